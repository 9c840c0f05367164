"""Queries and the window's ring after a chunk, against the oracle and byte by byte."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.cache.storage import Dense, EntryRecord
from dsv4_jax.ops.append_swa import append_swa
from tests.cache_cases import (
    BFLOAT16,
    DENSE,
    EPS,
    FREQUENCIES,
    IMPLEMENTATIONS,
    KERNELS,
    RECORDS,
    WINDOW_FREQUENCIES,
    C,
    assert_rounded,
    assert_same_bytes,
    random_planes,
)
from tests.oracles import cache_writes as oracle

LAYERS, LAYER = 2, 1
RECORD = EntryRecord(C, 64)
WEIGHT_SCALE = 0.3

append = jax.jit(
    append_swa, static_argnames=("layer", "storage", "eps", "with_chunk", "implementation")
)


class Case:
    """Chunks of some sequences, and a ring full of bytes."""

    def __init__(self, start, length, num_tokens, *, heads=2, ring=128, slots=None, seed=0):
        self.rng = np.random.default_rng(seed)
        self.batch, self.num_tokens, self.ring_size = len(start), num_tokens, ring
        self.slots = slots or len(start) + 1
        self.start = jnp.asarray(start, jnp.int32)
        self.length = jnp.asarray(length, jnp.int32)
        scale = np.exp(self.rng.uniform(-3, 3, (self.batch, num_tokens, 1, 1)))
        q = scale * self.rng.standard_normal((self.batch, num_tokens, heads, C))
        kv = scale[..., 0] * self.rng.standard_normal((self.batch, num_tokens, C))
        self.q, self.kv = jnp.asarray(q, BFLOAT16), jnp.asarray(kv, BFLOAT16)
        weight = 1 + WEIGHT_SCALE * self.rng.standard_normal(C)
        self.weight = jnp.asarray(weight, BFLOAT16)

    def ring(self, storage):
        return random_planes(self.rng, storage, LAYERS, self.slots, self.ring_size)

    def run(self, implementation, storage, ring, frequencies=FREQUENCIES, with_chunk=True):
        return append(
            *(self.q, self.kv, self.weight, ring, LAYER, self.start, self.length, frequencies),
            storage=storage,
            eps=EPS,
            with_chunk=with_chunk,
            implementation=implementation,
        )

    def positions(self, sequence):
        return int(self.start[sequence]) + np.arange(self.num_tokens)


def float64(x):
    return np.asarray(x).astype(np.float64)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("frequencies", [FREQUENCIES, WINDOW_FREQUENCIES], ids=["yarn", "window"])
@pytest.mark.parametrize(("num_tokens", "heads"), [(1, 64), (5, 3)])
def test_values(implementation, frequencies, num_tokens, heads):
    start = [0, 126, 1_048_575, 3_000_000]
    case = Case(start, [num_tokens] * 4, num_tokens, heads=heads)
    found = case.run(implementation, DENSE, case.ring(DENSE), frequencies)
    for i in range(case.batch):
        positions = case.positions(i)
        q = oracle.queries(float64(case.q[i]), positions, frequencies, EPS)
        assert_rounded(found.q[i], q)
        kv = oracle.window_entries(
            float64(case.kv[i]), float64(case.weight), positions, frequencies, EPS
        )
        assert_rounded(found.new[0][i], kv)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("storage", "encode"), RECORDS)
def test_bytes(implementation, storage, encode):
    """Records are the oracle's encoding of the values that a dense ring gets."""
    case = Case([0, 77, 2_000_000], [33, 33, 33], 33)
    kv = np.array(case.kv)
    kv[0, 0] = 0
    kv[0, 1, :448], kv[0, 2, :64] = 0, 0
    kv[0, 3, 1:] = 0
    case.kv = jnp.asarray(kv)
    case.weight = case.weight.at[:64].set(1e-7).at[64:128].set(1e-30).at[128:192].set(3e4)
    dense = case.run(implementation, DENSE, case.ring(DENSE)).new[0]
    found = case.run(implementation, storage, case.ring(storage)).new
    assert_same_bytes(found, encode(float64(dense)))


def expected_ring(case, before, new):
    """The ring after the chunk, filled position by position with the chunk's entries."""
    after = [np.array(plane) for plane in before]
    for i in range(case.batch):
        start, length = int(case.start[i]), int(case.length[i])
        for token in range(length):
            for plane, entries in zip(after, new, strict=True):
                plane[LAYER, i, (start + token) % case.ring_size] = entries[i, token]
    return after


SHAPES = [
    # start, length, tokens, ring
    ([0, 5, 127, 128, 1_000_003], [1, 1, 1, 0, 1], 1, 128),
    ([0, 126, 255, 3], [4, 3, 0, 1], 4, 128),
    ([0, 127, 2_000_127, 1], [129, 128, 127, 0], 129, 128),
    ([0, 5, 1_000_001], [300, 256, 255], 300, 128),
    ([7, 0], [9, 3], 9, 4),
]


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize(("start", "length", "num_tokens", "ring"), SHAPES)
@pytest.mark.parametrize("storage", [DENSE, RECORD], ids=["dense", "record"])
def test_ring(implementation, storage, start, length, num_tokens, ring):
    """Each position at its slot, and no other byte anywhere."""
    check_ring(implementation, storage, start, length, num_tokens, ring)


