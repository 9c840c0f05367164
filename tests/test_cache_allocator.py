import numpy as np
import pytest

from dsv4_jax.cache.allocator import BlockAllocator, OutOfBlocksError


def test_every_block_has_one_owner():
    allocator = BlockAllocator(7)
    first, second = allocator.acquire(3), allocator.acquire(4)
    assert sorted([*first, *second]) == list(range(7))
    assert allocator.num_free == 0


def test_against_a_set_under_random_use():
    rng = np.random.default_rng(0)
    allocator, held, free = BlockAllocator(40), [], set(range(40))
    refused = 0
    for _ in range(500):
        if held and rng.random() < 0.5:
            ids = held.pop(rng.integers(len(held)))
            allocator.release(ids)
            free |= set(ids.tolist())
        else:
            n = int(rng.integers(0, 12))
            if n > len(free):
                refused += 1
                with pytest.raises(OutOfBlocksError):
                    allocator.acquire(n)
            else:
                ids = allocator.acquire(n)
                assert len(ids) == n and set(ids.tolist()) <= free
                free -= set(ids.tolist())
                held.append(ids)
        assert allocator.num_free == len(free)
    assert refused > 10


def test_acquire_is_all_or_nothing():
    allocator = BlockAllocator(3)
    allocator.acquire(1)
    with pytest.raises(OutOfBlocksError, match="3 blocks are needed, 2 of 3 are free"):
        allocator.acquire(3)
    assert len(allocator.acquire(2)) == 2


def test_acquired_ids_do_not_change_with_later_use():
    allocator = BlockAllocator(4)
    ids = allocator.acquire(2)
    before = ids.copy()
    allocator.release(allocator.acquire(2)[::-1])
    assert np.array_equal(ids, before)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 2], "blocks \\[2\\] are free already"),
        ([0, 0], "no id twice"),
        ([0, 4], "got \\[4\\]"),
        ([-1], "got \\[-1\\]"),
        ([0.0], "expected integers"),
        ([[0]], "expected integers"),
    ],
)
def test_wrong_release_frees_nothing(ids, message):
    allocator = BlockAllocator(4)
    held = allocator.acquire(2)
    assert held.tolist() == [0, 1]
    with pytest.raises(ValueError, match=message):
        allocator.release(np.array(ids))
    assert allocator.num_free == 2
    allocator.release(held)
    assert allocator.num_free == 4


def test_released_twice_is_refused():
    allocator = BlockAllocator(2)
    ids = allocator.acquire(2)
    allocator.release(ids)
    with pytest.raises(ValueError, match="free already"):
        allocator.release(ids)


def test_nothing_is_fine():
    allocator = BlockAllocator(0)
    assert allocator.acquire(0).shape == (0,)
    allocator.release(np.array([], np.int32))
    with pytest.raises(OutOfBlocksError):
        allocator.acquire(1)


def test_negative_counts_are_refused():
    with pytest.raises(ValueError, match="num_blocks"):
        BlockAllocator(-1)
    with pytest.raises(ValueError, match="n: got -1"):
        BlockAllocator(1).acquire(-1)
