"""Checkpoints written byte by byte: valid ones in all formats, and broken files."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from dsv4_jax.checkpoint import names
from tests.checkpoints import random_config, random_tensors

DTYPE_NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0",
    np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8",
    np.dtype(np.int32): "I32",
    np.dtype(np.int64): "I64",
}


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_raw(path: Path, header: dict | bytes, data: bytes, header_size: int | None = None):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(encoded) if header_size is None else header_size
    path.write_bytes(size.to_bytes(8, "little") + encoded + data)


def write_tensors(path: Path, tensors: dict[str, np.ndarray]):
    """One valid file; the dtype of each array says what is stored."""
    header, end = {}, 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        header[name] = entry(DTYPE_NAMES[array.dtype], list(array.shape), begin, end)
    write_raw(path, header, b"".join(array.tobytes() for array in tensors.values()))


def write_index(directory: Path, weight_map: dict[str, str]):
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


BF16, E4M3, E8M0 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
NUM_EXPERTS = 3
CONFIG = random_config(
    mtp=True, hidden_size=160, moe_intermediate_size=64, n_routed_experts=NUM_EXPERTS, vocab_size=48
)
PLAIN = random_tensors(CONFIG, seed=0)
# By layer and matrix; the MTP block's experts are MXFP4 whatever the backbone's are.
EXPERT_FORMATS = {
    "layers.0": dict.fromkeys(("w1", "w2", "w3"), "F32"),
    "layers.1": {"w1": "BF16", "w2": "F32", "w3": "BF16"},
    "layers.2": dict.fromkeys(("w1", "w2", "w3"), "fp8_block"),
    "layers.3": {"w1": "mxfp4", "w2": "fp8_block", "w3": "mxfp4"},
    "layers.4": dict.fromkeys(("w1", "w2", "w3"), "nvfp4"),
    "mtp.0": dict.fromkeys(("w1", "w2", "w3"), "mxfp4"),
}
LINEARS = ("wq_a", "wq_b", "wo_a", "wo_b", "attn.wkv", "e_proj", "h_proj")


def random_bytes(rng, dtype, *shape) -> np.ndarray:
    """Any bit pattern that is no NaN in a scale."""
    return rng.integers(0, 127, shape, np.uint8).view(dtype)


def packed(name: str, shape: tuple[int, int], weight_format: str, rng) -> dict[str, np.ndarray]:
    rows, columns = shape
    module = name.removesuffix(".weight")
    match weight_format:
        case "fp8_block":
            blocks = -(-rows // 128), -(-columns // 128)
            return {
                name: random_bytes(rng, E4M3, rows, columns),
                f"{module}.scale": random_bytes(rng, E8M0, *blocks),
            }
        case "mxfp4":
            return {
                name: rng.integers(-128, 128, (rows, columns // 2), np.int8),
                f"{module}.scale": random_bytes(rng, E8M0, rows, columns // 32),
            }
        case "nvfp4":
            return {
                name: rng.integers(0, 256, (rows, columns // 2), np.uint8),
                f"{module}.weight_scale": random_bytes(rng, E4M3, rows, columns // 16),
                f"{module}.weight_scale_2": np.array(rng.random(), np.float32),
                f"{module}.input_scale": np.array(rng.random(), np.float32),
            }
    dtype = {"F32": np.float32, "BF16": BF16}[weight_format]
    return {name: rng.standard_normal(shape).astype(dtype)}


def mixed_tensors() -> dict[str, np.ndarray]:
    """All formats in one checkpoint, the plain tensors alternately float32 and bfloat16."""
    rng = np.random.default_rng(1)
    tensors = {}
    for i, (name, array) in enumerate(PLAIN.items()):
        block = ".".join(name.split(".")[:2])
        if ".experts." in name:
            matrix = name.split(".")[-2]
            tensors |= packed(name, array.shape, EXPERT_FORMATS[block][matrix], rng)
        elif any(part in name for part in (*LINEARS, "shared_experts")) and i % 4:
            if ".compressor." not in name:
                tensors |= packed(name, array.shape, "fp8_block", rng)
                continue
            tensors[name] = array
        elif array.dtype == np.int64:
            tensors[name] = array
        else:
            tensors[name] = array.astype((np.float32, BF16)[i % 2])
    return tensors


MIXED = mixed_tensors()


def save(directory: Path, tensors: dict[str, np.ndarray], num_files: int = 1) -> Path:
    """The tensors dealt out to files, with an index when there are several."""
    directory.mkdir(exist_ok=True)
    weight_map = {name: f"part{i % num_files}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        part = {name: array for name, array in tensors.items() if weight_map[name] == file}
        write_tensors(directory / file, part)
    if num_files > 1:
        write_index(directory, weight_map)
    return directory


def expected_params(tensors: dict[str, np.ndarray]) -> dict[tuple, np.ndarray]:
    """The parameters that official tensors hold."""
    params: dict[tuple, np.ndarray] = {}
    rows: dict[tuple, dict[int, np.ndarray]] = {}
    for name, array in tensors.items():
        path, expert = names.param_path(name)
        if array.dtype in (E8M0, np.int8):
            array = array.view(np.uint8)
        if array.dtype == np.int64:
            array = array.astype(np.int32)
        if expert is None:
            params[path] = array
        else:
            rows.setdefault(path, {})[expert] = array
    stacks = {p: np.stack([found[e] for e in sorted(found)]) for p, found in rows.items()}
    return params | stacks


def assert_same_arrays(params, expected):
    assert params.keys() == expected.keys()
    for path, array in params.items():
        host = np.asarray(array)
        assert (host.dtype, host.shape) == (expected[path].dtype, expected[path].shape), path
        assert host.tobytes() == expected[path].tobytes(), path
