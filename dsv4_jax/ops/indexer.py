"""Lightning indexer: which compressed entries a query attends to."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

import dsv4_ffi
from dsv4_jax.formats import mxfp4, nvfp4
from dsv4_jax.ops.dispatch import dispatch
from dsv4_jax.ops.product import product
from dsv4_jax.ops.topk import topk_select

# Keys scored at a time: bounds the [queries, heads, keys] intermediate of long contexts.
_KEY_BLOCK = 4096
# What the CUDA kernel is made for.
_HEADS, _WIDTH = 64, 128
_QUERIES_OF_ITEM, _MAX_ITEMS = 4, 8192
# A query's largest channel is brought within [2^7, 2^8): E4M3 ends at 448.
_TOP_EXPONENT = 7

Planes = tuple[Shaped[Array, "layers blocks entries _"], ...]


def indexer_scores(
    q: Float[Array, "b t h c"], keys: Float[Array, "b n c"], weights: Float[Array, "b t h"]
) -> Float[Array, "b t n"]:
    """I = Σ_h weights_h · relu(q_h · k), accumulated in float32.

    Args:
        q: indexer queries.
        keys: one key per compressed entry.
        weights: float32 head weights, scale included; may be negative.
    """

    def score(block: Array) -> Array:
        dots = product("bthc,bnc->bthn", q, block)
        return product("bth,bthn->btn", weights, jax.nn.relu(dots))

    b, n, c = keys.shape
    if n <= _KEY_BLOCK:
        return score(keys)
    blocks = -(-n // _KEY_BLOCK)
    padded = jnp.pad(keys, ((0, 0), (0, blocks * _KEY_BLOCK - n), (0, 0)))
    scores = jax.lax.map(score, padded.reshape(b, blocks, _KEY_BLOCK, c).swapaxes(0, 1))
    return jnp.moveaxis(scores, 0, 2).reshape(b, q.shape[1], blocks * _KEY_BLOCK)[..., :n]


def indexer_topk(
    q: Float[Array, "b t h c"],
    keys: Float[Array, "b n c"],
    weights: Float[Array, "b t h"],
    visible: Bool[Array, "b t n"],
    top_k: int,
) -> Int[Array, "b t k"]:
    """Ids of the top_k visible entries by `indexer_scores`; -1 where there are fewer.

    The lower id wins ties. No gradient flows through the choice.
    """
    scores = jax.lax.stop_gradient(indexer_scores(q, keys, weights))
    return topk_select(scores, top_k, visible)[1]


def fp8_queries(
    q: Float[Array, "b t h c"], weights: Float[Array, "b t h"]
) -> tuple[Float[Array, "b t h c"], Float32[Array, "b t h"]]:
    """Queries as float8_e4m3fn, each head's power of two moved to its weight: the same scores.

    Exact for queries rounded to MXFP4 (`indexer_key.round_trip`) whose groups of 32 channels have
    largest values within 2^13 of each other; smaller groups, and other queries, are rounded.
    """
    amax = jnp.abs(q.astype(jnp.float32)).max(-1)
    exponent = (jax.lax.bitcast_convert_type(amax, jnp.int32) >> 23) - 127
    exponent = jnp.clip(exponent, -100, 127) - _TOP_EXPONENT
    scaled = q.astype(jnp.float32) * _power_of_two(-exponent)[..., None]
    return scaled.astype(jnp.float8_e4m3fn), weights * _power_of_two(exponent)


def paged_indexer_scores(
    q: Float[Array, "b t h c"],
    weights: Float32[Array, "b t h"],
    pool: Planes,
    layer: int,
    block_table: Int[Array, "b m"],
    lengths: Int[Array, "b t"],
    *,
    min_length: int = 0,
    mxfp4_queries: bool = False,
    implementation: str | None = None,
) -> Float32[Array, "b t n"]:
    """`indexer_scores` of the keys in a paged pool.

    Args:
        q: queries; float8_e4m3fn ones come from `fp8_queries`.
        weights: head weights, scale included; may be negative.
        pool: planes [layer, block, entry, bytes] of the keys, whose dtypes tell the format:
            (uint8 c/2, uint8 c/32) MXFP4, (float8_e4m3fn c, float32 1) FP8 with a factor a key,
            (uint8 c/2, float8_e4m3fn c/16) NVFP4 groups, or one plane of numbers.
        layer: which of the pool's layers.
        block_table: the blocks of each sequence in order; -1 where there is none.
        lengths: how many entries each query sees, floor((position + 1) / 4); 0 for padding.
        min_length: queries that see no more entries than that need no scores.
        mxfp4_queries: the queries are rounded to MXFP4, so that kernels may take `fp8_queries`.
        implementation: "ffi" (on CUDA 64 heads of 128 channels, no float32 queries but of MXFP4
            values), "xla" or None for the fastest.

    Returns:
        Scores [b, t, m * entries of a block]; anything from an entry the query does not see on,
        and for queries without need.
    """
    return dispatch(
        implementation,
        {"ffi": _ffi_scores, "xla": _xla_scores},
        *(q, weights, pool, block_table, lengths),
        layer=layer,
        min_length=min_length,
        mxfp4_queries=mxfp4_queries,
    )


def paged_indexer_topk(
    q: Float[Array, "b t h c"],
    weights: Float32[Array, "b t h"],
    pool: Planes,
    layer: int,
    block_table: Int[Array, "b m"],
    lengths: Int[Array, "b t"],
    top_k: int,
    *,
    mxfp4_queries: bool = False,
    implementation: str | None = None,
) -> Int[Array, "b t k"]:
    """Ids of the top_k entries by `paged_indexer_scores` among those each query sees.

    The ids are in any order, -1 where there are fewer; the lower id wins ties. Queries that see at
    most top_k entries take all of them, and nothing is computed for them. No gradient flows.

    Args: as of `paged_indexer_scores`.
    """
    return dispatch(
        implementation,
        {"ffi": partial(_topk, _ffi_scores, "ffi"), "xla": partial(_topk, _xla_scores, "xla")},
        *jax.lax.stop_gradient((q, weights, pool)),
        *(block_table, lengths),
        layer=layer,
        top_k=top_k,
        mxfp4_queries=mxfp4_queries,
    )


def _topk(
    scores_of: Callable[..., Array],
    implementation: str,
    q: Array,
    weights: Array,
    pool: Planes,
    block_table: Array,
    lengths: Array,
    *,
    layer: int,
    top_k: int,
    mxfp4_queries: bool,
) -> Array:
    capacity = block_table.shape[1] * pool[0].shape[2]
    if capacity <= top_k:
        ids = jnp.arange(top_k)
        return jnp.where(ids < jnp.minimum(lengths, capacity)[..., None], ids, -1)
    scores = scores_of(
        q,
        weights,
        pool,
        block_table,
        lengths,
        layer=layer,
        min_length=top_k,
        mxfp4_queries=mxfp4_queries,
    )
    _, ids = topk_select(
        scores, top_k, lengths=lengths, sorted=False, implementation=implementation
    )
    return ids


def _xla_scores(
    q: Array,
    weights: Array,
    pool: Planes,
    block_table: Array,
    lengths: Array,
    *,
    layer: int,
    min_length: int,
    mxfp4_queries: bool,
) -> Array:
    del lengths, min_length, mxfp4_queries
    dtype = q.dtype
    if dtype == jnp.float8_e4m3fn:
        # In which codes and MXFP4 keys are exact.
        dtype = jnp.dtype(jnp.bfloat16 if pool[-1].dtype == jnp.uint8 else jnp.float32)
    blocks = jnp.maximum(block_table, 0)
    planes = (plane[layer, blocks] for plane in pool)
    found = tuple(plane.reshape(blocks.shape[0], -1, plane.shape[-1]) for plane in planes)
    return indexer_scores(q.astype(dtype), _decode(found, dtype), weights)


def _decode(planes: tuple[Array, ...], dtype: DTypeLike) -> Float[Array, "b n c"]:
    """Keys of any format in `dtype`."""
    codes, scales = planes[0], planes[-1]
    match [plane.dtype.name for plane in planes]:
        case ["uint8", "uint8"]:
            return mxfp4.dequantize(codes, scales, dtype)
        case ["uint8", "float8_e4m3fn"]:
            no_further_scale = jnp.ones(codes.shape[0], jnp.float32)
            return nvfp4.dequantize(codes, scales, no_further_scale, dtype)
        case ["float8_e4m3fn", "float32"]:
            return (codes.astype(jnp.float32) * scales).astype(dtype)
        case [_]:
            return codes.astype(dtype)
        case dtypes:
            raise ValueError(f"pool: got planes of {', '.join(dtypes)}, which is no key format")


def _ffi_scores(
    q: Array,
    weights: Array,
    pool: Planes,
    block_table: Array,
    lengths: Array,
    *,
    layer: int,
    min_length: int,
    mxfp4_queries: bool,
) -> Array:
    if len(pool) != 2:
        raise NotImplementedError("indexer: the kernel reads quantised keys only")
    nvfp4_keys = pool[1].dtype == jnp.float8_e4m3fn
    if mxfp4_queries:
        # The product of a code and an NVFP4 scale has more digits than E4M3.
        q, weights = (q.astype(jnp.bfloat16), weights) if nvfp4_keys else fp8_queries(q, weights)
    if jax.default_backend() == "gpu":
        _check_cuda(q, pool)
    capacity = block_table.shape[1] * pool[0].shape[2]
    return dsv4_ffi.call(
        "indexer_scores",
        jax.ShapeDtypeStruct((*lengths.shape, capacity), jnp.float32),
        *(q, weights, *pool, block_table.astype(jnp.int32), lengths.astype(jnp.int32)),
        layer=np.int64(layer),
        min_length=np.int64(min_length),
    )


def _check_cuda(q: Array, pool: Planes) -> None:
    capability = getattr(jax.devices()[0], "compute_capability", "unknown")
    per_block = pool[0].shape[2]
    if capability != "9.0":
        raise NotImplementedError(f"indexer: the kernel is for sm_90, the device has {capability}")
    if q.shape[2:] != (_HEADS, _WIDTH):
        raise NotImplementedError(
            f"indexer: the kernel is for {_HEADS} heads of {_WIDTH} channels, got {q.shape[2:]}"
        )
    if q.dtype == jnp.float32:
        raise NotImplementedError("indexer: the kernel has no float32 queries but MXFP4 values")
    if q.dtype == jnp.float8_e4m3fn and pool[1].dtype == jnp.float8_e4m3fn:
        raise NotImplementedError("indexer: the kernel has no float8 queries for NVFP4 keys")
    if q.shape[0] * -(-q.shape[1] // _QUERIES_OF_ITEM) > _MAX_ITEMS:
        raise NotImplementedError(f"indexer: the kernel takes fewer queries than {q.shape[:2]}")
    if per_block < 16 or per_block & (per_block - 1):
        raise NotImplementedError(f"indexer: blocks of {per_block} entries, not 16, 32, 64, ...")


def _power_of_two(exponent: Array) -> Array:
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
