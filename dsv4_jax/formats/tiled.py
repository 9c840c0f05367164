"""Weights cut into blocks in the order in which a GPU's matrix units take them.

A block is 64 outputs x 128 inputs; blocks of the same outputs follow each other. It holds four
warp tiles of 16 outputs, a warp tile holds chunks of 512 contiguous bytes, and a chunk holds 16
bytes for each of the 32 lanes of a warp. With g = lane // 4 and t = lane % 4 a lane owns, of
outputs g and g + 8, the inputs 32 t + 4 s + j for s < 8 and j < 4. Step s is its share of the A
operand of an m16k16 matrix instruction: registers (g; j = 0, 1), (g + 8; 0, 1), (g; 2, 3),
(g + 8; 2, 3). A product sums over inputs in any order, so the other operand only has to be read in
the same one. A lane owns 32 consecutive inputs so that it decodes few scales.

A 32-bit word holds
- bfloat16: one register, even j in the low half; a chunk is one step;
- FP8: one output of a step, from the lowest byte j = 2, 0, 3, 1; a chunk is steps s, s + 1, each
  for outputs g and g + 8;
- FP4: a whole step, its bits where one rotation or two shifts bring a register's signs and
  magnitudes to bits 15 and 8..6 of both halves; a chunk is steps s .. s + 3.
"""

from dataclasses import dataclass, field
from typing import no_type_check

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Float8e4m3fn, Float32, Shaped, UInt8, UInt32

from dsv4_jax.formats import e2m1, fp8_block, groups, mxfp4, nvfp4

ROWS = 64
COLUMNS = 128
FORMATS = ("mxfp4", "nvfp4", "fp8_block", "bf16")

# Where the four registers of a step lie in a word of FP4 codes: lowest bit of the magnitudes, bit
# of the signs, and whether a sign lies in the other half than its magnitude.
_MAGNITUDE_BIT = (6, 9, 12, 3)
_SIGN_BIT = (15, 2, 0, 1)
_SIGN_CROSSES = (False, True, False, False)
_FP8_ORDER = (2, 0, 3, 1)
# The kernels decode these scale bytes and all above to infinity: 2^32 and 2^38.
_MXFP4_INFINITE = 159
_FP8_INFINITE = 165
# E4M3 scales are kept as E5M3 of this bias: all normal, the kernels decode them by one addition.
_E5M3_BIAS = 10
_E5M3_INFINITE = 0xF8


