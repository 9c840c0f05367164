"""What the expert kernels need beyond `hopper`: copies of 16 bytes into shared memory that arrive
at a barrier, counters in memory, and polling for them.
"""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np

from tests.ptx import hopper
from tests.ptx.emulator import lanes, memory
from tests.ptx.emulator.lanes import (
    WARP,
    Spinning,
    address_reader,
    address_reader_32,
    dtype_of,
    reader,
    writer,
)
from tests.ptx.emulator.mbarrier import barrier_at
from tests.ptx.emulator.memory import shared_view
from tests.ptx.emulator.tma import GARBAGE_BYTE


@contextlib.contextmanager
def instructions() -> Iterator[None]:
    builders = {
        "cp.async.cg.shared.global": _chunk_load,
        "cp.async.mbarrier.arrive.noinc": _arrive_after_chunks,
        "red": _atomic,
        "atom": _atomic,
        "ld.acquire": _poll,
        "redux.sync.max": _largest_of_lanes,
    }
    with hopper.instructions(), mock.patch.dict(lanes._BUILDERS, builders):
        yield


class _Chunk:
    """A copy under way, and what happens when it has landed."""

    def __init__(self):
        self.landed = False
        self.then: list[Callable] = []


def _chunks(warp) -> list[list[_Chunk]]:
    if not hasattr(warp, "chunks"):
        warp.chunks = [[] for _ in range(WARP)]
    return warp.chunks


def _chunk_load(i):
    to, source = address_reader_32(i.operands[0]), address_reader(i.operands[1])

    def run(warp, mask):
        for lane in np.flatnonzero(mask):
            target, address = shared_view(warp, int(to(warp)[lane]), 16), int(source(warp)[lane])
            if address % 16:
                raise RuntimeError(f"{i.text}: the address must be a multiple of 16")
            target[:] = GARBAGE_BYTE
            chunk = _Chunk()
            _chunks(warp)[lane].append(chunk)

            def finish(target=target, address=address, chunk=chunk):
                target[:] = warp.memory.view(address, 16)
                chunk.landed = True
                for then in chunk.then:
                    then()

            warp.block.cluster.copy_later(finish)

    return run


def _arrive_after_chunks(i):
    barriers = address_reader_32(i.operands[0])

    def run(warp, mask):
        for lane in np.flatnonzero(mask):
            barrier = barrier_at(warp, int(barriers(warp)[lane]))
            under_way = [chunk for chunk in _chunks(warp)[lane] if not chunk.landed]
            _chunks(warp)[lane] = under_way
            missing = [len(under_way)]

            def landed(barrier=barrier, missing=missing):
                missing[0] -= 1
                if missing[0] <= 0:
                    barrier.arrive()

            for chunk in under_way:
                chunk.then.append(landed)
            if not under_way:
                landed()

    return run


def _atomic(i):
    returns = i.parts[0] == "atom"
    dtype = dtype_of(i.parts[-1])
    if "add" not in i.parts:
        raise NotImplementedError(f"instruction: {i.text}")
    place, value = i.operands[returns:]
    in_shared = "shared" in i.parts
    addresses = (address_reader_32 if in_shared else address_reader)(place)
    read, write = reader(value, dtype), writer(i.operands[0], dtype) if returns else None
    size = np.dtype(dtype).itemsize

    def run(warp, mask):
        before = np.zeros(WARP, dtype)
        for lane in np.flatnonzero(mask):
            address = int(addresses(warp)[lane])
            view = shared_view if in_shared else lambda warp, *place: warp.memory.view(*place)
            cell = view(warp, address, size).view(dtype)
            before[lane] = cell[0]
            cell[0] += read(warp)[lane]
        if write:
            write(warp, mask, before)

    return run


def _poll(i):
    load = memory._load(i)

    def run(warp, mask):
        load(warp, mask)
        raise Spinning

    return run


def _largest_of_lanes(i):
    value, write = reader(i.operands[1], "u4"), writer(i.operands[0], "u4")
    return lambda warp, mask: write(warp, mask, np.full(WARP, value(warp)[mask].max(), "u4"))
