"""The selection of short rows, as nvcc compiles it for sm_90, in the emulator."""

import shutil

import numpy as np
import pytest

from tests.oracles.topk import top_k
from tests.ptx import hopper, warp_instructions  # noqa: F401
from tests.ptx.emulator import GlobalMemory, launch
from tests.ptx.test_router import kernel, values
from tests.test_ops_topk import equal, few_values, narrow, normal, specials

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="there is no nvcc to compile with"
)


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("num_blocks", [1, 2])
@pytest.mark.parametrize(
    ("make", "n", "k"),
    [
        (normal, 700, 40),
        (narrow, 1100, 512),
        (equal, 600, 512),
        (few_values, 700, 300),
        (specials, 520, 100),
    ],
)
def test_rows(make, n, k, num_blocks, in_order):
    rng = np.random.default_rng(n)
    scores = np.array([make(rng, n) for _ in range(3)], np.float32)
    lengths = np.array([n, k + 30, 0], np.int32)
    best, indices = np.full((3, k), np.nan, np.float32), np.full((3, k), -7, np.int32)
    memory = GlobalMemory()
    scores_, lengths_, best_, indices_ = map(memory.place, (scores, lengths, best, indices))
    with hopper.instructions():
        launch(
            kernel("topk.cu", f"10SelectRowsILi16ELb{num_blocks > 1:d}ELb{in_order:d}E"),
            grid=(3 * num_blocks,),
            cluster=num_blocks,
            block=512,
            arguments=values("PPIIPP", scores_, lengths_, n, k, best_, indices_),
            memory=memory,
        )
    for row, length in enumerate(lengths):
        with np.errstate(invalid="ignore"):
            expected = top_k(scores[row, :length].astype(np.float64), k)
        found = indices[row, : len(expected)]
        order = slice(None) if in_order else np.argsort(found)
        expected = expected if in_order else np.sort(expected)
        np.testing.assert_array_equal(found[order], expected)
        np.testing.assert_array_equal(best[row, : len(expected)], scores[row, found])
        np.testing.assert_array_equal(indices[row, len(expected) :], -1)
        np.testing.assert_array_equal(best[row, len(expected) :], -np.inf)
