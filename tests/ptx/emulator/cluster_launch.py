"""Cluster launch control: a running cluster takes over one that has not started yet.

The answer, 16 bytes in the emulator's own format, arrives in shared memory as if copied there.
"""

import struct

import numpy as np

from tests.ptx.emulator.lanes import WARP, address_reader_32, instruction, only_lane, writer
from tests.ptx.emulator.mbarrier import barrier_at
from tests.ptx.emulator.tma import GARBAGE_BYTE


@instruction("clusterlaunchcontrol.try_cancel")
def _try_cancel(i):
    to, signal = address_reader_32(i.operands[0]), address_reader_32(i.operands[1])
    to_all = "multicast::cluster::all" in i.parts

    def try_cancel(warp, mask):
        lane = only_lane(mask, i.text)
        offset, barrier = (int(read(warp)[lane]) & 0xFFFFFF for read in (to, signal))
        cluster = warp.block.cluster
        first = warp.run.waiting.pop(0) if warp.run.waiting else None
        answer = struct.pack("<4I", *(first or (0, 0, 0)), first is not None)
        for block in cluster.blocks if to_all else [warp.block]:
            target = block.shared[offset : offset + 16]
            target[:] = GARBAGE_BYTE

            def finish(target=target, block=block):
                target[:] = np.frombuffer(answer, np.uint8)
                barrier_at(warp, block.rank << 24 | barrier).complete(16)

            cluster.copy_later(finish)

    return try_cancel


def _answer(warp, register) -> np.ndarray:
    """[32 lanes, 4] words of a 128-bit register."""
    halves = warp.registers.bits[register.index : register.index + 2]
    return np.ascontiguousarray(halves.T).view(np.uint32)


@instruction("clusterlaunchcontrol.query_cancel.is_canceled")
def _is_canceled(i):
    write = writer(i.operands[0], "pred")
    return lambda warp, mask: write(warp, mask, _answer(warp, i.operands[1])[:, 3] == 1)


@instruction("clusterlaunchcontrol.query_cancel.get_first_ctaid")
def _first_block(i):
    writers = [writer(o, "u4") for o in i.operands[0].elements]

    def first_block(warp, mask):
        answer = _answer(warp, i.operands[1])
        for axis, write in enumerate(writers):
            write(warp, mask, answer[:, axis] if axis < 3 else np.zeros(WARP, "u4"))

    return first_block
