"""`Cache`: the host's side of a cache; who is in which slot, and which blocks are whose."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np

from dsv4_jax.cache.allocator import BlockAllocator, OutOfBlocksError
from dsv4_jax.cache.paged import BLOCK_TOKENS
from dsv4_jax.cache.schema import CacheArrays


class OutOfSlotsError(RuntimeError):
    """Every slot holds a sequence or was handed out by `admit`."""


class CacheUnusableError(RuntimeError):
    """The cache's arrays were lost or contradict its blocks; make a new cache."""


def _blocks_for(num_tokens: np.ndarray) -> np.ndarray:
    return -(-num_tokens // BLOCK_TOKENS)


def _layout(arrays: CacheArrays) -> tuple[object, list[str]]:
    leaves, structure = jax.tree.flatten(arrays)
    return structure, [f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves]


def _place_like(old: jax.Array, new: np.ndarray) -> jax.Array:
    # An array that is committed to a device where the old one was not would compile steps anew.
    return jax.device_put(new.astype(old.dtype), old.sharding if old.committed else None)


class Cache:
    """Slots for sequences that share pools of blocks; a block covers 128 tokens.

    The state lives in `arrays`, which the steps take and return. The cache keeps copies of the
    lengths and of the block table on the host, so that nothing waits for the device: allocate
    with `prepare_step` or `reserve`, run a step, `advance`. All slots start admitted and empty.

    Every method raises CacheUnusableError after `mark_unusable`.

    Args:
        arrays: of empty sequences.
        num_blocks: blocks in the pools.
    """

    def __init__(self, arrays: CacheArrays, num_blocks: int):
        self._arrays = arrays
        self._allocator = BlockAllocator(num_blocks)
        self._lengths = np.zeros(arrays.lengths.shape, np.int64)
        self._table = np.full(arrays.block_table.shape, -1, np.int32)
        self._handed_out: set[int] = set()
        self._from_outside = False
        self._unusable: str | None = None

    @property
    def max_sequences(self) -> int:
        """Slots."""
        return len(self._table)

    @property
    def max_tokens(self) -> int:
        """Tokens that the pools hold over all sequences, if each fills its blocks."""
        return self._allocator.num_blocks * BLOCK_TOKENS

    @property
    def arrays(self) -> CacheArrays:
        """The device arrays.

        A program of yours that takes them (blocks allocated by `reserve`) and returns them may
        advance the lengths; assign what it returns. Arrays of another structure, shape or dtype
        are refused with ValueError.
        """
        self._check_usable()
        return self._arrays

    @arrays.setter
    def arrays(self, arrays: CacheArrays) -> None:
        self._check_usable()
        if _layout(arrays) != _layout(self._arrays):
            raise ValueError(f"arrays: got {_layout(arrays)}, expected {_layout(self._arrays)}")
        self._arrays = arrays
        self._from_outside = True

    def replace_arrays(self, arrays: CacheArrays) -> None:
        """Takes what a step returned whose tokens `advance` is told about."""
        self._check_usable()
        self._arrays = arrays

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int64 [max_sequences], a copy; 0 is an empty slot."""
        self._sync()
        return self._lengths.copy()

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence has."""
        self._check_usable()
        return self._allocator.num_free

    def memory_bytes(self) -> int:
        """Bytes of all device arrays."""
        self._check_usable()
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._arrays))

    def prepare_step(self, num_tokens: np.ndarray | Sequence[int]) -> None:
        """Allocates the blocks that the next tokens of each sequence need.

        Args:
            num_tokens: integers [max_sequences], how many tokens each slot will append.

        Raises:
            ValueError: wrong shape or a negative number.
            OutOfBlocksError: too few blocks are free; everything is left as it was.
        """
        self._sync()
        after = _blocks_for(self._lengths + self._checked(num_tokens))
        held = self._num_held()
        missing = np.maximum(after - held, 0)
        try:
            ids = self._allocator.acquire(int(missing.sum()))
        except OutOfBlocksError as error:
            raise OutOfBlocksError(
                f"{error}; a block holds {BLOCK_TOKENS} tokens of one sequence, "
                f"lengths are {self._lengths.tolist()}, to append {list(num_tokens)}"
            ) from None
        if len(ids):
            parts = np.split(ids, np.cumsum(missing)[:-1])
            for slot in np.flatnonzero(missing):
                self._table[slot, held[slot] : after[slot]] = parts[slot]
            self._write_table()

    def reserve(self, n: int) -> None:
        """Allocates ahead for the next n tokens of each sequence that is not empty.

        Then n pure steps run without the host.

        Raises:
            ValueError: n is negative.
            OutOfBlocksError: too few blocks are free; everything is left as it was.
        """
        self._sync()
        self.prepare_step(np.where(self._lengths > 0, n, 0))

    def advance(self, num_tokens: np.ndarray | Sequence[int]) -> None:
        """Records that a step appended tokens; integers [max_sequences]."""
        self._sync()
        self._lengths += self._checked(num_tokens)

    def admit(self) -> int:
        """Index of an empty slot that was not handed out before; `release` hands it back.

        Raises:
            OutOfSlotsError: there is none.
        """
        self._sync()
        for slot in np.flatnonzero(self._lengths == 0):
            if slot not in self._handed_out:
                self._handed_out.add(int(slot))
                return int(slot)
        raise OutOfSlotsError(f"all {self.max_sequences} slots are in use")

    def release(self, slot: int) -> None:
        """Ends the sequence in a slot: its blocks are free, the slot is empty and reusable.

        Raises:
            ValueError: there is no such slot.
        """
        self._sync()
        if not 0 <= slot < self.max_sequences:
            raise ValueError(f"slot: got {slot}, expected one in [0, {self.max_sequences})")
        self._handed_out.discard(slot)
        row = self._table[slot]
        self._allocator.release(row[row >= 0])
        row[:] = -1
        self._lengths[slot] = 0
        lengths = _place_like(self._arrays.lengths, self._lengths)
        self._arrays = replace(self._arrays, lengths=lengths)
        self._write_table()

    def mark_unusable(self, reason: str) -> None:
        """Makes every later use raise CacheUnusableError with the reason."""
        self._unusable = reason

    def _check_usable(self) -> None:
        if self._unusable is not None:
            raise CacheUnusableError(f"the cache is unusable: {self._unusable}")

    def _sync(self) -> None:
        """Brings the host's lengths up to date after arrays were assigned from outside."""
        self._check_usable()
        if not self._from_outside:
            return
        self._lengths = np.asarray(self._arrays.lengths).astype(np.int64)
        self._from_outside = False
        if (_blocks_for(self._lengths) > self._num_held()).any():
            self.mark_unusable(
                f"steps appended tokens that no block was allocated for: lengths are "
                f"{self._lengths.tolist()}, blocks of {BLOCK_TOKENS} tokens "
                f"{self._num_held().tolist()}; call reserve before"
            )
            self._check_usable()
        self._write_table()

    def _num_held(self) -> np.ndarray:
        return np.count_nonzero(self._table >= 0, axis=1)

    def _write_table(self) -> None:
        table = _place_like(self._arrays.block_table, self._table)
        self._arrays = replace(self._arrays, block_table=table)

    def _checked(self, num_tokens: np.ndarray | Sequence[int]) -> np.ndarray:
        counts = np.asarray(num_tokens)
        if counts.shape != (self.max_sequences,):
            raise ValueError(
                f"num_tokens: got shape {counts.shape}, expected ({self.max_sequences},)"
            )
        if not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any():
            raise ValueError(f"num_tokens: got {counts.tolist()}, expected integers >= 0")
        return counts
