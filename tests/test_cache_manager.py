"""The host side of a cache; the steps here only advance lengths."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.cache.allocator import OutOfBlocksError
from dsv4_jax.cache.manager import Cache, CacheUnusableError, OutOfSlotsError
from dsv4_jax.cache.schema import CacheSchema, new_arrays
from dsv4_jax.cache.storage import Dense


def new_cache(slots=3, num_blocks=6):
    entries = Dense(8, jnp.dtype(jnp.float32), "none")
    schema = CacheSchema((4,), 5, 8, 8, entries, entries)
    return Cache(new_arrays(schema, slots, num_blocks), num_blocks)


@jax.jit
def step(arrays, num_tokens):
    return replace(arrays, lengths=arrays.lengths + num_tokens)


def append(cache, *num_tokens):
    cache.prepare_step(np.array(num_tokens))
    cache.replace_arrays(step(cache.arrays, jnp.array(num_tokens)))
    cache.advance(np.array(num_tokens))


def blocks(cache):
    """Blocks of each slot as the device has them; the ids are each sequence's own."""
    table = np.asarray(cache.arrays.block_table)
    rows = [row[row >= 0].tolist() for row in table]
    for row, ids in zip(table, rows, strict=True):
        assert row[: len(ids)].tolist() == ids, "a hole in the block table"
    every = [block for row in rows for block in row]
    assert len(set(every)) == len(every) == cache.max_tokens // 128 - cache.num_free_blocks
    return [len(row) for row in rows]


def test_starts_empty():
    cache = new_cache()
    assert cache.max_sequences == 3
    assert cache.max_tokens == 6 * 128
    assert cache.lengths.tolist() == [0, 0, 0]
    assert blocks(cache) == [0, 0, 0]


def test_memory_bytes_counts_every_array():
    host = 3 * 4 + 3 * 6 * 4
    window, pools, tails = 3 * 5 * 8 * 4, 2 * 6 * 32 * 8 * 4, 2 * 3 * 8 * 2 * 16 * 4
    assert new_cache(3, 6).memory_bytes() == host + window + pools + tails


@pytest.mark.parametrize(("length", "expected"), [(1, 1), (127, 1), (128, 1), (129, 2), (256, 2)])
def test_blocks_cover_the_tokens(length, expected):
    cache = new_cache()
    append(cache, length, 0, 0)
    assert blocks(cache) == [expected, 0, 0]
    assert cache.lengths.tolist() == [length, 0, 0]


def test_growing_one_token_at_a_time():
    cache = new_cache(2, 5)
    append(cache, 126, 300)
    held = []
    for _ in range(4):
        append(cache, 1, 1)
        held.append(blocks(cache))
    assert held == [[1, 3], [1, 3], [2, 3], [2, 3]]
    assert np.asarray(cache.arrays.lengths).tolist() == cache.lengths.tolist() == [130, 304]


def test_a_sequence_keeps_its_blocks_in_order():
    cache = new_cache()
    append(cache, 100, 100, 0)
    before = np.asarray(cache.arrays.block_table)
    append(cache, 100, 100, 100)
    after = np.asarray(cache.arrays.block_table)
    assert np.array_equal(after[:2, 0], before[:2, 0])
    assert blocks(cache) == [2, 2, 1]


def test_the_table_is_written_only_when_it_changes():
    cache = new_cache()
    append(cache, 100, 0, 0)
    table = cache.arrays.block_table
    cache.prepare_step(np.array([28, 0, 0]))
    assert cache.arrays.block_table is table
    cache.prepare_step(np.array([29, 0, 0]))
    assert cache.arrays.block_table is not table


def test_out_of_blocks_leaves_everything():
    cache = new_cache(3, 3)
    append(cache, 200, 0, 0)
    arrays, free = cache.arrays, cache.num_free_blocks
    with pytest.raises(OutOfBlocksError, match="2 blocks are needed, 1 of 3 are free"):
        cache.prepare_step(np.array([0, 100, 100]))
    assert cache.arrays is arrays
    assert cache.num_free_blocks == free
    append(cache, 56, 128, 0)
    assert blocks(cache) == [2, 1, 0]


def test_reserve_allocates_for_sequences_only():
    cache = new_cache()
    append(cache, 120, 0, 3)
    cache.reserve(9)
    assert blocks(cache) == [2, 0, 1]
    cache.reserve(9)
    assert blocks(cache) == [2, 0, 1]
    with pytest.raises(OutOfBlocksError):
        cache.reserve(700)
    with pytest.raises(ValueError, match="num_tokens"):
        cache.reserve(-1)


