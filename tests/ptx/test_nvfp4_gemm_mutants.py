"""Mistakes in how the NVFP4 kernel waits and shares work are noticed on the emulator."""

import pytest

from tests.ptx import nvfp4_gemm, nvrtc
from tests.ptx.mutants import SEEDS, ids, survives

pytestmark = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))

# (what is wrong, source as it is, source as it would be)
PIPELINE_MUTANTS = [
    (
        "the producer does not wait for a free stage",
        "WaitBarrier(&shared.empty[ring.slot], ring.parity ^ 1);",
        "",
    ),
    (
        "the producer waits with the wrong parity",
        "WaitBarrier(&shared.empty[ring.slot], ring.parity ^ 1);",
        "WaitBarrier(&shared.empty[ring.slot], ring.parity);",
    ),
    (
        "the tensor warp does not wait for a stage's copies",
        "WaitBarrier(&shared.full[ring.slot], ring.parity);",
        "",
    ),
    (
        "the tensor warp waits with the wrong parity",
        "WaitBarrier(&shared.full[ring.slot], ring.parity);",
        "WaitBarrier(&shared.full[ring.slot], ring.parity ^ 1);",
    ),
    (
        "the tensor warp does not wait for a free accumulator",
        "WaitBarrier(&shared.stored[accumulators.slot], accumulators.parity ^ 1);",
        "",
    ),
    (
        "the storing warps do not wait for the accumulator",
        "WaitBarrier(&shared.accumulated[accumulators.slot], accumulators.parity);",
        "",
    ),
    ("a used stage is never given back", "tcgen05::Commit(&shared.empty[ring.slot]);", ""),
    (
        "a finished accumulator is not announced",
        "tcgen05::Commit(&shared.accumulated[accumulators.slot]);",
        "",
    ),
    ("a stored accumulator is not given back", "Arrive(&shared.stored[accumulators.slot]);", ""),
    ("fewer bytes are expected", "(1 + token_blocks) * scale_bytes);", "scale_bytes);"),
    (
        "more bytes are expected",
        "(1 + token_blocks) * scale_bytes);",
        "(2 + token_blocks) * scale_bytes);",
    ),
    ("a ring one slot too long", "if (++slot == kSlots)", "if (++slot == kSlots + 1)"),
    ("the parity never changes", "parity ^= 1;", ""),
    ("stored expects one thread a warp", "stored[i], kStoreThreads", "stored[i], 4"),
    ("barriers are used before they are initialised", "  SyncCluster();\n  tcgen05", "  tcgen05"),
]  # fmt: skip

CLUSTER_MUTANTS = [
    ("the sum is used before it is there", "WaitBarrierOfCluster(exchanged, 0);", ""),
    ("a block is not told of the sums", "other < size; ++other", "other < size - 1; ++other"),
    ("sums overwrite each other", "(rank * share + column % share)", "(column % share)"),
    ("sums go to the wrong block", "ClusterAddress(place, column / share)",
     "ClusterAddress(place, 0)"),
    ("one block's part is forgotten", "source < size; ++source", "source + 1 < size; ++source"),
    ("a slice of K is done twice", "begin = rank * stages / size;", "begin = 0;"),
    ("the blocks do not start together", "  SyncCluster();\n  tcgen05",
     "  __syncthreads();\n  tcgen05"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new"), [m[1:] for m in PIPELINE_MUTANTS], ids=ids(PIPELINE_MUTANTS)
)
def test_mistake_in_the_pipeline_is_noticed(old, new):
    problem = nvfp4_gemm.random_problem(130, 136, 544)
    assert not survives(problem, 64, old, new, num_blocks=1)


@pytest.mark.parametrize(("old", "new"), [m[1:] for m in CLUSTER_MUTANTS], ids=ids(CLUSTER_MUTANTS))
def test_mistake_in_the_cluster_is_noticed(old, new):
    problem = nvfp4_gemm.random_problem(20, 128, 544)
    assert not survives(problem, 32, old, new, num_blocks=2, cluster=2)


def test_unchanged_kernel_survives():
    problem = nvfp4_gemm.random_problem(130, 136, 544)
    kernel = nvfp4_gemm.compiled(64)
    for seed in SEEDS:
        out = nvfp4_gemm.run(problem, 64, kernel=kernel, seed=seed, num_blocks=1)
        assert nvfp4_gemm.difference(problem, out)[0] == 0
