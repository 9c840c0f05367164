"""Reading checkpoints: every format and naming, and every way of being wrong."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.checkpoint import names
from dsv4_jax.checkpoint.errors import CheckpointError
from dsv4_jax.checkpoint.read import read
from dsv4_jax.config import Config
from tests.checkpoint_files import (
    BF16,
    CONFIG,
    E4M3,
    E8M0,
    EXPERT_FORMATS,
    MIXED,
    NUM_EXPERTS,
    PLAIN,
    assert_same_arrays,
    expected_params,
    packed,
    random_bytes,
    save,
)
from tests.checkpoints import random_config, random_tensors
from tests.conftest import GOLDEN


def load(directory, config=CONFIG, **options):
    return read(directory, Config.from_dict(config), **options)


def findings(tmp_path, tensors, config=CONFIG) -> tuple[str, ...]:
    """What reading reports; header problems must be found before anything is placed."""
    with pytest.raises(CheckpointError) as caught:
        load(save(tmp_path / "checkpoint", tensors), config)
    return caught.value.findings


def changed(**changes: np.ndarray) -> dict[str, np.ndarray]:
    return MIXED | changes


def test_mixed_formats_bit_exact(tmp_path):
    checkpoint = load(save(tmp_path / "one", MIXED))
    assert_same_arrays(checkpoint.params, expected_params(MIXED))
    assert checkpoint.has_mtp
    from_shards = load(save(tmp_path / "three", MIXED, num_files=3))
    assert_same_arrays(from_shards.params, expected_params(MIXED))


def test_weight_formats_per_matrix(tmp_path):
    directory = save(tmp_path / "checkpoint", MIXED)
    formats = load(directory).weight_formats
    for block, matrices in EXPERT_FORMATS.items():
        kind, index = block.split(".")
        for matrix, stored in matrices.items():
            expected = "float" if stored in ("F32", "BF16") else stored
            assert formats[kind, int(index), "ffn", "experts", matrix] == expected
    for path, weight_format in formats.items():
        if "experts" not in path:
            stored = MIXED[names.official_name((*path, "weight"))].dtype
            assert weight_format == ("fp8_block" if stored == E4M3 else "float")
    assert set(formats.values()) == {"float", "fp8_block", "mxfp4", "nvfp4"}


def test_golden_checkpoint_loads_completely():
    directory = GOLDEN
    checkpoint = read(directory, Config.from_json(directory))
    assert not checkpoint.has_mtp
    assert set(checkpoint.weight_formats.values()) == {"float"}
    assert checkpoint.params["layers", 6, "ffn", "experts", "w2", "weight"].shape == (12, 96, 48)
    assert checkpoint.params["layers", 0, "ffn", "gate", "tid2eid"].dtype == jnp.int32
    num_elements = sum(array.size for array in checkpoint.params.values())
    config = Config.from_json(directory)
    assert num_elements == sum(np.prod(spec.shape) for spec in names.tensors(config))


def test_stack_of_float32_and_bfloat16_experts_is_float32(tmp_path):
    name = "layers.0.ffn.experts.{}.w1.weight"
    tensors = changed(**{name.format(2): MIXED[name.format(2)].astype(BF16)})
    stack = load(save(tmp_path / "checkpoint", tensors)).params[
        "layers", 0, "ffn", "experts", "w1", "weight"
    ]
    expected = np.stack([tensors[name.format(e)].astype(np.float32) for e in range(NUM_EXPERTS)])
    assert stack.dtype == jnp.float32
    np.testing.assert_array_equal(stack, expected)


def test_expert_table_of_int32(tmp_path):
    name = "layers.0.ffn.gate.tid2eid"
    params = load(
        save(tmp_path / "checkpoint", changed(**{name: MIXED[name].astype(np.int32)}))
    ).params
    assert_same_arrays(params, expected_params(MIXED))


def test_scales_as_float32_powers_of_two(tmp_path):
    name = "mtp.0.ffn.experts.1.w2.scale"
    exponents = np.arange(MIXED[name].size).reshape(MIXED[name].shape) % 255
    tensors = changed(**{name: np.ldexp(1.0, exponents - 127).astype(np.float32)})
    scale = load(save(tmp_path / "checkpoint", tensors)).params[
        "mtp", 0, "ffn", "experts", "w2", "scale"
    ]
    assert exponents.min() == 0 and exponents.max() == 254
    np.testing.assert_array_equal(scale[1], exponents.astype(np.uint8))


# Hugging Face


def hugging_face(tensors) -> dict[str, np.ndarray]:
    """The official tensors in transformers' names, experts fused, without MTP blocks."""
    renamed = {
        names.to_huggingface(name): array
        for name, array in tensors.items()
        if not name.startswith("mtp.") and ".experts." not in name
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        experts = f"layers.{layer}.ffn.experts"
        for part, suffix in (("weight", ""), ("scale", "_scale_inv")):
            if f"{experts}.0.w1.{part}" in tensors:
                fused = f"model.layers.{layer}.mlp.experts.{{}}_proj{suffix}"
                w1, w2, w3 = (
                    np.stack([tensors[f"{experts}.{e}.{w}.{part}"] for e in range(NUM_EXPERTS)])
                    for w in ("w1", "w2", "w3")
                )
                renamed[fused.format("gate_up")] = np.concatenate([w1, w3], axis=1)
                renamed[fused.format("down")] = w2
    return renamed


def hugging_face_case(expert_format: str) -> tuple[dict, dict]:
    """(official tensors, config) with experts that Hugging Face's names can hold."""
    config = CONFIG | {"moe_intermediate_size": 128}
    rng = np.random.default_rng(2)
    tensors = {}
    for name, array in random_tensors(config, seed=3).items():
        if ".experts." in name:
            tensors |= packed(name, array.shape, expert_format, rng)
        elif name.endswith("wq_b.weight"):
            tensors |= packed(name, array.shape, "fp8_block", rng)
        else:
            tensors[name] = array
    return tensors, config


@pytest.mark.parametrize("expert_format", ["BF16", "fp8_block", "mxfp4"])
def test_hugging_face_names(tmp_path, expert_format):
    tensors, config = hugging_face_case(expert_format)
    renamed = hugging_face(tensors)
    assert {
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_b_proj.weight_scale_inv",
        "model.layers.2.self_attn.compressor.indexer.kv_norm.weight",
        "model.layers.3.mlp.experts.gate_up_proj",
    } <= renamed.keys()
    checkpoint = load(save(tmp_path / "checkpoint", renamed), config)
    backbone = {name: array for name, array in tensors.items() if not name.startswith("mtp.")}
    assert_same_arrays(checkpoint.params, expected_params(backbone))
    assert not checkpoint.has_mtp


def test_hugging_face_fused_shape(tmp_path):
    tensors, config = hugging_face_case("mxfp4")
    renamed = hugging_face(tensors)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    for shape in ((NUM_EXPERTS + 1, 256, 80), (NUM_EXPERTS, 255, 80), (2**20, 256, 0), (256, 80)):
        renamed[name] = np.zeros(shape, np.int8)
        expected = f"{name}: shape {list(shape)}, expected [3, 2 x rows, columns]"
        assert expected in findings(tmp_path, renamed, config)


def test_hugging_face_fp8_blocks_across_fused_matrices(tmp_path):
    config = CONFIG | {"moe_intermediate_size": 224}
    rng = np.random.default_rng(4)
    renamed = hugging_face(random_tensors(config, seed=5))
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    renamed[fused] = random_bytes(rng, E4M3, NUM_EXPERTS, 448, 160)
    renamed[f"{fused}_scale_inv"] = random_bytes(rng, E8M0, NUM_EXPERTS, 4, 2)
    found = findings(tmp_path, renamed, config)
    assert set(found) == {f"{fused}: FP8 blocks reach across the matrices fused in it"}


def test_one_tensor_under_two_names(tmp_path):
    twice = changed(**{"lm_head.weight": MIXED["head.weight"]})
    assert findings(tmp_path, twice) == (
        "head.weight: stored as both head.weight and lm_head.weight",
    )


# MTP blocks


def test_mtp_tensors_without_mtp_block_are_ignored(tmp_path):
    checkpoint = load(
        save(tmp_path / "checkpoint", MIXED), CONFIG | {"num_nextn_predict_layers": 0}
    )
    backbone = {name: array for name, array in MIXED.items() if not name.startswith("mtp.")}
    assert not checkpoint.has_mtp
    assert_same_arrays(checkpoint.params, expected_params(backbone))


def test_draft_stages_of_dspark_builds_are_ignored(tmp_path):
    stages = {
        "mtp.0.main_proj.weight": np.zeros((3, 5), np.float16),
        "mtp.2.markov_head.w1.weight": np.zeros(2, BF16),
        "mtp.2.confidence_head.proj.weight": np.zeros(2, BF16),
    }
    tensors = {n: a for n, a in MIXED.items() if not n.startswith("mtp.0.e_proj")} | stages
    assert not load(save(tmp_path / "checkpoint", tensors)).has_mtp


def test_further_mtp_blocks_are_ignored(tmp_path):
    tensors = changed(**{"mtp.1.norm.weight": np.zeros(3, BF16)})
    checkpoint = load(save(tmp_path / "checkpoint", tensors))
    assert checkpoint.has_mtp
    assert_same_arrays(checkpoint.params, expected_params(MIXED))


def test_official_checkpoint_without_its_mtp_block(tmp_path):
    backbone = {name: array for name, array in MIXED.items() if not name.startswith("mtp.")}
    found = findings(tmp_path, backbone)
    assert "mtp.0.e_proj.weight: missing" in found
    assert all(finding.startswith("mtp.0.") for finding in found)


# Wrong headers

FP8 = "layers.0.attn.wq_a"
MXFP4, NVFP4 = "layers.3.ffn.experts.2.w1", "layers.4.ffn.experts.1.w3"
assert f"{FP8}.scale" in MIXED


@pytest.mark.parametrize(
    ("name", "reported"),
    [
        ("norm.weight", ["norm.weight"]),
        ("layers.4.ffn.gate.bias", ["layers.4.ffn.gate.bias"]),
        ("layers.1.ffn.gate.tid2eid", ["layers.1.ffn.gate.tid2eid"]),
        (f"{FP8}.weight", [f"{FP8}.weight"]),
        (f"{FP8}.scale", [f"{FP8}.scale"]),
        (f"{MXFP4}.weight", [f"{MXFP4}.weight"]),
        (f"{NVFP4}.weight_scale", [f"{NVFP4}.weight_scale"]),
        (f"{NVFP4}.weight_scale_2", [f"{NVFP4}.weight_scale_2"]),
        (f"{NVFP4}.input_scale", [f"{NVFP4}.input_scale"]),
    ],
)
def test_missing_tensor(tmp_path, name, reported):
    tensors = {n: array for n, array in MIXED.items() if n != name}
    assert findings(tmp_path, tensors) == tuple(f"{name}: missing" for name in reported)


@pytest.mark.parametrize(
    "name",
    [
        "surprise",
        "layers.5.norm.weight",
        "layers.0.attn.wq_a.bias",
        "layers.0.ffn.experts.3.w1.weight",
        "layers.0.ffn.experts.0.w1.scale",
        "mtp.0.surprise",
        "mtp",
        "mtp.x.norm",
        f"{MXFP4}.weight_scale_2",
    ],
)
def test_surplus_tensor(tmp_path, name):
    assert findings(tmp_path, changed(**{name: np.zeros(1, np.float32)})) == (
        f"{name}: not a tensor of this model",
    )


@pytest.mark.parametrize(
    "name",
    [
        "norm.weight",
        "layers.0.ffn.gate.tid2eid",
        f"{FP8}.weight",
        f"{FP8}.scale",
        f"{MXFP4}.weight",
        f"{MXFP4}.scale",
        f"{NVFP4}.weight_scale",
        f"{NVFP4}.input_scale",
    ],
)
def test_misshapen_tensor(tmp_path, name):
    right = MIXED[name]
    wrong = np.concatenate([right, right]) if right.ndim else right.reshape(1)
    assert findings(tmp_path, changed(**{name: wrong})) == (
        f"{name}: shape {list(wrong.shape)}, expected {list(right.shape)}",
    )


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("norm.weight", np.float16, "stored as F16, expected F32 or BF16"),
        ("hc_head_fn", E4M3, "stored as F8_E4M3, expected F32 or BF16"),
        ("head.weight", np.int8, "stored as I8, expected F32 or BF16"),
        ("layers.0.ffn.gate.tid2eid", np.float32, "stored as F32, expected I64 or I32"),
        (f"{FP8}.weight", np.int8, "stored as I8, expected F8_E4M3 or F32 or BF16"),
        (f"{FP8}.scale", BF16, "stored as BF16, expected F8_E8M0 or F32"),
        (f"{MXFP4}.weight", np.int32, "stored as I32, expected F8_E4M3 or I8 or U8 or F32 or BF16"),
        (f"{MXFP4}.scale", E4M3, "stored as F8_E4M3, expected F8_E8M0 or F32"),
        (f"{NVFP4}.weight_scale", E8M0, "stored as F8_E8M0, expected F8_E4M3"),
        (f"{NVFP4}.weight_scale_2", BF16, "stored as BF16, expected F32"),
    ],
)
def test_mistyped_tensor(tmp_path, name, dtype, expected):
    mistyped = np.ones(MIXED[name].shape, dtype)
    assert findings(tmp_path, changed(**{name: mistyped})) == (f"{name}: {expected}",)


