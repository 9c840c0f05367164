"""The mini model's parameters: how they start, how they are stored, what storing costs.

Parameters are handled as a flat dict from dotted path ("layers.2.attn.wq_a.weight") to array.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv4_jax.config import Config
from dsv4_jax.formats import fp8_block, mxfp4

Flat = dict[str, jax.Array]
StoredFormat = Literal["mxfp4", "fp8_block", "bfloat16", "float32", "int64"]

_PACKED = {"wq_a", "wq_b", "wkv", "wo_a", "wo_b", "w1", "w2", "w3", "e_proj", "h_proj"}
_FLOAT32 = {"fn", "base", "scale", "sink", "ape", "bias"}

# Mixing logits of a stream with itself: each stream starts out nearly separate.
_SELF_MIXING = 4.0
_EMBEDDING_STD = 0.2


def flatten(params: nnx.State) -> Flat:
    return {
        ".".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(params)
    }


def by_path(arrays: Flat) -> dict[tuple[str | int, ...], jax.Array]:
    return {
        tuple(int(key) if key.isdigit() else key for key in name.split(".")): array
        for name, array in arrays.items()
    }


def unflatten(arrays: Flat) -> nnx.State:
    return nnx.from_flat_state(
        [(path, nnx.Param(array)) for path, array in by_path(arrays).items()]
    )


def stored_format(name: str) -> StoredFormat:
    """How the released checkpoints store a parameter (DeepSeek-V4, tensor table)."""
    keys = name.split(".")
    if keys[-1] == "tid2eid":
        return "int64"
    if keys[-1] in _FLOAT32:
        return "float32"
    if keys[-2] in _PACKED and "compressor" not in keys:
        return "mxfp4" if "experts" in keys else "fp8_block"
    return "bfloat16"


def stored_bytes(name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a parameter in a checkpoint, scales included."""
    count = math.prod(shape)
    match stored_format(name):
        case "mxfp4":
            return count // 2 + count // 32
        case "fp8_block":
            *lead, rows, columns = shape
            return count + math.prod(lead) * -(-rows // 128) * -(-columns // 128)
        case "bfloat16":
            return 2 * count
        case "float32":
            return 4 * count
        case "int64":
            return 8 * count


def packed(arrays: Flat) -> Flat:
    """Every parameter as it is stored: a packed `weight` gets a `scale` beside it."""
    stored: Flat = {}
    for name, array in arrays.items():
        match stored_format(name):
            case "mxfp4":
                stored[name], stored[_scale_name(name)] = mxfp4.quantize(array)
            case "fp8_block":
                stored[name], stored[_scale_name(name)] = fp8_block.quantize(array)
            case "bfloat16":
                stored[name] = array.astype(jnp.bfloat16)
            case _:
                stored[name] = array
    return stored


def _scale_name(name: str) -> str:
    return name.removesuffix("weight") + "scale"


def rounded(name: str, array: jax.Array) -> jax.Array:
    """What is left of a float32 parameter after storing."""
    match stored_format(name):
        case "mxfp4":
            return mxfp4.dequantize(*mxfp4.quantize(array), jnp.float32)
        case "fp8_block":
            return fp8_block.dequantize(*fp8_block.quantize(array), jnp.float32)
        case "bfloat16":
            return array.astype(jnp.bfloat16).astype(jnp.float32)
        case _:
            return array


def straight_through(arrays: Flat, amount: jax.Array) -> Flat:
    """Parameters moved by `amount` (0 to 1) towards their stored values, gradients unchanged."""

    def moved(name: str, array: jax.Array) -> jax.Array:
        if stored_format(name) in ("float32", "int64"):
            return array
        return array + amount * jax.lax.stop_gradient(rounded(name, array) - array)

    return {name: moved(name, array) for name, array in arrays.items()}


def decays(name: str, array: jax.Array) -> bool:
    """Matrices decay; norms, hyper-connections, sinks and position biases do not."""
    return array.ndim >= 2 and stored_format(name) != "float32"


def is_trained(name: str) -> bool:
    """Hash tables are drawn, router biases follow the load."""
    return name.split(".")[-1] not in ("tid2eid", "bias")


def initial(config: Config, arrays: Flat, token_counts: np.ndarray, seed: int) -> Flat:
    """Rescales freshly initialised parameters for training and fills the hash tables.

    Linears start at 1 / sqrt(inputs), those that write into the residual streams smaller by the
    square root of the number of such writes. Head and routers stay as they are, so that
    predictions and routing start out nearly even.
    """
    residual = (2 * config.num_hidden_layers) ** -0.5
    rng = np.random.default_rng(seed)
    started: Flat = {}
    for name, array in arrays.items():
        keys = name.split(".")
        if keys[-1] == "tid2eid":
            table = hash_table(
                token_counts, config.n_routed_experts, config.num_experts_per_tok, rng
            )
            array = jnp.asarray(table)
        elif keys[-1] == "base" and keys[-2] in ("hc_attn", "hc_ffn"):
            n = config.hc_mult
            array = array.at[2 * n :].set(_SELF_MIXING * jnp.eye(n).reshape(-1))
        elif keys[0] == "embed":
            array = array * (_EMBEDDING_STD / config.initializer_range)
        elif decays(name, array) and keys[-2] not in ("head", "gate"):
            gain = residual if keys[-2] in ("wo_b", "w2") else 1.0
            array = array * (gain * array.shape[-1] ** -0.5 / config.initializer_range)
        started[name] = array
    return started


def hash_table(
    token_counts: np.ndarray, num_experts: int, top_k: int, rng: np.random.Generator
) -> np.ndarray:
    """`top_k` distinct experts per token id, chosen so that experts see equally many tokens.

    From the most frequent id to the rarest, each takes the least loaded experts; ties are broken
    at random.
    """
    table = np.zeros((len(token_counts), top_k), np.int32)
    load = rng.random(num_experts)
    for token in np.argsort(-token_counts, kind="stable"):
        table[token] = np.argsort(load + rng.random(num_experts), kind="stable")[:top_k]
        load[table[token]] += token_counts[token]
    return table
