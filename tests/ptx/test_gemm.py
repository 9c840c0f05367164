"""The kernels of gemm for many rows on sm_90, compiled to PTX and executed on the CPU."""

import functools
import pathlib
import re
import struct

import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.formats import tiled
from tests.oracles import formats
from tests.packed_weights import tile, weight_arrays
from tests.ptx import hopper, nvrtc
from tests.ptx.emulator import Deadlock, GlobalMemory, launch, parse

pytestmark = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))

FFI = pathlib.Path(__file__).parents[2] / "ffi"
SHARED_BYTES = 227 * 1024
TILED = "template __global__ void TiledGemm<{}>(const __grid_constant__ TiledParams);"
ENUMERATORS = {
    "mxfp4": "WeightFormat::kMxfp4",
    "nvfp4": "WeightFormat::kNvfp4",
    "fp8_block": "WeightFormat::kFp8Block",
    "bf16": "WeightFormat::kBf16",
}


@functools.cache
def compiled(template, name, mutant=(), includes=("gemm_tiled.cuh", "tile_inputs.cuh")):
    """A kernel; `mutant` is (file, text, replacement)."""
    headers = {"cuda_runtime.h": "#pragma once\n", "cuda_bf16.h": "#pragma once\n"}
    if mutant:
        file, text, replacement = mutant
        source = (FFI / "cuda" / file).read_text()
        assert source.count(text) == 1
        headers[file] = source.replace(text, replacement)
    source = "".join(f'#include "{file}"\n' for file in includes)
    source += f"namespace dsv4 {{ {template} }}"
    include = [FFI / "cuda", FFI / "include"]
    text = nvrtc.compile_ptx(source, architecture="compute_90a", include=include, headers=headers)
    (entry,) = (e for e in re.findall(r"\.entry (\w+)\(", text) if name in e)
    return parse(text, entry)


