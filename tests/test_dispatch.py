"""ops.dispatch: exactly what was asked for, or the fastest that is supported."""

import jax
import jax.numpy as jnp
import pytest

import dsv4_ffi
from dsv4_jax.ops.dispatch import dispatch


def xla(x, scale):
    return x * scale


def kernel(x, scale):
    return x * scale + 1


def refuses(x, scale):
    raise NotImplementedError(f"scale {scale} is not supported")


def test_a_name_takes_exactly_that_one():
    implementations = {"ffi": kernel, "xla": xla}
    assert dispatch("ffi", implementations, jnp.float32(3), scale=2) == 7
    assert dispatch("xla", implementations, jnp.float32(3), scale=2) == 6


def test_a_kernel_asked_for_by_name_never_falls_back():
    with pytest.raises(NotImplementedError, match="scale 2 is not supported"):
        dispatch("ffi", {"ffi": refuses, "xla": xla}, jnp.float32(3), scale=2)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="implementation: got 'triton', expected one of 'ffi'"):
        dispatch("triton", {"ffi": kernel, "xla": xla}, jnp.float32(3), scale=2)


@pytest.mark.parametrize(("platform", "expected"), [("cuda", 7), ("cpu", 6), ("tpu", 6)])
def test_without_a_name_kernels_are_for_cuda(platform, expected, monkeypatch):
    monkeypatch.setattr(dsv4_ffi, "platform", lambda: platform)
    implementations = {"pallas": refuses, "ffi": kernel, "xla": xla}
    assert dispatch(None, implementations, jnp.float32(3), scale=2) == expected


def test_the_default_device_is_what_counts():
    with jax.default_device(jax.devices("cpu")[0]):
        assert dispatch(None, {"ffi": kernel, "xla": xla}, jnp.float32(3), scale=2) == 6


def test_when_kernels_refuse_the_reference_runs(monkeypatch):
    monkeypatch.setattr(dsv4_ffi, "platform", lambda: "cuda")
    result = dispatch(None, {"pallas": refuses, "xla": xla}, jnp.float32(3), scale=2)
    assert result == 6


def test_what_is_slower_than_the_reference_runs_by_name_only(monkeypatch):
    monkeypatch.setattr(dsv4_ffi, "platform", lambda: "cuda")
    implementations = {"xla": xla, "ffi": kernel}
    assert dispatch(None, implementations, jnp.float32(3), scale=2) == 6
    assert dispatch("ffi", implementations, jnp.float32(3), scale=2) == 7
