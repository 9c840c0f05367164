"""Matrices and checkpoints in every weight format, and their values by the formats' definitions."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np

from tests.checkpoint_files import BF16, E4M3, random_bytes, save
from tests.checkpoints import random_config, random_tensors
from tests.oracles import formats

FORMATS = {"nvfp4": "nvfp4", "mxfp4": "mxfp4", "fp8": "fp8_block", "bf16": "float"}
EXPERTS = 2
SHAPE = (160, 160)
CONFIG = random_config(
    mtp=True,
    hidden_size=160,
    moe_intermediate_size=160,
    n_routed_experts=EXPERTS,
    num_experts_per_tok=2,
    vocab_size=48,
    num_hidden_layers=2,
    num_hash_layers=1,
    compress_ratios=[0, 4, 0],
    # Every linear is 160 x 160: few programs.
    q_lora_rank=160,
    num_attention_heads=1,
    head_dim=160,
    o_groups=1,
    o_lora_rank=160,
    index_n_heads=5,
)


def matrix(weight_format, shape, seed=0, lowest=-2, highest=3):
    """A random weight; power-of-two scales from 2^lowest to 2^highest, both of which occur."""
    rng = np.random.default_rng(seed)
    rows, columns = shape
    codes = rng.integers(0, 16, shape, np.uint8)
    codes[0, :2] = codes[-1, -2:] = 5

    def powers(*shape):
        exponents = rng.integers(lowest, highest, shape, endpoint=True)
        exponents.flat[0], exponents.flat[-1] = lowest, highest
        return (exponents + 127).astype(np.uint8)

    match weight_format:
        case "float":
            return {"weight": rng.standard_normal(shape).astype(BF16)}
        case "fp8_block":
            scale = powers(-(-rows // 128), -(-columns // 128))
            return {"weight": random_bytes(rng, E4M3, *shape), "scale": scale}
        case "mxfp4":
            scale = powers(rows, -(-columns // 32))
            return {"weight": formats.packed(codes), "scale": scale}
    return {
        "weight": formats.packed(codes),
        "scale": random_bytes(rng, E4M3, rows, columns // 16),
        "scale_2": np.array(rng.uniform(0.1, 1), np.float32),
        "input_scale": np.array(0.25, np.float32),
    }


def values(arrays, weight_format) -> np.ndarray:
    """float64, from the definitions of the formats."""
    weight = np.asarray(arrays["weight"])
    if weight_format == "float":
        return weight.astype(np.float64)
    scale = np.asarray(arrays["scale"])
    if weight_format == "fp8_block":
        decoded = formats.E4M3[weight.view(np.uint8)]
        spread = formats.E8M0[scale.view(np.uint8)].repeat(128, 0).repeat(128, 1)
        return decoded * spread[: decoded.shape[0], : decoded.shape[1]]
    packed = weight.view(np.uint8)
    decoded = formats.E2M1[np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)]
    if weight_format == "mxfp4":
        return decoded * formats.E8M0[scale.view(np.uint8)].repeat(32, 1)[:, : decoded.shape[1]]
    scale_2 = np.float64(arrays["scale_2"])
    return decoded * formats.E4M3[scale.view(np.uint8)].repeat(16, 1) * scale_2


def error(new, old) -> float:
    return float(np.linalg.norm(new - old) / np.linalg.norm(old))


_DTYPES = {
    "F32": np.float32, "BF16": BF16, "F8_E4M3": E4M3, "F8_E8M0": np.uint8, "I8": np.uint8,
    "U8": np.uint8, "I64": np.int64,
}  # fmt: skip


def stored(directory: Path) -> dict[str, tuple[str, np.ndarray]]:
    """dtype and array of every tensor in the files, read without the library."""
    tensors = {}
    for path in directory.glob("*.safetensors"):
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            array = np.frombuffer(raw[begin:end], _DTYPES[entry["dtype"]])
            tensors[name] = entry["dtype"], array.reshape(entry["shape"])
    return tensors


def stored_matrix(tensors, module) -> tuple[str, dict[str, np.ndarray]]:
    """Format and arrays of one."""
    dtype, weight = tensors[f"{module}.weight"]
    weight_format = {"U8": "nvfp4", "I8": "mxfp4", "F8_E4M3": "fp8_block"}.get(dtype, "float")
    if weight_format == "float":
        return "float", {"weight": weight}
    prefix = "weight_" if weight_format == "nvfp4" else ""
    arrays = {"weight": weight, "scale": tensors[f"{module}.{prefix}scale"][1]}
    if weight_format == "nvfp4":
        arrays["scale_2"] = tensors[f"{module}.weight_scale_2"][1]
        arrays["input_scale"] = tensors[f"{module}.input_scale"][1]
    return weight_format, arrays


def is_linear(name) -> bool:
    projection = r"(wq_a|wq_b|attn\.wkv|wo_a|wo_b|e_proj|h_proj|shared_experts\.w[123])\.weight"
    return re.search(projection, name) is not None


def official(name, arrays) -> dict[str, np.ndarray]:
    module = name.removesuffix(".weight")
    if "scale_2" in arrays:
        leaves = {"scale": "weight_scale", "scale_2": "weight_scale_2"}
        return {f"{module}.{leaves.get(leaf, leaf)}": array for leaf, array in arrays.items()}
    if "scale" in arrays:
        arrays = arrays | {"scale": arrays["scale"].view(ml_dtypes.float8_e8m0fnu)}
    if arrays["weight"].dtype == np.uint8:
        arrays = arrays | {"weight": arrays["weight"].view(np.int8)}
    return {f"{module}.{leaf}": array for leaf, array in arrays.items()}


def checkpoint(directory, experts, linears="fp8_block", config=CONFIG) -> Path:
    tensors = {}
    for i, (name, array) in enumerate(random_tensors(config, seed=1).items()):
        if ".experts." in name:
            tensors |= official(name, matrix(experts, array.shape, i))
        elif is_linear(name):
            tensors |= official(name, matrix(linears, array.shape, i))
        else:
            tensors[name] = array
    save(directory, tensors, num_files=2)
    config = config | {"expert_dtype": "fp4", "quantization_config": {"quant_method": "fp8"}}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def contents(directory) -> dict[str, bytes]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def modules(tensors) -> list[str]:
    return [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
