"""The kernel of gemm for up to 64 rows, compiled to PTX and executed on the CPU."""

import struct

import numpy as np
import pytest

from tests.ptx import attention_instructions, nvrtc
from tests.ptx.emulator import Deadlock, GlobalMemory, launch
from tests.ptx.emulator.memory import MemoryFault
from tests.ptx.test_gemm import ENUMERATORS, SHARED_BYTES, Problem, compiled

pytestmark = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))

CHUNKS = {"mxfp4": 2, "nvfp4": 2, "fp8_block": 4, "bf16": 8}


def kernel(arguments, mutant):
    """The kernel; `mutant` is (text, replacement)."""
    template = (
        f"template __global__ void DirectGemm<{arguments}>(const __grid_constant__ DirectParams);"
    )
    file = "gemm_direct.cuh"
    return compiled(template, "DirectGemm", (file, *mutant) if mutant else (), (file,))


def multiply(problems, warps, chunks, ranks_log2, unit_warps_log2, clusters, seed=0, mutant=()):
    """Products of one input; `clusters` are those of each weight format."""
    num_rows, groups, k = problems[0].x.shape
    blocks = -(-k // 128)
    blocks_of_rank = -(-blocks >> ranks_log2)
    token_tiles = 1 if num_rows <= 8 else 2 if num_rows <= 16 else 4
    token_groups = -(-num_rows // (8 * token_tiles))
    used = list(dict.fromkeys(p.weight.weight_format for p in problems))
    memory = GlobalMemory()
    segments, parts, num_segments, first = b"", [], 0, 0
    for weight_format, num_clusters in zip(used, clusters, strict=True):
        tile_rows = warps * 16 * max(1, chunks // CHUNKS[weight_format]) >> unit_warps_log2
        first_segment, tiles = num_segments, 0
        for problem in problems:
            n = problem.weight.shape[0]
            if problem.weight.weight_format != weight_format:
                continue
            segments += problem.segment(memory) + struct.pack("<2i", n // groups, tiles)
            num_segments += 1
            tiles += -(-n // tile_rows)
        parts += [first_segment, num_segments, tiles * token_groups, first, num_clusters]
        first += num_clusters
    params = struct.pack(
        "<Q29i4x",
        memory.place(problems[0].x.view(np.uint16).reshape(-1)),
        num_rows,
        groups * k,
        k,
        blocks,
        ranks_log2,
        unit_warps_log2,
        blocks_of_rank,
        max(0, (blocks_of_rank - 1).bit_length() - 2),
        token_groups - 1,
        *(parts + 20 * [0])[:20],
    )
    numbers = [str(warps), str(token_tiles), str(chunks)]
    arguments = ", ".join([*numbers, *(ENUMERATORS[f] for f in used)])
    with attention_instructions.instructions():
        launch(
            kernel(arguments, mutant),
            grid=(1 << ranks_log2, first),
            block=warps * 32,
            arguments=[params + segments.ljust(8 * 56, b"\0")],
            memory=memory,
            cluster=1 << ranks_log2,
            dynamic_shared_bytes=SHARED_BYTES,
            seed=seed,
        )


@pytest.mark.parametrize(
    ("weight_format", "shape", "groups", "round_input", "plan"),
    [
        ("mxfp4", (3, 140, 2056), 1, False, (16, 8, 0, 4, [2])),
        ("nvfp4", (11, 130, 392), 1, True, (16, 4, 1, 3, [1])),
        ("fp8_block", (13, 256, 136), 2, True, (16, 8, 1, 2, [1])),
        ("fp8_block", (2, 70, 1544), 1, False, (16, 4, 0, 3, [1])),
        ("bf16", (9, 65, 136), 1, False, (16, 8, 0, 4, [3])),
        ("fp8_block", (37, 64, 136), 1, True, (8, 4, 1, 3, [2])),
    ],
)
def test_products(weight_format, shape, groups, round_input, plan):
    problem = Problem(weight_format, *shape, groups, round_input, f32=weight_format != "mxfp4")
    multiply([problem], *plan)
    problem.check()


def test_segments_of_several_formats():
    problems = [
        Problem("nvfp4", 5, 40, 392, f32=False),
        Problem("fp8_block", 5, 128, 392, round_input=True),
        Problem("bf16", 5, 64, 392),
        Problem("fp8_block", 5, 192, 392),
    ]
    multiply(problems, 16, 8, 0, 2, [1, 2, 1])
    for problem in problems:
        problem.check()


MUTANTS = {
    "products begin before the inputs have come": (
        "            if (copied) WaitBarrier(shared.loaded + (block >> p.part_log2), parity);\n",
        "",
    ),
    "warps add up before all are done": (
        "    __syncthreads();\n    if (ranks > 1 && threadIdx.x == 0)",
        "    if (ranks > 1 && threadIdx.x == 0)",
    ),
    "sums are added up before all have come": ("    WaitBarrier(ready, turn / 2 % 2);\n", ""),
    "sums are overwritten before they are added up": (
        "      if (last) return;\n      __syncthreads();",
        "      if (last) return;",
    ),
    "weights of the next turn are loaded before those of this one are decoded": (
        "step % kSteps == kSteps - 1) ahead",
        "step % kSteps == 0) ahead",
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    def error(seed):
        problem = Problem("mxfp4", 3, 128, 1032)
        ranks_log2 = 1 if "Barrier" in mutant[0] else 0
        multiply([problem], 16, 4, ranks_log2, 3, [1], seed, mutant)
        return problem.error

    assert any(_fails(error, seed) for seed in range(3))


def _fails(error, seed):
    try:
        return not error(seed) <= 1e-6
    except (Deadlock, MemoryFault, RuntimeError):
        return True
