"""The router: ours, XLA, the best kernels known, and the floor.

python -m benchmarks.router [--quick]
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

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
from dsv4_jax.ops.dense_router import dense_router
from dsv4_jax.ops.grouped import route_plan, tile_size
from dsv4_jax.ops.hash_router import hash_router
from dsv4_jax.ops.router import activation_topk

TOP_K, SCALE, VOCAB = 6, 1.5, 1000
SIZES = {"flash": (256, 4096), "pro": (384, 7168)}
# What is timed, by tokens.
CASES: dict[tuple[str, str], dict[int, tuple[str, ...]]] = {
    ("activation_topk", "flash"): {
        1: ("ffi", "pallas", "xla"),
        64: ("ffi",),
        1024: ("ffi", "pallas", "xla"),
        4096: ("ffi",),
        16384: ("ffi", "pallas"),
    },
    ("activation_topk", "pro"): {1: ("ffi",), 1024: ("ffi",)},
    # At 64, at MIN_TILED_TOKENS and at MAX_TILED_TOKENS the fastest changes.
    ("dense_router", "flash"): {
        1: ("ffi", "unfused", "xla"),
        8: ("ffi",),
        16: ("ffi", "unfused"),
        64: ("ffi", "unfused", "xla"),
        256: ("ffi", "unfused"),
        512: ("ffi", "unfused"),
        1024: ("ffi", "unfused", "xla"),
        2048: ("ffi", "unfused"),
        4096: ("ffi", "unfused"),
    },
    ("dense_router", "pro"): {1: ("ffi",), 16: ("ffi",), 64: ("ffi", "unfused")},
    ("hash_router", "flash"): {1: ("ffi",), 64: ("ffi", "xla"), 256: ("ffi", "xla")},
    ("route_plan", "flash"): {1: ("ffi",), 64: ("ffi", "xla"), 1024: ("ffi",), 16384: ("ffi",)},
}
QUICK_TOKENS = (1, 64, 1024)
# On an H200, measured 2026-11-21: the faster of vLLM's CUDA and Triton kernels; cuBLAS with
# topk_softplus_sqrt; cuBLAS with its hash variant (each alone, added).
PEERS_US = {
    ("activation_topk", "flash"): {1: 2.06, 64: 2.15, 1024: 3.04, 4096: 6.67, 16384: 20.3},
    ("activation_topk", "pro"): {1: 2.55, 1024: 3.94},
    ("dense_router", "flash"): {
        1: 10.5,
        16: 10.7,
        64: 11.1,
        256: 11.4,
        1024: 14.9,
        4096: 28.1,
    },
    ("dense_router", "pro"): {1: 11.6, 16: 11.7, 64: 12.2},
    ("hash_router", "flash"): {1: 8.09, 64: 8.62, 256: 8.93},
}
TARGETS_US = {
    ("activation_topk", "flash"): {1: 1.9, 64: 2.0, 1024: 2.6, 4096: 4.5, 16384: 10.0},
    ("dense_router", "flash"): {1: 4.2, 8: 4.2, 16: 4.2, 64: 5.0, 1024: 9.0},
    ("dense_router", "pro"): {1: 5.5, 16: 5.5},
}


# Times an implementation; the bytes that must come from memory.
Case = tuple[Callable[[str], float], int]


def normal(*shape: int, std: float = 1.0) -> jax.Array:
    return jnp.asarray(std * np.random.default_rng(0).standard_normal(shape), jnp.float32)


def activation_case(size: str, tokens: int) -> Case:
    num_experts, _ = SIZES[size]
    logits, bias = normal(tokens, num_experts), normal(num_experts, std=0.2)

    def time_us(name: str) -> float:
        route = partial(activation_topk, top_k=TOP_K, scale=SCALE, implementation=name)
        return device_time_us(route, logits, bias)

    return time_us, logits.nbytes + 8 * TOP_K * tokens


@contextlib.contextmanager
def any_number_of_tokens() -> Iterator[None]:
    """The kernels run also where another implementation is faster."""
    module = sys.modules[dense_router.__module__]
    with mock.patch.multiple(module, MIN_TILED_TOKENS=0, MAX_TILED_TOKENS=1 << 20):
        yield


def dense_case(size: str, tokens: int) -> Case:
    num_experts, width = SIZES[size]
    x = normal(tokens, width).astype(jnp.bfloat16)
    gate = normal(num_experts, width, std=width**-0.5).astype(jnp.bfloat16)
    bias = normal(num_experts, std=0.2)

    def time_us(name: str) -> float:
        route = partial(dense_router, top_k=TOP_K, scale=SCALE, implementation=name)
        with any_number_of_tokens():
            return device_time_us(route, x, gate, bias, cold=(1,))

    return time_us, gate.nbytes + x.nbytes


def hash_case(size: str, tokens: int) -> Case:
    num_experts, width = SIZES[size]
    x = normal(tokens, width).astype(jnp.bfloat16)
    gate = normal(num_experts, width, std=width**-0.5).astype(jnp.bfloat16)
    rng = np.random.default_rng(0)
    permutations = rng.permuted(np.tile(np.arange(num_experts), (VOCAB, 1)), axis=1)
    table = jnp.asarray(permutations[:, :TOP_K], jnp.int32)
    token_ids = jnp.asarray(rng.integers(0, VOCAB, tokens), jnp.int32)

    def time_us(name: str) -> float:
        def route(
            gate: jax.Array, x: jax.Array, token_ids: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            return hash_router(token_ids, table, SCALE, x, gate, name)

        return device_time_us(route, gate, x, token_ids, cold=(0,))

    return time_us, min(tokens * TOP_K, num_experts) * width * 2 + x.nbytes


def plan_case(size: str, tokens: int) -> Case:
    num_experts, _ = SIZES[size]
    num_rows = tokens * TOP_K
    ids = jnp.asarray(np.random.default_rng(0).integers(0, num_experts, num_rows), jnp.int32)
    tile = tile_size(num_rows, num_experts)

    def time_us(name: str) -> float:
        plan = partial(route_plan, num_experts=num_experts, tile=tile, implementation=name)
        return device_time_us(plan, ids, jnp.ones(tokens, bool))

    num_slots = (num_rows // tile + min(num_experts, num_rows)) * tile
    return time_us, 4 * (2 * num_rows + num_slots)


OPS: dict[str, Callable[[str, int], Case]] = {
    "activation_topk": activation_case,
    "dense_router": dense_case,
    "hash_router": hash_case,
    "route_plan": plan_case,
}


def main(quick: bool) -> None:
    rows: list[Row] = []
    for (op, size), by_tokens in CASES.items():
        targets, peers = TARGETS_US.get((op, size), {}), PEERS_US.get((op, size), {})
        for tokens, names in by_tokens.items():
            if quick and (size != "flash" or tokens not in QUICK_TOKENS):
                continue
            time_us, num_bytes = OPS[op](size, tokens)
            row: dict[str, Any] = {"op": op, "size": size, "tokens": tokens}
            for name in names[:1] if quick else names:
                row[f"{name}_us"] = time_us(name)
            row |= {"best_peer_us": peers.get(tokens), "target_us": targets.get(tokens)}
            rows.append(row | {"floor_us": memory_floor_us(num_bytes)})
            print(row, flush=True)
    rows.append({"op": "empty kernel", "ffi_us": empty_kernel_us()})
    write_results("router", rows)


if __name__ == "__main__":
    main("--quick" in sys.argv[1:])
