"""Rows of input as E4M3 codes in the tiles from which FP8 units read them.

A tile is 8 rows x 128 inputs, in the order in which tiled weights meet them: the code of input
32 t + 4 s + j of a block lies in part s of the row, 16 bytes, at byte 4 t + (1, 3, 0, 2)[j]. Part s
stands where part s ^ row would, so that reading one part of all rows meets every bank of shared
memory.
"""

from dataclasses import dataclass, field
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from dsv4_jax.formats import e8m0, fp8_block, groups

ROWS = 8
COLUMNS = 128
_ORDER = (2, 0, 3, 1)
_PARTS = np.arange(8)[:, None] ^ np.arange(8)


# JAX builds this tree with leaves of its own kinds too; `no_type_check` lets them pass.
@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CodedInputs:
    """x [rows, k], rounded (Q1, `fp8_block.round_trip`), as codes and scales; see the module.

    Attributes:
        codes: uint8 [ceil(k / 128), ceil(rows / 8), 8, 128].
        scales: float32 [ceil(k / 128), 8 ceil(rows / 8)], powers of two: of a block and a row.
        shape: (rows, k), without the padding.
    """

    codes: Array
    scales: Array
    shape: tuple[int, int] = field(metadata={"static": True})


def encode(x: Float[Array, "rows k"]) -> CodedInputs:
    """x rounded to E4M3 with one scale per row and 128 inputs."""
    padded = jnp.pad(x, ((0, -x.shape[0] % ROWS), (0, -x.shape[1] % COLUMNS)))
    codes, scales = fp8_block.quantize(padded, (1, COLUMNS))
    code_bytes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
    num_rows, width = x.shape
    return CodedInputs(_tiles(code_bytes), e8m0.to_float32(scales).T, (num_rows, width))


def decode(inputs: CodedInputs, dtype: DTypeLike) -> Float[Array, "rows k"]:
    """The rounded inputs in `dtype`; exact in float32 and bfloat16."""
    codes = jax.lax.bitcast_convert_type(_rows(inputs.codes), jnp.float8_e4m3fn)
    values = codes.astype(jnp.float32) * jnp.repeat(inputs.scales.T, COLUMNS, axis=1)
    return values[: inputs.shape[0], : inputs.shape[1]].astype(dtype)


def _tiles(codes: Shaped[Array, "rows k"]) -> Shaped[Array, "blocks tiles 8 128"]:
    blocks = groups.split(codes, ROWS, COLUMNS).transpose(2, 0, 1, 3)
    parts = blocks.reshape(*blocks.shape[:3], 4, 8, 4).swapaxes(3, 4)[..., _ORDER]
    return _swapped(parts).reshape(blocks.shape)


def _rows(tiles: Shaped[Array, "blocks tiles 8 128"]) -> Shaped[Array, "rows k"]:
    parts = _swapped(tiles.reshape(*tiles.shape[:3], 8, 4, 4))
    blocks = parts[..., np.argsort(_ORDER)].swapaxes(3, 4).reshape(tiles.shape)
    num_blocks, num_tiles = tiles.shape[:2]
    return blocks.transpose(1, 2, 0, 3).reshape(num_tiles * ROWS, num_blocks * COLUMNS)


def _swapped(parts: Shaped[Array, "blocks tiles 8 8 4 4"]) -> Shaped[Array, "blocks tiles 8 8 4 4"]:
    return parts[:, :, np.arange(8)[:, None], _PARTS]
