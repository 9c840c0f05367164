"""topk_select over rows of scores: ours, XLA, the best kernels known, and the floor.

python -m benchmarks.topk [--quick]
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import device_time_us, empty_kernel_us, memory_floor_us, write_results
from dsv4_jax.ops.topk import topk_select

K = 512
# (rows, length): best of vLLM's and FlashInfer's kernels on an H200, inputs in L2, normal scores;
# then the best of those that are exact for every input (measured 2026-11-21, k = 512).
PEERS = {
    (1, 8192): (4.40, 6.89),
    (8, 8192): (4.67, 7.11),
    (64, 8192): (5.02, 7.22),
    (1, 65536): (9.68, 30.2),
    (8, 65536): (9.82, 27.8),
    (64, 65536): (27.5, 28.2),
    (1, 262144): (14.6, 38.8),
    (8, 262144): (14.8, 40.6),
    (64, 262144): (93.1, 93.1),
    (2048, 8192): (56.9, 56.9),
    (2048, 65536): (304, 304),
}
TARGETS_US = {
    (1, 8192): 4.7,
    (8, 8192): 4.7,
    (64, 8192): 5.0,
    (1, 65536): 9.7,
    (8, 65536): 9.7,
    (64, 65536): 25.0,
    (1, 262144): 14.8,
    (8, 262144): 14.8,
    (64, 262144): 60.0,
}
# XLA sorts whole rows, so few shapes tell by how much it is slower.
XLA_SHAPES = {(1, 8192), (64, 65536), (1, 262144)}
# Where the values of other options are measured, too.
OPTION_SHAPES = {(1, 8192), (64, 65536)}


def scores(kind: str, rows: int, n: int) -> jax.Array:
    x = np.random.default_rng(0).standard_normal((min(rows, 64), n), np.float32)
    x = 30 + 3 * x if kind == "narrow" else x
    return jnp.tile(jnp.asarray(x), (-(-rows // 64), 1))[:rows]


def time_us(x: jax.Array, k: int, implementation: str, sorted: bool = False) -> float:
    def select(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return topk_select(x, k, sorted=sorted, implementation=implementation)

    return device_time_us(select, x)


def main(quick: bool) -> None:
    rows: list[dict[str, Any]] = []
    for (num_rows, n), (peer, exact_peer) in PEERS.items():
        if quick and num_rows == 2048:
            continue
        x = scores("normal", num_rows, n)
        row: dict[str, Any] = {"rows": num_rows, "length": n, "k": K}
        row["ours_us"] = time_us(x, K, "ffi")
        if num_rows != 2048:
            row["narrow_us"] = time_us(scores("narrow", num_rows, n), K, "ffi")
        if not quick and (num_rows, n) in OPTION_SHAPES:
            row |= {
                "sorted_us": time_us(x, K, "ffi", sorted=True),
                "k1024_us": time_us(x, 1024, "ffi"),
            }
        if not quick and (num_rows, n) in XLA_SHAPES:
            row["xla_us"] = time_us(x, K, "xla")
        row |= {
            "best_peer_us": peer,
            "exact_peer_us": exact_peer,
            "target_us": TARGETS_US.get((num_rows, n)),
            "floor_us": memory_floor_us(x.nbytes),
        }
        rows.append(row)
        print(row, flush=True)
    for num_rows in (1, 16384):
        x = scores("normal", num_rows, 256)
        rows.append({"rows": num_rows, "length": 256, "k": 6, "ours_us": time_us(x, 6, "ffi")})
    rows.append({"rows": "empty kernel", "ours_us": empty_kernel_us()})
    write_results("topk", rows)


if __name__ == "__main__":
    main("--quick" in sys.argv)