def test_experts_of_different_formats(tmp_path):
    rng = np.random.default_rng(6)
    tensors = dict(MIXED)
    for expert, weight_format in ((1, "mxfp4"), (2, "fp8_block")):
        name = f"layers.0.ffn.experts.{expert}.w2.weight"
        tensors |= packed(name, PLAIN[name].shape, weight_format, rng)
    assert findings(tmp_path, tensors) == (
        "layers.0.ffn.experts.w2: experts in float, but some in mxfp4 (1), fp8_block (2)",
    )


def test_one_error_lists_everything_and_nothing_is_placed(tmp_path):
    tensors = changed(surprise=np.zeros(1, np.float32))
    del tensors["norm.weight"]
    tensors["head.weight"] = tensors["head.weight"][:-1]
    tensors["hc_head_scale"] = np.zeros(1, np.float16)
    directory = save(tmp_path / "checkpoint", tensors)
    placed = []
    with pytest.raises(CheckpointError) as caught:
        load(directory, place=lambda path, array: placed.append(path))
    assert placed == []
    assert sorted(caught.value.findings) == [
        "hc_head_scale: stored as F16, expected F32 or BF16",
        "head.weight: shape [47, 160], expected [48, 160]",
        "norm.weight: missing",
        "surprise: not a tensor of this model",
    ]
    message = str(caught.value)
    assert message.startswith(f"{directory}: 4 problems")
    assert all(finding in message for finding in caught.value.findings)


