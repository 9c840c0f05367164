"""Products with tiled weights on tcgen05, on the emulator: how they are compiled and launched."""

import dataclasses
import functools
import pathlib
import re
import struct

import ml_dtypes
import numpy as np

from tests.oracles import formats
from tests.packed_weights import tile, weight_arrays
from tests.ptx import hopper, nvrtc
from tests.ptx.emulator import GlobalMemory, launch, parse
from tests.ptx.emulator.parser import Kernel

FFI = pathlib.Path(__file__).parents[2] / "ffi"
THREADS, INPUT_THREADS = 448, 256
ENUMERATORS = {
    "mxfp4": "kMxfp4",
    "nvfp4": "kNvfp4",
    "fp8_block": "kFp8Block",
    "bf16": "kBf16",
}
ROUNDINGS = {"none": 0, "bfloat16": 1, "codes": 2}
_SOURCE = """
#include "decoded_moe_sm100.cuh"
namespace dsv4::sm100 {{
template __global__ void MakeInputTiles<{rows}>(const __grid_constant__ InputTiles);
template __global__ void DecodedGemmKernel<{variant}, StoreRows>(
    const __grid_constant__ DecodedGemm, const __grid_constant__ StoreRows);
{pairs}
extern "C" __constant__ int dynamic_bytes = DecodedTile<{variant}>::kDynamicBytes;
}}
"""
_PAIRS = """
template __global__ void DecodedGemmKernel<{variant}, StoreHidden>(
    const __grid_constant__ DecodedGemm, const __grid_constant__ StoreHidden);
"""
HEADERS = {"cuda_runtime.h": "#pragma once\n", "cuda_bf16.h": "#pragma once\n"}


@dataclasses.dataclass(frozen=True)
class Variant:
    weight_format: str
    tile_rows: int
    codes: bool = False


@dataclasses.dataclass(frozen=True)
class Kernels:
    inputs: Kernel
    product: Kernel
    pairs: Kernel | None
    dynamic_bytes: int


@functools.cache
def compiled(variant: Variant, pairs: bool = False, mutant: tuple[str, str, str] | None = None):
    """`mutant` is (file, text, replacement)."""
    headers = dict(HEADERS)
    if mutant:
        file, text, replacement = mutant
        source = (FFI / "cuda" / file).read_text()
        assert source.count(text) == 1, f"{text!r} is not unique"
        headers[file] = source.replace(text, replacement)
    operands = "kCodes" if variant.codes else "kBfloat16"
    name = f"WeightFormat::{ENUMERATORS[variant.weight_format]}, {variant.tile_rows}"
    name = f"{name}, Operands::{operands}"
    source = _SOURCE.format(
        rows=variant.tile_rows, variant=name, pairs=_PAIRS.format(variant=name) if pairs else ""
    )
    text = nvrtc.compile_ptx(source, include=[FFI / "cuda", FFI / "include"], headers=headers)
    names = re.findall(r"\.entry (\w*DecodedGemmKernel\w*)\(", text)
    product, hidden = (
        [parse(text, n) for n in names if sink in n] for sink in ("StoreRows", "StoreHidden")
    )
    dynamic_bytes = int(re.search(r"dynamic_bytes = (\d+)", text)[1])
    return Kernels(
        parse(text, "MakeInputTiles"), product[0], hidden[0] if pairs else None, dynamic_bytes
    )


def matrix(memory, weights):
    """The bytes of a TiledMatrix of a stack of tiled weights."""
    codes, scales, factors = (
        np.concatenate([np.array(getattr(w, name)).reshape(-1) for w in weights])
        for name in ("codes", "scales", "global_scale")
    )
    scales = scales if scales.size else np.zeros(16, np.uint8)
    return struct.pack("<3Q", *map(memory.place, (codes, scales, factors)))


