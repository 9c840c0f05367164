"""topk_select against a stable sort in float64, over inputs made to break selections."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import dsv4_ffi
from dsv4_jax.ops.topk import topk_select
from tests.oracles.topk import top_k

IMPLEMENTATIONS = [
    "xla",
    pytest.param(
        "ffi",
        marks=pytest.mark.skipif(
            (missing := dsv4_ffi.missing(jax.default_backend().replace("gpu", "cuda"))) is not None,
            reason=missing or "",
        ),
    ),
]


def normal(rng, n):
    return rng.standard_normal(n)


def narrow(rng, n):
    return 30 + 3 * rng.standard_normal(n)


def equal(rng, n):
    return np.full(n, rng.standard_normal())


def few_values(rng, n):
    return rng.integers(-2, 3, n)


def zeros(rng, n):
    return rng.choice([0.0, -0.0, 1e-45, -1e-45], n)


def subnormals(rng, n):
    return rng.integers(-50, 50, n) * 1e-45


def neighbours(rng, n):
    """Scores that differ in the last bits only."""
    return (np.float32(1.5).view(np.int32) + rng.integers(0, 40, n)).astype(np.int32).view("f4")


def every_bit_pattern(rng, n):
    return rng.integers(-(2**31), 2**31, n).astype(np.int32).view(np.float32)


def specials(rng, n):
    return rng.choice([np.inf, -np.inf, np.nan, -np.nan, 0.0, 3.4e38, -3.4e38], n)


def negative_nan_only(rng, n):
    return np.where(np.arange(n) == n // 2, -np.inf, -np.nan)


def ascending(rng, n):
    return np.arange(n)


def descending(rng, n):
    return -np.arange(n)


INPUTS = [
    normal,
    narrow,
    equal,
    few_values,
    zeros,
    subnormals,
    neighbours,
    every_bit_pattern,
    specials,
    negative_nan_only,
    ascending,
    descending,
]


jitted = jax.jit(topk_select, static_argnames=("k", "sorted", "implementation"))


def check(scores, k, implementation, sorted=True, lengths=None):
    scores = np.asarray(scores, np.float32)
    actual = jitted(
        jnp.asarray(scores),
        k,
        lengths=None if lengths is None else jnp.asarray(lengths, jnp.int32),
        sorted=sorted,
        implementation=implementation,
    )
    values, indices = (np.asarray(x) for x in actual)
    assert values.dtype == np.float32 and indices.dtype == np.int32
    for row, row_scores in enumerate(scores):
        length = len(row_scores) if lengths is None else np.clip(lengths[row], 0, len(row_scores))
        with np.errstate(invalid="ignore"):
            expected = top_k(row_scores[:length].astype(np.float64), k)
        found = indices[row]
        order = slice(None) if sorted else np.argsort(np.where(found < 0, 2**31 - 1, found))
        expected = expected if sorted else np.sort(expected)
        np.testing.assert_array_equal(found[order][: len(expected)], expected)
        np.testing.assert_array_equal(values[row][order][: len(expected)], row_scores[expected])
        np.testing.assert_array_equal(found[order][len(expected) :], -1)
        np.testing.assert_array_equal(values[row][order][len(expected) :], -np.inf)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 7), (257, 6), (1025, 512)])
@pytest.mark.parametrize("sorted", [True, False])
def test_against_a_stable_sort(implementation, make, n, k, sorted):
    rng = np.random.default_rng(n)
    check(np.stack([make(rng, n) for _ in range(3)]), k, implementation, sorted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sorted", [True, False])
@pytest.mark.parametrize("n", [40, 2100])
def test_lengths(implementation, sorted, n):
    """None, fewer than k, exactly k, more, all, and what is out of range."""
    rng = np.random.default_rng(0)
    scores = np.stack([make(rng, n) for make in (specials, narrow, few_values) for _ in range(3)])
    check(scores, 20, implementation, sorted, lengths=[0, 1, 19, 20, 21, 33, n, n + 5, -3])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_rows(implementation):
    values, indices = topk_select(jnp.zeros((2, 0, 9)), 3, implementation=implementation)
    assert values.shape == indices.shape == (2, 0, 3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_transformations(implementation):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.integers(0, 9, (4, 3, 50)), jnp.float32)
    lengths = jnp.asarray(rng.integers(0, 50, (4, 3)))
    expected = topk_select(x, 5, lengths=lengths, implementation="xla")

    def select(x, lengths):
        return topk_select(x, 5, lengths=lengths, implementation=implementation)

    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = P("rows")
    for transformed in (
        jax.jit(select),
        jax.vmap(select),
        jax.vmap(jax.vmap(select)),
        lambda x, lengths: jax.lax.scan(lambda _, row: (None, select(*row)), None, (x, lengths))[1],
        jax.shard_map(select, mesh=mesh, in_specs=(rows, rows), out_specs=rows),
        jax.vmap(lambda x, lengths: select(x, lengths), in_axes=(1, 1), out_axes=1),
    ):
        for actual, wanted in zip(transformed(x, lengths), expected, strict=True):
            np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("lengths", [None, [30, 2, 0]])
def test_gradient_reaches_the_chosen_scores(implementation, lengths):
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((3, 30)), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)
    lengths = None if lengths is None else jnp.asarray(lengths)

    def loss(x):
        values, _ = topk_select(x, 4, lengths=lengths, implementation=implementation)
        return (weights * jnp.where(jnp.isfinite(values), values, 0)).sum()

    expected = np.zeros(x.shape)
    for row in range(3):
        n = 30 if lengths is None else lengths[row]
        ids = top_k(np.asarray(x[row, :n], np.float64), 4)
        expected[row, ids] = weights[row, : len(ids)]
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(x), expected)


def test_mask():
    scores = jnp.array([[5.0, 1.0, 1.0, 7.0]] * 3)
    valid = jnp.array([[False, True, True, True], [False, False, True, False], [False] * 4])
    values, ids = topk_select(scores, 2, valid)
    np.testing.assert_array_equal(ids, [[3, 1], [2, -1], [-1, -1]])
    np.testing.assert_array_equal(values, [[7, 1], [1, -np.inf], [-np.inf, -np.inf]])


@pytest.mark.parametrize("k", [0, 5])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match=f"k: got {k}"):
        topk_select(jnp.zeros((2, 4)), k)


def test_what_the_kernel_refuses():
    x = jnp.zeros((1, 4000))
    with pytest.raises(NotImplementedError, match="mask"):
        topk_select(x, 2, x > 0, implementation="ffi")
    with pytest.raises(NotImplementedError, match="2048"):
        topk_select(x, 2049, implementation="ffi")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "n", "k"),
    [
        (3, 300, 16),
        (3, 513, 16),
        (200, 5000, 1024),
        (2, 8192, 2048),
        (2, 8193, 512),
        (3, 60000, 700),
        (70, 40000, 512),
        (1, 65537, 2048),
        (3, 262144, 512),
        (1, 300001, 1),
        (1, 1048576, 2048),
    ],
)
def test_gpu_kernels(rows, n, k):
    rng = np.random.default_rng(rows * n)
    lengths = rng.integers(0, n + 1, rows)
    lengths[0] = k
    for make in INPUTS:
        scores = np.stack([make(rng, n) for _ in range(min(rows, 2))]).astype(np.float32)
        scores = np.tile(scores, (-(-rows // len(scores)), 1))[:rows]
        check(scores, k, "ffi")
        check(scores, k, "ffi", sorted=False, lengths=lengths)


@pytest.mark.gpu
def test_gpu_order_is_the_same_every_time():
    x = jnp.asarray(few_values(np.random.default_rng(0), (8, 100000)), jnp.float32)
    select = jax.jit(lambda x: topk_select(x, 512, sorted=False, implementation="ffi")[1])
    first = np.asarray(select(x))
    for _ in range(5):
        np.testing.assert_array_equal(select(x), first)
