"""The experts of a layer, from routed tokens to their combined output: ours, the best known, the
floor, and XLA.

python -m benchmarks.moe [--quick]
"""

import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import device_time_us, empty_kernel_us, memory_floor_us, write_results
from dsv4_jax.formats import fp8_block, mxfp4, nvfp4, tiled
from dsv4_jax.formats.tiled import TiledWeight
from dsv4_jax.ops.experts import (
    clamped_swiglu,
    experts_with_shared,
    routed_experts,
    sorted_gemm,
)
from dsv4_jax.ops.gemm import Segment, projections

NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, LIMIT = 256, 6, 4096, 2048, 10.0
# Marlin's chain (align, gate and up, SwiGLU, down, sum) with MXFP4 on an H200, by tokens.
MXFP4_PEERS = {1: 54.3, 8: 241.0, 64: 1003.0, 256: 1454.0, 1024: 2050.0}
# Each call has the experts of the one before plus this, so that few stay in the L2 cache. The
# addition, about an empty kernel, is within our time.
NEXT_EXPERTS = 37


def expert_weight(
    weight_format: str, outputs: int, inputs: int, num_experts: int = NUM_EXPERTS
) -> TiledWeight:
    """Random and normal, of all experts."""

    def one(key: jax.Array) -> TiledWeight:
        w = jax.random.normal(key, (outputs, inputs), jnp.bfloat16) / inputs**0.5
        match weight_format:
            case "mxfp4":
                return tiled.tile_mxfp4(*mxfp4.quantize(w))
            case "nvfp4":
                return tiled.tile_nvfp4(*nvfp4.quantize(w))
            case _:
                return tiled.tile_fp8_block(*fp8_block.quantize(w))

    return jax.jit(lambda key: jax.lax.map(one, jax.random.split(key, num_experts)))(
        jax.random.key(outputs)
    )


def random_ids(num_tokens: int) -> np.ndarray:
    """[tokens, k]: each token's experts are different and equally likely."""
    order = np.random.default_rng(0).random((num_tokens, NUM_EXPERTS)).argsort(-1)
    return order[:, :TOP_K].astype(np.int32)


def row(
    weights: list[TiledWeight], num_tokens: int, round_input: bool, with_xla: bool
) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    ids = random_ids(num_tokens)
    x = jnp.asarray(rng.standard_normal((num_tokens, HIDDEN)), jnp.bfloat16)
    routing_weights = jnp.asarray(rng.uniform(0.1, 0.5, ids.shape), jnp.float32)
    valid = jnp.ones(num_tokens, bool)

    def time_us(implementation: str) -> float:
        def experts(ids: jax.Array, *args: Any) -> tuple[jax.Array, jax.Array]:
            y = routed_experts(
                x,
                routing_weights,
                ids,
                valid,
                *args,
                limit=LIMIT,
                round_input=round_input,
                implementation=implementation,
            )
            return (ids + NEXT_EXPERTS) % NUM_EXPERTS, y

        return device_time_us(experts, jnp.asarray(ids), *weights, carried=1)

    hit = len(np.unique(ids))
    bytes_of_expert = sum(a.nbytes for w in weights for a in (w.codes, w.scales)) / NUM_EXPERTS
    ours, floor = time_us("ffi"), memory_floor_us(hit * bytes_of_expert)
    return {
        "weights": weights[0].weight_format,
        "inputs": "e4m3" if round_input else "bf16",
        "tokens": num_tokens,
        "experts_hit": hit,
        "ours_us": ours,
        "best_peer_us": MXFP4_PEERS.get(num_tokens),
        "floor_us": floor,
        "ours_to_floor": ours / floor,
        "xla_us": time_us("xla") if with_xla else None,
    }


