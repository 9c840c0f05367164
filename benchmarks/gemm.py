"""Products with packed weights: ours, the best kernels known, and the floor.

python -m benchmarks.gemm [--quick]

What bounds up to 64 rows, measured on an H200: a kernel that only reads 8.7 MB takes 3.4 us with
plain loads, 4.1 to 5.5 us with bulk copies, an empty one 0.65 us. Beyond that FP4 weights are bound
by the issue of instructions, not by memory: 250 for each warp's 16 x 128 weights, twice what their
bytes leave time for at the rate of one instruction in two clocks that profiles show.
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
from dsv4_jax.ops.gemm import Segment, gemm, grouped_gemm, projections

# (k, n): best of Marlin (FP4 weights) and cuBLAS (BF16 weights) on an H200 by rows of input.
FP4_PEERS = {
    (4096, 4096): {1: 9.43, 8: 9.64, 16: 10.3, 64: 12.3, 256: 18.6, 1024: 43.9},
    (4096, 32768): {1: 34.2, 8: 34.4, 16: 39.2, 64: 59.6, 256: 95.5, 1024: 393.0},
    (1024, 32768): {1: 12.8, 8: 12.7, 16: 13.9, 64: 18.8, 256: 28.0, 1024: 96.7},
}
# (k, n): DeepGEMM with inputs that are FP8 already.
FP8_PEERS = {
    (4096, 1536): {1: 9.99, 16: 6.89, 64: 6.41, 256: 7.53, 1024: 11.9, 4096: 37.2},
    (1024, 32768): {1: 12.7, 16: 13.0, 64: 13.2, 256: 19.6, 1024: 57.5, 4096: 215.0},
    (8192, 4096): {1: 16.4, 16: 14.5, 64: 13.2, 256: 19.4, 1024: 47.9, 4096: 188.0},
    (4096, 4096): {1: 12.1, 16: 8.96, 64: 7.68, 256: 11.5, 1024: 26.1, 4096: 97.3},
}
VOCABULARY, HIDDEN = 129280, 4096


def weight(weight_format: str, n: int, k: int) -> TiledWeight:
    """Random and normal, in device memory."""

    def quantized(key: jax.Array) -> TiledWeight:
        w = jax.random.normal(key, (n, k), jnp.bfloat16)
        match weight_format:
            case "mxfp4":
                return tiled.tile_mxfp4(*mxfp4.quantize(w))
            case "nvfp4":
                return tiled.tile_nvfp4(*nvfp4.quantize(w))
            case "fp8_block":
                return tiled.tile_fp8_block(*fp8_block.quantize(w))
            case _:
                return tiled.tile_bf16(w)

    return jax.jit(quantized)(jax.random.key(0))


def inputs(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.bfloat16)


def floor_us(x: jax.Array, weights: list[TiledWeight], out_bytes: int) -> float:
    num_bytes = x.nbytes + out_bytes
    for w in weights:
        num_bytes += w.codes.nbytes + w.scales.nbytes
    return memory_floor_us(num_bytes)


def row(
    weight_format: str, num_rows: int, w: TiledWeight, peer: float | None, round_input: bool
) -> dict[str, Any]:
    n, k = w.shape
    x = inputs(num_rows, k)
    dtype = jnp.float32 if weight_format == "bf16" else jnp.bfloat16

    def product(x: jax.Array, w: TiledWeight) -> jax.Array:
        return gemm(x, w, round_input=round_input, out_dtype=dtype, implementation="ffi")

    ours = device_time_us(product, x, w, cold=(1,))
    floor = floor_us(x, [w], num_rows * n * jnp.dtype(dtype).itemsize)
    return {
        "weights": weight_format,
        "inputs": "e4m3" if round_input else "bf16",
        "k": k,
        "n": n,
        "rows": num_rows,
        "ours_us": ours,
        "best_peer_us": peer,
        "floor_us": floor,
        "ours_to_floor": ours / floor,
        "tflops": 2 * num_rows * n * k / ours / 1e6,
    }


def dense(quick: bool) -> Iterator[dict[str, Any]]:
    for weight_format in ("mxfp4", "nvfp4"):
        for (k, n), peers in FP4_PEERS.items():
            w = weight(weight_format, n, k)
            for num_rows, peer in peers.items():
                if not quick or num_rows in (1, 16, 64, 1024):
                    yield row(weight_format, num_rows, w, peer, False)
    for (k, n), peers in FP8_PEERS.items():
        w = weight("fp8_block", n, k)
        for num_rows, peer in peers.items():
            if not quick or num_rows in (1, 16, 256, 1024):
                yield row("fp8_block", num_rows, w, peer, True)
    head = weight("bf16", VOCABULARY, HIDDEN)
    for num_rows in (1, 16, 64):
        yield row("bf16", num_rows, head, None, False)


def attention_projections(num_rows: int) -> dict[str, Any]:
    """The six products of a layer with compressed attention that read its normalised input."""
    low_rank, kv = weight("fp8_block", 1024, HIDDEN), weight("fp8_block", 512, HIDDEN)
    compressor, indexer = weight("bf16", 2048, HIDDEN), weight("bf16", 512, HIDDEN)
    heads = weight("bf16", 64, HIDDEN)
    weights = [low_rank, kv, compressor, indexer, heads]
    x = inputs(num_rows, HIDDEN)

    def products(x: jax.Array, weights: list[TiledWeight]) -> tuple[jax.Array, ...]:
        segments = [
            Segment(w, w.weight_format == "fp8_block", None if i < 2 else jnp.float32)
            for i, w in enumerate(weights)
        ]
        return projections(x, segments, implementation="ffi")

    ours = device_time_us(products, x, weights, cold=(1,))
    floor = floor_us(x, weights, num_rows * (2 * 1536 + 4 * 2624))
    return {
        "weights": "fp8_block + bf16, one call",
        "k": HIDDEN,
        "n": 1536 + 2624,
        "rows": num_rows,
        "ours_us": ours,
        "floor_us": floor,
        "ours_to_floor": ours / floor,
    }


def output_groups(num_rows: int) -> dict[str, Any]:
    """The block-diagonal half of the attention's output projection, with unrounded inputs."""
    w = weight("fp8_block", 8192, HIDDEN)
    x = inputs(num_rows, 8, HIDDEN)

    def product(x: jax.Array, w: TiledWeight) -> jax.Array:
        return grouped_gemm(x, w, implementation="ffi")

    ours = device_time_us(product, x, w, cold=(1,))
    floor = floor_us(x, [w], num_rows * 8192 * 2)
    return {
        "weights": "fp8_block, 8 groups",
        "inputs": "bf16",
        "k": HIDDEN,
        "n": 8192,
        "rows": num_rows,
        "ours_us": ours,
        "floor_us": floor,
        "ours_to_floor": ours / floor,
    }


def main(quick: bool) -> None:
    rows = list(dense(quick))
    for num_rows in (1, 16, 64):
        rows += [attention_projections(num_rows), output_groups(num_rows)]
    rows.append({"weights": "empty kernel", "ours_us": empty_kernel_us()})
    write_results("gemm", rows)


if __name__ == "__main__":
    main("--quick" in sys.argv[1:])
