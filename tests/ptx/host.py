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
) -> list[str]:
    """Executes the launches that `call` makes, in their order; returns their kernels' names."""
    library = host.library
    library.launched_kernel.restype = ctypes.c_char_p
    library.launched_parameters.restype = ctypes.c_void_p
    library.forget_launches()
    call()
    names = [library.launched_kernel(i).decode() for i in range(library.launches())]
    kernels = {name: parse(host.ptx, _checked(name)) for name in set(names)}
    for name, kernel in kernels.items():
        offsets, sizes = zip(*kernel.parameters, strict=True)
        array = ctypes.c_int64 * len(sizes)
        library.expect_parameters(name.encode(), len(sizes), array(*offsets), array(*sizes))
    # Now that the kernels are known their parameters' sizes are, and the call is made once more.
    library.forget_launches()
    call()
    assert library.launches() == len(names)
    for i, name in enumerate(names):
        kernel, shape = kernels[name], (ctypes.c_int64 * 10)()
        library.launched_shape(i, shape)
        data = ctypes.string_at(library.launched_parameters(i), kernel.parameter_bytes)
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
    return names


def _checked(name: str) -> str:
    assert re.fullmatch(r"\w+", name), name
    return name
