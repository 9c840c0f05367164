"""The router: ours, XLA, the best kernels known, and the floor.

python -m benchmarks.router [--quick]
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import (
    Row,
    device_time_us,
    empty_kernel_us,
    memory_floor_us,
    write_results,
)
from dsv4_jax.ops.dense_router import MAX_KERNEL_TOKENS, dense_router
from dsv4_jax.ops.grouped import route_plan, tile_size
from dsv4_jax.ops.hash_router import hash_router
from dsv4_jax.ops.router import activation_topk

TOP_K, SCALE, VOCAB = 6, 1.5, 1000
SIZES = {"flash": (256, 4096), "pro": (384, 7168)}
TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
# On an H200, measured 2026-11-21: the faster of vLLM's CUDA and Triton kernels; cuBLAS with
# topk_softplus_sqrt; weights from a table with scores at hand.
PEERS_US = {
    ("activation_topk", "flash"): (2.06, 2.11, 2.15, 2.35, 3.04, 6.67, 20.3),
    ("activation_topk", "pro"): (2.55, 2.60, 2.64, 2.85, 3.94, 9.67, 31.4),
    ("dense_router", "flash"): (10.5, 10.7, 11.1, 11.4, 14.9, 28.1, 81.8),
    ("dense_router", "pro"): (11.6, 11.7, 12.2, 13.3, 20.6, 47.3, 174),
}


def normal(*shape: int, std: float = 1.0) -> jax.Array:
    return jnp.asarray(std * np.random.default_rng(0).standard_normal(shape), jnp.float32)


def activation_row(size: str, tokens: int, quick: bool) -> Row:
    num_experts, _ = SIZES[size]
    logits, bias = normal(tokens, num_experts), normal(num_experts, std=0.2)
    row = {}
    for name in ("ffi",) if quick else ("ffi", "pallas", "xla"):
        route = partial(activation_topk, top_k=TOP_K, scale=SCALE, implementation=name)
        row[f"{name}_us"] = device_time_us(route, logits, bias)
    return row | {"floor_us": memory_floor_us(logits.nbytes + 8 * TOP_K * tokens)}


def dense_row(size: str, tokens: int, quick: bool) -> Row:
    num_experts, width = SIZES[size]
    x = normal(tokens, width).astype(jnp.bfloat16)
    gate = normal(num_experts, width, std=width**-0.5).astype(jnp.bfloat16)
    bias = normal(num_experts, std=0.2)
    row = {}
    for name in ("ffi", "unfused") if quick else ("ffi", "unfused", "xla"):
        if name == "ffi" and tokens > MAX_KERNEL_TOKENS:
            continue
        route = partial(dense_router, top_k=TOP_K, scale=SCALE, implementation=name)
        row[f"{name}_us"] = device_time_us(route, x, gate, bias, cold=(1,))
    return row | {"floor_us": memory_floor_us(gate.nbytes + x.nbytes)}


def hash_row(size: str, tokens: int, quick: bool) -> Row:
    num_experts, width = SIZES[size]
    x = normal(tokens, width).astype(jnp.bfloat16)
    gate = normal(num_experts, width, std=width**-0.5).astype(jnp.bfloat16)
    rng = np.random.default_rng(0)
    permutations = rng.permuted(np.tile(np.arange(num_experts), (VOCAB, 1)), axis=1)
    table = jnp.asarray(permutations[:, :TOP_K], jnp.int32)
    token_ids = jnp.asarray(rng.integers(0, VOCAB, tokens), jnp.int32)
    row = {}
    for name in ("ffi",) if quick else ("ffi", "xla"):

        def route(gate: jax.Array, x: jax.Array, name: str = name) -> tuple[jax.Array, jax.Array]:
            # Under a trace, as here, ids are not checked.
            return hash_router(token_ids + 0 * x[0, 0].astype(int), table, SCALE, x, gate, name)

        row[f"{name}_us"] = device_time_us(route, gate, x, cold=(0,))
    chosen = min(tokens * TOP_K, num_experts) * width * 2
    return row | {"floor_us": memory_floor_us(chosen + x.nbytes)}


def plan_row(size: str, tokens: int, quick: bool) -> Row:
    num_experts, _ = SIZES[size]
    num_rows = tokens * TOP_K
    ids = jnp.asarray(np.random.default_rng(0).integers(0, num_experts, num_rows), jnp.int32)
    tile = tile_size(num_rows, num_experts)
    row = {}
    for name in ("ffi",) if quick else ("ffi", "xla"):
        plan = partial(route_plan, num_experts=num_experts, tile=tile, implementation=name)
        row[f"{name}_us"] = device_time_us(
            plan, jnp.asarray(ids, jnp.int32), jnp.ones(tokens, bool)
        )
    num_slots = (num_rows // tile + min(num_experts, num_rows)) * tile
    return row | {"floor_us": memory_floor_us(4.0 * (2 * num_rows + num_slots))}


OPS = {
    "activation_topk": activation_row,
    "dense_router": dense_row,
    "hash_router": hash_row,
    "route_plan": plan_row,
}


def main(quick: bool) -> None:
    rows: list[Row] = []
    for op, measure in OPS.items():
        for size in ("flash",) if quick else SIZES:
            peers = PEERS_US.get((op, size), (None,) * len(TOKENS))
            for tokens, peer in zip(TOKENS, peers, strict=True):
                if quick and tokens not in (1, 64, 1024):
                    continue
                row = {"op": op, "size": size, "tokens": tokens, **measure(size, tokens, quick)}
                rows.append(row | {"best_peer_us": peer})
    rows.append({"op": "empty kernel", "ffi_us": empty_kernel_us()})
    write_results("router", rows)


if __name__ == "__main__":
    main("--quick" in sys.argv[1:])
