"""The kernel of gemm for one row, compiled to PTX and executed on the CPU."""

import struct

import numpy as np
import pytest

from tests.ptx import moe_instructions, nvrtc
from tests.ptx.emulator import Deadlock, GlobalMemory, launch
from tests.ptx.emulator.memory import MemoryFault
from tests.ptx.test_gemm import ENUMERATORS, Problem, compiled

pytestmark = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))


def kernel(arguments, mutant):
    """The kernel; `mutant` is (text, replacement)."""
    template = f"template __global__ void GemmRow<{arguments}>(const __grid_constant__ RowParams);"
    file = "gemm_row.cuh"
    return compiled(template, "GemmRow", (file, *mutant) if mutant else (), (file,))


def multiply(problems, warps_log2, cuts, seed=0, mutant=()):
    """Products of one input; `cuts` are (k_warps_log2, units_log2) of each problem."""
    _, groups, k = problems[0].x.shape
    memory = GlobalMemory()
    segments, blocks = b"", 0
    for problem, (k_warps_log2, units_log2) in zip(problems, cuts, strict=True):
        outputs = problem.weight.shape[0] // groups
        segments += problem.segment(memory)
        segments += struct.pack("<4i", outputs, blocks, k_warps_log2, units_log2)
        blocks += -(-outputs // (16 << (warps_log2 - k_warps_log2 + units_log2)))
    params = struct.pack(
        "<Q3i4x",
        memory.place(problems[0].x.view(np.uint16).reshape(-1)),
        k,
        -(-k // 128),
        len(problems),
    )
    formats = dict.fromkeys(p.weight.weight_format for p in problems)
    with moe_instructions.instructions():
        launch(
            kernel(", ".join([str(warps_log2), *(ENUMERATORS[f] for f in formats)]), mutant),
            grid=(blocks, groups),
            block=32 << warps_log2,
            arguments=[params + segments.ljust(8 * 64, b"\0")],
            memory=memory,
            dynamic_shared_bytes=(512 + 256) << warps_log2,
            seed=seed,
        )


@pytest.mark.parametrize(
    ("weight_format", "shape", "groups", "round_input", "warps_log2", "cut"),
    [
        ("mxfp4", (140, 1032), 1, False, 4, (3, 1)),
        ("nvfp4", (130, 392), 1, True, 4, (1, 2)),
        ("fp8_block", (256, 264), 2, True, 4, (1, 0)),
        ("fp8_block", (70, 2056), 1, False, 5, (4, 2)),
        ("bf16", (65, 136), 1, False, 5, (1, 1)),
    ],
)
def test_products(weight_format, shape, groups, round_input, warps_log2, cut):
    problem = Problem(weight_format, 1, *shape, groups, round_input, f32=weight_format != "mxfp4")
    multiply([problem], warps_log2, [cut])
    problem.check()


def test_segments_of_several_formats():
    problems = [
        Problem("fp8_block", 1, 40, 392, round_input=True),
        Problem("bf16", 1, 64, 392),
        Problem("fp8_block", 1, 192, 392, f32=False),
    ]
    multiply(problems, 5, [(2, 0), (1, 1), (2, 2)])
    for problem in problems:
        problem.check()


MUTANTS = {
    "warps add up before all are done": ("    __syncthreads();\n", ""),
    "weights behind the last are read": ("if (--turns_left < 0) return;", "--turns_left;"),
    "sums of a group of inputs have another's": (
        "        inputs = reinterpret_cast<const uint4(*)[4]>(&mine.zeros",
        "        inputs = reinterpret_cast<const uint4(*)[4]>(&mine.steps",
    ),
    "weights of the next block of inputs are those of the same": (
        "      unit += next_block;\n",
        "",
    ),
    "a block's sums replace those before": ("if (block > 0) pair", "if (block > 9) pair"),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    def error(seed):
        problem = Problem("mxfp4", 1, 64, 1032)
        multiply([problem], 4, [(2, 1)], seed, mutant)
        return problem.error

    assert any(_fails(error, seed) for seed in range(3))


def _fails(error, seed):
    try:
        return not error(seed) <= 1e-6
    except (Deadlock, MemoryFault, RuntimeError):
        return True
