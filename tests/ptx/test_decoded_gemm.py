"""Products with tiled weights on tcgen05, as NVRTC compiles them, against the float64 product."""

import numpy as np
import pytest

from tests.ptx import nvrtc
from tests.ptx.decoded_gemm import Problem

pytestmark = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))

# (format, rounded inputs, products of codes)
VARIANTS = [
    ("mxfp4", True, True),
    ("fp8_block", True, True),
    ("mxfp4", False, False),
    ("nvfp4", True, False),
    ("fp8_block", False, False),
    ("bf16", False, False),
]


def check(problem, out):
    assert problem.error(out) <= (1e-6 if problem.f32 else 2e-3)


@pytest.mark.parametrize(
    ("weight_format", "rounded", "codes", "tile_rows"),
    [(*variant, 64) for variant in VARIANTS]
    + [("mxfp4", True, True, 128), ("bf16", False, False, 128)],
)
def test_dense(weight_format, rounded, codes, tile_rows):
    rng = np.random.default_rng([len(weight_format), tile_rows, codes])
    # The last block of rows is a small one, the last block of columns not a whole one.
    num_rows = tile_rows + int(rng.integers(1, 40))
    n, k = int(rng.integers(65, 128)), 8 * int(rng.integers(17, 32))
    problem = Problem(weight_format, num_rows, n, k, rounded=rounded, f32=tile_rows == 64)
    check(problem, problem.run(tile_rows, codes=codes, blocks=int(rng.integers(1, 4))))


@pytest.mark.parametrize("codes", [False, True])
def test_groups_of_inputs(codes):
    """Each run of outputs reads its own group of inputs."""
    problem = Problem("fp8_block", 19, 256, 200, input_groups=2, rounded=codes)
    check(problem, problem.run(64, codes=codes))


@pytest.mark.parametrize("cluster", [2])
def test_blocks_of_a_cluster_share_k(cluster):
    problem = Problem("mxfp4", 61, 70, 128 * (cluster + 1) + 8, rounded=True)
    outs = [problem.run(64, codes=True, blocks=cluster, cluster=cluster, seed=seed)
            for seed in range(2)]  # fmt: skip
    check(problem, outs[0])
    np.testing.assert_array_equal(outs[0], outs[1])


@pytest.mark.parametrize("sizes", [[0, 70, 0, 3], [1, 1]], ids=["several-blocks", "one-each"])
def test_groups_of_rows(sizes):
    problem = Problem("mxfp4", sum(sizes), 70, 136, sizes=sizes, rounded=True)
    check(problem, problem.run(64, codes=True))


def test_an_outlier_and_rows_of_zeros():
    problem = Problem("mxfp4", 20, 64, 256, rounded=True)
    problem.x[3, 0, 5], problem.x[7] = 1e4, 0
    out = problem.run(64, codes=True)
    assert np.isfinite(out).all() and not out[7].any()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("tile_rows", [64, 128])
@pytest.mark.parametrize(("weight_format", "rounded", "codes"), VARIANTS)
def test_sweep(weight_format, rounded, codes, tile_rows, seed):
    rng = np.random.default_rng([len(weight_format), tile_rows, codes, seed])
    num_rows, n = int(rng.integers(1, 3 * tile_rows)), int(rng.integers(1, 400))
    k = 8 * int(rng.integers(1, 150))
    sizes = None
    if rng.integers(2):
        shares = rng.dirichlet(np.full(int(rng.integers(1, 12)), 0.3))
        sizes = rng.multinomial(num_rows, shares).tolist()
    cluster = 1
    if tile_rows == 64 and sizes is None:
        cluster = int(rng.choice([c for c in (1, 2, 4, 8) if c <= -(-k // 128)]))
    tiles = -(-n // 128) * -(-num_rows // tile_rows)
    blocks = tiles * cluster if cluster > 1 else int(rng.integers(1, 9))
    problem = Problem(weight_format, num_rows, n, k, sizes=sizes, rounded=rounded)
    check(problem, problem.run(tile_rows, codes=codes, blocks=blocks, cluster=cluster, seed=seed))


@pytest.mark.slow
@pytest.mark.parametrize("codes", [False, True])
def test_width_of_the_model(codes):
    problem = Problem("mxfp4", 130, 130, 4096, rounded=codes)
    check(problem, problem.run(128, codes=codes))
