"""Products of inputs that are E4M3 codes already, and what makes them: ours, DeepGEMM, the floor.

python -m benchmarks.coded_gemm [--quick]
"""

import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gemm import FP8_PEERS, inputs, weight
from benchmarks.harness import device_time_us, memory_floor_us, write_results
from dsv4_jax.formats import coded_inputs
from dsv4_jax.formats.coded_inputs import CodedInputs
from dsv4_jax.formats.tiled import TiledWeight
from dsv4_jax.ops.coded_gemm import FORMATS, coded_gemm
from dsv4_jax.ops.gemm import gemm
from dsv4_jax.ops.norm_quantize import rms_norm_quantize
from dsv4_jax.ops.norms import rms_norm

ROWS = (256, 1024, 4096)
QUICK_ROWS = (256, 1024)
EPS = 1e-6


def product(coded: CodedInputs, w: TiledWeight) -> jax.Array:
    return coded_gemm(coded, w, implementation="ffi")


def product_with_rounding(x: jax.Array, w: TiledWeight) -> jax.Array:
    return gemm(x, w, round_input=True, implementation="ffi")


def products(quick: bool) -> Iterator[dict[str, Any]]:
    for weight_format in FORMATS:
        for (k, n), peers in FP8_PEERS.items():
            w = weight(weight_format, n, k)
            for num_rows in QUICK_ROWS if quick else ROWS:
                x = inputs(num_rows, k)
                coded = jax.jit(coded_inputs.encode)(x)
                ours = device_time_us(product, coded, w, cold=(1,))
                num_bytes = num_rows * (k + 2 * n) + w.codes.nbytes + w.scales.nbytes
                yield {
                    "weights": weight_format,
                    "k": k,
                    "n": n,
                    "rows": num_rows,
                    "ours_us": ours,
                    "with_rounding_us": device_time_us(product_with_rounding, x, w, cold=(1,)),
                    "deepgemm_us": peers[num_rows],
                    "floor_us": memory_floor_us(num_bytes),
                    "tflops": 2 * num_rows * n * k / ours / 1e6,
                }


def norms(quick: bool) -> Iterator[dict[str, Any]]:
    for width in (1024, 4096, 7168):
        factors = jnp.ones(width, jnp.float32)
        for num_rows in QUICK_ROWS if quick else ROWS:
            x = inputs(num_rows, width)

            def coded(x: jax.Array, factors: jax.Array) -> Any:
                return rms_norm_quantize(x, factors, EPS, "ffi")

            def plain(x: jax.Array, factors: jax.Array) -> jax.Array:
                return rms_norm(x, factors, EPS)

            yield {
                "weights": "rms_norm_quantize",
                "k": width,
                "rows": num_rows,
                "ours_us": device_time_us(coded, x, factors),
                "norm_alone_by_xla_us": device_time_us(plain, x, factors),
                "floor_us": memory_floor_us(num_rows * width * 5),
            }


def main(quick: bool) -> None:
    write_results("coded-gemm", [*products(quick), *norms(quick)])


if __name__ == "__main__":
    main("--quick" in sys.argv[1:])
