"""A layer's writes in one launch: what the operations it joins do, and what the oracle says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.append_swa import append_swa
from dsv4_jax.ops.flush import Stream, flush_csa, flush_hca
from dsv4_jax.ops.indexer_queries import indexer_queries
from dsv4_jax.ops.layer_writes import layer_writes
from tests import test_ops_append_swa as swa
from tests import test_ops_flush as flush
from tests.cache_cases import (
    BFLOAT16,
    DENSE,
    DENSE_KEY,
    EPS,
    FREQUENCIES,
    KERNELS,
    KEY,
    KEY_RECORD,
    RECORDS,
    assert_rounded,
    assert_same_bytes,
)
from tests.oracles import cache_writes as oracle

LAYER, POOL_LAYER, SCALE, HEADS = 0, flush.LAYER, 0.01, 5
joined = jax.jit(
    layer_writes,
    static_argnames=(
        *("layer", "pool_layer", "storage", "key_storage", "eps", "with_chunk"),
        *("query_scale", "implementation"),
    ),
)


class Case:
    """One layer of sequences in the midst of others' slots and blocks."""

    def __init__(self, ratio, start, length, num_tokens, storages, *, heads=64, seed=0):
        self.append = swa.Case(start, length, num_tokens, heads=heads, ring=132, seed=seed)
        self.flush = flush.Case(ratio, start, num_tokens, seed=seed + 1)
        self.storages = storages
        self.ring = self.append.ring(storages[0])
        state = self.flush.state(storages[: len(self.flush.widths)])
        arrays = zip(
            *(self.flush.value, self.flush.gate, self.flush.ape, self.flush.weight),
            state,
            strict=True,
        )
        self.streams = tuple(Stream(*map(jnp.asarray, rest), *flushed) for *rest, flushed in arrays)
        rng = np.random.default_rng(seed + 2)
        shape = (len(start), num_tokens, HEADS)
        q = jnp.asarray(rng.standard_normal((*shape, KEY)), BFLOAT16)
        self.queries = q, jnp.asarray(rng.standard_normal(shape), jnp.float32)
        self.table = jnp.asarray(self.flush.table)

    def window(self):
        case = self.append
        return case.q, case.kv, case.weight, self.ring, LAYER, case.start, case.length, FREQUENCIES

    def run(self, implementation, queries=True, with_chunk=False):
        return joined(
            *(*self.window(), self.streams, POOL_LAYER, self.table),
            self.queries if queries else None,
            storage=self.storages[0],
            key_storage=self.storages[1],
            eps=EPS,
            with_chunk=with_chunk,
            query_scale=SCALE,
            implementation=implementation,
        )

    def apart(self, implementation, with_chunk=False):
        """The same by the operations that it joins."""
        case = self.append
        shared = {"storage": self.storages[0], "eps": EPS, "implementation": implementation}
        place = POOL_LAYER, self.table, case.start, case.length, FREQUENCIES
        appended = append_swa(*self.window(), with_chunk=with_chunk, **shared)
        if len(self.streams) == 2:
            kinds = {"key_storage": self.storages[1], "dtype": BFLOAT16}
            flushed = flush_csa(*self.streams, *place, **kinds, **shared)
        else:
            flushed = (flush_hca(*self.streams, *place, dtype=BFLOAT16, **shared),)
        positions = case.start[:, None] + jnp.arange(case.num_tokens)
        queries = indexer_queries(
            *(*self.queries, positions, FREQUENCIES), scale=SCALE, implementation=implementation
        )
        return appended, flushed, queries


def assert_same(found, expected):
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert_same_bytes(found, expected)


SEQUENCES = [
    pytest.param([0, 3, 127, 3, 1_003], [1, 1, 1, 0, 1], 1, id="1"),
    pytest.param([0, 3, 126, 7, 1_021], [4, 2, 3, 0, 4], 4, id="4"),
]


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize(("start", "length", "num_tokens"), SEQUENCES)
@pytest.mark.parametrize(
    "storages", [(RECORDS[0].values[0], KEY_RECORD), (DENSE, DENSE_KEY)], ids=["record", "dense"]
)
def test_joined(implementation, ratio, start, length, num_tokens, storages):
    """To the bit what the kernels do that it joins, in every array."""
    case = Case(ratio, start, length, num_tokens, storages)
    found = case.run(implementation)
    assert_same(found, case.apart(implementation))
    without = case.run(implementation, queries=False)
    assert without.queries is None
    assert_same(without, found[:2])


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("batch", [1, 70])
def test_batches(implementation, batch):
    """As many sequences as make a warp take one head, or two of which the last has one."""
    case = Case(4, list(range(batch)), [1] * batch, 1, (RECORDS[1].values[0], KEY_RECORD), heads=63)
    assert_same(case.run(implementation), case.apart(implementation))


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("ratio", [4, 128])
def test_whole_chunks(implementation, ratio):
    """Tokens that overwrite what those before them need."""
    case = Case(ratio, [0, 100], [7, 9], 9, (DENSE, DENSE_KEY), heads=2)
    found = case.run(implementation, with_chunk=True)
    apart = jax.jit(case.apart, static_argnums=(0, 1))
    assert_same(found, apart(implementation, True))
    assert found.appended.new[0].shape[1] == 9


@pytest.mark.parametrize("implementation", KERNELS)
def test_values(implementation):
    """The fourth token: its query, its window entry, and the first entry and key."""
    case = Case(4, [0, 0], [4, 4], 4, (DENSE, DENSE_KEY), heads=3)
    found = case.run(implementation)
    for i in range(2):
        q, kv = (np.asarray(x[i]).astype(np.float64) for x in (case.append.q, case.append.kv))
        positions = np.arange(4)
        expected = oracle.queries(q, positions, FREQUENCIES, EPS)
        assert_rounded(found.appended.q[i], expected)
        weight = np.asarray(case.append.weight).astype(np.float64)
        expected = oracle.window_entries(kv, weight, positions, FREQUENCIES, EPS)
        assert_rounded(found.appended.window[0][LAYER, i, :4], expected)
        for stream, flushed in enumerate(found.flushed):
            arrays = (x[stream] for x in (case.flush.value, case.flush.gate))
            value, gate = (x[i].astype(np.float64) for x in arrays)
            ape, weight = (
                np.asarray(x[stream]).astype(np.float64)
                for x in (case.flush.ape, case.flush.weight)
            )
            entries = oracle.compressed_entries(value, gate, ape, weight, FREQUENCIES, EPS)
            expected = oracle.keys(entries) if stream else entries
            (entry,) = case.flush.entries(stream, flushed.pool, i, np.arange(1))
            assert_rounded(entry, expected, 0.05)


def test_what_the_kernel_does_not_support():
    case = Case(4, [0], [1], 1, (DENSE, KEY_RECORD), heads=2)
    with pytest.raises(NotImplementedError, match="only records or only dense pools"):
        case.run("ffi")
