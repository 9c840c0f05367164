"""CUDA C++ to PTX by the pip package nvidia-cuda-nvrtc: no host compiler, no CUDA headers."""

import ctypes
import functools
import importlib.util
import pathlib
from collections.abc import Mapping, Sequence

# What the kernels' sources include of the standard library.
_HEADERS = {
    "cstdint": """#pragma once
        typedef signed char int8_t; typedef short int16_t; typedef int int32_t;
        typedef long long int64_t; typedef unsigned char uint8_t; typedef unsigned short uint16_t;
        typedef unsigned int uint32_t; typedef unsigned long long uint64_t;""",
    "cstring": "#pragma once\n",
}


def missing() -> str | None:
    """Why nothing can be compiled, or None."""
    try:
        _library()
    except OSError as error:
        return f"nvidia-cuda-nvrtc is not installed: {error}"
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations) if spec else []
    folders = [pathlib.Path(root) / "cu13" / "lib" for root in roots]
    folder = next((f for f in folders if (f / "libnvrtc.so.13").exists()), None)
    if folder is None:
        raise OSError(f"no libnvrtc.so.13 in {folders}")
    # libnvrtc looks for its built-ins by name only.
    builtins = next(folder.glob("libnvrtc-builtins.so.13.*"))
    ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(folder / "libnvrtc.so.13"))


def compile_ptx(
    source: str,
    *,
    architecture: str = "compute_100f",
    include: Sequence[pathlib.Path] = (),
    headers: Mapping[str, str] | None = None,
) -> str:
    """PTX of the source. `headers` go before files of the include folders.

    Raises:
        RuntimeError: what the compiler says.
    """
    library = _library()
    headers = {**_HEADERS, **(headers or {})}
    names = (ctypes.c_char_p * len(headers))(*(n.encode() for n in headers))
    texts = (ctypes.c_char_p * len(headers))(*(t.encode() for t in headers.values()))
    program = ctypes.c_void_p()
    _check(
        library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"kernel.cu", len(headers), texts, names
        )
    )
    try:
        # Functions of shared headers have no annotation: they are not used on the device.
        flags = [
            f"--gpu-architecture={architecture}",
            "--std=c++17",
            "--device-as-default-execution-space",
        ]
        flags += [f"--include-path={folder}" for folder in include]
        array = (ctypes.c_char_p * len(flags))(*(f.encode() for f in flags))
        if library.nvrtcCompileProgram(program, len(flags), array):
            raise RuntimeError(_text(library, "ProgramLog", program))
        return _text(library, "PTX", program)
    finally:
        _check(library.nvrtcDestroyProgram(ctypes.byref(program)))


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"NVRTC: status {status}")


def _text(library: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    _check(library[f"nvrtcGet{what}Size"](program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(library[f"nvrtcGet{what}"](program, text))
    return text.value.decode()
