"""The NVFP4 kernel of sm_100 on the emulator: how it is compiled and launched, and its oracle."""

import dataclasses
import functools
import pathlib
import re
import struct
from collections.abc import Sequence

import numpy as np

from tests.oracles import formats
from tests.ptx import nvrtc
from tests.ptx.emulator import GlobalMemory, TensorMap, launch, parse
from tests.ptx.emulator.parser import Kernel

FFI = pathlib.Path(__file__).parents[2] / "ffi"
TILE_SIZES = (32, 64, 128, 192)
THREADS = 192

_SOURCE = """
#include "nvfp4_gemm_sm100.cuh"
namespace dsv4::sm100 {{
template __global__ void Nvfp4GemmKernel<{tokens}, StoreBfloat16>(
    const __grid_constant__ Nvfp4Gemm, const __grid_constant__ StoreBfloat16);
extern "C" __constant__ int dynamic_bytes = Tile<{tokens}>::kDynamicBytes;
}}
"""


@functools.cache
def compiled(tile_tokens: int, headers: tuple[tuple[str, str], ...] = ()) -> tuple[Kernel, int]:
    """(kernel, its dynamic shared bytes). `headers`, (name, text), replace files, for mutants."""
    include = [FFI / "cuda", FFI / "include"]
    source = _SOURCE.format(tokens=tile_tokens)
    text = nvrtc.compile_ptx(source, include=include, headers=dict(headers))
    dynamic_bytes = int(re.search(r"dynamic_bytes = (\d+)", text)[1])
    return parse(text, "Nvfp4GemmKernel"), dynamic_bytes


@dataclasses.dataclass
class Operand:
    """NVFP4 rows as a kernel takes them, and their values without the global scale."""

    packed: np.ndarray  # [rows, width / 2]
    scales: np.ndarray  # [ceil(rows / 128), ceil(width / 64), 512]
    values: np.ndarray  # [rows, width] float64


def random_operand(rng: np.random.Generator, rows: int, width: int) -> Operand:
    """Padding rows have NaN scales, padding columns any others."""
    codes = rng.integers(0, 16, (rows, width), np.uint8)
    scales = rng.integers(0x20, 0x50, (rows, width // 16), np.uint8)
    values = formats.E2M1[codes] * np.repeat(formats.E4M3[scales], 16, 1)
    blocks = np.full((-(-rows // 128), -(-width // 64), 512), 0x7F, np.uint8)
    padded = rng.integers(0, 127, (rows, blocks.shape[1] * 4), np.uint8)
    padded[:, : width // 16] = scales
    row, group = np.indices(padded.shape)
    place = row % 32 * 16 + row % 128 // 32 * 4 + group % 4
    blocks[row // 128, group // 4, place] = padded
    return Operand(formats.packed(codes), blocks, values)


@dataclasses.dataclass
class Problem:
    """Tokens of consecutive groups times the weights of each group."""

    tokens: Operand
    weights: list[Operand]
    token_scales: np.ndarray  # [tokens] float32
    weight_scales: np.ndarray  # [groups] float32
    group_sizes: list[int] | None  # None: one group, which the kernel is not told of

    @property
    def expected(self) -> np.ndarray:
        """[tokens, features] in float64; NaN where no group is."""
        num_tokens, num_features = len(self.token_scales), len(self.weights[0].values)
        out = np.full((num_tokens, num_features), np.nan)
        start = 0
        sizes = [num_tokens] if self.group_sizes is None else self.group_sizes
        for weights, scale, size in zip(self.weights, self.weight_scales, sizes, strict=True):
            rows = slice(start, start + size)
            scales = np.float64(scale) * self.token_scales[rows, None]
            out[rows] = self.tokens.values[rows] @ weights.values.T * scales
            start += size
        return out


def random_problem(
    num_tokens: int,
    num_features: int,
    width: int,
    group_sizes: Sequence[int] | None = None,
    seed: int = 0,
) -> Problem:
    rng = np.random.default_rng(seed)
    num_groups = 1 if group_sizes is None else len(group_sizes)
    return Problem(
        random_operand(rng, num_tokens, width),
        [random_operand(rng, num_features, width) for _ in range(num_groups)],
        rng.uniform(0.5, 2, num_tokens).astype(np.float32),
        rng.uniform(0.5, 2, num_groups).astype(np.float32),
        None if group_sizes is None else list(group_sizes),
    )


def _packed_map(memory: GlobalMemory, packed: np.ndarray, box_rows: int) -> bytes:
    rows, row_bytes = packed.shape
    address = memory.place(packed)
    box = (128, box_rows)
    return TensorMap(address, (row_bytes, rows), (row_bytes,), box, swizzle="128B").encode()


def run(
    problem: Problem,
    tile_tokens: int,
    *,
    num_blocks: int = 3,
    cluster: int = 1,
    seed: int = 0,
    kernel: tuple[Kernel, int] | None = None,
) -> np.ndarray:
    """[tokens, features] bits of bfloat16; 0x7fff where the kernel wrote nothing."""
    code, dynamic_bytes = kernel or compiled(tile_tokens)
    memory = GlobalMemory()
    num_tokens, num_features = len(problem.token_scales), len(problem.weights[0].values)
    width = problem.tokens.values.shape[1]
    weights = np.concatenate([w.packed for w in problem.weights])
    weight_blocks = np.concatenate([w.scales for w in problem.weights])
    sizes = problem.group_sizes
    out = np.full((num_tokens, num_features), 0x7FFF, np.uint16)
    gemm = (
        _packed_map(memory, weights, 128)
        + _packed_map(memory, problem.tokens.packed, tile_tokens)
        + struct.pack(
            "<5Q4i",
            memory.place(weight_blocks),
            memory.place(problem.tokens.scales),
            memory.place(problem.weight_scales),
            memory.place(problem.token_scales),
            0 if sizes is None else memory.place(np.array(sizes, np.int32)),
            num_tokens,
            num_features,
            width,
            len(problem.weights),
        )
    )
    sink = struct.pack("<Qq", memory.place(out), num_features)
    launch(
        code,
        grid=(num_blocks,),
        block=THREADS,
        arguments=[gemm.ljust(384, b"\0"), sink],
        memory=memory,
        cluster=cluster,
        dynamic_shared_bytes=dynamic_bytes,
        seed=seed,
    )
    return out


def difference(problem: Problem, out: np.ndarray) -> tuple[float, float]:
    """(fraction of outputs that are not the nearest bfloat16, relative L2 error)."""
    expected = problem.expected
    written = ~np.isnan(expected)
    if (out[~written] != 0x7FFF).any():
        return 1.0, np.inf
    got = (out.astype(np.uint32) << 16).view(np.float32)[written].astype(np.float64)
    reference = expected[written]
    nearest = formats.to_bfloat16(reference)
    wrong = np.mean(got != nearest) if len(got) else 0.0
    norm = np.linalg.norm(reference) or 1.0
    return float(wrong), float(np.linalg.norm(got - reference) / norm)
