"""Host code of launches, compiled by nvcc and run with a stand-in for the CUDA runtime."""

import ctypes
import dataclasses
import pathlib
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence

from tests.ptx.emulator import GlobalMemory, launch, parse

NVCC = shutil.which("nvcc")
_HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass
class HostLibrary:
    library: ctypes.CDLL
    ptx: str


def build(
    sources: Sequence[pathlib.Path],
    folder: pathlib.Path,
    *,
    architecture: str,
    include: Sequence[pathlib.Path],
    flags: Sequence[str] = (),
) -> HostLibrary:
    """Compiles the sources, the first of which to PTX as well, into `folder`."""
    options = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", *flags]
    options += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
    options += [f"-I{path}" for path in include]
    objects = []
    for source in [*sources, _HERE / "fake_cudart.cpp"]:
        objects.append(folder / f"{source.stem}.o")
        keep = ["--keep", "--keep-dir", folder]
        subprocess.run([NVCC, *options, *keep, "-c", source, "-o", objects[-1]], check=True)
    path = folder / "host.so"
    subprocess.run([NVCC, "-shared", "-cudart", "none", *objects, "-o", path], check=True)
    return HostLibrary(ctypes.CDLL(str(path)), (folder / f"{sources[0].stem}.ptx").read_text())


def run(
    host: HostLibrary, call: Callable[[], None], memory: GlobalMemory, *, seed: int = 0, **options
) -> None:
    """Executes the one launch that `call` makes."""
    library = host.library
    before = library.launches()
    call()
    name = _launched_name(library)
    kernel = parse(host.ptx, name)
    offsets, sizes = zip(*kernel.parameters, strict=True)
    array = ctypes.c_int64 * len(sizes)
    # Now that the kernel is known its parameters' sizes are, and the call is made once more.
    library.expect_parameters(len(sizes), array(*offsets), array(*sizes))
    call()
    assert library.launches() == before + 2
    shape = (ctypes.c_int64 * 10)()
    library.launched_shape(shape)
    library.launched_parameters.restype = ctypes.c_void_p
    data = ctypes.string_at(library.launched_parameters(), kernel.parameter_bytes)
    library.expect_parameters(0, None, None)
    assert shape[4] == shape[5] == shape[7] == shape[8] == 1, "blocks and clusters along x only"
    launch(
        kernel,
        grid=list(shape[:3]),
        block=shape[3],
        cluster=shape[6],
        dynamic_shared_bytes=shape[9],
        arguments=[data[o : o + s] for o, s in kernel.parameters],
        memory=memory,
        seed=seed,
        **options,
    )


def _launched_name(library: ctypes.CDLL) -> str:
    library.launched_kernel.restype = ctypes.c_char_p
    name = library.launched_kernel().decode()
    assert re.fullmatch(r"\w+", name), name
    return name
