"""Warps, blocks and clusters, and the schedule in which they and asynchronous operations run."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from tests.ptx.emulator.control import ThreadBarrier, needs_whole_warp
from tests.ptx.emulator.lanes import LANES, WARP, Blocked, Registers, Spinning, link
from tests.ptx.emulator.memory import GlobalMemory, parameter_symbol_address
from tests.ptx.emulator.parser import SYSTEM_SHARED_BYTES, Kernel
from tests.ptx.emulator.tensor import TensorFences, TensorMemory
from tests.ptx.emulator.tma import GARBAGE_BYTE

CLUSTERS_AT_ONCE = 2
LONGEST_TURN = 400


class Deadlock(Exception):
    pass


@dataclasses.dataclass
class Launch:
    kernel: Kernel
    grid: tuple[int, int, int]
    block: int
    cluster: int
    memory: GlobalMemory
    rng: np.random.Generator
    strict: bool
    shared_bytes: int
    parameter_address: int
    constant_address: int
    waiting: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.effects = link(self.kernel)
        self.whole_warp = [needs_whole_warp(i) for i in self.kernel.instructions]


def launch(
    kernel: Kernel,
    *,
    grid: Sequence[int],
    block: int,
    arguments: Sequence[bytes],
    memory: GlobalMemory,
    cluster: int = 1,
    dynamic_shared_bytes: int = 0,
    seed: int = 0,
    strict: bool = True,
) -> None:
    """Runs a grid; clusters extend along x. Arguments are the parameters' bytes.

    For `seed` and `strict` see the package's and `tensor`'s description.
    """
    parameters = np.zeros(max(kernel.parameter_bytes, 1), np.uint8)
    for (offset, size), value in zip(kernel.parameters, arguments, strict=True):
        if len(value) != size:
            raise ValueError(f"arguments: got {len(value)} bytes, the parameter has {size}")
        parameters[offset : offset + size] = np.frombuffer(value, np.uint8)
    constants = np.frombuffer(kernel.constants.ljust(1, b"\0"), np.uint8)
    run = Launch(
        kernel,
        (*grid, 1, 1)[:3],
        block,
        cluster,
        memory,
        np.random.default_rng(seed),
        strict,
        kernel.static_shared_bytes + dynamic_shared_bytes,
        memory.place(parameters),
        memory.place(constants),
    )
    with np.errstate(all="ignore"):
        _run(run)


def _run(run: Launch) -> None:
    x, y, z = run.grid
    run.waiting = [(i, j, k) for k in range(z) for j in range(y) for i in range(0, x, run.cluster)]
    active: list[Cluster] = []
    idle_rounds = 0
    while run.waiting or active:
        while run.waiting and len(active) < CLUSTERS_AT_ONCE:
            active.append(Cluster(run, run.waiting.pop(0)))
        progress = False
        for cluster in list(active):
            progress |= cluster.take_turn()
            if cluster.is_done():
                active.remove(cluster)
                progress = True
        idle_rounds = 0 if progress else idle_rounds + 1
        if idle_rounds > 2:
            raise Deadlock("\n".join(w.place() for c in active for w in c.warps if w.groups))


class Cluster:
    def __init__(self, run: Launch, first: tuple[int, int, int]):
        self._rng = run.rng
        self._copies: list = []
        self._stores_in_flight = 0
        # Sometimes copies are slow, sometimes products.
        self._copies_a_turn, self._products_a_turn = run.rng.permutation([2, 30])
        self.barrier = ThreadBarrier()
        x, y, z = first
        self.blocks = [Block(run, self, rank, (x + rank, y, z)) for rank in range(run.cluster)]
        self.warps = [warp for block in self.blocks for warp in block.warps]

    def copy_later(self, finish) -> None:
        self._copies.append(finish)

    def store_later(self, finish) -> None:
        """A copy to global memory, which may outlive the threads, as kernels of CUTLASS expect."""

        def finish_store():
            finish()
            self._stores_in_flight -= 1

        self._stores_in_flight += 1
        self._copies.append(finish_store)

    def take_turn(self) -> bool:
        """Whether anything happened or may still happen by itself."""
        progress = False
        for index in self._rng.permutation(len(self.warps)):
            if not self.warps[index].block.has_started():
                progress = True
                continue
            short = self._rng.random() < 0.2
            turn = int(self._rng.integers(1, 64)) if short else LONGEST_TURN
            progress |= self.warps[index].take_turn(turn)
        for block in self.blocks:
            block.turns_to_start -= 1
            progress |= block.finish_products(int(self._rng.integers(self._products_a_turn)))
        progress |= bool(self._copies)
        for _ in range(int(self._rng.integers(self._copies_a_turn))):
            if self._copies:
                self._copies.pop(int(self._rng.integers(len(self._copies))))()
        return progress

    def is_done(self) -> bool:
        if not all(block.has_ended() for block in self.blocks):
            return False
        loading = len(self._copies) > self._stores_in_flight
        if loading or any(block.has_products() for block in self.blocks):
            raise RuntimeError("the cluster's threads ended before their asynchronous operations")
        if any(block.tensor_memory.owned.any() for block in self.blocks):
            raise RuntimeError("the cluster's threads ended without freeing tensor memory")
        return not self._copies


class Block:
    def __init__(self, run: Launch, cluster: Cluster, rank: int, index: tuple[int, int, int]):
        self.cluster, self.rank, self.index = cluster, rank, index
        self.shared = np.full(max(run.shared_bytes, SYSTEM_SHARED_BYTES), GARBAGE_BYTE, np.uint8)
        self.tensor_memory = TensorMemory(run.rng)
        self.barriers: dict = {}
        self.thread_barriers: dict[int, ThreadBarrier] = {}
        self._products: list = []
        self.warps = [Warp(run, self, i) for i in range(run.block // WARP)]
        # Nothing but a barrier makes the blocks of a cluster start together.
        self.turns_to_start = int(run.rng.integers(2) * run.rng.integers(200))

    def has_started(self) -> bool:
        return self.turns_to_start <= 0

    def has_ended(self) -> bool:
        return not any(warp.groups for warp in self.warps)

    def tensor_later(self, finish) -> None:
        self._products.append(finish)

    def has_products(self) -> bool:
        return bool(self._products)

    def finish_products(self, count: int) -> bool:
        waiting = bool(self._products)
        for finish in self._products[:count]:
            finish()
        del self._products[:count]
        return waiting


class Warp:
    def __init__(self, run: Launch, block: Block, index: int):
        self.run, self.block, self.index = run, block, index
        self.memory, self.rng = run.memory, run.rng
        self.registers = Registers(run.kernel.num_registers)
        self.groups = {0: np.ones(WARP, bool)}  # place in the program -> lanes
        self.waiting_for: int | None = None
        self.cluster_generation = 0
        self.tensor_fences = TensorFences(run.strict)
        self.pending_loads: list = []
        self.store_groups: list[list] = [[]]  # the last one is not committed yet

    def special(self, name: str, axis: int) -> np.ndarray:
        run, block = self.run, self.block
        thread = self.index * WARP + LANES
        per_axis = {
            "%tid": [thread, 0, 0],
            "%ntid": [run.block, 1, 1],
            "%ctaid": block.index,
            "%nctaid": run.grid,
            "%cluster_ctaid": [block.rank, 0, 0],
            "%cluster_nctaid": [run.cluster, 1, 1],
            "%clusterid": [block.index[0] // run.cluster, *block.index[1:]],
            "%nclusterid": [run.grid[0] // run.cluster, *run.grid[1:]],
        }
        scalars = {
            "%laneid": LANES,
            "%warpid": self.index,
            "%cluster_ctarank": block.rank,
            "%cluster_nctarank": run.cluster,
        }
        value = scalars[name] if name in scalars else per_axis[name][axis]
        return np.broadcast_to(np.asarray(value), WARP)

    def symbol_address(self, symbol) -> int:
        return parameter_symbol_address(self.run, symbol, self.block)

    def take_turn(self, length: int) -> bool:
        """Whether any lane did more than poll or wait."""
        progress = False
        for pc in sorted(self.groups):
            if pc in self.groups:
                progress |= self._run_group(pc, length)
        return progress

    def _run_group(self, pc: int, length: int) -> bool:
        run = self.run
        instructions, effects, whole_warp = run.kernel.instructions, run.effects, run.whole_warp
        mask = self.groups.pop(pc)
        for done in range(length):
            if pc in self.groups:
                mask = mask | self.groups.pop(pc)
            instruction = instructions[pc]
            if whole_warp[pc] and self.groups:
                self.groups[pc] = mask
                return done > 0
            active = mask
            if instruction.guard is not None:
                predicate = self.registers.bits[instruction.guard.index] != 0
                active = mask & (predicate ^ instruction.guard_negated)
            if effects[pc] is None:
                remaining = mask & ~active
                if instruction.target is not None and active.any():
                    self._add_group(instruction.target, active)
                if remaining.any():
                    self._add_group(pc + 1, remaining)
                nearest = instruction.target if not remaining.any() else pc + 1
                if nearest not in self.groups:
                    return True
                pc, mask = nearest, self.groups.pop(nearest)
                continue
            try:
                if active is mask or active.any():
                    effects[pc](self, active)
            except Blocked:
                self._add_group(pc, mask)
                return done > 0
            except Spinning:
                self._add_group(pc + 1, mask)
                return False
            except Exception as error:
                error.add_note(self.place() + f" at: {instruction.text}")
                raise
            pc += 1
        self._add_group(pc, mask)
        return True

    def _add_group(self, pc: int, mask: np.ndarray) -> None:
        self.groups[pc] = self.groups[pc] | mask if pc in self.groups else mask

    def place(self) -> str:
        texts = [self.run.kernel.instructions[pc].text for pc in sorted(self.groups)]
        return f"block {self.block.index} warp {self.index}: {' | '.join(t[:80] for t in texts)}"
