"""Transaction barriers.

A phase ends when the pending arrivals and the pending bytes are both zero; the arrivals are then
pending again. Bytes may complete before they are announced, so their count may be negative.
"""

import numpy as np

from tests.ptx.emulator.lanes import (
    Spinning,
    address_reader_32,
    instruction,
    reader,
    writer,
)
from tests.ptx.emulator.memory import shared_place
from tests.ptx.emulator.parser import Address


class Barrier:
    def __init__(self, arrivals: int):
        self.arrivals = self.pending = arrivals
        self.pending_bytes = 0
        self.phase = 0

    def arrive(self, count: int = 1) -> None:
        if count > self.pending:
            raise RuntimeError("more arrivals at a barrier than its phase has")
        self.pending -= count
        self._end_phase()

    def expect(self, count: int) -> None:
        self.pending_bytes += count

    def complete(self, count: int) -> None:
        self.pending_bytes -= count
        self._end_phase()

    def has_ended(self, parity: int) -> bool:
        """Whether the last phase of this parity is over."""
        return self.phase != parity

    def _end_phase(self) -> None:
        if self.pending == 0 and self.pending_bytes == 0:
            self.phase ^= 1
            self.pending = self.arrivals


def barrier_at(warp, address: int) -> Barrier:
    block, offset = shared_place(warp, address)
    if offset not in block.barriers:
        raise RuntimeError(f"no barrier was initialised at {offset} of block {block.rank}")
    return block.barriers[offset]


@instruction("mbarrier.init")
def _init(i):
    addresses, counts = address_reader_32(i.operands[0]), reader(i.operands[1], "u4")

    def init(warp, mask):
        where, arrivals = addresses(warp), counts(warp)
        for lane in np.flatnonzero(mask):
            block, offset = shared_place(warp, where[lane])
            if offset % 8 or offset + 8 > len(block.shared):
                raise RuntimeError(f"a barrier cannot be at {offset}")
            block.barriers[offset] = Barrier(int(arrivals[lane]))

    return init


@instruction("mbarrier.inval")
def _inval(i):
    addresses = address_reader_32(i.operands[0])

    def inval(warp, mask):
        for lane in np.flatnonzero(mask):
            block, offset = shared_place(warp, addresses(warp)[lane])
            del block.barriers[offset]

    return inval


@instruction("mbarrier.arrive", "mbarrier.expect_tx")
def _arrive(i):
    at = next(k for k, o in enumerate(i.operands) if isinstance(o, Address))
    addresses = address_reader_32(i.operands[at])
    count = reader(i.operands[at + 1], "u4") if len(i.operands) > at + 1 else None
    expects, arrives = "expect_tx" in i.parts, i.parts[1] == "arrive"
    local = not any("cluster" in p for p in i.parts)

    def arrive(warp, mask):
        if arrives and local:
            warp.tensor_fences.check_before_sync(i.text)
        where = addresses(warp)
        counts = count(warp) if count else np.ones(len(where), int)
        for lane in np.flatnonzero(mask):
            barrier = barrier_at(warp, where[lane])
            if expects:
                barrier.expect(int(counts[lane]))
            if arrives:
                barrier.arrive(1 if expects else int(counts[lane]))

    return arrive


@instruction("mbarrier.try_wait", "mbarrier.test_wait")
def _wait(i):
    if "parity" not in i.parts:
        raise NotImplementedError(f"instruction: {i.text}")
    addresses, parity = address_reader_32(i.operands[1]), reader(i.operands[2], "u4")
    write = writer(i.operands[0], "pred")

    def wait(warp, mask):
        where, parities = addresses(warp), parity(warp)
        ended = np.zeros(len(where), bool)
        for lane in np.flatnonzero(mask):
            ended[lane] = barrier_at(warp, where[lane]).has_ended(int(parities[lane]) & 1)
        write(warp, mask, ended)
        if not ended[mask].all():
            raise Spinning
        warp.tensor_fences.synced()

    return wait
