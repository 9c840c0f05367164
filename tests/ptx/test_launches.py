"""The launcher's tensor maps and launches, and, as proof of the emulator, a kernel of CUTLASS.

Both need nvcc; the second also the package nvidia-cutlass (4.2.0.0; or CUTLASS_DIR, a folder with
its include and tools) and 6 GB of memory.
"""

import ctypes
import importlib.util
import os
import pathlib

import jax.ffi
import numpy as np
import pytest

from tests.oracles import formats
from tests.ptx import host, nvfp4_gemm
from tests.ptx.emulator import GlobalMemory

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(host.NVCC is None, reason="there is no nvcc on the PATH"),
]
HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    ffi = nvfp4_gemm.FFI
    return host.build(
        [ffi / "cuda" / "nvfp4_gemm_sm100.cu", HERE / "launch_nvfp4.cu"],
        tmp_path_factory.mktemp("launcher"),
        architecture="100f",
        include=[ffi / "cuda", ffi / "include", pathlib.Path(jax.ffi.include_dir())],
    )


def call_launcher(library, problem, memory, out, num_groups=None):
    function = library.launch_nvfp4
    function.restype = ctypes.c_char_p
    weights = [
        np.concatenate([getattr(w, f) for w in problem.weights]) for f in ("packed", "scales")
    ]
    sizes = problem.group_sizes
    tokens = problem.tokens
    arrays = [tokens.packed, tokens.scales, problem.token_scales, *weights, problem.weight_scales]
    pointers = [ctypes.c_void_p(memory.place(a)) for a in arrays]
    pointers.append(None if sizes is None else ctypes.c_void_p(memory.place(np.array(sizes, "i4"))))
    pointers.append(ctypes.c_void_p(memory.place(out)))
    numbers = [*out.shape, tokens.values.shape[1], num_groups or len(problem.weights)]

    def call():
        error = function(*pointers, *(ctypes.c_int64(n) for n in numbers))
        if error is not None:
            raise ValueError(error.decode())

    return call


@pytest.mark.parametrize(
    ("shape", "group_sizes"),
    [
        ((5, 130, 1056), None),
        ((60, 100, 608), None),
        ((100, 260, 352), None),
        ((250, 130, 96), None),
        ((100, 140, 160), [40, 0, 60]),
        ((250, 140, 160), [100, 0, 150]),
    ],
)
def test_launcher(launcher, shape, group_sizes):
    problem = nvfp4_gemm.random_problem(*shape, group_sizes)
    out = np.full(shape[:2], 0x7FFF, np.uint16)
    memory = GlobalMemory()
    host.run(launcher, call_launcher(launcher.library, problem, memory, out), memory)
    wrong, error = nvfp4_gemm.difference(problem, out)
    assert wrong <= 1e-4 and error <= 2e-3


def test_launcher_refuses_too_many_groups(launcher):
    problem = nvfp4_gemm.random_problem(3, 5, 64)
    out = np.zeros((3, 5), np.uint16)
    call = call_launcher(launcher.library, problem, GlobalMemory(), out, num_groups=513)
    with pytest.raises(ValueError, match="weights: got 513 groups"):
        call()


def _cutlass_headers() -> pathlib.Path | None:
    if root := os.environ.get("CUTLASS_DIR"):
        return pathlib.Path(root)
    spec = importlib.util.find_spec("cutlass_library")
    return pathlib.Path(spec.origin).parent / "source" if spec and spec.origin else None


def _obstacle() -> str | None:
    if _cutlass_headers() is None:
        return "neither nvidia-cutlass is installed nor CUTLASS_DIR set"
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None if available > 6 << 30 else "less than 6 GiB of memory are free"


def _build_cutlass(tmp_path_factory, variant):
    headers = _cutlass_headers()
    return host.build(
        [HERE / "cutlass_gemm.cu"],
        tmp_path_factory.mktemp("cutlass"),
        architecture="100a",
        include=[headers / "include", headers / "tools" / "util" / "include"],
        flags=["--expt-relaxed-constexpr", f"-D{variant}"],
    )


@pytest.fixture(scope="module", params=["ONE_BLOCK", "TWO_BLOCKS"])
def cutlass(tmp_path_factory, request):
    """With products of one block, and of pairs of blocks with multicast copies."""
    return _build_cutlass(tmp_path_factory, request.param)


@pytest.fixture(scope="module")
def cutlass_codes(tmp_path_factory):
    """With E4M3 codes and power-of-two scales."""
    return _build_cutlass(tmp_path_factory, "MXFP8")


@pytest.mark.skipif(_obstacle() is not None, reason=_obstacle() or "")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("m", "n", "k"), [(128, 128, 256), (200, 264, 640), (300, 136, 1056)])
def test_kernel_of_cutlass(cutlass, m, n, k, seed):
    rng = np.random.default_rng(seed)
    a, b = nvfp4_gemm.random_operand(rng, m, k), nvfp4_gemm.random_operand(rng, n, k)
    _check_cutlass(cutlass, a, b, seed)


def _check_cutlass(cutlass, a, b, seed):
    (m, k), n = a.values.shape, len(b.values)
    out, workspace = np.zeros((m, n), np.uint16), np.zeros(1 << 20, np.uint8)
    memory = GlobalMemory()
    arrays = [a.packed, a.scales, b.packed, b.scales, out, workspace]
    pointers = [ctypes.c_void_p(memory.place(array)) for array in arrays]

    def call():
        assert cutlass.library.launch_cutlass(*pointers, m, n, k) == 0

    host.run(cutlass, call, memory, seed=seed, strict=False)
    got = (out.astype(np.uint32) << 16).view(np.float32)
    assert np.mean(got == formats.to_bfloat16(a.values @ b.values.T)) >= 0.9999


def _random_codes(rng, rows, width):
    """E4M3 codes with a power-of-two scale for each 32, swizzled like those of NVFP4."""
    codes = rng.integers(0, 0x7F, (rows, width), np.uint8) | rng.choice([0, 0x80], (rows, width))
    codes = codes.astype(np.uint8)
    scales = rng.integers(117, 137, (rows, width // 32), np.uint8)
    blocks = np.zeros((-(-rows // 128), -(-width // 128), 512), np.uint8)
    row, group = np.indices(scales.shape)
    blocks[row // 128, group // 4, row % 32 * 16 + row % 128 // 32 * 4 + group % 4] = scales
    values = formats.E4M3[codes] * np.repeat(formats.E8M0[scales], 32, 1)
    return nvfp4_gemm.Operand(codes, blocks, values)


@pytest.mark.skipif(_obstacle() is not None, reason=_obstacle() or "")
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("m", "n", "k"), [(128, 128, 128), (200, 264, 416)])
def test_codes_of_cutlass(cutlass_codes, m, n, k, seed):
    rng = np.random.default_rng(seed)
    _check_cutlass(cutlass_codes, _random_codes(rng, m, k), _random_codes(rng, n, k), seed)
