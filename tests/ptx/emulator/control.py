"""Instructions about other threads: barriers of a block and of a cluster, votes, shuffles.

All of them are executed by a warp's lanes together; `machine` sees to that (`needs_whole_warp`).
"""

import numpy as np

from tests.ptx.emulator.lanes import LANES, WARP, Blocked, instruction, reader, writer
from tests.ptx.emulator.parser import Instruction, Pair, Sink


def needs_whole_warp(i: Instruction) -> bool:
    parts = i.parts
    return (
        "sync" in parts
        or "aligned" in parts
        or parts[0] in ("bar", "barrier", "elect", "shfl", "vote")
    )


class ThreadBarrier:
    """Counts warps in; each remembers the generation that it waits for the end of."""

    def __init__(self):
        self.arrived = 0
        self.generation = 0

    def arrive(self, needed: int, count: int = 1) -> int:
        """The generation that this arrival belongs to."""
        generation = self.generation
        self.arrived += count
        if self.arrived > needed:
            raise RuntimeError("more threads at a barrier than it has")
        if self.arrived == needed:
            self.arrived = 0
            self.generation += 1
        return generation


@instruction("st.param")
def _argument_of_call(i):
    return lambda warp, mask: None


@instruction("call", "brkpt", "trap")
def _failure(i):
    """Of the kernels run here only failed assertions call or trap."""

    def fail(warp, mask):
        raise RuntimeError(f"{i.text} is executed")

    return fail


@instruction("elect")
def _elect(i):
    leader, elected = writer(i.operands[0].first, "u4"), writer(i.operands[0].second, "pred")

    def elect(warp, mask):
        lane = int(np.flatnonzero(mask)[0])
        leader(warp, mask, np.full(WARP, lane, "u4"))
        elected(warp, mask, lane == LANES)

    return elect


@instruction("vote")
def _vote(i):
    predicate = reader(i.operands[1], "pred")
    ballot = i.parts[2] == "ballot"
    write = writer(i.operands[0], "u4" if ballot else "pred")

    def vote(warp, mask):
        votes = predicate(warp) & mask
        if ballot:
            value = np.uint32(sum(1 << int(lane) for lane in np.flatnonzero(votes)))
        else:
            value = votes.any() if i.parts[2] == "any" else votes[mask].all()
        write(warp, mask, np.full(WARP, value))

    return vote


@instruction("shfl")
def _shuffle(i):
    pair = i.operands[0] if isinstance(i.operands[0], Pair) else Pair(i.operands[0], Sink())
    write, write_inside = writer(pair.first, "u4"), writer(pair.second, "pred")
    value, distance, clamp = (reader(o, "u4") for o in i.operands[1:4])
    mode = i.parts[2]

    def shuffle(warp, mask):
        by, c = distance(warp).astype(int) & 31, clamp(warp).astype(int)
        segment = c >> 8 & 31
        last = LANES & segment | c & 31 & ~segment
        source = {
            "up": LANES - by,
            "down": LANES + by,
            "bfly": LANES ^ by,
            "idx": LANES & segment | by & ~segment,
        }[mode]
        inside = source >= last if mode == "up" else source <= last
        source = np.where(inside, source, LANES)
        if not mask[source[mask]].all():
            raise RuntimeError(f"{i.text}: reads a lane that takes no part")
        write_inside(warp, mask, inside)
        write(warp, mask, value(warp)[source])

    return shuffle


@instruction("bar.warp.sync")
def _warp_barrier(i):
    return lambda warp, mask: None


@instruction("bar.sync", "bar.arrive", "barrier.sync", "barrier.arrive")
@instruction("bar.cta.sync", "bar.cta.arrive", "barrier.cta.sync", "barrier.cta.arrive")
def _block_barrier(i):
    number = reader(i.operands[0], "u4")
    threads = reader(i.operands[1], "u4") if len(i.operands) > 1 else None
    waits = "sync" in i.parts

    def barrier(warp, mask):
        named = warp.block.thread_barriers.setdefault(int(number(warp)[0]), ThreadBarrier())
        if warp.waiting_for is None:
            warp.tensor_fences.check_before_sync(i.text)
            needed = int(threads(warp)[0]) if threads else WARP * len(warp.block.warps)
            generation = named.arrive(needed, WARP)
            if not waits:
                return
            warp.waiting_for = generation
        if named.generation == warp.waiting_for:
            raise Blocked
        warp.waiting_for = None
        warp.tensor_fences.synced()

    return barrier


@instruction("barrier.cluster.arrive")
def _cluster_arrive(i):
    def arrive(warp, mask):
        warp.tensor_fences.check_before_sync(i.text)
        cluster = warp.block.cluster
        warp.cluster_generation = cluster.barrier.arrive(len(cluster.warps))

    return arrive


@instruction("barrier.cluster.wait")
def _cluster_wait(i):
    def wait(warp, mask):
        if warp.block.cluster.barrier.generation == warp.cluster_generation:
            raise Blocked
        warp.tensor_fences.synced()

    return wait
