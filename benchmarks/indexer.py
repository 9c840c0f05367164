"""Indexer scores and top-k over paged keys: ours, XLA, the best kernel known, and the floors.

python -m benchmarks.indexer [--quick]
"""

import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import device_time_us, empty_kernel_us, memory_floor_us, write_results
from dsv4_jax.ops.indexer import fp8_queries, paged_indexer_scores, paged_indexer_topk

HEADS, WIDTH, TOP_K, PER_BLOCK = 64, 128, 512, 32
FLOPS_PER_US = 2 * 4096 * 132 * 1755  # of E4M3 products: 4,096 each clock and SM, at 1,755 MHz
KEY_BYTES = {"mxfp4": 68, "fp8": 132, "nvfp4": 72}
# (batch, entries): DeepGEMM's paged FP8 scores on an H200, keys from memory (2026-11-21).
PEER_SCORES = {
    (1, 16384): 4.39,
    (1, 65536): 6.81,
    (1, 262144): 14.3,
    (16, 16384): 13.6,
    (16, 65536): 40.0,
    (16, 262144): 144,
    (64, 16384): 40.3,
}
PEER_PREFILL = {(2048, 8192): 245, (2048, 65536): 2185}


def arguments(key_format: str, batch: int, tokens: int, entries: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    num_blocks = batch * entries // PER_BLOCK
    shape = (1, num_blocks, PER_BLOCK)
    random_bytes = partial(jax.random.randint, jax.random.key(0), dtype=jnp.uint8)
    codes = random_bytes((*shape, WIDTH // 2), 0, 256)
    pool: tuple[jax.Array, ...]
    if key_format == "fp8":
        values = jax.random.normal(jax.random.key(1), (*shape, WIDTH), jnp.bfloat16)
        pool = (values.astype(jnp.float8_e4m3fn), jnp.ones((*shape, 1), jnp.float32))
    elif key_format == "mxfp4":
        pool = (codes, random_bytes((*shape, WIDTH // 32), 126, 129))
    else:
        scales = random_bytes((*shape, WIDTH // 16), 50, 60)
        pool = (codes, jax.lax.bitcast_convert_type(scales, jnp.float8_e4m3fn))
    magnitudes = rng.choice([0.0, 0.5, 1, 1.5, 2, 3, 4, 6], (batch, tokens, HEADS, WIDTH))
    q = jnp.asarray(magnitudes * rng.choice([-1, 1], magnitudes.shape), jnp.bfloat16)
    weights = jnp.asarray(rng.standard_normal((batch, tokens, HEADS)) / 90, jnp.float32)
    if key_format != "nvfp4":
        q, weights = fp8_queries(q, weights)
    table = jnp.asarray(rng.permutation(num_blocks).reshape(batch, -1), jnp.int32)
    lengths = jnp.full((batch, tokens), entries, jnp.int32)
    return q, weights, pool, table, lengths


def scores(
    implementation: str,
    q: jax.Array,
    weights: jax.Array,
    pool: tuple[jax.Array, ...],
    table: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    return paged_indexer_scores(q, weights, pool, 0, table, lengths, implementation=implementation)


def topk(
    implementation: str,
    q: jax.Array,
    weights: jax.Array,
    pool: tuple[jax.Array, ...],
    table: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    return paged_indexer_topk(
        q, weights, pool, 0, table, lengths, TOP_K, implementation=implementation
    )


def decode_row(key_format: str, batch: int, entries: int, quick: bool) -> dict[str, Any]:
    args = arguments(key_format, batch, 1, entries)
    row = {
        "keys": key_format,
        "batch": batch,
        "tokens": 1,
        "entries": entries,
        "scores_us": device_time_us(partial(scores, "ffi"), *args, cold=(2,)),
        "with_topk_us": device_time_us(partial(topk, "ffi"), *args, cold=(2,)),
    }
    if not quick and batch == 1:
        row["xla_us"] = device_time_us(partial(topk, "xla"), *args, cold=(2,))
    num_keys = batch * entries
    return row | {
        "peer_scores_us": PEER_SCORES.get((batch, entries)),
        "bytes_floor_us": memory_floor_us(num_keys * KEY_BYTES[key_format]),
        "flops_floor_us": 2 * num_keys * HEADS * WIDTH / FLOPS_PER_US,
    }


def prefill_row(key_format: str, tokens: int, entries: int) -> dict[str, Any]:
    args = arguments(key_format, 1, tokens, entries)
    elapsed = device_time_us(partial(scores, "ffi"), *args)
    flops = 2 * tokens * entries * HEADS * WIDTH
    return {
        "keys": key_format,
        "batch": 1,
        "tokens": tokens,
        "entries": entries,
        "scores_us": elapsed,
        "tflops": flops / elapsed / 1e6,
        "peer_scores_us": PEER_PREFILL[tokens, entries],
        "flops_floor_us": flops / FLOPS_PER_US,
    }


def main(quick: bool) -> None:
    formats = ("mxfp4",) if quick else ("mxfp4", "fp8", "nvfp4")
    rows: list[dict[str, Any]] = [
        decode_row(key_format, batch, entries, quick)
        for key_format in formats
        for batch, entries in PEER_SCORES
        if not quick or batch == 1 or (batch, entries) == (16, 262144)
    ]
    rows += [
        prefill_row(key_format, *shape)
        for key_format in (("fp8",) if quick else ("mxfp4", "fp8"))
        for shape in PEER_PREFILL
    ]
    rows.append({"keys": "empty kernel", "scores_us": empty_kernel_us()})
    write_results("indexer", rows)


if __name__ == "__main__":
    main("--quick" in sys.argv)
