"""Hyper-connections: spread, collapse and norm in one call, ours, XLA, and the best peers.

python -m benchmarks.hyper_connections [--quick]
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

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
from dsv4_jax.ops.hyper_connections import Gates, hc_post, hc_post_pre, hc_pre

STATIC: dict[str, Any] = {"num_iterations": 20, "eps": 1e-6, "norm_eps": 1e-6}
TOKENS = (1, 16, 64, 1024, 4096)
WIDTHS = {"flash": 4096, "pro": 7168}
# On an H200, measured 2026-11-21, weights and streams from device memory: vLLM's TileLang kernels
# (of pre with the RMSNorm), FlashInfer's for post.
PEERS_US = {
    ("hc_post_pre", "flash"): (7.74, 9.94, 13.2, 44.6, 166),
    ("hc_pre", "flash"): (8.42, 8.79, 9.42, 27.7, 92.7),
    ("hc_post", "flash"): (2.06, None, 3.09, 20.0, 74.2),
    ("hc_post", "pro"): (4.67, None, 5.52, 35.9, 126),
}


def normal(*shape: int, std: float = 1.0) -> jax.Array:
    return jnp.asarray(std * np.random.default_rng(0).standard_normal(shape, np.float32))


def row(op: str, size: str, tokens: int, quick: bool) -> dict[str, Any]:
    width = WIDTHS[size]
    streams = normal(tokens, 4, width).astype(jnp.bfloat16)
    gates = Gates(normal(24, 4 * width, std=0.01), normal(24), normal(3), normal(width))
    output, post = normal(tokens, width).astype(jnp.bfloat16), abs(normal(tokens, 4))
    comb = jax.nn.softmax(normal(tokens, 4, 4), axis=1)
    calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "hc_pre": (partial(hc_pre, **STATIC), (streams, gates)),
        "hc_post": (hc_post, (output, streams, post, comb)),
        "hc_post_pre": (partial(hc_post_pre, **STATIC), (output, streams, post, comb, gates)),
    }
    function, args = calls[op]
    results = jax.eval_shape(function, *args)
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((args, results)))
    times = {}
    for name in ("ffi",) if quick else ("ffi", "xla"):
        call = partial(function, implementation=name)
        times[f"{name}_us"] = device_time_us(call, *args, cold=range(len(args)))
    return times | {"floor_us": memory_floor_us(num_bytes)}


def main(quick: bool) -> None:
    rows: list[Row] = []
    for op in ("hc_post_pre", "hc_pre", "hc_post"):
        for size in ("flash",) if quick else WIDTHS:
            peers = PEERS_US.get((op, size), (None,) * len(TOKENS))
            for tokens, peer in zip(TOKENS, peers, strict=True):
                if quick and (tokens == 16 or op == "hc_post"):
                    continue
                shared: dict[str, Any] = {"op": op, "size": size, "tokens": tokens}
                rows.append(shared | row(op, size, tokens, quick) | {"best_peer_us": peer})
    rows.append({"op": "empty kernel", "ffi_us": empty_kernel_us()})
    write_results("hyper-connections", rows)


if __name__ == "__main__":
    main("--quick" in sys.argv[1:])
