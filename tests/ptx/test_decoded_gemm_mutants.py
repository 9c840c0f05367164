"""Mistakes planted in products with tiled weights on tcgen05 are noticed on the emulator."""

import re

import pytest

from tests.ptx import nvrtc
from tests.ptx.decoded_gemm import Problem
from tests.ptx.emulator import Deadlock, MemoryFault

pytestmark = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))

GEMM, WEIGHTS, INPUTS, TENSOR = (
    "decoded_gemm_sm100.cuh",
    "decoded_weights_sm100.cuh",
    "decoded_inputs_sm100.cuh",
    "tcgen05.cuh",
)
# (what is wrong, file, source as it is, source as it would be)
WAIT_MUTANTS = [
    ("blocks of weights overwrite each other", GEMM,
     "WaitBarrier(&shared.raw_empty[raw.slot], raw.parity ^ 1);", ""),
    ("rows are copied over what is multiplied", GEMM,
     "WaitBarrier(&shared.empty[ring.slot], ring.parity ^ 1);\n        ArriveExpecting",
     "ArriveExpecting"),
    ("weights are decoded over what is multiplied", GEMM,
     "WaitBarrier(&shared.empty[ring.slot], ring.parity ^ 1);\n        if constexpr",
     "if constexpr"),
    ("weights are decoded before they are there", GEMM,
     "WaitBarrier(&shared.raw_full[raw.slot], raw.parity);", ""),
    ("operands are multiplied before they are there", GEMM,
     "WaitBarrier(&shared.full[ring.slot], ring.parity);", ""),
    ("products do not wait for all that decode", GEMM, "1 + kDecodeWarps", "kDecodeWarps"),
    ("blocks are given back when one warp has read them", GEMM,
     "InitBarrier(&shared.raw_empty[i], kDecodeWarps);",
     "InitBarrier(&shared.raw_empty[i], 1);"),
    ("blocks are never given back", GEMM,
     "if (lane == 0) Arrive(&shared.raw_empty[raw.slot]);", ""),
    ("an accumulator is overwritten before it is stored", GEMM,
     "WaitBarrier(&shared.stored[accumulators.slot], accumulators.parity ^ 1);", ""),
    ("an accumulator is stored before it is complete", GEMM,
     "WaitBarrier(&shared.accumulated[accumulators.slot], accumulators.parity);", ""),
]  # fmt: skip

DATA_MUTANTS = [
    ("scales of weights stay where they are", GEMM,
     "tcgen05::CopyScaleBlock(weight_scales,",
     "if (k == 0) tcgen05::CopyScaleBlock(weight_scales,"),
    ("scales of rows stay where they are", GEMM,
     "tcgen05::CopyScaleBlock(row_scales,", "if (k == 0) tcgen05::CopyScaleBlock(row_scales,"),
    ("the first scale of four serves all", GEMM,
     "tcgen05::Mxfp8Instruction(kLanes, columns, step)",
     "tcgen05::Mxfp8Instruction(kLanes, columns, 0)"),
    ("another format of scales", TENSOR, "kE4m3 = 0, kUe8m0 = 1", "kE4m3 = 0, kUe8m0 = 0"),
    ("sums of the last tile are added", GEMM, "k > walk.Begin() || step > 0", "true"),
    ("the other side of the tile", GEMM, "16 * warp;", "16 * (warp ^ 4);"),
    ("rows of the next block", GEMM, "tile.rows.num_rows + 3) / 4 * 16",
     "tile.rows.num_rows + 3) / 4 * 32"),
    ("stores beyond the last row", GEMM, "column < tile.rows.num_rows && ", ""),
    ("stores beyond the last output", GEMM, " && output < gemm.num_outputs", ""),
    ("nothing brings the shortness of FP4 in", WEIGHTS, "kFp8 ? 0 : 6", "0"),
    ("codes in another order", WEIGHTS, "0x6420", "0x6240"),
    ("signs of other codes", WEIGHTS, "0x7531", "0x7351"),
    ("shares of other lanes", WEIGHTS, "share * 2 + half", "share + 4 * half"),
    ("inputs are not swizzled", INPUTS, "(part ^ row % 8) * 16", "part * 16"),
]  # fmt: skip


def ids(mutants):
    return [re.sub(r"\W+", "-", name) for name, *_ in mutants]


def survives(problem, mutant):
    for seed in range(6):
        try:
            out = problem.run(64, codes=True, blocks=1, seed=seed, mutant=mutant)
        except (Deadlock, MemoryFault, RuntimeError, NotImplementedError):
            return False
        if problem.error(out) > 1e-6:
            return False
    return True


@pytest.fixture(scope="module")
def problem():
    return Problem("mxfp4", 66, 130, 136, rounded=True)


@pytest.fixture(scope="module")
def many_tiles():
    return Problem("mxfp4", 64, 700, 8, rounded=True)


@pytest.mark.parametrize("mutant", [m[1:] for m in WAIT_MUTANTS], ids=ids(WAIT_MUTANTS))
def test_missing_wait_is_noticed(problem, many_tiles, mutant):
    assert not survives(many_tiles if "stored[" in mutant[1] else problem, mutant)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [m[1:] for m in DATA_MUTANTS], ids=ids(DATA_MUTANTS))
def test_mistake_in_the_data_is_noticed(problem, mutant):
    assert not survives(problem, mutant)
