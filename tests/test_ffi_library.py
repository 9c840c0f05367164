"""dsv4_ffi: which library is used, and what is said of one that is not."""

import ctypes
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import dsv4_ffi
from dsv4_ffi import library as libraries
from dsv4_ffi.stamp import source_hash
from dsv4_ffi.targets import CALLS

SOURCES = Path(__file__).parents[1] / "ffi"
HANDLER = re.compile(r"XLA_FFI_DEFINE_HANDLER_SYMBOL\(\s*dsv4_(\w+)")
find = libraries.load.__wrapped__
result = jax.ShapeDtypeStruct((1,), jnp.float32)


def handlers(pattern):
    return {name for file in SOURCES.glob(pattern) for name in HANDLER.findall(file.read_text())}


def test_every_handler_is_listed():
    assert handlers("cpu/*.cc") | handlers("cuda/*.cu") == set(CALLS)
    assert len(set(CALLS)) == len(CALLS)


def test_the_cpu_library_holds_every_cpu_handler():
    assert dsv4_ffi.missing("cpu") is None
    assert libraries.load("cpu").calls == handlers("cpu/*.cc")


def test_no_library(monkeypatch, tmp_path):
    monkeypatch.setenv("DSV4_FFI_DIR", str(tmp_path))
    assert find("cpu").obstacle == (
        f"no libdsv4_cpu.so in {tmp_path}; it is built with the package where there is "
        "a C++17 compiler"
    )
    assert "nvcc 12.9 or later" in find("cuda").obstacle


def test_a_call_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(dsv4_ffi, "missing", lambda platform: f"nothing for {platform}")
    with pytest.raises(NotImplementedError, match="topk_select: nothing for cpu"):
        dsv4_ffi.call("topk_select", result, jnp.ones(1))


def test_a_call_that_the_library_lacks():
    with pytest.raises(NotImplementedError, match=r"no_such: .*libdsv4_cpu.so does not hold it"):
        dsv4_ffi.call("no_such", result, jnp.ones(1))


def test_a_library_for_another_abi():
    def obstacle(version):
        return libraries._abi_obstacle(SimpleNamespace(dsv4_ffi_api_version=lambda: version))

    assert obstacle(3) is None
    with_newer = obstacle(999)
    assert with_newer.startswith("was built for version 0.999 of the XLA FFI, jaxlib ")
    assert obstacle(1000).startswith("was built for version 1.0 of the XLA FFI")
    assert "no library of this package" in libraries._abi_obstacle(ctypes.CDLL(None))


def test_a_stale_library(monkeypatch):
    path = libraries.load("cpu").path
    monkeypatch.setattr(libraries, "_candidates", lambda platform: [(path, False)])
    monkeypatch.setattr(libraries, "source_hash", lambda platform: "other")
    assert find("cpu").obstacle.startswith(f"{path} is stale: it was built from other sources")


def test_the_hash_is_of_names_and_contents(monkeypatch, tmp_path):
    monkeypatch.setattr("dsv4_ffi.stamp._SOURCES", tmp_path)
    assert source_hash("cpu") is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "a.cc").write_text("x")
    first = source_hash("cpu")
    (tmp_path / "cpu" / "a.cc").write_text("y")
    second = source_hash("cpu")
    (tmp_path / "cpu" / "a.cc").rename(tmp_path / "cpu" / "b.cc")
    assert len({first, second, source_hash("cpu")}) == 3
    assert source_hash("cuda") is None


def fake_driver(version):
    def get_version(pointer):
        pointer._obj.value = version

    return SimpleNamespace(cuDriverGetVersion=get_version)


def test_a_driver_too_old(monkeypatch):
    built = SimpleNamespace(dsv4_cuda_version=lambda: 13000)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake_driver(13010))
    assert libraries._driver_obstacle(built) is None
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake_driver(12080))
    assert libraries._driver_obstacle(built) == (
        "the library was built with CUDA 13.0, the driver supports CUDA 12.8: "
        "it needs a newer driver, or nvcc 12.9 to be built with"
    )


def test_no_driver(monkeypatch):
    def absent(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    built = SimpleNamespace(dsv4_cuda_version=lambda: 13000)
    assert libraries._driver_obstacle(built) == "there is no NVIDIA driver (libcuda.so.1)"


def test_devices(monkeypatch):
    def devices(capability):
        return lambda platform: [
            SimpleNamespace(device_kind="NVIDIA X", compute_capability=capability)
        ]

    monkeypatch.setattr(jax, "devices", devices("9.0"))
    assert libraries._device_obstacle() is None
    monkeypatch.setattr(jax, "devices", devices("8.0"))
    assert libraries._device_obstacle() == (
        "NVIDIA X has compute capability 8.0, the kernels are for 9.0, 10.0, 10.3"
    )

    def none(platform):
        raise RuntimeError

    monkeypatch.setattr(jax, "devices", none)
    assert "finds no CUDA device" in libraries._device_obstacle()
