"""nvfp4_quantize beside its XLA reference and beside a copy: python -m benchmarks.quantize."""

import jax
import jax.numpy as jnp

from benchmarks import harness
from dsv4_jax.formats import nvfp4
from dsv4_jax.ops.quantize import nvfp4_quantize

SHAPES = ((1, 4096), (16, 4096), (64, 7168), (1024, 4096), (32768, 4096))
SMALL_ROWS = 64


def rows() -> list[harness.Row]:
    empty_us = harness.empty_kernel_us()
    return [
        {**row(shape, per_row), "empty_us": empty_us}
        for shape in SHAPES
        for per_row in (True, False)
    ]


def row(shape: tuple[int, int], per_row: bool) -> harness.Row:
    x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    # Activations of a few rows were just written: they are in L2.
    cold = () if shape[0] <= SMALL_ROWS else (0,)

    def time_us(implementation: str) -> float:
        return harness.device_time_us(
            lambda x: nvfp4_quantize(x, per_row, implementation), x, cold=cold
        )

    result_bytes = x.size // 2 + x.size // nvfp4.GROUP
    floor_us = harness.memory_floor_us(x.nbytes + result_bytes)
    ffi_us = time_us("ffi")
    copy_us = harness.device_time_us(lambda x: -x, x, cold=cold)
    return {
        "m": shape[0],
        "k": shape[1],
        "scale": "row" if per_row else "matrix",
        "ffi_us": ffi_us,
        "xla_us": time_us("xla"),
        "copy_us": copy_us,
        "ffi/copy": ffi_us / copy_us,
        "floor_us": floor_us,
        "ffi/floor": ffi_us / floor_us,
    }


if __name__ == "__main__":
    harness.write_results("quantize", rows())