def test_long_lists_are_cut(tmp_path):
    tensors = {name: array for name, array in MIXED.items() if not name.startswith("layers.3.")}
    directory = save(tmp_path / "checkpoint", tensors)
    with pytest.raises(CheckpointError, match=r"and \d+ more$") as caught:
        load(directory)
    assert len(str(caught.value).splitlines()) == 22
    assert len(caught.value.findings) > 20


# Wrong values


def poisoned(name: str, value, index=-1) -> dict[str, np.ndarray]:
    array = MIXED[name].copy()
    array.reshape(-1)[index] = value
    return changed(**{name: array})


NAN_SCALES = [
    (f"{FP8}.scale", np.nan),
    (f"{MXFP4}.scale", np.nan),
    (f"{NVFP4}.weight_scale", np.nan),
    (f"{NVFP4}.weight_scale_2", np.nan),
    (f"{NVFP4}.weight_scale_2", np.inf),
    (f"{NVFP4}.input_scale", np.nan),
]


@pytest.mark.parametrize(("name", "value"), NAN_SCALES)
def test_scale_that_is_nan(tmp_path, name, value):
    count = f"1 of {MIXED[name].size} scales are NaN or infinite"
    assert findings(tmp_path, poisoned(name, value)) == (f"{name}: {count}",)


