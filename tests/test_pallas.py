"""Every Pallas kernel: interpreted with race detection, lowered, compiled for sm_90 and sm_100.

They need jax 0.11, and that Python 3.12. Where this environment is older, the environment variable
DSV4_NEWER_PYTHON or the PATH may offer another Python that has them.
"""

import functools
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.router import activation_topk

PROBE = "import jax; assert jax.__version_info__ >= (0, 11), jax.__version__"
PLUGIN = "import jax_cuda13_plugin"


@functools.cache
def newer_python() -> str | None:
    """A Python with jax 0.11 or later."""
    named = [os.environ.get("DSV4_NEWER_PYTHON"), sys.executable]
    on_path = [shutil.which(f"python3.{minor}") for minor in (12, 13, 14)]
    return next((p for p in [*named, *on_path] if p and runs(p, "-c", PROBE)[0]), None)


def runs(python: str, *arguments: str) -> tuple[bool, str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [python, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode == 0, done.stdout + done.stderr


def mosaic(*arguments: str) -> None:
    python = newer_python()
    if python is None:
        pytest.skip(
            f"jax {jax.__version__} has no Mosaic GPU kernels, and neither DSV4_NEWER_PYTHON nor "
            "the PATH names a Python with jax 0.11 or later"
        )
    if "compile" in arguments and not runs(python, "-c", PLUGIN)[0]:
        pytest.skip(f"{python} has no jax_cuda13_plugin to compile with")
    succeeded, output = runs(python, "-m", "tests.mosaic", *arguments)
    assert succeeded and "done" in output.splitlines(), output


def test_interpreted_without_races():
    mosaic("interpret")


def test_lowered():
    mosaic("lower")


@pytest.mark.parametrize("chip", ["sm_90", "sm_100"])
def test_compiled(chip):
    mosaic("compile", chip)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="this jax has Mosaic GPU kernels")
def test_older_jax_is_refused():
    with pytest.raises(NotImplementedError, match=r"needs jax 0\.11, this is 0\.10"):
        activation_topk(jnp.zeros((2, 256)), jnp.zeros(256), 6, 1.0, "pallas")


@pytest.mark.gpu
@pytest.mark.parametrize("num_experts", [20, 256, 384])
@pytest.mark.parametrize("num_tokens", [0, 1, 65, 1000])
def test_on_a_gpu(num_tokens, num_experts):
    rng = np.random.default_rng(num_tokens)
    logits = jnp.asarray(rng.standard_normal((num_tokens, num_experts)), jnp.float32)
    bias = jnp.asarray(rng.normal(0, 0.3, num_experts), jnp.float32)
    weights, ids = activation_topk(logits, bias, 6, 2.5, "pallas")
    expected = activation_topk(logits, bias, 6, 2.5, "ffi")
    np.testing.assert_array_equal(ids, expected[1])
    np.testing.assert_allclose(weights, expected[0], rtol=1e-6)