def _e5m3_table() -> np.ndarray:
    codes = np.arange(1, 127, dtype=np.uint8)
    mantissa, exponent = np.frexp(codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    table = np.full(256, _E5M3_INFINITE, np.uint8)
    table[codes] = (exponent - 1 + _E5M3_BIAS) * 8 + (mantissa * 16 - 8)
    table[[0x00, 0x80]] = 0
    return table


_TO_E5M3 = _e5m3_table()
_FROM_E5M3 = np.full(256, 0x7F, np.uint8)
_FROM_E5M3[_TO_E5M3[:127]] = np.arange(127)


# JAX builds this tree with leaves of its own kinds too; `no_type_check` lets them pass.
@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TiledWeight:
    """A weight [n, k], or a stack of them, in blocks of 64 outputs x 128 inputs; see the module.

    Attributes:
        codes: uint32 [*stack, ceil(n / 64), ceil(k / 128), 4, chunks, 32, 4]; 2 chunks for FP4, 4
            for FP8, 8 for bfloat16.
        scales: uint8.
            "mxfp4": [*stack, bn, bk, 4, 32, 2], a lane's E8M0 bytes for outputs g and g + 8.
            "nvfp4": [*stack, bn, bk, 4, 32, 4], its E5M3 bytes for g and g + 8 of steps 0..3, then
            of steps 4..7.
            "fp8_block": [*stack, bn, bk], E8M0.
            "bf16": [*stack, 0].
        global_scale: float32 [*stack], a factor of all weights; 1 except for "nvfp4".
        weight_format: "mxfp4", "nvfp4", "fp8_block" or "bf16".
        shape: (n, k), without the padding.
    """

    codes: Array
    scales: Array
    global_scale: Array
    weight_format: str = field(metadata={"static": True})
    shape: tuple[int, int] = field(metadata={"static": True})


def tile_mxfp4(
    packed: UInt8[Array, "*stack n half"], scales: UInt8[Array, "*stack n groups"]
) -> TiledWeight:
    """Blocks of an MXFP4 weight (`mxfp4.quantize`). A scale of 2^32 or more becomes infinite.

    Raises:
        ValueError: scales do not cover the codes in groups of 32.
    """
    n, k = packed.shape[-2], 2 * packed.shape[-1]
    _check_shape("scales", scales, (*packed.shape[:-1], groups.count(k, mxfp4.GROUP)))
    words = _fp4_words(e2m1.unpack(packed))
    lanes = _lane_scales(jnp.minimum(scales, _MXFP4_INFINITE), mxfp4.GROUP)
    return TiledWeight(words, lanes, jnp.ones(packed.shape[:-2]), "mxfp4", (n, k))


def tile_nvfp4(
    packed: UInt8[Array, "*stack n half"],
    scales: Float8e4m3fn[Array, "*stack n groups"],
    global_scale: Float32[Array, "..."],
) -> TiledWeight:
    """Blocks of an NVFP4 weight (`nvfp4.quantize`).

    Codes under a scale of zero become zeros; a NaN or negative scale becomes infinite.

    Raises:
        ValueError: scales do not cover the codes in groups of 16, or global_scale the stack.
    """
    n, k = packed.shape[-2], 2 * packed.shape[-1]
    _check_shape("scales", scales, (*packed.shape[:-1], groups.count(k, nvfp4.GROUP)))
    _check_shape("global_scale", global_scale, packed.shape[:-2])
    scale_bytes = jnp.asarray(_TO_E5M3)[jax.lax.bitcast_convert_type(scales, jnp.uint8)]
    dead = jnp.repeat(scale_bytes == 0, nvfp4.GROUP, axis=-1)[..., :k]
    words = _fp4_words(jnp.where(dead, 0, e2m1.unpack(packed)))
    return TiledWeight(words, _lane_scales(scale_bytes, nvfp4.GROUP), global_scale, "nvfp4", (n, k))


def tile_fp8_block(
    codes: Float8e4m3fn[Array, "*stack n k"], scales: UInt8[Array, "*stack bn bk"]
) -> TiledWeight:
    """Blocks of an FP8 weight (`fp8_block.quantize`). A scale of 2^38 or more becomes infinite.

    Raises:
        ValueError: scales do not cover the codes in blocks of 128 x 128.
    """
    *stack, n, k = codes.shape
    blocks = groups.count(n, fp8_block.BLOCK[0]), groups.count(k, fp8_block.BLOCK[1])
    _check_shape("scales", scales, (*stack, *blocks))
    lanes = _lanes(jax.lax.bitcast_convert_type(codes, jnp.uint8), COLUMNS)
    steps = lanes.reshape(*lanes.shape[:-2], 8, 4, 2).swapaxes(-1, -2)
    words = _join_bits(steps[..., _FP8_ORDER], 8).reshape(*lanes.shape[:-2], 16)
    scales = jnp.repeat(scales, fp8_block.BLOCK[0] // ROWS, axis=-2)[..., : words.shape[-5], :]
    scales = jnp.minimum(scales, _FP8_INFINITE)
    return TiledWeight(_chunks(words), scales, jnp.ones(stack), "fp8_block", (n, k))


def tile_bf16(weight: BFloat16[Array, "*stack n k"]) -> TiledWeight:
    """Blocks of a bfloat16 weight."""
    *stack, n, k = weight.shape
    lanes = _lanes(jax.lax.bitcast_convert_type(weight, jnp.uint16), COLUMNS)
    pairs = lanes.reshape(*lanes.shape[:-2], 8, 2, 2, 2).swapaxes(-1, -2)
    words = _join_bits(pairs, 16).reshape(*lanes.shape[:-2], 32)
    scales = jnp.zeros((*stack, 0), jnp.uint8)
    return TiledWeight(_chunks(words), scales, jnp.ones(stack), "bf16", (n, k))


def untile(weight: TiledWeight) -> tuple[Array, ...]:
    """The arguments of the `tile_*` function that made `weight`.

    Scales that became infinite come back as the smallest such scale, in NVFP4 as NaN, and codes
    under a scale of zero as zeros.
    """
    words = weight.codes.swapaxes(-2, -3)
    words = words.reshape(*words.shape[:-2], -1)
    match weight.weight_format:
        case "mxfp4":
            packed = e2m1.pack(_unlanes(_fp4_codes(words), weight.shape))
            return packed, _unlane_scales(weight.scales, weight.shape, mxfp4.GROUP)
        case "nvfp4":
            packed = e2m1.pack(_unlanes(_fp4_codes(words), weight.shape))
            scale_bytes = _unlane_scales(weight.scales, weight.shape, nvfp4.GROUP)
            scales = jnp.asarray(_FROM_E5M3)[scale_bytes]
            scales = jax.lax.bitcast_convert_type(scales, jnp.float8_e4m3fn)
            return packed, scales, weight.global_scale
        case "fp8_block":
            outputs = _split_bits(words, 8)[..., np.argsort(_FP8_ORDER)].astype(jnp.uint8)
            lanes = outputs.reshape(*words.shape[:-1], 8, 2, 4).swapaxes(-1, -2)
            codes = _unlanes(lanes.reshape(*words.shape[:-1], 32, 2), weight.shape)
            codes = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
            return codes, weight.scales[..., :: fp8_block.BLOCK[0] // ROWS, :]
        case _:
            registers = _split_bits(words, 16).astype(jnp.uint16)
            lanes = registers.reshape(*words.shape[:-1], 16, 2, 2).swapaxes(-1, -2)
            values = _unlanes(lanes.reshape(*words.shape[:-1], 32, 2), weight.shape)
            return (jax.lax.bitcast_convert_type(values, jnp.bfloat16),)


def dequantize(weight: TiledWeight, dtype: DTypeLike) -> Float[Array, "*stack n k"]:
    """The weight's values in `dtype`, as by the `dequantize` of its format."""
    codes, *scales = untile(weight)
    match weight.weight_format:
        case "mxfp4":
            return mxfp4.dequantize(codes, scales[0], dtype)
        case "nvfp4":
            return nvfp4.dequantize(codes, scales[0], scales[1], dtype)
        case "fp8_block":
            return fp8_block.dequantize(codes, scales[0], dtype)
        case _:
            return codes.astype(dtype)


def _check_shape(name: str, array: Array, expected: tuple[int, ...]) -> None:
    if array.shape != expected:
        raise ValueError(f"{name}: got {array.shape}, these codes have {expected}")


def _lanes(x: Shaped[Array, "*stack n k"], width: int) -> Shaped[Array, "*stack bn bk 4 32 w 2"]:
    """What each lane owns, of outputs g and g + 8, with `width` elements to a block's row."""
    blocks = groups.split(x, ROWS, width)
    *stack, bn, _, bk, _ = blocks.shape
    blocks = blocks.reshape(*stack, bn, 4, 2, 8, bk, 4, width // 4)
    order = [*range(len(stack)), *(len(stack) + axis for axis in (0, 4, 1, 3, 5, 6, 2))]
    return blocks.transpose(order).reshape(*stack, bn, bk, 4, 32, width // 4, 2)


def _unlanes(
    lanes: Shaped[Array, "*stack bn bk 4 32 w 2"], shape: tuple[int, int]
) -> Shaped[Array, "*stack n k"]:
    *stack, bn, bk, _, _, per_lane, _ = lanes.shape
    blocks = lanes.reshape(*stack, bn, bk, 4, 8, 4, per_lane, 2)
    order = [*range(len(stack)), *(len(stack) + axis for axis in (0, 2, 6, 3, 1, 4, 5))]
    padded = blocks.transpose(order).reshape(*stack, bn * ROWS, bk * 4 * per_lane)
    return padded[..., : shape[0], : shape[1]]


def _lane_scales(
    scales: UInt8[Array, "*stack n groups"], group: int
) -> UInt8[Array, "*stack bn bk 4 32 bytes"]:
    lanes = _lanes(scales, COLUMNS // group)
    return lanes.reshape(*lanes.shape[:-2], -1)


def _unlane_scales(
    lanes: UInt8[Array, "*stack bn bk 4 32 bytes"], shape: tuple[int, int], group: int
) -> UInt8[Array, "*stack n groups"]:
    pairs = lanes.reshape(*lanes.shape[:-1], -1, 2)
    return _unlanes(pairs, (shape[0], groups.count(shape[1], group)))


def _chunks(words: UInt32[Array, "... 32 words"]) -> UInt32[Array, "... chunks 32 4"]:
    return words.reshape(*words.shape[:-1], -1, 4).swapaxes(-2, -3)


def _join_bits(parts: Shaped[Array, "... per_word"], bits: int) -> UInt32[Array, "..."]:
    """Parts of `bits` bits each, the lowest first, of the last axis as one word."""
    shifts = jnp.arange(32 // bits, dtype=jnp.uint32) * bits
    return (parts.astype(jnp.uint32) << shifts).sum(-1, dtype=jnp.uint32)


def _split_bits(words: UInt32[Array, "..."], bits: int) -> UInt32[Array, "... per_word"]:
    shifts = jnp.arange(32 // bits, dtype=jnp.uint32) * bits
    return (words[..., None] >> shifts) & jnp.uint32(2**bits - 1)


def _fp4_shifts() -> tuple[np.ndarray, np.ndarray]:
    """Shifts of magnitudes and signs in a word, for each of four registers and two halves."""
    half = np.arange(2)
    magnitude = np.array(_MAGNITUDE_BIT)[:, None] + 16 * half
    sign = np.array(_SIGN_BIT)[:, None] + 16 * (half ^ np.array(_SIGN_CROSSES)[:, None])
    return magnitude.astype(np.uint32), sign.astype(np.uint32)


def _fp4_words(codes: UInt8[Array, "*stack n k"]) -> UInt32[Array, "*stack bn bk 4 2 32 4"]:
    lanes = _lanes(codes, COLUMNS).astype(jnp.uint32)
    registers = lanes.reshape(*lanes.shape[:-2], 8, 2, 2, 2).swapaxes(-1, -2)
    registers = registers.reshape(*lanes.shape[:-2], 8, 4, 2)
    magnitude, sign = _fp4_shifts()
    bits = ((registers & 7) << magnitude) | ((registers >> 3) << sign)
    return _chunks(bits.sum((-1, -2), dtype=jnp.uint32))


def _fp4_codes(words: UInt32[Array, "... 8"]) -> UInt8[Array, "... 32 2"]:
    magnitude, sign = _fp4_shifts()
    words = words[..., None, None]
    registers = ((words >> magnitude) & 7) | (((words >> sign) & 1) << 3)
    lanes = registers.reshape(*registers.shape[:-3], 8, 2, 2, 2).swapaxes(-1, -2)
    return lanes.reshape(*registers.shape[:-3], 32, 2).astype(jnp.uint8)