def shared_row(
    weights: list[TiledWeight], shared: list[TiledWeight], num_tokens: int
) -> dict[str, Any]:
    """Routed experts and the shared one, in one operation and one after the other."""
    rng = np.random.default_rng(1)
    ids = random_ids(num_tokens)
    x = jnp.asarray(rng.standard_normal((num_tokens, HIDDEN)), jnp.bfloat16)
    routing_weights = jnp.asarray(rng.uniform(0.1, 0.5, ids.shape), jnp.float32)
    valid = jnp.ones(num_tokens, bool)
    options: dict[str, Any] = {"limit": LIMIT, "round_input": True}

    def together(ids: jax.Array, routed: Any, shared: Any) -> tuple[jax.Array, jax.Array]:
        y = experts_with_shared(x, routing_weights, ids, valid, routed, shared, **options)
        return (ids + NEXT_EXPERTS) % NUM_EXPERTS, y

    def separately(ids: jax.Array, routed: Any, shared: Any) -> tuple[jax.Array, jax.Array]:
        w1, w3, w2 = (Segment(weight, True) for weight in shared)
        gate, up = projections(x, [w1, w3])
        hidden = clamped_swiglu(gate, up, LIMIT).astype(x.dtype)
        y = projections(hidden, [w2])[0] + routed_experts(
            x, routing_weights, ids, valid, *routed, **options
        )
        return (ids + NEXT_EXPERTS) % NUM_EXPERTS, y

    args = jnp.asarray(ids), tuple(weights), tuple(shared)
    hit = len(np.unique(ids))
    num_bytes = sum(a.nbytes for w in weights for a in (w.codes, w.scales)) * hit / NUM_EXPERTS
    num_bytes += sum(w.codes.nbytes for w in shared)
    ours = device_time_us(together, *args, cold=(2,), carried=1)
    floor = memory_floor_us(num_bytes)
    return {
        "weights": f"{weights[0].weight_format}, with the shared expert",
        "inputs": "e4m3",
        "tokens": num_tokens,
        "experts_hit": hit,
        "ours_us": ours,
        "separately_us": device_time_us(separately, *args, cold=(2,), carried=1),
        "floor_us": floor,
        "ours_to_floor": ours / floor,
    }


def sorted_row(weight: TiledWeight, rows_of_group: int) -> dict[str, Any]:
    """One product of as many rows for each expert."""
    num_rows = NUM_EXPERTS * rows_of_group
    x = jnp.asarray(np.random.default_rng(0).standard_normal((num_rows, HIDDEN)), jnp.bfloat16)
    sizes = jnp.full(NUM_EXPERTS, rows_of_group, jnp.int32)

    def products(x: jax.Array, sizes: jax.Array, weight: TiledWeight) -> jax.Array:
        return sorted_gemm(x, sizes, weight, implementation="ffi")

    ours = device_time_us(products, x, sizes, weight)
    floor = memory_floor_us(weight.codes.nbytes + weight.scales.nbytes + x.nbytes)
    return {
        "weights": f"{weight.weight_format}, sorted rows",
        "inputs": "bf16",
        "tokens": num_rows,
        "ours_us": ours,
        "floor_us": floor,
        "ours_to_floor": ours / floor,
    }


def measured(quick: bool) -> Iterator[dict[str, Any]]:
    for weight_format in ("mxfp4",) if quick else ("mxfp4", "nvfp4", "fp8_block"):
        up = [expert_weight(weight_format, INTERMEDIATE, HIDDEN) for _ in range(2)]
        weights = [*up, expert_weight(weight_format, HIDDEN, INTERMEDIATE)]
        for num_tokens in MXFP4_PEERS:
            for round_input in (False, True):
                with_xla = weight_format == "mxfp4" and num_tokens <= 64 and not round_input
                yield row(weights, num_tokens, round_input, with_xla and not quick)
        if weight_format == "mxfp4":
            shared = [expert_weight("fp8_block", *w.shape, num_experts=1) for w in weights]
            shared = [jax.tree.map(lambda a: a[0], w) for w in shared]
            for num_tokens in (1, 2, 3):
                yield shared_row(weights, shared, num_tokens)
        yield sorted_row(up[0], 4)


def main(quick: bool) -> None:
    rows = list(measured(quick))
    rows.append({"weights": "empty kernel", "ours_us": empty_kernel_us()})
    write_results("moe", rows)


if __name__ == "__main__":
    main("--quick" in sys.argv[1:])