@pytest.mark.parametrize("value", [3.0, 0.0, -1.0, 2.0**-128])
def test_float32_scale_that_is_no_power_of_two(tmp_path, value):
    name = f"{FP8}.scale"
    tensors = changed(**{name: np.full(MIXED[name].shape, value, np.float32)})
    assert findings(tmp_path, tensors) == (f"{name}: scale {value}, expected powers of two",)


def test_float32_scale_that_is_nan(tmp_path):
    name = f"{FP8}.scale"
    tensors = changed(**{name: np.full(MIXED[name].shape, np.nan, np.float32)})
    (found,) = findings(tmp_path, tensors)
    assert found.endswith("scales are NaN or infinite")


@pytest.mark.parametrize("expert", [-1, NUM_EXPERTS, 2**32])
def test_expert_id_out_of_range(tmp_path, expert):
    name = "layers.1.ffn.gate.tid2eid"
    assert findings(tmp_path, poisoned(name, expert)) == (
        f"{name}: expert id {expert}, expected ids in [0, {NUM_EXPERTS})",
    )


def test_all_wrong_values_are_listed(tmp_path):
    tensors = dict(MIXED)
    for name, value in NAN_SCALES[1:5]:
        tensors[name] = poisoned(name, value)[name]
    assert len(findings(tmp_path, tensors)) == 3


