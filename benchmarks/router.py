"""The router: ours, XLA, the best kernels known, and the floor.

python -m benchmarks.router [--quick]
"""

import sys
from collections.abc import Callable
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
# On an H200, measured 2026-11-21: the faster of vLLM's CUDA and Triton kernels; cuBLAS with
# topk_softplus_sqrt; cuBLAS with its hash variant (each alone, added).
PEERS_US: dict[tuple[str, str], dict[int, float | None]] = {
    ("activation_topk", "flash"): {1: 2.06, 64: 2.15, 1024: 3.04, 4096: 6.67, 16384: 20.3},
    ("activation_topk", "pro"): {1: 2.55, 64: 2.64, 1024: 3.94, 16384: 31.4},
    ("dense_router", "flash"): {1: 10.5, 8: None, 16: 10.7, 64: 11.1, 1024: 14.9, 4096: 28.1},
    ("dense_router", "pro"): {1: 11.6, 16: 11.7, 64: 12.2, 1024: 20.6},
    ("hash_router", "flash"): {1: 8.09, 64: 8.62, 1024: 11.2},
    ("route_plan", "flash"): {1: None, 64: None, 1024: None, 16384: None},
}
TARGETS_US = {
    ("activation_topk", "flash"): {1: 1.9, 64: 2.0, 1024: 2.6, 4096: 4.5, 16384: 10.0},
    ("dense_router", "flash"): {1: 4.2, 8: 4.2, 16: 4.2, 64: 5.0, 1024: 9.0},
    ("dense_router", "pro"): {1: 5.5, 16: 5.5},
}
# What ncu, and clocks read within the kernel, say of those that miss their targets.
HANDOVER = "latency: product 1.1 us, handover of sums 1 us, selection 1.2 us"
BOUND_BY = {
    ("activation_topk", "flash", 16384): "475 instructions a token at 0.66 per cycle and scheduler",
    ("dense_router", "flash", 1): HANDOVER,
    ("dense_router", "flash", 8): HANDOVER,
    ("dense_router", "flash", 16): HANDOVER,
    ("dense_router", "flash", 64): "latency: product 2.3 us, handover of sums 2 us, selection 1 us",
    ("dense_router", "pro", 1): "latency: product 2 us, handover of sums 1.2 us, selection 1.2 us",
    (
        "dense_router",
        "pro",
        16,
    ): "latency: product 2.6 us, handover of sums 1.3 us, selection 1.2 us",
}
QUICK_TOKENS = (1, 64, 1024)


def normal(*shape: int, std: float = 1.0) -> jax.Array:
    return jnp.asarray(std * np.random.default_rng(0).standard_normal(shape), jnp.float32)


def activation_row(size: str, tokens: int, quick: bool) -> Row:
    num_experts, _ = SIZES[size]
    logits, bias = normal(tokens, num_experts), normal(num_experts, std=0.2)
    row: dict[str, float] = {}
    names = ("ffi",) if quick or size == "pro" else ("ffi", "pallas", "xla")
    for name in names:
        route = partial(activation_topk, top_k=TOP_K, scale=SCALE, implementation=name)
        row[f"{name}_us"] = device_time_us(route, logits, bias)
    return row | {"floor_us": memory_floor_us(logits.nbytes + 8 * TOP_K * tokens)}


def dense_row(size: str, tokens: int, quick: bool) -> Row:
    num_experts, width = SIZES[size]
    x = normal(tokens, width).astype(jnp.bfloat16)
    gate = normal(num_experts, width, std=width**-0.5).astype(jnp.bfloat16)
    bias = normal(num_experts, std=0.2)
    row: dict[str, float] = {}
    names = ("ffi", "unfused") if quick or size == "pro" else ("ffi", "unfused", "xla")
    for name in names[tokens > MAX_KERNEL_TOKENS :]:
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
    row: dict[str, float] = {}
    for name in ("ffi",) if quick else ("ffi", "xla"):

        def route(
            gate: jax.Array, x: jax.Array, token_ids: jax.Array, name: str = name
        ) -> tuple[jax.Array, jax.Array]:
            return hash_router(token_ids, table, SCALE, x, gate, name)

        row[f"{name}_us"] = device_time_us(route, gate, x, token_ids, cold=(0,))
    chosen = min(tokens * TOP_K, num_experts) * width * 2
    return row | {"floor_us": memory_floor_us(chosen + x.nbytes)}


def plan_row(size: str, tokens: int, quick: bool) -> Row:
    num_experts, _ = SIZES[size]
    num_rows = tokens * TOP_K
    ids = jnp.asarray(np.random.default_rng(0).integers(0, num_experts, num_rows), jnp.int32)
    tile = tile_size(num_rows, num_experts)
    row: dict[str, float] = {}
    for name in ("ffi",) if quick else ("ffi", "xla"):
        plan = partial(route_plan, num_experts=num_experts, tile=tile, implementation=name)
        row[f"{name}_us"] = device_time_us(
            plan, jnp.asarray(ids, jnp.int32), jnp.ones(tokens, bool)
        )
    num_slots = (num_rows // tile + min(num_experts, num_rows)) * tile
    return row | {"floor_us": memory_floor_us(4.0 * (2 * num_rows + num_slots))}


OPS: dict[str, Callable[[str, int, bool], Row]] = {
    "activation_topk": activation_row,
    "dense_router": dense_row,
    "hash_router": hash_row,
    "route_plan": plan_row,
}


def main(quick: bool) -> None:
    rows: list[Row] = []
    for (op, size), peers in PEERS_US.items():
        targets = TARGETS_US.get((op, size), {})
        for tokens, peer in peers.items():
            if quick and (size != "flash" or tokens not in QUICK_TOKENS):
                continue
            row = {"op": op, "size": size, "tokens": tokens, **OPS[op](size, tokens, quick)}
            row |= {"best_peer_us": peer, "target_us": targets.get(tokens)}
            rows.append(row | {"bound_by": BOUND_BY.get((op, size, tokens))})
    rows.append({"op": "empty kernel", "ffi_us": empty_kernel_us()})
    write_results("router", rows)


if __name__ == "__main__":
    main("--quick" in sys.argv[1:])
