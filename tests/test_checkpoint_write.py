"""Writing checkpoints: bit-exact round trips, and nothing half-written."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from dsv4_jax.checkpoint import files, names
from dsv4_jax.checkpoint.errors import CheckpointError
from dsv4_jax.checkpoint.read import read
from dsv4_jax.checkpoint.write import write
from dsv4_jax.config import Config
from tests.checkpoint_files import (
    CONFIG,
    DTYPE_NAMES,
    MIXED,
    assert_same_arrays,
    expected_params,
    save,
)
from tests.conftest import GOLDEN

MODEL = Config.from_dict(CONFIG)
PARAMS = expected_params(MIXED)


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return read(save(tmp_path_factory.mktemp("source") / "checkpoint", MIXED), MODEL)


@pytest.fixture(scope="module")
def written(tmp_path_factory, loaded):
    directory = tmp_path_factory.mktemp("target") / "new" / "checkpoint"
    write(directory, MODEL, loaded.params)
    return directory


def test_reloads_bit_exactly(written, loaded):
    assert sorted(contents(written)) == ["config.json", "model.safetensors"]
    assert Config.from_json(written) == MODEL
    checkpoint = read(written, Config.from_json(written))
    assert_same_arrays(checkpoint.params, PARAMS)
    assert checkpoint.weight_formats == loaded.weight_formats
    assert checkpoint.has_mtp


def test_file_holds_the_tensors_it_came_from(written):
    with safe_open(written / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert stored.keys() == MIXED.keys()
        for name, entry in stored.items():
            assert entry.get_dtype() == DTYPE_NAMES[MIXED[name].dtype], name
            assert tuple(entry.get_shape()) == MIXED[name].shape, name
    raw = (written / "model.safetensors").read_bytes()
    header_bytes = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + header_bytes])
    assert header_bytes % 8 == 0
    for name, array in MIXED.items():
        begin, end = (8 + header_bytes + offset for offset in header[name]["data_offsets"])
        assert begin % array.itemsize == 0, name
        assert raw[begin:end] == array.tobytes(), name


def test_numpy_params(tmp_path, written):
    write(tmp_path / "checkpoint", MODEL, PARAMS)
    assert contents(tmp_path / "checkpoint") == contents(written)


def test_shards_and_index(tmp_path, loaded):
    limit = 35_000
    write(tmp_path / "checkpoint", MODEL, loaded.params, max_shard_bytes=limit)
    files = contents(tmp_path / "checkpoint")
    index = json.loads(files.pop("model.safetensors.index.json"))
    del files["config.json"]
    assert sorted(files) == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in MIXED.values())
    assert index["weight_map"].keys() == MIXED.keys()
    held = {
        file: [MIXED[name].nbytes for name, f in index["weight_map"].items() if f == file]
        for file in files
    }
    assert all(sum(sizes) <= limit or len(sizes) == 1 for sizes in held.values())
    assert max(map(sum, held.values())) > limit > min(map(sum, held.values()))
    assert_same_arrays(read(tmp_path / "checkpoint", MODEL).params, PARAMS)


def test_golden_round_trip(tmp_path):
    source = GOLDEN
    params = read(source, Config.from_json(source)).params
    write(tmp_path / "checkpoint", Config.from_json(source), params)
    assert Config.from_json(tmp_path / "checkpoint") == Config.from_json(source)
    again = read(tmp_path / "checkpoint", Config.from_json(source)).params
    assert_same_arrays(again, {path: np.asarray(array) for path, array in params.items()})


def test_without_mtp_params_the_config_counts_no_mtp_block(tmp_path):
    backbone = {path: array for path, array in PARAMS.items() if path[0] != "mtp"}
    write(tmp_path / "checkpoint", MODEL, backbone)
    config = Config.from_json(tmp_path / "checkpoint")
    assert (MODEL.num_nextn_predict_layers, config.num_nextn_predict_layers) == (1, 0)
    assert_same_arrays(read(tmp_path / "checkpoint", config).params, backbone)


def test_tokenizer_is_copied(tmp_path):
    (tmp_path / "vocabulary").write_bytes(b'{"model": 1}')
    write(tmp_path / "checkpoint", MODEL, PARAMS, tokenizer_file=tmp_path / "vocabulary")
    assert contents(tmp_path / "checkpoint")["tokenizer.json"] == b'{"model": 1}'


# Refusals: nothing is written


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "mine").write_text("mine")
    for directory in (tmp_path, tmp_path / "mine"):
        with pytest.raises(ValueError, match=f"directory: got {directory}, expected an absent or"):
            write(directory, MODEL, PARAMS)
    assert contents(tmp_path) == {"mine": b"mine"}


def test_empty_directory_is_filled(tmp_path):
    write(tmp_path, MODEL, PARAMS)
    assert_same_arrays(read(tmp_path, MODEL).params, PARAMS)


@pytest.mark.parametrize(
    ("option", "value"), [("tokenizer_file", "/nonexistent/file"), ("max_shard_bytes", 0)]
)
def test_bad_option(tmp_path, option, value):
    with pytest.raises(ValueError, match=f"{option}: got {value}, expected"):
        write(tmp_path / "checkpoint", MODEL, PARAMS, **{option: value})
    assert not (tmp_path / "checkpoint").exists()


def test_params_that_do_not_fit_are_listed(tmp_path):
    params = dict(PARAMS)
    del params["norm", "weight"]
    params["head", "weight"] = params["head", "weight"][:-1]
    params["hc_head", "scale"] = np.zeros(1, np.float16)
    params["surprise",] = np.zeros(1, np.float32)
    stack = "layers", 0, "ffn", "experts", "w1", "weight"
    params[stack] = params[stack][:-1]
    with pytest.raises(CheckpointError) as caught:
        write(tmp_path / "checkpoint", MODEL, params)
    found = caught.value.findings
    assert {
        f"{stack}: shape [2, 64, 160], expected [3, ...]",
        "norm.weight: missing",
        "head.weight: shape [47, 160], expected [48, 160]",
        "hc_head_scale: stored as float16, expected F32 or BF16",
        "surprise: not a tensor of this model",
    } <= set(found)
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("layers", 3, "ffn", "experts", "w1", "scale"), 255),
        (("layers", 4, "ffn", "experts", "w1", "scale_2"), np.nan),
        (("layers", 1, "ffn", "gate", "tid2eid"), -1),
    ],
)
def test_values_that_read_would_refuse(tmp_path, path, value):
    array = PARAMS[path].copy()
    array.reshape(-1)[-1] = value
    with pytest.raises(CheckpointError, match=r"scales are NaN|expert id -1"):
        write(tmp_path / "checkpoint", MODEL, PARAMS | {path: array}, max_shard_bytes=100_000)
    assert contents(tmp_path / "checkpoint") == {}


def test_failure_leaves_no_file(tmp_path, monkeypatch):
    seen = []

    def full_disk(descriptor):
        seen.append(contents(tmp_path).keys())
        if len(seen) == 6:
            raise OSError("no space left")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write(tmp_path, MODEL, PARAMS, max_shard_bytes=300_000)
    assert [name.endswith(".tmp") for name in seen[0]] == [True]
    assert len(seen[-1]) == 3
    assert contents(tmp_path) == {}


def test_config_comes_last(tmp_path, monkeypatch):
    order = []

    def note(descriptor):
        order.append({name.removesuffix(".tmp") for name in contents(tmp_path)})

    monkeypatch.setattr(files.os, "fsync", note)
    write(tmp_path, MODEL, PARAMS, max_shard_bytes=300_000)
    first = next(i for i, files in enumerate(order) if "config.json" in files)
    assert order[first] == set(contents(tmp_path))
    assert not any(name.endswith(".tmp") for name in contents(tmp_path))


def test_a_plain_tensor_of_another_float_dtype(tmp_path):
    path = next(path for path, array in PARAMS.items() if array.dtype == jnp.bfloat16)
    params = PARAMS | {path: PARAMS[path].astype(np.float32)}
    write(tmp_path, MODEL, params)
    assert_same_arrays(read(tmp_path, MODEL).params, params)


def test_every_parameter_has_one_name():
    assert len({names.param_path(name) for name in MIXED}) == len(MIXED)