def test_nan_weights_are_no_error(tmp_path):
    tensors = poisoned("norm.weight", np.nan)
    checkpoint = load(save(tmp_path / "checkpoint", tensors))
    assert np.isnan(checkpoint.params["norm", "weight"][-1])


# Memory and placement


def test_place_puts_every_parameter(tmp_path):
    device = jax.devices()[0]
    shapes = {}

    def place(path, array):
        assert isinstance(array, np.ndarray)
        shapes[path] = array.shape
        return jax.device_put(array, device)

    checkpoint = load(save(tmp_path / "checkpoint", MIXED), place=place)
    assert shapes == {path: array.shape for path, array in checkpoint.params.items()}


def test_no_copy_on_cpu(tmp_path):
    addresses = {}

    def place(path, array):
        addresses[path] = array.ctypes.data
        return jax.device_put(array, jax.devices("cpu")[0])

    checkpoint = load(save(tmp_path / "checkpoint", MIXED), place=place)
    for path, array in checkpoint.params.items():
        assert array.unsafe_buffer_pointer() == addresses[path], path


def test_host_memory_is_one_parameter(tmp_path):
    config = random_config(hidden_size=512, moe_intermediate_size=128)
    directory = save(tmp_path / "checkpoint", random_tensors(config, seed=7))
    load(directory, config, place=lambda path, array: jnp.zeros(()))
    largest_bytes, total_bytes = 0, 0

    def place(path, array):
        nonlocal largest_bytes, total_bytes
        largest_bytes, total_bytes = max(largest_bytes, array.nbytes), total_bytes + array.nbytes
        return jnp.zeros(())

    tracemalloc.start()
    try:
        load(directory, config, place=place)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    headers_bytes = 2 * 2**20
    assert total_bytes > 5 * (largest_bytes + headers_bytes)
    assert peak_bytes < largest_bytes + headers_bytes


def test_progress_bar(tmp_path, capsys):
    directory = save(tmp_path / "checkpoint", MIXED)
    load(directory)
    assert capsys.readouterr() == ("", "")
    load(directory, progress=True)
    assert capsys.readouterr() == ("", "Loading\n")