def test_arrays_handed_back_by_the_users_own_loop():
    cache = new_cache()
    append(cache, 100, 0, 100)
    cache.reserve(60)

    @jax.jit
    def loop(arrays):
        return jax.lax.fori_loop(0, 60, lambda _, a: step(a, jnp.array([1, 0, 1])), arrays)

    cache.arrays = loop(cache.arrays)
    assert cache.lengths.tolist() == [160, 0, 160]
    append(cache, 97, 0, 0)
    assert cache.lengths.tolist() == [257, 0, 160]
    assert blocks(cache) == [3, 0, 2]


def test_tokens_beyond_the_reserved_blocks_make_the_cache_unusable():
    cache = new_cache()
    append(cache, 100, 0, 0)
    cache.arrays = step(cache.arrays, jnp.array([29, 0, 0]))
    for _ in range(2):
        with pytest.raises(CacheUnusableError, match="call reserve before"):
            cache.lengths  # noqa: B018


def test_older_arrays_get_the_present_table():
    cache = new_cache()
    append(cache, 100, 0, 0)
    older = cache.arrays
    append(cache, 100, 0, 0)
    cache.arrays = older
    assert cache.lengths.tolist() == [100, 0, 0]
    append(cache, 100, 0, 0)
    assert blocks(cache) == [2, 0, 0]


def test_arrays_of_another_layout_are_refused():
    cache = new_cache()
    before = cache.arrays
    with pytest.raises(ValueError, match=r"int32\[4\]"):
        cache.arrays = new_cache(4).arrays
    assert cache.arrays is before


def test_release_empties_the_slot():
    cache = new_cache()
    append(cache, 300, 300, 0)
    assert cache.num_free_blocks == 0
    cache.release(0)
    assert cache.lengths.tolist() == np.asarray(cache.arrays.lengths).tolist() == [0, 300, 0]
    assert blocks(cache) == [0, 3, 0]
    append(cache, 5, 0, 300 - 45)
    assert blocks(cache) == [1, 3, 2]
    cache.release(2)
    cache.release(2)
    assert blocks(cache) == [1, 3, 0]


def test_release_after_arrays_from_outside():
    cache = new_cache()
    append(cache, 100, 100, 0)
    cache.arrays = step(cache.arrays, jnp.array([1, 2, 0]))
    cache.release(0)
    assert cache.lengths.tolist() == [0, 102, 0]
    assert np.asarray(cache.arrays.lengths).tolist() == [0, 102, 0]


@pytest.mark.parametrize("slot", [-1, 3])
def test_release_of_no_slot(slot):
    with pytest.raises(ValueError, match=f"slot: got {slot}"):
        new_cache().release(slot)


def test_admit_hands_out_each_empty_slot_once():
    cache = new_cache()
    append(cache, 0, 5, 0)
    assert [cache.admit(), cache.admit()] == [0, 2]
    with pytest.raises(OutOfSlotsError):
        cache.admit()
    cache.release(1)
    assert cache.admit() == 1
    cache.release(0)
    assert cache.admit() == 0


@pytest.mark.parametrize("num_tokens", [[1, 1], [1, 1, -1], [1.0, 1.0, 1.0], [[1, 1, 1]]])
def test_wrong_token_counts_change_nothing(num_tokens):
    cache = new_cache()
    for method in (cache.prepare_step, cache.advance):
        with pytest.raises(ValueError, match="num_tokens"):
            method(np.array(num_tokens))
    assert cache.lengths.tolist() == [0, 0, 0]
    assert cache.num_free_blocks == 6


def test_every_use_of_an_unusable_cache_says_why():
    cache = new_cache()
    arrays, zero = cache.arrays, np.zeros(3, int)
    cache.mark_unusable("the power went out")
    uses = {
        "lengths": lambda: cache.lengths,
        "arrays": lambda: cache.arrays,
        "arrays=": lambda: setattr(cache, "arrays", arrays),
        "replace_arrays": lambda: cache.replace_arrays(arrays),
        "prepare_step": lambda: cache.prepare_step(zero),
        "reserve": lambda: cache.reserve(1),
        "advance": lambda: cache.advance(zero),
        "release": lambda: cache.release(0),
        "admit": cache.admit,
        "memory_bytes": cache.memory_bytes,
        "num_free_blocks": lambda: cache.num_free_blocks,
    }
    for name, use in uses.items():
        with pytest.raises(CacheUnusableError, match="the power went out"):
            use()
            pytest.fail(f"{name} worked")


def test_steps_compile_once_whatever_the_host_writes():
    cache = new_cache(3, 40)
    traces = []

    @jax.jit
    def counted(arrays, num_tokens):
        traces.append(1)
        return step(arrays, num_tokens)

    for i in range(20):
        num_tokens = np.array([50, 70, 0])
        cache.prepare_step(num_tokens)
        cache.replace_arrays(counted(cache.arrays, jnp.array(num_tokens)))
        cache.advance(num_tokens)
        if i % 5 == 4:
            cache.release(1)
    assert counted._cache_size() == 1
    assert len(traces) == 1
