"""Whole checkpoints in other formats, on disk and in memory."""

import json

import numpy as np
import pytest
from flax import nnx

import dsv4_jax
from dsv4_jax.checkpoint.convert import converted
from dsv4_jax.checkpoint.convert_files import convert
from dsv4_jax.checkpoint.manifest import write_configs
from dsv4_jax.checkpoint.read import read
from dsv4_jax.config import Config
from dsv4_jax.variants import rebuilt
from tests.checkpoint_files import CONFIG as MIXED_CONFIG
from tests.checkpoint_files import DTYPE_NAMES, MIXED, save
from tests.test_checkpoint_read import hugging_face, hugging_face_case
from tests.weight_formats import (
    EXPERTS,
    FORMATS,
    checkpoint,
    contents,
    error,
    is_linear,
    modules,
    stored,
    stored_matrix,
    values,
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sources")
    return {name: checkpoint(directory / name, FORMATS[name]) for name in FORMATS}


def assert_reported(source, target, report, wanted):
    """Exactness and errors as NumPy finds them; what was not to be converted is the same."""
    old, new = stored(source), stored(target)
    num_exact = 0
    for module in modules(old):
        old_format, old_arrays = stored_matrix(old, module)
        new_format, new_arrays = stored_matrix(new, module)
        kind = "experts" if ".experts." in module else "linears"
        is_matrix = kind == "experts" or is_linear(f"{module}.weight")
        target_format = wanted.get(kind) if is_matrix else None
        assert new_format == (target_format or old_format), module
        if new_format == old_format:
            for leaf, array in old_arrays.items():
                assert array.tobytes() == new_arrays[leaf].tobytes(), module
            continue
        expected, got = values(old_arrays, old_format), values(new_arrays, new_format)
        reported = report.relative_errors.get(f"{module}.weight", 0)
        assert reported == pytest.approx(error(got, expected), rel=1e-3, abs=0), module
        num_exact += f"{module}.weight" not in report.relative_errors
        if new_format == "nvfp4":
            assert new_arrays["input_scale"] == 1
            if module.endswith("w1"):
                w3 = f"{module.removesuffix('w1')}w3.weight_scale_2"
                assert new_arrays["scale_2"] == new[w3][1]
    assert report.num_exact == num_exact
    plain = {n for n in old if not n.endswith(("scale", "scale_2", "weight"))}
    for name in plain:
        assert (old[name][0], old[name][1].tobytes()) == (new[name][0], new[name][1].tobytes())


@pytest.mark.parametrize("experts", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_experts_in_every_pair_of_formats(tmp_path, sources, source, experts):
    report = convert(sources[source], tmp_path / "out", experts=experts)
    assert_reported(sources[source], tmp_path / "out", report, {"experts": FORMATS[experts]})
    num_matrices = 3 * EXPERTS * 3 if source != experts else 0
    assert report.num_exact + len(report.relative_errors) == num_matrices
    if source in ("mxfp4", experts):
        assert not report.relative_errors
    config = Config.from_json(tmp_path / "out")
    assert config.expert_dtype == {"mxfp4": "fp4"}.get(experts, experts)
    algorithm = "NVFP4" if experts == "nvfp4" else None
    assert config.quantization_config.moe_quant_algo == algorithm
    assert config.num_nextn_predict_layers == 1
    checkpoint = read(tmp_path / "out", config)
    found = {f for path, f in checkpoint.weight_formats.items() if "experts" in path}
    assert found == {FORMATS[experts]} and checkpoint.has_mtp


@pytest.mark.parametrize("linears", ["fp8", "bf16"])
@pytest.mark.parametrize("source", ["fp8_block", "float"])
def test_linears(tmp_path, source, linears):
    directory = checkpoint(tmp_path / "in", "float", source)
    report = convert(directory, tmp_path / "out", linears=linears)
    assert_reported(directory, tmp_path / "out", report, {"linears": FORMATS[linears]})
    quantization = Config.from_json(tmp_path / "out").quantization_config
    assert (quantization is None) == (linears == "bf16")


def test_report_and_files(tmp_path, sources):
    (tmp_path / "in" / "encoding").mkdir(parents=True)
    for path in sources["bf16"].iterdir():
        (tmp_path / "in" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "in" / "tokenizer.json").write_text("tokens")
    (tmp_path / "in" / "encoding" / "encoding_dsv4.py").write_text("texts")
    report = convert(tmp_path / "in", tmp_path / "new" / "out", experts="nvfp4", linears="bf16")
    written = contents(tmp_path / "new" / "out")
    assert sorted(written) == [
        "config.json",
        "conversion.json",
        "encoding/encoding_dsv4.py",
        "hf_quant_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert written["tokenizer.json"] == b"tokens"
    assert written["encoding/encoding_dsv4.py"] == b"texts"
    assert json.loads(written["conversion.json"]) == {
        "experts": "nvfp4",
        "linears": "bf16",
        "num_exact": report.num_exact,
        "num_requantized": len(report.relative_errors),
        "relative_errors": report.relative_errors,
    }
    assert len(report.relative_errors) == 3 * EXPERTS * 3 and report.num_exact > 20


def test_manifest_of_nvfp4_checkpoints(tmp_path, sources):
    """Both files say which modules are NVFP4; away from NVFP4 and back the files are the same."""
    convert(sources["mxfp4"], tmp_path / "nvfp4", experts="nvfp4")
    written = json.loads((tmp_path / "nvfp4" / "hf_quant_config.json").read_text())
    scheme = {"quant_algo": "NVFP4", "group_size": 16}
    experts = ("layers.0.ffn.experts", "layers.1.ffn.experts", "mtp.0.ffn.experts")
    exclude = ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*.e_proj", "mtp.*.h_proj"]
    assert written["quantization"] == {
        "quant_algo": "MIXED_PRECISION",
        "moe_quant_algo": "NVFP4",
        "group_size": 16,
        "kv_cache_quant_algo": None,
        "quantized_layers": dict.fromkeys(experts, scheme),
        "exclude_modules": exclude,
    }
    quantization = json.loads((tmp_path / "nvfp4" / "config.json").read_text())[
        "quantization_config"
    ]
    assert quantization["quant_method"] == "fp8"
    assert quantization["weight_block_size"] == [128, 128]
    assert quantization["quantized_layers"] == written["quantization"]["quantized_layers"]
    assert quantization["ignore"] == exclude

    dsv4_jax.load(tmp_path / "nvfp4").save(tmp_path / "saved")
    convert(tmp_path / "nvfp4", tmp_path / "mxfp4", experts="mxfp4")
    assert not (tmp_path / "mxfp4" / "hf_quant_config.json").exists()
    assert "ignore" not in (tmp_path / "mxfp4" / "config.json").read_text()
    convert(tmp_path / "mxfp4", tmp_path / "again", experts="nvfp4")
    for name in ("config.json", "hf_quant_config.json"):
        first = (tmp_path / "nvfp4" / name).read_bytes()
        assert (tmp_path / "saved" / name).read_bytes() == first
        assert (tmp_path / "again" / name).read_bytes() == first


def test_mtp_blocks_that_stay_are_excluded(tmp_path):
    tensors = checkpoint(tmp_path / "in", "nvfp4")
    config = Config.from_json(tensors)
    formats = dict(read(tensors, config).weight_formats)
    formats |= {path: "mxfp4" for path in formats if path[0] == "mtp" and "experts" in path}
    write_configs(tmp_path, config, formats)
    written = json.loads((tmp_path / "hf_quant_config.json").read_text())["quantization"]
    assert written["exclude_modules"] == ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"]
    assert list(written["quantized_layers"]) == ["layers.0.ffn.experts", "layers.1.ffn.experts"]


def test_wide_scales_and_mixed_formats(tmp_path):
    directory = save(tmp_path / "in", MIXED)
    (directory / "config.json").write_text(json.dumps(MIXED_CONFIG))
    report = convert(directory, tmp_path / "out", experts="nvfp4")
    assert_reported(directory, tmp_path / "out", report, {"experts": "nvfp4"})
    assert {name.split(".")[0] for name in report.relative_errors} == {"layers", "mtp"}


def test_values_of_mxfp4_in_bfloat16_are_kept(tmp_path, sources):
    convert(sources["mxfp4"], tmp_path / "bf16", experts="bf16")
    report = convert(tmp_path / "bf16", tmp_path / "nvfp4", experts="nvfp4")
    assert not report.relative_errors
    convert(sources["mxfp4"], tmp_path / "direct", experts="nvfp4")
    old, new = stored(tmp_path / "direct"), stored(tmp_path / "nvfp4")
    for module in modules(old):
        one, other = (values(*stored_matrix(t, module)[::-1]) for t in (old, new))
        np.testing.assert_array_equal(one, other)


def test_hugging_face_names_become_official(tmp_path):
    tensors, config = hugging_face_case("mxfp4")
    directory = save(tmp_path / "in", hugging_face(tensors))
    (directory / "config.json").write_text(json.dumps(config))
    report = convert(directory, tmp_path / "out", experts="mxfp4")
    assert (report.num_exact, report.relative_errors) == (0, {})
    backbone = {name: array for name, array in tensors.items() if not name.startswith("mtp.")}
    new = stored(tmp_path / "out")
    assert new.keys() == backbone.keys()
    for name, array in backbone.items():
        assert (new[name][0], new[name][1].shape) == (DTYPE_NAMES[array.dtype], array.shape)
        assert new[name][1].tobytes() == array.tobytes(), name
    assert Config.from_json(tmp_path / "out").num_nextn_predict_layers == 0


def test_in_memory_as_on_disk(tmp_path, sources):
    convert(sources["bf16"], tmp_path / "out", experts="nvfp4", linears="bf16")
    config = Config.from_json(sources["bf16"])
    old, new = (read(directory, config) for directory in (sources["bf16"], tmp_path / "out"))
    params, weight_formats = converted(old.params, old.weight_formats, "nvfp4", "bf16")
    assert weight_formats == new.weight_formats
    assert params.keys() == new.params.keys()
    for path, array in params.items():
        assert (array.dtype, array.shape) == (new.params[path].dtype, new.params[path].shape)
        assert np.asarray(array).tobytes() == np.asarray(new.params[path]).tobytes(), path


@pytest.mark.parametrize("experts", FORMATS)
def test_a_loaded_model(tmp_path, sources, experts):
    model = dsv4_jax.load(sources["mxfp4"], dtype="float32", numerics=dsv4_jax.Numerics.EXACT)
    convert(sources["mxfp4"], tmp_path / "out", experts=experts)
    from_disk = dsv4_jax.load(tmp_path / "out", dtype="float32", numerics=dsv4_jax.Numerics.EXACT)
    model_in_memory = rebuilt(model, experts=experts)
    assert model_in_memory.graph == from_disk.graph
    params = dict(nnx.to_flat_state(from_disk.params))
    in_memory = dict(nnx.to_flat_state(model_in_memory.params))
    assert params.keys() == in_memory.keys()
    for path, variable in params.items():
        np.testing.assert_array_equal(variable[...], in_memory[path][...])
