"""Weights in another format, and what that loses: of a matrix, of all parameters."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int

from dsv4_jax.checkpoint import names
from dsv4_jax.config import Config, QuantizationConfig
from dsv4_jax.formats import e2m1, e8m0, fp8_block, mxfp4, nvfp4
from dsv4_jax.formats.convert import mxfp4_to_fp8_block, mxfp4_to_nvfp4

Arrays = Mapping[str, Array | np.ndarray]

# What users call the formats.
FORMATS: dict[str, names.WeightFormat] = {
    "nvfp4": "nvfp4",
    "mxfp4": "mxfp4",
    "fp8": "fp8_block",
    "bf16": "float",
}
EXPERT_FORMATS = ("nvfp4", "mxfp4", "fp8", "bf16")
LINEAR_FORMATS = ("fp8", "bf16")

# w1 and w3 of an expert share their NVFP4 scale: kernels compute both in one product.
EXPERT_GROUPS = (("w1", "w3"), ("w2",))

LEAVES: dict[str, tuple[str, ...]] = {
    "float": ("weight",),
    "fp8_block": ("weight", "scale"),
    "mxfp4": ("weight", "scale"),
    "nvfp4": ("weight", "scale", "scale_2", "input_scale"),
}
_WIDTH_MULTIPLE = {"mxfp4": mxfp4.GROUP, "nvfp4": nvfp4.GROUP}


class Converted(NamedTuple):
    """A matrix in its new format.

    Attributes:
        arrays: as `convert_weight` returns them.
        exact: every value is the same. Not claimed for values below 2^-126, which some backends
            read as zero.
        relative_error: Frobenius norm of the difference over that of the matrix.
    """

    arrays: dict[str, Array]
    exact: bool
    relative_error: float


def wanted_formats(
    experts: str | None, linears: str | None
) -> dict[names.Kind, names.WeightFormat | None]:
    """The formats that users named, by kind of matrix; None leaves matrices as they are.

    Raises:
        ValueError: an unknown format, or one that the kind does not have.
    """
    for argument, value, known in (
        ("experts", experts, EXPERT_FORMATS),
        ("linears", linears, LINEAR_FORMATS),
    ):
        if value is not None and value not in known:
            raise ValueError(f"{argument}: got {value!r}, expected one of {', '.join(known)}")
    return {
        "expert": FORMATS[experts] if experts else None,
        "linear": FORMATS[linears] if linears else None,
    }


def width_problem(width: int, weight_format: str) -> str | None:
    """Why a format cannot hold matrices of this many inputs, or None."""
    multiple = _WIDTH_MULTIPLE.get(weight_format, 1)
    if width % multiple:
        return f"{width} inputs, {weight_format} needs a multiple of {multiple}"
    return None


def convert_weight(
    arrays: Arrays, source_format: str, target_format: str
) -> tuple[dict[str, Array], bool]:
    """One matrix in another format, value for value where the format can hold them.

    MXFP4 and whatever has values that MXFP4 holds exactly becomes NVFP4 or FP8 without loss as
    long as its exponents do not span more than those hold; else values are quantised anew, with
    the rules of `formats`. "float" is bfloat16. A packed matrix in the target format stays as it
    is. input_scale of a new NVFP4 matrix is 1, for nothing was calibrated; it is never used.

    Args:
        arrays: "weight" [out, in] or packed, and with packed weights "scale"; for NVFP4 also
            "scale_2" and "input_scale", as `checkpoint.read` returns them.
        source_format, target_format: "float", "fp8_block", "mxfp4" or "nvfp4".

    Returns:
        (arrays in the new format, whether every value is the same)

    Raises:
        ValueError: an unknown format, a width that it cannot pack, NaN or infinite values.
    """
    (converted,) = convert_matrices([arrays], [source_format], target_format)
    return converted.arrays, converted.exact


def convert_matrices(
    matrices: Sequence[Arrays], source_formats: Sequence[str], target_format: str
) -> list[Converted]:
    """`convert_weight` of matrices of one width, which as NVFP4 get one scale_2."""
    for weight_format in (*source_formats, target_format):
        if weight_format not in LEAVES:
            raise ValueError(
                f"weight_format: got {weight_format!r}, expected one of {', '.join(LEAVES)}"
            )
    sources = [_Source.of(*pair) for pair in zip(matrices, source_formats, strict=True)]
    changing = [source for source in sources if not source.is_in(target_format)]
    together = [changing] if target_format == "nvfp4" and changing else [[s] for s in changing]
    new = iter([arrays for group in together for arrays in _encode(group, target_format)])
    return [
        Converted(dict(source.arrays), True, 0.0)
        if source.is_in(target_format)
        else source.compared_with(next(new), target_format)
        for source in sources
    ]


class _Source(NamedTuple):
    arrays: dict[str, Array]
    weight_format: str
    values: Float32[Array, "o i"]

    @staticmethod
    def of(arrays: Arrays, weight_format: str) -> "_Source":
        on_device = {leaf: jnp.asarray(array) for leaf, array in arrays.items()}
        values = _values(on_device, weight_format)
        if not jnp.isfinite(values).all():
            raise ValueError("arrays: got values that are NaN or infinite in float32")
        return _Source(on_device, weight_format, values)

    def is_in(self, target_format: str) -> bool:
        if target_format == "float":
            return self.arrays["weight"].dtype == jnp.bfloat16
        return self.weight_format == target_format

    def as_mxfp4(self) -> tuple[Array, Array] | None:
        """The matrix as MXFP4 if that holds its values exactly."""
        if self.weight_format == "mxfp4":
            return self.arrays["weight"], self.arrays["scale"]
        if width_problem(self.values.shape[-1], "mxfp4"):
            return None
        packed, scales = _QUANTIZE["mxfp4"](self.values)
        same = (_values({"weight": packed, "scale": scales}, "mxfp4") == self.values).all()
        return (packed, scales) if same else None

    def compared_with(self, arrays: dict[str, Array], weight_format: str) -> Converted:
        nonzero = _nonzero(self.arrays, self.weight_format)
        same, error = _difference(self.values, _values(arrays, weight_format), nonzero)
        if not jnp.isfinite(error):
            raise ValueError(f"arrays: got values that {weight_format} cannot hold")
        return Converted(arrays, bool(same), float(f"{error:.4g}"))


_QUANTIZE = {
    "fp8_block": jax.jit(fp8_block.quantize),
    "mxfp4": jax.jit(mxfp4.quantize),
    "nvfp4": jax.jit(nvfp4.quantize),
}
_LOSSLESS = {"fp8_block": mxfp4_to_fp8_block, "nvfp4": mxfp4_to_nvfp4}


# Programs of their own: inside one, XLA may take a cast to a narrow type and back for the identity.
@partial(jax.jit, static_argnums=1)
def _values(arrays: Mapping[str, Array], weight_format: str) -> Float32[Array, "o i"]:
    match weight_format:
        case "float":
            return arrays["weight"].astype(jnp.float32)
        case "fp8_block":
            return fp8_block.dequantize(arrays["weight"], arrays["scale"], jnp.float32)
        case "mxfp4":
            return mxfp4.dequantize(arrays["weight"], arrays["scale"], jnp.float32)
        case _:
            parts = arrays["weight"], arrays["scale"], arrays["scale_2"]
            return nvfp4.dequantize(*parts, jnp.float32)


@partial(jax.jit, static_argnums=1)
def _nonzero(arrays: Mapping[str, Array], weight_format: str) -> Bool[Array, "o i"]:
    """Which values are not zero, also those that are when subnormal numbers are flushed."""
    weight = arrays["weight"]
    match weight_format:
        case "float":
            unsigned = jnp.uint32 if weight.dtype == jnp.float32 else jnp.uint16
            return jax.lax.bitcast_convert_type(weight, unsigned) << 1 != 0
        case "fp8_block":
            return weight.astype(jnp.float32) != 0
        case "mxfp4":
            return e2m1.unpack(weight) & 7 != 0
        case _:
            scaled = jnp.repeat(arrays["scale"].astype(jnp.float32) != 0, nvfp4.GROUP, axis=-1)
            return (e2m1.unpack(weight) & 7 != 0) & scaled


@jax.jit
def _difference(
    old: Float32[Array, "o i"], new: Float32[Array, "o i"], nonzero: Bool[Array, "o i"]
) -> tuple[Bool[Array, ""], Float32[Array, ""]]:
    """(whether the values are the same for sure, relative error)."""
    flushed = nonzero & (jnp.abs(old) < e8m0.SMALLEST_NORMAL)
    largest = jnp.abs(old).max(initial=0)
    unit = jnp.where(largest > 0, largest, 1)
    error = jnp.linalg.norm(new / unit - old / unit)
    norm = jnp.linalg.norm(old / unit)
    relative = jnp.where(error > 0, error / norm, 0)
    return (old == new).all() & ~flushed.any(), relative


def _encode(sources: Sequence[_Source], target_format: str) -> list[dict[str, Array]]:
    """The matrices one after the other as one matrix of the format, taken apart again."""
    if found := width_problem(sources[0].values.shape[-1], target_format):
        raise ValueError(f"arrays: got {found}")
    if target_format == "float":
        return [{"weight": source.values.astype(jnp.bfloat16)} for source in sources]
    parts = None
    if target_format in _LOSSLESS:
        parts = _encode_lossless([source.as_mxfp4() for source in sources], target_format)
    if parts is None:
        joined = jnp.concatenate([source.values for source in sources])
        parts = _QUANTIZE[target_format](joined)
    if target_format != "nvfp4":
        return [dict(zip(("weight", "scale"), parts, strict=True))]
    weight, scale, scale_2 = parts
    scale = scale[:, : 2 * weight.shape[1] // nvfp4.GROUP]  # half a group of MXFP4 has one
    ends = np.cumsum([source.values.shape[0] for source in sources])[:-1]
    return [
        {"weight": w, "scale": s, "scale_2": scale_2, "input_scale": jnp.ones_like(scale_2)}
        for w, s in zip(jnp.split(weight, ends), jnp.split(scale, ends), strict=True)
    ]


def _encode_lossless(
    matrices: Sequence[tuple[Array, Array] | None], target_format: str
) -> tuple[Array, ...] | None:
    """Through MXFP4, or None where that is not exact."""
    found = [matrix for matrix in matrices if matrix is not None]
    if len(found) < len(matrices):
        return None
    packed, scales = (jnp.concatenate(parts) for parts in zip(*found, strict=True))
    try:
        return _LOSSLESS[target_format](packed, scales)
    except ValueError:
        return None


def converted(
    params: Mapping[names.Path, Array],
    weight_formats: Mapping[names.Path, str],
    experts: str | None = None,
    linears: str | None = None,
) -> tuple[dict[names.Path, Array], dict[names.Path, str]]:
    """All matrices of the named kinds in other formats, as `dsv4 convert` would write them.

    Args:
        params: every array by its parameter path, experts stacked.
        weight_formats: of the matrices that may change, by path without "weight".
        experts: "nvfp4", "mxfp4", "fp8" or "bf16" for the routed experts, MTP blocks' included.
        linears: "fp8" or "bf16" for the other packed matrices.

    Returns:
        (params, weight_formats), other entries as they came

    Raises:
        ValueError: as `wanted_formats` and `convert_weight`.
    """
    wanted = wanted_formats(experts, linears)
    new_params, new_formats = dict(params), dict(weight_formats)
    for group in _groups(weight_formats):
        stacked = "experts" in group[0]
        target = wanted["expert" if stacked else "linear"]
        if target is None:
            continue
        num_rows = len(params[(*group[0], "weight")]) if stacked else 1
        rows = []
        for row in range(num_rows):
            matrices = [
                {
                    leaf: _row(params[(*module, leaf)], row) if stacked else params[(*module, leaf)]
                    for leaf in LEAVES[weight_formats[module]]
                }
                for module in group
            ]
            rows.append(convert_matrices(matrices, [weight_formats[m] for m in group], target))
        for module, of_rows in zip(group, zip(*rows, strict=True), strict=True):
            for leaf in LEAVES[weight_formats[module]]:
                del new_params[(*module, leaf)]
            for leaf in LEAVES[target]:
                arrays = [result.arrays[leaf] for result in of_rows]
                new_params[(*module, leaf)] = jnp.stack(arrays) if stacked else arrays[0]
            new_formats[module] = target
    return new_params, new_formats


@jax.jit
def _row(stack: Array, row: Int[Array, ""]) -> Array:
    # Compiled once; a literal index is compiled for each of its values.
    return stack[row]


def _groups(modules: Iterable[names.Path]) -> list[list[names.Path]]:
    """Modules that are converted together."""
    groups = []
    for module in modules:
        members = [module]
        if "experts" in module:
            matrices = next((g for g in EXPERT_GROUPS if g[0] == module[-1]), ())
            members = [(*module[:-1], matrix) for matrix in matrices]
        if members:
            groups.append(members)
    return groups


def converted_config(
    config: Config, weight_formats: Mapping[names.Path, str], experts: str | None
) -> Config:
    """The config that says what is inside after experts were converted, or stayed (None)."""
    backbone = {
        weight_format
        for module, weight_format in weight_formats.items()
        if "experts" in module and module[0] == "layers"
    }
    quantization = None
    if set(weight_formats.values()) != {"float"}:
        quantization = replace(
            config.quantization_config or QuantizationConfig(scale_fmt="ue8m0"),
            moe_quant_algo="NVFP4" if backbone == {"nvfp4"} else None,
        )
    expert_dtype = config.expert_dtype
    if experts is not None:
        expert_dtype = "fp4" if experts == "mxfp4" else experts
    return replace(config, quantization_config=quantization, expert_dtype=expert_dtype)
