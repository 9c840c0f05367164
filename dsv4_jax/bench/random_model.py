"""A model with random packed weights, made on the device: for timing, its text means nothing."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, PRNGKeyArray

from dsv4_jax.checkpoint import names
from dsv4_jax.checkpoint.convert import FORMATS
from dsv4_jax.checkpoint.names import Path, TensorSpec, WeightFormat, stored, tensors
from dsv4_jax.config import Config
from dsv4_jax.kernels import Kernels
from dsv4_jax.model import Model, assemble
from dsv4_jax.numerics import Numerics

_DTYPES = {"BF16": jnp.bfloat16, "F32": jnp.float32, "I64": jnp.int32, "F8_E4M3": jnp.float8_e4m3fn}
# With random codes, weights of about the size of trained ones.
_E8M0_SCALE = {"fp8_block": 122, "mxfp4": 120}
_NVFP4_GLOBAL_SCALE = 2.0**-7


def first_layers(config: Config, num_layers: int) -> Config:
    """The model cut off after so many layers, without MTP blocks.

    Raises:
        ValueError: it does not have so many.
    """
    if not 1 <= num_layers <= config.num_hidden_layers:
        raise ValueError(
            f"num_layers: got {num_layers}, expected 1 to {config.num_hidden_layers} (the model's)"
        )
    return replace(
        config,
        num_hidden_layers=num_layers,
        num_nextn_predict_layers=0,
        num_hash_layers=min(config.num_hash_layers, num_layers),
        compress_ratios=config.compress_ratios[:num_layers],
    )


def layers_of_each_kind(config: Config) -> int:
    """How many first layers have every kind of attention and of routing that the model has."""
    routing = [config.is_hash_layer(layer) for layer in range(config.num_hidden_layers)]
    kinds: tuple[list[int], ...] = (list(config.layer_ratios), list(map(int, routing)))
    return 1 + max(of_layers.index(kind) for of_layers in kinds for kind in of_layers)


def formats_of(config: Config, experts: str, linears: str) -> dict[Path, WeightFormat]:
    """Which format each weight is in that may be packed, by its path without "weight".

    Raises:
        ValueError: an unknown format.
    """
    user_names = {weight_format: name for name, weight_format in FORMATS.items()}
    choices: dict[names.Kind, str] = {"expert": experts, "linear": linears}
    for kind, value in choices.items():
        known = [user_names[weight_format] for weight_format in names.FORMATS[kind]]
        if value not in known:
            raise ValueError(f"{kind}s: got {value!r}, expected one of {', '.join(known)}")
    return {
        spec.path[:-1]: FORMATS[choices[spec.kind]]
        for spec in _distinct(config)
        if spec.kind in choices
    }


def weight_sizes(config: Config, experts: str, linears: str) -> list[int]:
    """Bytes of each array of weights, as stored."""
    formats = formats_of(config, experts, linears)
    return [
        tensor.num_bytes * math.prod(_lead(config, spec))
        for spec in _distinct(config)
        for tensor in stored(spec, formats.get(spec.path[:-1]))
    ]


def random_model(
    config: Config,
    *,
    experts: str = "mxfp4",
    linears: str = "fp8",
    dtype: DTypeLike = jnp.bfloat16,
    numerics: Numerics = Numerics.CHECKPOINT,
    kernels: Kernels = Kernels.FASTEST,
) -> Model:
    """Weights of random bits in the layout in which the model runs; nothing is read.

    Args:
        config: sizes.
        experts: format of the routed experts, "mxfp4", "nvfp4", "fp8" or "bf16".
        linears: format of the other matrices that may be packed, "fp8" or "bf16".
        dtype, numerics, kernels: as for `dsv4_jax.load`.

    Raises:
        ValueError: an unknown format.
    """
    formats = formats_of(config, experts, linears)
    specs = _distinct(config)
    arrays: dict[Path, Array] = {}
    for key, spec in zip(
        jax.random.split(jax.random.key(0, impl="rbg"), len(specs)), specs, strict=True
    ):
        weight_format = formats.get(spec.path[:-1])
        for tensor in stored(spec, weight_format):
            shape = (*_lead(config, spec), *tensor.shape)
            made = _random(key, tensor.path, tensor.dtype, shape, weight_format, config)
            arrays[tensor.path] = jax.block_until_ready(made)
    return Model(*assemble(config, arrays, formats, dtype, numerics, kernels))


def _distinct(config: Config) -> list[TensorSpec]:
    """One spec for each parameter: of a stack of experts the first."""
    return [spec for spec in tensors(config) if not spec.expert]


def _lead(config: Config, spec: TensorSpec) -> tuple[int, ...]:
    return () if spec.expert is None else (config.n_routed_experts,)


def _random(
    key: PRNGKeyArray,
    path: Path,
    stored_dtype: str,
    shape: tuple[int, ...],
    weight_format: WeightFormat | None,
    config: Config,
) -> Array:
    match stored_dtype, path[-1]:
        case "I8" | "U8", _:
            return jax.random.bits(key, shape, jnp.uint8)
        case "F8_E8M0", _:
            return jnp.full(shape, _E8M0_SCALE[weight_format or ""], jnp.uint8)
        case "F8_E4M3", "scale":
            return jnp.ones(shape, jnp.float8_e4m3fn)
        case "F8_E4M3", _:
            # Without the highest bit of the exponent, so that no code is NaN.
            codes = jax.random.bits(key, shape, jnp.uint8) & 0xBF
            return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
        case "I64", _:
            return jax.random.randint(key, shape, 0, config.n_routed_experts, jnp.int32)
        case _, "scale_2" | "input_scale":
            return jnp.full(shape, _NVFP4_GLOBAL_SCALE, jnp.float32)
    dtype = _DTYPES[stored_dtype]
    if len(shape) == 1:  # norms, and the small vectors of mHC, router and sink
        return jnp.ones(shape, dtype) if path[-1] == "weight" else jnp.zeros(shape, dtype)
    return config.initializer_range * jax.random.normal(key, shape, dtype)
