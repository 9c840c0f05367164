"""Free list of the blocks that a cache's pools are divided into."""

import numpy as np


class OutOfBlocksError(RuntimeError):
    """The cache has fewer free blocks than the new tokens need."""


class BlockAllocator:
    """Hands out block ids 0 .. num_blocks-1; each has one owner at a time.

    Raises:
        ValueError: num_blocks is negative.
    """

    def __init__(self, num_blocks: int):
        if num_blocks < 0:
            raise ValueError(f"num_blocks: got {num_blocks}, expected at least 0")
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._is_free = np.ones(num_blocks, bool)
        # A stack whose first `num_free` ids are free; the lowest id is on top at first.
        self._stack = np.arange(num_blocks, dtype=np.int32)[::-1].copy()

    def acquire(self, n: int) -> np.ndarray:
        """Ids of n blocks that were free, int32 [n].

        Raises:
            ValueError: n is negative.
            OutOfBlocksError: fewer than n are free; none is taken.
        """
        if n < 0:
            raise ValueError(f"n: got {n}, expected at least 0")
        if n > self.num_free:
            raise OutOfBlocksError(
                f"{n} blocks are needed, {self.num_free} of {self.num_blocks} are free"
            )
        ids = self._stack[self.num_free - n : self.num_free][::-1].copy()
        self.num_free -= n
        self._is_free[ids] = False
        return ids

    def release(self, ids: np.ndarray) -> None:
        """Frees blocks that `acquire` handed out.

        Args:
            ids: integers [n].

        Raises:
            ValueError: an id that is no block, is free already or comes twice; none is freed.
        """
        ids = np.asarray(ids)
        if ids.size == 0:
            return
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"ids: got {ids.dtype}{list(ids.shape)}, expected integers [n]")
        foreign = ids[(ids < 0) | (ids >= self.num_blocks)]
        if foreign.size:
            raise ValueError(f"ids: got {foreign.tolist()}, expected ids in [0, {self.num_blocks})")
        free = ids[self._is_free[ids]]
        if free.size:
            raise ValueError(f"ids: blocks {free.tolist()} are free already")
        if len(np.unique(ids)) < len(ids):
            raise ValueError(f"ids: got {ids.tolist()}, expected no id twice")
        self._is_free[ids] = True
        self._stack[self.num_free : self.num_free + len(ids)] = ids[::-1]
        self.num_free += len(ids)