@pytest.mark.parametrize(("start", "length", "num_tokens", "ring"), SHAPES[1:3])
def test_reference_ring(start, length, num_tokens, ring):
    check_ring("xla", RECORD, start, length, num_tokens, ring)


def check_ring(implementation, storage, start, length, num_tokens, ring):
    case = Case(start, length, num_tokens, heads=1, ring=ring, seed=1)
    before = case.ring(storage)
    found = case.run(implementation, storage, before)
    assert_same_bytes(found.before, [np.asarray(plane)[LAYER, : case.batch] for plane in before])
    assert_same_bytes(
        found.window, expected_ring(case, before, [np.asarray(plane) for plane in found.new])
    )
    alone = case.run(implementation, storage, before, with_chunk=False)
    assert alone.before == alone.new == ()
    assert_same_bytes(alone.window, found.window)
    np.testing.assert_array_equal(float64(alone.q), float64(found.q))


@pytest.mark.parametrize("implementation", KERNELS)
def test_chunks_make_no_difference(implementation):
    """A sequence in chunks of several lengths leaves what single tokens leave."""
    case = Case([0, 1_048_448], [259] * 2, 259, heads=1, seed=2)
    q, kv, start = case.q, case.kv, np.asarray(case.start)

    def in_chunks(widths):
        ring, done, queries = case.ring(RECORD), 0, []
        for width in widths:
            case.q, case.kv = q[:, done : done + width], kv[:, done : done + width]
            case.num_tokens = width
            case.start, case.length = jnp.asarray(start + done), jnp.full(2, width)
            found = case.run(implementation, RECORD, ring, with_chunk=width > 1)
            ring, done = found.window, done + width
            queries.append(float64(found.q))
        assert done == 259
        return [plane[LAYER, :2] for plane in ring], np.concatenate(queries, axis=1)

    whole_ring, whole_queries = in_chunks([259])
    for widths in ([128, 3, 128], [3] * 86 + [1]):
        ring, queries = in_chunks(widths)
        assert_same_bytes(ring, whole_ring)
        np.testing.assert_array_equal(queries, whole_queries)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_bad_number_stays_in_its_sequence(implementation):
    case = Case([10, 20, 30], [3, 3, 3], 3, heads=1, seed=3)
    ring = case.ring(RECORD)
    clean = case.run(implementation, RECORD, ring)
    case.kv = case.kv.at[1, 1, 7].set(jnp.nan)
    case.q = case.q.at[1].set(jnp.inf)
    found = case.run(implementation, RECORD, ring)
    for a, b in zip(found.window, clean.window, strict=True):
        np.testing.assert_array_equal(a[:, [0, 2, 3]], b[:, [0, 2, 3]])
        np.testing.assert_array_equal(a[LAYER, 1, 20], b[LAYER, 1, 20])
    # All seven scales of the entry say NaN.
    assert (np.asarray(found.window[1])[LAYER, 1, 21, :7] == 255).all()
    np.testing.assert_array_equal(float64(found.q[::2]), float64(clean.q[::2]))
    assert np.isnan(float64(found.q[1])).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float32_weight(implementation):
    case = Case([3], [2], 2, heads=1)
    ring = case.ring(DENSE)
    found = case.run(implementation, DENSE, ring)
    case.weight = case.weight.astype(jnp.float32)
    assert_same_bytes(case.run(implementation, DENSE, ring).window, found.window)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_in_place(implementation, num_tokens):
    """A donated ring is written where it lies, also when the chunk reads what it was."""
    case = Case([3], [num_tokens], num_tokens)

    def step(ring, *arrays):
        q, kv, weight, start, length = arrays
        appended = append_swa(
            *(q, kv, weight, ring, LAYER, start, length, FREQUENCIES),
            storage=RECORD,
            eps=EPS,
            with_chunk=num_tokens > 1,
            implementation=implementation,
        )
        return appended.window, appended.q, appended.before, appended.new

    ring = case.ring(RECORD)
    arrays = (case.q, case.kv, case.weight, case.start, case.length)
    compiled = jax.jit(step, donate_argnums=0).lower(ring, *arrays).compile()
    assert " copy(" not in compiled.as_text()
    assert compiled.memory_analysis().alias_size_in_bytes == sum(plane.nbytes for plane in ring)


@pytest.mark.parametrize(
    ("dtype", "storage", "message"),
    [
        (jnp.float32, DENSE, "computes in bfloat16, not float32"),
        (jnp.bfloat16, Dense(C, BFLOAT16, "entry", 64), "does not know Dense"),
    ],
)
def test_the_kernel_refuses(dtype, storage, message):
    case = Case([0], [1], 1)
    case.q, case.kv = case.q.astype(dtype), case.kv.astype(dtype)
    with pytest.raises(NotImplementedError, match=message):
        case.run("ffi", storage, case.ring(storage))
