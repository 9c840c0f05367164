"""Finds the compiled libraries, checks that they fit, and registers their calls with XLA."""

import ctypes
import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path

import jax

from dsv4_ffi.stamp import source_hash
from dsv4_ffi.targets import CALLS

PLATFORMS = {"cpu": "cpu", "cuda": "CUDA"}
_BUILT_WITH = {"cpu": "a C++17 compiler", "cuda": "nvcc 12.9 or later"}
_CUDA_ARCHITECTURES = ("9.0", "10.0", "10.3")


@dataclass(frozen=True)
class Library:
    """A loaded library and the calls it holds; `obstacle` says why there is none."""

    path: Path | None = None
    calls: frozenset[str] = frozenset()
    obstacle: str | None = None


@functools.cache
def load(platform: str) -> Library:
    """Of "cpu" or "cuda"; its calls are registered with XLA. Looked for once.

    The directory that the environment variable DSV4_FFI_DIR names is the only one searched, and
    its library may be built from other sources than those beside this package. Else the
    installed library is taken or, in a checkout, that of build/ffi.
    """
    obstacles = []
    for path, any_sources in _candidates(platform):
        if not path.exists():
            continue
        loaded = ctypes.CDLL(str(path))
        reason = _abi_obstacle(loaded) or (None if any_sources else _stale(loaded, platform))
        if reason is None:
            return Library(path, _register(loaded, platform))
        obstacles.append(f"{path} {reason}")
    searched = ", ".join(str(path.parent) for path, _ in _candidates(platform))
    missing = (
        f"no {_file_name(platform)} in {searched}; "
        f"it is built with the package where there is {_BUILT_WITH[platform]}"
    )
    return Library(obstacle="; ".join(obstacles) or missing)


def missing(platform: str) -> str | None:
    """Why calls cannot run on "cpu" or "cuda" devices here; None if they can."""
    found = load(platform)
    if found.obstacle is not None or platform == "cpu":
        return found.obstacle
    assert found.path is not None
    return _driver_obstacle(ctypes.CDLL(str(found.path))) or _device_obstacle()


def _file_name(platform: str) -> str:
    return f"libdsv4_{platform}.so"


def _candidates(platform: str) -> list[tuple[Path, bool]]:
    name = _file_name(platform)
    if override := os.environ.get("DSV4_FFI_DIR"):
        return [(Path(override) / name, True)]
    import dsv4_ffi

    # An editable install has two directories: the sources and what was compiled for them.
    installed = [Path(directory) / "lib" / name for directory in dsv4_ffi.__path__]
    checkout = Path(__file__).parents[2] / "build" / "ffi" / name
    return [(path, False) for path in (*installed, checkout)]


def _abi_obstacle(loaded: ctypes.CDLL) -> str | None:
    try:
        built = loaded.dsv4_ffi_api_version()
    except AttributeError:
        return "has no dsv4_ffi_api_version: it is no library of this package"
    header = Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text()
    major, minor = (
        int(match[1])
        for part in ("MAJOR", "MINOR")
        if (match := re.search(rf"#define XLA_FFI_API_{part} (\d+)", header))
    )
    if built // 1000 == major and built % 1000 <= minor:
        return None
    return (
        f"was built for version {built // 1000}.{built % 1000} of the XLA FFI, "
        f"jaxlib {jax.lib.__version__} has {major}.{minor}: build it again with an older jaxlib"
    )


def _stale(loaded: ctypes.CDLL, platform: str) -> str | None:
    expected = source_hash(platform)
    try:
        found = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(loaded, "dsv4_source_hash")))
    except ValueError:
        found = b"none"
    if expected is None or found.decode() == expected:
        return None
    return (
        "is stale: it was built from other sources than those in the checkout; build it again, "
        "or set DSV4_FFI_DIR to use it all the same"
    )


def _register(loaded: ctypes.CDLL, platform: str) -> frozenset[str]:
    held = frozenset(call for call in CALLS if hasattr(loaded, f"dsv4_{call}"))
    for call in held:
        handler = jax.ffi.pycapsule(getattr(loaded, f"dsv4_{call}"))
        jax.ffi.register_ffi_target(f"dsv4_{call}", handler, platform=PLATFORMS[platform])
    return held


def _driver_obstacle(loaded: ctypes.CDLL) -> str | None:
    built = loaded.dsv4_cuda_version()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1)"
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    if version.value // 1000 >= built // 1000:
        return None
    return (
        f"the library was built with CUDA {_dotted(built)}, the driver supports CUDA "
        f"{_dotted(version.value)}: it needs a newer driver, or nvcc 12.9 to be built with"
    )


def _dotted(cuda_version: int) -> str:
    return f"{cuda_version // 1000}.{cuda_version % 1000 // 10}"


def _device_obstacle() -> str | None:
    try:
        devices = jax.devices("cuda")
    except RuntimeError:
        return f"jax {jax.__version__} finds no CUDA device (is jax[cuda13] installed?)"
    capability = devices[0].compute_capability
    if capability in _CUDA_ARCHITECTURES:
        return None
    return (
        f"{devices[0].device_kind} has compute capability {capability}, "
        f"the kernels are for {', '.join(_CUDA_ARCHITECTURES)}"
    )
