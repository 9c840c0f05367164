"""The NVFP4 kernel of sm_100, as NVRTC compiles it, against the float64 product."""

import numpy as np
import pytest

from tests.ptx import nvfp4_gemm, nvrtc

pytestmark = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))


def assert_right(problem, out):
    wrong, error = nvfp4_gemm.difference(problem, out)
    # The kernel's sums are rounded to float32 before they are rounded to bfloat16.
    assert wrong <= 1e-4
    assert error <= 2e-3


def random_shape(rng: np.random.Generator, max_tokens: int) -> tuple[int, int, int]:
    """(tokens, features, width), odd as often as not; the width is odd times 32."""
    return (
        int(rng.integers(1, max_tokens + 1)),
        int(rng.integers(1, 300)),
        32 * int(rng.integers(1, 24)),
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tile_tokens", nvfp4_gemm.TILE_SIZES)
def test_dense(tile_tokens, seed):
    rng = np.random.default_rng([tile_tokens, seed])
    shape = random_shape(rng, 32 if tile_tokens == 32 else 2 * tile_tokens)
    problem = nvfp4_gemm.random_problem(*shape, seed=seed)
    blocks = int(rng.integers(1, 5))
    assert_right(problem, nvfp4_gemm.run(problem, tile_tokens, num_blocks=blocks, seed=seed))


@pytest.mark.parametrize("cluster", [2, 4, 8])
@pytest.mark.parametrize("tile_tokens", [32, 64])
def test_blocks_of_a_cluster_share_k(tile_tokens, cluster):
    # The last stage is a partial one, and stages do not divide evenly.
    problem = nvfp4_gemm.random_problem(tile_tokens - 3, 130, 256 * (cluster + 1) + 96)
    launch = {"num_blocks": 2 * cluster, "cluster": cluster}
    outs = [nvfp4_gemm.run(problem, tile_tokens, seed=seed, **launch) for seed in range(2)]
    assert_right(problem, outs[0])
    np.testing.assert_array_equal(outs[0], outs[1])


@pytest.mark.parametrize(
    ("tile_tokens", "num_tokens", "group_sizes"),
    [
        (64, 90, [0, 1, 50, 0, 39, 0]),
        (64, 70, [0, 70, 0]),
        (64, 3, [1, 1, 1]),
        (128, 330, [100, 0, 37, 193]),
        (192, 400, [300, 50, 0, 50]),
        (64, 80, [20, 0, 20]),
        (64, 0, [0, 0]),
    ],
    ids=["odd", "all-in-one", "one-each", "tile-128", "tile-192", "not-all-tokens", "no-tokens"],
)
def test_grouped(tile_tokens, num_tokens, group_sizes):
    problem = nvfp4_gemm.random_problem(max(num_tokens, 1), 140, 288, group_sizes)
    assert_right(problem, nvfp4_gemm.run(problem, tile_tokens, num_blocks=3))


def test_more_groups_than_lanes():
    sizes = np.random.default_rng(0).integers(0, 4, 70).tolist()
    problem = nvfp4_gemm.random_problem(sum(sizes), 7, 64, sizes)
    assert_right(problem, nvfp4_gemm.run(problem, 64, num_blocks=3))


def test_group_sizes_beyond_the_tokens_stay_inside_the_arrays():
    problem = nvfp4_gemm.random_problem(40, 20, 64, [30, 10, 0])
    problem.group_sizes = [30, 2**31 - 1, 5]
    out = nvfp4_gemm.run(problem, 64)
    problem.group_sizes = [30, 10, 0]
    assert_right(problem, out)


def test_a_token_does_not_change_another():
    problem = nvfp4_gemm.random_problem(40, 130, 96)
    before = nvfp4_gemm.run(problem, 64)
    problem.token_scales[3] = 1e30
    problem.token_scales[4] = np.nan
    problem.tokens.packed[5] = 0
    after = nvfp4_gemm.run(problem, 64)
    others = [t for t in range(40) if t not in (3, 4, 5)]
    np.testing.assert_array_equal(after[others], before[others])
    assert (after[4] & 0x7FFF > 0x7F80).all()
    assert not (after[5] & 0x7FFF).any()


def test_schedule_does_not_change_the_result():
    problem = nvfp4_gemm.random_problem(60, 200, 544)
    outs = [nvfp4_gemm.run(problem, 64, num_blocks=n, seed=n) for n in (1, 2, 4)]
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], outs[2])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("tile_tokens", nvfp4_gemm.TILE_SIZES)
def test_sweep(tile_tokens, seed):
    rng = np.random.default_rng([tile_tokens, seed, 1])
    num_tokens, num_features, width = random_shape(rng, 32 if tile_tokens == 32 else 600)
    group_sizes = None
    if tile_tokens > 32 and rng.integers(2):
        num_groups = int(rng.integers(1, 40))
        sizes = rng.multinomial(num_tokens, rng.dirichlet(np.full(num_groups, 0.3)))
        group_sizes = sizes.tolist()
    cluster = 1
    if tile_tokens <= 64 and group_sizes is None:
        cluster = int(rng.choice([c for c in (1, 2, 4, 8) if c <= -(-width // 256)]))
    tiles = -(-num_features // 128) * -(-num_tokens // tile_tokens)
    blocks = tiles * cluster if cluster > 1 else int(rng.integers(1, 9))
    problem = nvfp4_gemm.random_problem(num_tokens, num_features, width, group_sizes, seed)
    launch = {"num_blocks": blocks, "cluster": cluster, "seed": seed}
    assert_right(problem, nvfp4_gemm.run(problem, tile_tokens, **launch))


@pytest.mark.slow
def test_width_of_the_model():
    problem = nvfp4_gemm.random_problem(130, 260, 4096)
    assert_right(problem, nvfp4_gemm.run(problem, 192, num_blocks=2))
