"""Runs the cases of some subjects on the GPU and compares their results with the CPU handlers'.

`python -m tests.sanitizer.run SUBJECT ...`; JAX_PLATFORMS is "cpu,cuda". XLA computes nothing on
the GPU, where the library's calls are programs of their own.
"""

import math
import sys
import time
from functools import partial
from typing import Any
from unittest import mock

import jax
import numpy as np

import dsv4_ffi
from tests.sanitizer.cases import SUBJECTS

# Of results that are rounded in another order.
LARGEST_DIFFERENCE, LARGEST_SHARE = 5e-3, 0.01
NEEDS_BLACKWELL = ("nvfp4_products",)


class OnGpu:
    """`dsv4_ffi.call` of arrays on the CPU, to which its results come back."""

    def __init__(self) -> None:
        self.called: set[str] = set()
        self.call = dsv4_ffi.call

    def __call__(self, name: str, shapes: Any, *arrays: jax.Array, **options: Any) -> Any:
        self.called.add(name)
        cpu, gpu = jax.devices("cpu")[0], jax.devices("cuda")[0]
        with jax.disable_jit(False), jax.default_device(gpu):
            run = jax.jit(partial(self.call, name, shapes, **options))
            results = run(*jax.device_put(arrays, gpu))
        return jax.device_put(results, cpu)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative to what is allowed; infinite where only one has a number."""
    if expected.dtype.kind in "iub" or expected.dtype.itemsize == 1:
        differ = found.view(np.uint8) != expected.view(np.uint8)
        return float(differ.mean()) / LARGEST_SHARE if differ.size else 0.0
    a, b = (np.asarray(x, np.float64) for x in (found, expected))
    differ = (a != b) & ~(np.isnan(a) & np.isnan(b))
    error = np.linalg.norm(a[differ] - b[differ]) / max(np.linalg.norm(b[np.isfinite(b)]), 1e-30)
    return math.inf if np.isnan(error) else float(error) / LARGEST_DIFFERENCE


def check(subject: str) -> bool:
    """Whether all calls of a subject were made, with the right results."""
    capability = jax.devices("cuda")[0].compute_capability
    if subject in NEEDS_BLACKWELL and not capability.startswith("10."):
        print(f"{subject}: not for a device of compute capability {capability}")
        return True
    begin, differences = time.perf_counter(), []
    calls, cases = SUBJECTS[subject]
    on_gpu = OnGpu()
    for case in cases():
        with jax.disable_jit():
            expected = map(np.asarray, jax.tree.leaves(case()))
            with mock.patch("dsv4_ffi.call", on_gpu):
                found = map(np.asarray, jax.tree.leaves(case()))
        differences.append(max(map(difference, found, expected)))
    seconds = time.perf_counter() - begin
    print(
        f"{subject}: {len(differences)} cases, {max(differences):.2f} of the tolerance, "
        f"{seconds:.1f} s"
    )
    if on_gpu.called != calls:
        print(f"{subject}: calls {sorted(on_gpu.called)}, expected {sorted(calls)}")
    return max(differences) <= 1 and on_gpu.called == calls


if __name__ == "__main__":
    sys.exit(not all([check(subject) for subject in sys.argv[1:]]))