def row_blocks(memory, sizes, tile_rows):
    """The bytes of RowBlocks of groups of rows, and how many blocks there are."""
    blocks, first = [], 0
    for group, size in enumerate(sizes):
        for begin in range(0, size, tile_rows):
            blocks.append((group, first + begin, min(size - begin, tile_rows), 0))
        first += size
    listed = np.array(blocks, np.int32).reshape(-1)
    count = np.array([len(blocks)], np.int32)
    listed = listed if listed.size else np.zeros(4, np.int32)
    return struct.pack("<2Qi4x", memory.place(listed), memory.place(count), first), len(blocks)


class Problem:
    """Random rows, of input groups or sorted by the stack's matrices, times weights."""

    def __init__(
        self, weight_format, num_rows, n, k, *, input_groups=1, sizes=None, rounded=False, f32=True
    ):
        rng = np.random.default_rng(num_rows)
        x = rng.standard_normal((num_rows, input_groups, k))
        x[rng.random(x.shape) < 0.3] *= 1e-3
        self.x = x.astype(ml_dtypes.bfloat16)
        self.format, self.sizes, self.rounded, self.f32 = weight_format, sizes, rounded, f32
        stack = [weight_arrays(weight_format, (n, k), seed, spread=3)
                 for seed in range(len(sizes or [1]))]  # fmt: skip
        self.weights = [tile(weight_format, arrays) for arrays, _ in stack]
        exact = self.x.astype(np.float64).reshape(num_rows * input_groups, k)
        exact = formats.fp8_rows(exact, 128)[2] if rounded else exact
        exact = exact.reshape(num_rows, input_groups, k)
        self.expected = np.full((num_rows, n), np.nan)
        first = 0
        for size, (_, values) in zip(sizes or [num_rows], stack, strict=True):
            of_groups = values.reshape(input_groups, n // input_groups, k)
            rows = slice(first, first + size)
            y = np.einsum("mgk,gnk->mgn", exact[rows], of_groups)
            self.expected[rows] = y.reshape(size, n)
            first += size

    def run(self, tile_rows, *, codes=False, blocks=2, cluster=1, seed=0, mutant=None):
        num_rows, input_groups, k = self.x.shape
        n = self.weights[0].shape[0]
        kernels = compiled(Variant(self.format, tile_rows, codes), mutant=mutant)
        memory = GlobalMemory()
        out = np.full((num_rows, n), 0x7FFFFFFF if self.f32 else 0x7FFF, "u4" if self.f32 else "u2")
        rows, num_blocks = struct.pack("<2Qi4x", 0, 0, num_rows), -(-num_rows // tile_rows)
        if self.sizes is not None:
            rows, num_blocks = row_blocks(memory, self.sizes, tile_rows)
        columns = -(-k // 128)
        tiles = memory.place(np.full(num_rows * input_groups * columns * 256 + 16, 0xFF, np.uint8))
        rounding = "codes" if codes else "bfloat16" if self.rounded else "none"
        with hopper.instructions():
            launch(
                kernels.inputs,
                grid=(input_groups * columns, num_blocks + 1),
                block=INPUT_THREADS,
                arguments=[
                    struct.pack("<3Q", memory.place(self.x.view(np.uint16)), 0, tiles)
                    + rows
                    + struct.pack("<3i4x", input_groups, k, ROUNDINGS[rounding])
                ],
                memory=memory,
                seed=seed,
            )
            weights = matrix(memory, self.weights)
            gemm = weights + weights + struct.pack("<Q", tiles) + rows
            gemm += struct.pack("<4i", n, k, input_groups, n // input_groups)
            launch(
                kernels.product,
                grid=(blocks,),
                block=THREADS,
                cluster=cluster,
                arguments=[gemm, struct.pack("<Qq?7x", memory.place(out), n, self.f32)],
                memory=memory,
                dynamic_shared_bytes=kernels.dynamic_bytes,
                seed=seed,
            )
        return out.view(np.float32 if self.f32 else ml_dtypes.bfloat16)

    def error(self, out):
        """Relative L2; infinite where there is a number that should not be there."""
        written = ~np.isnan(self.expected)
        out = out.astype(np.float64)
        if (np.isnan(out) != ~written).any():
            return np.inf
        expected = self.expected[written]
        return np.linalg.norm(out[written] - expected) / (np.linalg.norm(expected) or 1)
