"""Compressed entries and tails after chunks, against the oracle and byte by byte."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.cache.storage import EntryRecord
from dsv4_jax.ops.flush import Flushed, Stream, flush_csa, flush_hca
from tests.cache_cases import (
    BFLOAT16,
    DENSE,
    DENSE_KEY,
    EPS,
    FREQUENCIES,
    IMPLEMENTATIONS,
    KERNELS,
    KEY,
    KEY_RECORD,
    RECORDS,
    C,
    assert_rounded,
    assert_same_bytes,
    random_planes,
)
from tests.oracles import cache_writes as oracle

LAYERS, LAYER = 2, 1
RECORD = EntryRecord(C, 64)
STATIC = ("layer", "storage", "dtype", "eps", "implementation")
csa = jax.jit(flush_csa, static_argnames=(*STATIC, "key_storage"))
hca = jax.jit(flush_hca, static_argnames=STATIC)


class Case:
    """Sequences with rows for two compressors of one layer, or for one, and their state."""

    def __init__(self, ratio, start, num_tokens, *, columns=None, num_blocks=None, seed=0):
        self.rng = rng = np.random.default_rng(seed)
        self.ratio, self.start = ratio, np.asarray(start, np.int32)
        self.batch, self.num_tokens = len(start), num_tokens
        self.columns = columns or -(-int(max(start) + num_tokens) // 128)
        self.per_block = 128 // ratio
        self.num_blocks = num_blocks or self.batch * self.columns + 1
        blocks = np.arange(self.batch * self.columns) % self.num_blocks
        self.table = rng.permutation(blocks).reshape(self.batch, -1).astype(np.int32)
        self.widths = (C, KEY) if ratio == 4 else (C,)
        self.value, self.gate, self.ape, self.weight = [], [], [], []
        for width in self.widths:
            channels = 2 * width if ratio == 4 else width
            shape = (self.batch, num_tokens, channels)
            size = np.exp(rng.uniform(-2, 2, (self.batch, num_tokens, 1)))
            self.value.append((size * rng.standard_normal(shape)).astype(np.float32))
            self.gate.append(3 * rng.standard_normal(shape).astype(np.float32))
            self.ape.append(rng.standard_normal((ratio, channels)).astype(np.float32))
            weight = 1 + 0.3 * rng.standard_normal(width)
            self.weight.append(np.asarray(jnp.asarray(weight, BFLOAT16)))

    def state(self, storages, slots=None):
        """Tails and pools full of what earlier sequences may have left."""
        slots = slots or self.batch + 1
        found = []
        for width, storage in zip(self.widths, storages, strict=True):
            shape = (8, 2, 2 * width) if self.ratio == 4 else (3, width)
            tail = self.rng.standard_normal((LAYERS, slots, *shape)).astype(np.float32)
            pool = random_planes(self.rng, storage, LAYERS, self.num_blocks, self.per_block)
            found.append(Flushed(jnp.asarray(tail), pool))
        return found

    def flush(self, implementation, storages, state, first, width, length=None):
        """Rows first .. first + width - 1 of every sequence, of which `length` count."""
        length = np.full(self.batch, width) if length is None else length
        rows = slice(first, first + width)
        streams = [
            Stream(value[:, rows], gate[:, rows], ape, weight, *stream)
            for value, gate, ape, weight, stream in zip(
                self.value, self.gate, self.ape, self.weight, state, strict=True
            )
        ]
        shared = (
            LAYER,
            jnp.asarray(self.table),
            jnp.asarray(self.start + first),
            jnp.asarray(length, jnp.int32),
            FREQUENCIES,
        )
        static = {"dtype": BFLOAT16, "eps": EPS, "implementation": implementation}
        if self.ratio == 4:
            both = csa(*streams, *shared, storage=storages[0], key_storage=storages[1], **static)
            return list(both)
        return [hca(*streams, *shared, storage=storages[0], **static)]

    def in_chunks(self, implementation, storages, state, widths):
        done = 0
        for width in widths:
            state = self.flush(implementation, storages, state, done, width)
            done += width
        return state

    def entries(self, stream, planes, sequence, ids):
        """Entries of a sequence by id from planes."""
        at = self.table[sequence, ids // self.per_block], ids % self.per_block
        return [np.asarray(plane)[LAYER, *at] for plane in planes]


def dense(ratio):
    return (DENSE, DENSE_KEY) if ratio == 4 else (DENSE,)


def records(ratio):
    return (RECORD, KEY_RECORD) if ratio == 4 else (RECORD,)


@cache
def sequences(ratio, num_tokens):
    """Sequences from position 0, and the entries that each compressor makes of them."""
    case = Case(ratio, [0, 0], num_tokens, seed=ratio)
    expected = []
    for value, gate, ape, weight in zip(case.value, case.gate, case.ape, case.weight, strict=True):
        arrays = [x.astype(np.float64) for x in (ape, weight)]
        entries = [
            oracle.compressed_entries(
                value[i].astype(np.float64),
                gate[i].astype(np.float64),
                *arrays,
                FREQUENCIES,
                EPS,
            )
            for i in range(case.batch)
        ]
        expected.append([oracle.keys(e) if e.shape[-1] == KEY else e for e in entries])
    return case, expected


CHUNKS = {
    "whole": [512],
    "irregular": [1, 3, 4, 5, 127, 128, 129, 1, 114],
    "longer": [255, 256, 1],
    "511": [511, 1],
}


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("widths", CHUNKS.values(), ids=CHUNKS.keys())
def test_entries(implementation, ratio, widths):
    check_entries(implementation, ratio, widths)


@pytest.mark.parametrize("ratio", [4, 128])
def test_reference(ratio):
    check_entries("xla", ratio, [128] * 4)


def check_entries(implementation, ratio, widths):
    case, expected = sequences(ratio, 512)
    state = case.in_chunks(implementation, dense(ratio), case.state(dense(ratio)), widths)
    for stream, flushed in enumerate(state):
        for i in range(case.batch):
            ids = np.arange(512 // ratio)
            (found,) = case.entries(stream, flushed.pool, i, ids)
            # A key sums 128 channels, of which some differ in the last place.
            may_differ = 0.03 if stream else 0.01
            assert_rounded(found, expected[stream][i], may_differ)


@pytest.mark.parametrize("implementation", KERNELS)
def test_single_tokens(implementation):
    case, expected = sequences(4, 512)
    state = case.in_chunks(implementation, dense(4), case.state(dense(4)), [1] * 13)
    for stream, flushed in enumerate(state):
        (found,) = case.entries(stream, flushed.pool, 1, np.arange(3))
        assert_rounded(found, expected[stream][1][:3], 0.03)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize(("storage", "encode"), RECORDS)
def test_bytes(implementation, ratio, storage, encode):
    """Records are the oracle's encoding of the values that dense pools get."""
    case = Case(ratio, [0, 0], 512, seed=5)
    case.weight[0] = case.weight[0].copy()
    case.weight[0][64:128] = 1e-30
    kinds = (storage, KEY_RECORD)[: len(case.widths)]
    plain = case.in_chunks(implementation, dense(ratio), case.state(dense(ratio)), [128])
    found = case.in_chunks(implementation, kinds, case.state(kinds), [128])
    ids = np.arange(128 // ratio)
    for stream, encode_stream in enumerate((encode, oracle.key_record)[: len(case.widths)]):
        for i in range(case.batch):
            (values,) = case.entries(stream, plain[stream].pool, i, ids)
            expected = encode_stream(values.astype(np.float64))
            assert_same_bytes(case.entries(stream, found[stream].pool, i, ids), expected)


def expected_tails(case, stream, state, num_tokens):
    """Tails after so many tokens of every sequence from position 0, float64."""
    tail = np.asarray(state.tail).astype(np.float64)
    score = case.gate[stream] + case.ape[stream][np.arange(case.num_tokens) % case.ratio]
    value = case.value[stream]
    for i in range(case.batch):
        if case.ratio == 4:
            for p in range(max(0, num_tokens - 8), num_tokens):
                tail[LAYER, i, p % 8] = value[i, p], score[i, p]
        else:
            first = (num_tokens - 1) // case.ratio * case.ratio
            rows = slice(first, num_tokens)
            tail[LAYER, i] = oracle.running_softmax(
                score[i, rows].astype(np.float64), value[i, rows].astype(np.float64)
            )
    return tail


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("widths", [[128], [129], [5], [3, 4], [5, 124]], ids=str)
def test_tails(implementation, ratio, widths):
    check_tails(implementation, ratio, widths)


@pytest.mark.parametrize("ratio", [4, 128])
def test_reference_tails(ratio):
    check_tails("xla", ratio, [128])


def check_tails(implementation, ratio, widths):
    case, _ = sequences(ratio, 512)
    before = case.state(dense(ratio))
    after = case.in_chunks(implementation, dense(ratio), before, widths)
    for stream, (old, new) in enumerate(zip(before, after, strict=True)):
        expected = expected_tails(case, stream, old, sum(widths))
        error = np.abs(np.asarray(new.tail) - expected)
        assert (error <= (0 if ratio == 4 else 2e-6) * np.abs(expected).max()).all()


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("width", [1, 5, 130])
def test_what_does_not_count_changes_no_byte(implementation, ratio, width):
    """Sequences of length 0, entries without a block, other layers, other slots."""
    check_unchanged(implementation, ratio, width)


@pytest.mark.parametrize("ratio", [4, 128])
def test_reference_changes_no_other_byte(ratio):
    check_unchanged("xla", ratio, 1)


def check_unchanged(implementation, ratio, width):
    case = Case(ratio, [127, 0, 383, 3], width, columns=5, seed=6)
    kinds = records(ratio)
    before = case.state(kinds)
    nothing = case.flush(implementation, kinds, before, 0, width, np.zeros(4))
    for old, new in zip(before, nothing, strict=True):
        assert_same_bytes((new.tail, *new.pool), (old.tail, *old.pool))

    case.table[2] = -1
    length = np.array([width, 0, width, width])
    after = case.flush(implementation, kinds, before, 0, width, length)
    for stream, (old, new) in enumerate(zip(before, after, strict=True)):
        tail = np.asarray(old.tail).copy()
        tail[LAYER, [0, 2, 3]] = np.asarray(new.tail)[LAYER, [0, 2, 3]]
        assert_same_bytes([new.tail], [tail])
        assert not np.array_equal(tail[LAYER, 2], np.asarray(old.tail)[LAYER, 2])
        pool = [np.asarray(plane).copy() for plane in old.pool]
        for i in (0, 3):
            ids = np.arange(case.start[i] // ratio, (case.start[i] + width) // ratio)
            at = case.table[i, ids // case.per_block], ids % case.per_block
            written = case.entries(stream, new.pool, i, ids)
            for plane, entries in zip(pool, written, strict=True):
                plane[LAYER, *at] = entries
        assert_same_bytes(new.pool, pool)
    # Position 127 completes an entry of either kind.
    assert not np.array_equal(np.asarray(after[0].pool[0]), np.asarray(before[0].pool[0]))


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("ratio", [4, 128])
def test_far_into_a_sequence(implementation, ratio):
    """The last entry before two million tokens, from the tail of the tokens before."""
    first = 2_000_000 // ratio * ratio
    case, _ = sequences(ratio, 512)
    # All its blocks are two in turn; only the newest entry is looked at.
    far = Case(ratio, [first - 2 * ratio] * 2, 2 * ratio, num_blocks=2, seed=ratio)
    far.table[:] = np.array([[0], [1]])
    for name in ("value", "gate", "ape", "weight"):
        setattr(far, name, getattr(case, name))
    state = far.in_chunks(implementation, dense(ratio), far.state(dense(ratio)), [2 * ratio - 1, 1])
    near = case.in_chunks(
        implementation, dense(ratio), case.state(dense(ratio)), [2 * ratio - 1, 1]
    )
    for stream, (a, b) in enumerate(zip(state, near, strict=True)):
        last = np.array([first // ratio - 1])
        (found,) = far.entries(stream, a.pool, 0, last)
        (same,) = case.entries(stream, b.pool, 0, np.array([1]))
        if stream == 0:
            # All but the rotated channels are those of the same rows near the beginning.
            np.testing.assert_array_equal(found[:, :448], same[:, :448])
            turn = np.float32(first - ratio) * FREQUENCIES.astype(np.float32)
            before = np.float32(ratio) * FREQUENCIES.astype(np.float32)
            turned = complex_pairs(same) * np.exp(1j * (turn.astype(np.float64) - before))
            np.testing.assert_allclose(complex_pairs(found), turned, atol=0.04)


def complex_pairs(x):
    pairs = x[..., 448:].astype(np.float64).reshape(*x.shape[:-1], 32, 2)
    return pairs[..., 0] + 1j * pairs[..., 1]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("ratio", [4, 128])
def test_a_bad_number_stays_in_its_sequence(implementation, ratio):
    case = Case(ratio, [0, 0], 512, seed=7)
    kinds = records(ratio)
    before = case.state(kinds)
    clean = case.in_chunks(implementation, kinds, before, [128])
    case.value = [value.copy() for value in case.value]
    for value in case.value:
        value[1, 100, 3] = np.nan
    found = case.in_chunks(implementation, kinds, before, [128])
    for stream, (a, b) in enumerate(zip(found, clean, strict=True)):
        ids = np.arange(128 // ratio)
        expected = case.entries(stream, b.pool, 0, ids)
        assert_same_bytes(case.entries(stream, a.pool, 0, ids), expected)
        assert not np.array_equal(np.asarray(a.pool[1]), np.asarray(b.pool[1]))


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("ratio", [4, 128])
def test_in_place(implementation, ratio):
    """Donated tails and pools are written where they lie."""
    case = Case(ratio, [3], 5)

    def step(state):
        return case.flush(implementation, records(ratio), state, 0, 5)

    state = case.state(records(ratio))
    compiled = jax.jit(step, donate_argnums=0).lower(state).compile()
    assert " copy(" not in compiled.as_text()
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes == num_bytes


def test_the_kernel_refuses():
    case = Case(4, [0], 1)
    with pytest.raises(NotImplementedError, match="two records or two dense"):
        case.flush("ffi", (RECORD, DENSE_KEY), case.state((RECORD, DENSE_KEY)), 0, 1)