class Problem:
    """Random inputs of several groups and one weight."""

    def __init__(self, weight_format, num_rows, n, k, groups=1, round_input=False, f32=True):
        rng = np.random.default_rng(num_rows)
        x = rng.standard_normal((num_rows, groups, k))
        x[rng.random(x.shape) < 0.3] *= 1e-3
        self.x = x.astype(ml_dtypes.bfloat16)
        self.groups, self.round_input, self.f32 = groups, round_input, f32
        arrays, values = weight_arrays(weight_format, (n, k), spread=3)
        self.weight = tile(weight_format, arrays)
        exact = self.x.astype(np.float64).reshape(num_rows * groups, k)
        exact = formats.fp8_rows(exact, 128)[2] if round_input else exact
        self.expected = np.einsum(
            "mgk,gnk->mgn",
            exact.reshape(num_rows, groups, k),
            values.reshape(groups, n // groups, k),
        ).reshape(num_rows, n)
        dtype = np.float32 if f32 else ml_dtypes.bfloat16
        self.out = np.full((num_rows, n), np.nan, dtype)

    def segment(self, memory):
        """The bytes of a GemmSegment."""
        weight = self.weight
        scales = np.array(weight.scales).reshape(-1)
        return struct.pack(
            "<i??xxi4x4Q",
            tiled.FORMATS.index(weight.weight_format),
            self.round_input,
            self.f32,
            weight.shape[0],
            memory.place(np.array(weight.codes).reshape(-1)),
            memory.place(scales if scales.size else np.zeros(16, np.uint8)),
            memory.place(np.array(weight.global_scale).reshape(1)),
            memory.place(self.out.view(np.uint32 if self.f32 else np.uint16)),
        )

    @property
    def error(self):
        found = self.out.astype(np.float64)
        return np.linalg.norm(found - self.expected) / np.linalg.norm(self.expected)

    def check(self):
        assert self.error <= (1e-6 if self.f32 else 2e-3)


def tiled_product(problem, tokens, ranks=1, codes=False, clusters=2, seed=0, mutant=()):
    """The two kernels for many rows."""
    num_rows, groups, k = problem.x.shape
    n = problem.weight.shape[0]
    blocks, row_tiles = -(-k // 128), -(-num_rows // 8)
    memory = GlobalMemory()
    copy = np.full(row_tiles * 8 * groups * blocks * 256, 0xFF, np.uint8)
    scales = np.full(groups * blocks * row_tiles * 8, np.nan, np.float32)
    copies = [0, 0, 0, 0]
    copies[2 if codes else int(problem.round_input)] = memory.place(copy)
    copies[3] = memory.place(scales) if codes else 0
    shape = num_rows, groups, k, blocks, row_tiles
    x = memory.place(problem.x.view(np.uint16).reshape(-1))
    kernel = TILED.format(f"{ENUMERATORS[problem.weight.weight_format]}, {tokens}, {int(codes)}")
    token_tiles = -(-num_rows // tokens)
    with hopper.instructions():
        launch(
            compiled(kernel, "TileInputs", mutant),
            grid=(row_tiles, -(-blocks // 4), groups),
            block=256,
            arguments=[struct.pack("<Q5i4x4Q", x, *shape, *copies)],
            memory=memory,
            seed=seed,
        )
        params = struct.pack(
            "<2Q7i4x",
            sum(copies[:3]),
            copies[3],
            num_rows,
            row_tiles,
            blocks,
            n // groups,
            token_tiles,
            token_tiles * -(-n // 128),
            ranks,
        )
        launch(
            compiled(kernel, "TiledGemm", mutant),
            grid=(ranks * clusters,),
            block=384,
            arguments=[problem.segment(memory) + params],
            memory=memory,
            cluster=ranks,
            dynamic_shared_bytes=SHARED_BYTES,
            seed=seed,
        )


@pytest.mark.parametrize(
    ("shape", "ranks", "f32"),
    [
        ((35, 130, 160), 1, True),
        ((19, 130, 672), 4, True),
        ((43, 200, 264), 1, False),
        ((19, 132, 672), 2, False),
    ],
)
def test_many_rows(shape, ranks, f32):
    problem = Problem("mxfp4", *shape, round_input=True, f32=f32)
    tiled_product(problem, 32, ranks, clusters=1)
    problem.check()


def test_blocks_take_tile_after_tile():
    problem = Problem("nvfp4", 40, 440, 264, f32=False)
    tiled_product(problem, 32)
    problem.check()


@pytest.mark.parametrize(
    ("weight_format", "tokens", "groups", "ranks"),
    [
        ("fp8_block", 64, 2, 2),
        ("fp8_block", 128, 1, 1),
        ("fp8_block", 256, 1, 1),
        ("mxfp4", 64, 1, 1),
    ],
)
def test_products_of_codes(weight_format, tokens, groups, ranks):
    problem = Problem(weight_format, 77, 128 * groups, 328, groups, round_input=True, f32=False)
    tiled_product(problem, tokens, ranks, codes=True)
    problem.check()


MUTANTS = {
    "a stage is released before its products are done": (
        "gemm_tiled_products.cuh",
        "        WaitProductsExcept<1>();",
        "        WaitProductsExcept<9>();",
    ),
    "a stage is filled before it is released": (
        "gemm_tiled.cuh",
        "      WaitBarrier(&shared.empty[position.slot], position.parity ^ 1);",
        "",
    ),
    "blocks add up before all are done": (
        "gemm_tiled_outputs.cuh",
        "    SyncCluster();\n    const auto place",
        "    SyncThreads(kConsumerBarrier, Base::kConsumerThreads);\n    const auto place",
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    def error(seed):
        problem = Problem("mxfp4", 19, 130, 2304)
        adds_up = mutant[0] == "gemm_tiled_outputs.cuh"
        ranks = 2 if adds_up else 1
        tiled_product(problem, 32, ranks, clusters=1, seed=seed, mutant=mutant)
        return problem.error

    assert any(_fails(error, seed) for seed in range(3))


def _fails(error, seed):
    try:
        return not error(seed) <= 1e-6
    except (Deadlock, RuntimeError):
        return True
