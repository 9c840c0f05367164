"""Scores of paged indexer keys and the choice among them, against the oracle."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import dsv4_ffi
from dsv4_jax.ops.indexer import fp8_queries, paged_indexer_scores, paged_indexer_topk
from tests.oracles import indexer as oracle
from tests.oracles.formats import E2M1, E4M3, E8M0
from tests.oracles.topk import top_k

PLATFORM = jax.default_backend().replace("gpu", "cuda")
IMPLEMENTATIONS = [
    "xla",
    pytest.param(
        "ffi",
        marks=pytest.mark.skipif(
            (missing := dsv4_ffi.missing(PLATFORM)) is not None, reason=missing or ""
        ),
    ),
]
FORMATS = ["mxfp4", "fp8", "nvfp4"]
QUERIES = [
    pytest.param(jnp.float32, False, id="float32"),
    pytest.param(jnp.bfloat16, False, id="bfloat16"),
    pytest.param(jnp.float32, True, id="mxfp4"),
]
HEADS, WIDTH = 64, 128
LAYERS, LAYER = 2, 1
E4M3_DTYPE = ml_dtypes.float8_e4m3fn


def unpacked(codes):
    return E2M1[np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1)]


def random_pool(rng, key_format, blocks, per_block, width=WIDTH):
    """Planes, and the keys [layer, block, entry, channel] they hold."""
    shape = (LAYERS, blocks, per_block)
    if key_format == "fp8":
        codes = rng.standard_normal((*shape, width)).astype(E4M3_DTYPE)
        scales = np.exp2(rng.integers(-4, 5, (*shape, 1))).astype(np.float32)
        return (codes, scales), codes.astype(np.float64) * scales
    codes = rng.integers(0, 256, (*shape, width // 2), np.uint8)
    if key_format == "mxfp4":
        scales = rng.integers(120, 134, (*shape, width // 32), np.uint8)
        return (codes, scales), unpacked(codes) * np.repeat(E8M0[scales], 32, -1)
    scales = rng.integers(1, 127, (*shape, width // 16), np.uint8)
    return (codes, scales.view(E4M3_DTYPE)), unpacked(codes) * np.repeat(E4M3[scales], 16, -1)


def random_queries(rng, b, t, heads=HEADS, width=WIDTH):
    """Queries that MXFP4 holds, and head weights of both signs."""
    codes = rng.integers(0, 256, (b, t, heads, width // 2), np.uint8)
    scales = rng.integers(124, 131, (b, t, heads, width // 32))
    q = unpacked(codes) * np.repeat(E8M0[scales], 32, -1)
    weights = rng.standard_normal((b, t, heads)) * (heads * width) ** -0.5
    return q, weights.astype(np.float32)


def random_table(rng, b, blocks, width):
    """Blocks in no order, shared by nobody."""
    return rng.permutation(blocks)[: b * width].reshape(b, width).astype(np.int32)


def contiguous(keys, table):
    """The keys of each sequence [b, n, c]."""
    found = keys[LAYER, table]
    return found.reshape(len(table), -1, keys.shape[-1])


def expected_scores(q, weights, keys, table):
    keys = contiguous(keys, table)
    return np.array(
        [
            [
                oracle.scores(q[s, i], keys[s], weights[s, i].astype(np.float64))
                for i in range(len(q[s]))
            ]
            for s in range(len(q))
        ]
    )


def arguments(case, dtype):
    """What the functions take, of a case (q, weights, planes, keys, table, lengths)."""
    q, weights, planes, _, table, lengths = case
    planes = tuple(jnp.asarray(plane) for plane in planes)
    q = jnp.asarray(q, jnp.float32).astype(dtype)
    return q, jnp.asarray(weights), planes, LAYER, jnp.asarray(table), jnp.asarray(lengths)


def tolerance(mxfp4_queries):
    # Matrix units add E4M3 products with about 14 significant bits.
    return 3e-4 if mxfp4_queries and PLATFORM == "cuda" else 2e-6


STATIC = ("layer", "mxfp4_queries", "implementation")
jitted_scores = jax.jit(paged_indexer_scores, static_argnames=STATIC)
jitted_topk = jax.jit(paged_indexer_topk, static_argnames=("top_k", *STATIC))


def check(case, dtype, implementation, top, mxfp4_queries=False):
    q, weights, _, keys, table, lengths = case
    args = arguments(case, dtype)

    static = {"implementation": implementation, "mxfp4_queries": mxfp4_queries}
    scores = np.asarray(jitted_scores(*args, **static))
    ids = np.asarray(jitted_topk(*args, top, **static))
    expected = expected_scores(q, weights, keys, table)
    seen = np.arange(expected.shape[-1]) < lengths[..., None]
    scale = np.abs(expected).max(initial=1e-30)
    np.testing.assert_allclose(
        np.where(seen, scores, 0),
        np.where(seen, expected, 0),
        rtol=0,
        atol=tolerance(mxfp4_queries) * scale,
    )
    for s, t in np.ndindex(lengths.shape):
        length = min(lengths[s, t], expected.shape[-1])
        own = np.sort(top_k(scores[s, t, :length].astype(np.float64), top))
        found = np.sort(ids[s, t][ids[s, t] >= 0])
        np.testing.assert_array_equal(found, own)
        assert (ids[s, t] == -1).sum() == top - len(own)


def make_case(rng, key_format, b, t, blocks_each, per_block=32, heads=HEADS, width=WIDTH):
    q, weights = random_queries(rng, b, t, heads, width)
    planes, keys = random_pool(rng, key_format, b * blocks_each + 2, per_block, width)
    table = random_table(rng, b, b * blocks_each + 2, blocks_each)
    lengths = rng.integers(0, blocks_each * per_block + 1, (b, t)).astype(np.int32)
    lengths.flat[0] = blocks_each * per_block
    return q, weights, planes, keys, table, lengths


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("key_format", FORMATS)
@pytest.mark.parametrize(("dtype", "mxfp4_queries"), QUERIES)
def test_against_the_oracle(implementation, key_format, dtype, mxfp4_queries):
    if (
        implementation == "ffi"
        and PLATFORM == "cuda"
        and dtype == jnp.float32
        and not mxfp4_queries
    ):
        pytest.skip("not a case of the kernel")
    case = make_case(np.random.default_rng(0), key_format, b=3, t=2, blocks_each=5)
    check(case, dtype, implementation, 40, mxfp4_queries)


@pytest.mark.skipif(PLATFORM == "cuda", reason="the CUDA kernel has one size")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("heads", "width", "per_block"), [(1, 32, 1), (3, 64, 7)])
def test_other_sizes(implementation, heads, width, per_block):
    rng = np.random.default_rng(1)
    case = make_case(rng, "mxfp4", 2, 3, 6, per_block, heads, width)
    check(case, jnp.float32, implementation, top=5)


def test_plain_numbers():
    rng = np.random.default_rng(2)
    q, weights, _, keys, table, lengths = make_case(rng, "nvfp4", 2, 2, 3)
    check((q, weights, (keys.astype(np.float32),), keys, table, lengths), jnp.float32, "xla", 9)


def exact_case(rng, b, t, blocks_each, per_block=32):
    """Small integers: every score is exact in any order of summation, and many are equal."""
    q, _, (codes, scales), _, table, lengths = make_case(rng, "mxfp4", b, t, blocks_each, per_block)
    signs = rng.choice([0, 2, 10], (*codes.shape, 2)).astype(np.uint8)  # 0, 1, -1
    codes = signs[..., 0] | signs[..., 1] << 4
    q = rng.integers(-1, 2, q.shape).astype(np.float64)
    weights = rng.choice([-0.25, 0.0, 0.25, 0.5], q.shape[:3]).astype(np.float32)
    scales[:] = 127
    return q, weights, (codes, scales), unpacked(codes), table, lengths


def check_exact(case, implementation, top, mxfp4_queries):
    q, weights, _, keys, table, lengths = case
    args = arguments(case, jnp.bfloat16)
    static = {"implementation": implementation, "mxfp4_queries": mxfp4_queries}
    ids = jitted_topk(*args, top, **static)
    expected = expected_scores(q, weights, keys, table)
    for s, t in np.ndindex(lengths.shape):
        best = top_k(expected[s, t, : lengths[s, t]], top)
        found = np.sort(np.asarray(ids[s, t]))
        np.testing.assert_array_equal(found[found >= 0], np.sort(best))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mxfp4_queries", [False, True])
def test_equal_scores_prefer_the_lower_entry(implementation, mxfp4_queries):
    case = exact_case(np.random.default_rng(3), b=2, t=5, blocks_each=6)
    check_exact(case, implementation, 50, mxfp4_queries)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_few_entries_are_all_chosen(implementation):
    case = make_case(np.random.default_rng(4), "mxfp4", 3, 2, 2)
    lengths = case[-1]
    lengths[:] = [[0, 1], [31, 32], [63, 64]]
    for top in (64, 63, 100):
        args = arguments(case, jnp.bfloat16)
        ids = np.asarray(jitted_topk(*args, top, implementation=implementation))
        assert ids.shape == (3, 2, top)
        for s, t in np.ndindex(lengths.shape):
            if (length := lengths[s, t]) <= top:
                padded = np.full(top - length, -1)
                expected = np.concatenate([padded, np.arange(length)])
                np.testing.assert_array_equal(np.sort(ids[s, t]), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_missing_blocks_and_nan_scales(implementation):
    """Blocks past a sequence's entries need not exist; a NaN scale makes its key's score NaN."""
    case = make_case(np.random.default_rng(5), "mxfp4", 2, 1, 4)
    q, weights, (_, scales), keys, table, lengths = case
    lengths[:] = [[40], [64]]
    expected = expected_scores(q, weights, keys, table)
    table[:, 2:] = -1
    scales[LAYER, table[0, 1], 3, 2] = 255
    args = arguments(case, jnp.bfloat16)
    static = {"implementation": implementation, "mxfp4_queries": True}
    scores = np.asarray(jitted_scores(*args, **static))
    assert np.isnan(scores[0, 0, 35])
    scale = tolerance(True) * np.abs(expected).max()
    np.testing.assert_allclose(scores[0, 0, :35], expected[0, 0, :35], rtol=0, atol=scale)
    np.testing.assert_allclose(scores[1, 0, :64], expected[1, 0, :64], rtol=0, atol=scale)
    ids = jitted_topk(*args, 39, **static)
    assert 35 not in np.asarray(ids)[0]


def test_fp8_queries_are_exact_for_mxfp4_values():
    rng = np.random.default_rng(6)
    q, weights = random_queries(rng, 2, 3)
    q[0, 0, 0] = 0
    q[0, 0, 1] *= 2.0**60
    q[0, 0, 2] *= 2.0**-60
    q[0, 0, 3, :32] = 6 * 2.0**5
    q[0, 0, 3, 32:] = 0.5 * 2.0**-4
    q8, folded = fp8_queries(jnp.asarray(q, jnp.float32), jnp.asarray(weights))
    ratio = np.asarray(folded, np.float64) / weights
    np.testing.assert_array_equal(np.asarray(q8).astype(np.float64) * ratio[..., None], q)


def test_no_gradient_flows():
    q, *rest = arguments(make_case(np.random.default_rng(7), "mxfp4", 1, 2, 2), jnp.float32)

    def loss(q):
        return (jitted_topk(q, *rest, 5).sum() * q.sum()).astype(jnp.float32)

    grad = jax.grad(loss)(q)
    assert (grad == grad.ravel()[0]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("key_format", FORMATS)
@pytest.mark.parametrize("mxfp4_queries", [False, True])
@pytest.mark.parametrize(
    ("b", "t", "blocks_each", "per_block", "top"),
    [(1, 1, 700, 32, 512), (5, 3, 90, 32, 512), (70, 1, 37, 32, 40), (2, 13, 21, 64, 256)],
)
def test_gpu_kernel(key_format, mxfp4_queries, b, t, blocks_each, per_block, top):
    rng = np.random.default_rng(b)
    case = make_case(rng, key_format, b, t, blocks_each, per_block)
    check(case, jnp.bfloat16, "ffi", top, mxfp4_queries)


@pytest.mark.gpu
@pytest.mark.parametrize("mxfp4_queries", [False, True])
def test_gpu_ties(mxfp4_queries):
    case = exact_case(np.random.default_rng(8), 3, 6, 150)
    check_exact(case, "ffi", 512, mxfp4_queries)


@pytest.mark.gpu
def test_gpu_kernel_refuses():
    case = make_case(np.random.default_rng(9), "nvfp4", 1, 1, 2)
    with pytest.raises(NotImplementedError, match="indexer: the kernel has no float32"):
        paged_indexer_scores(*arguments(case, jnp.float32), implementation="ffi")
