"""Global, shared and parameter memory, and the instructions that load and store.

Addresses: of global memory, where `GlobalMemory` put an array; of shared memory, block rank << 24
| offset in that block's, as 32-bit numbers or, generic, in a window of the 64-bit space.
"""

import bisect
import dataclasses

import numpy as np

from tests.ptx.emulator.lanes import (
    RANK_SHIFT,
    SHARED_WINDOW,
    WARP,
    address_reader,
    address_reader_32,
    dtype_of,
    instruction,
    reader,
    writer,
)
from tests.ptx.emulator.parser import Address, Register, Symbol, Vector


class MemoryFault(Exception):
    pass


class GlobalMemory:
    """Arrays at made-up addresses, far enough apart that no small overrun reaches the next."""

    _FIRST, _GUARD = 1 << 40, 1 << 16

    def __init__(self):
        self._starts: list[int] = []
        self._bytes: list[np.ndarray] = []

    def place(self, array: np.ndarray) -> int:
        """The address of the array, which the kernel then reads and, if writeable, writes."""
        if not array.flags.c_contiguous:
            raise ValueError("array: is not contiguous")
        start = self._FIRST
        if self._starts:
            end = self._starts[-1] + len(self._bytes[-1])
            start = -(-end // self._GUARD) * self._GUARD + self._GUARD
        self._starts.append(start)
        self._bytes.append(array.reshape(-1).view(np.uint8))
        return start

    def find(self, address: int) -> tuple[int, np.ndarray]:
        """(address of the array that holds this address, its bytes)."""
        i = bisect.bisect_right(self._starts, address) - 1
        if i < 0 or address >= self._starts[i] + len(self._bytes[i]):
            raise MemoryFault(f"global address {address:#x} is outside of every array")
        return self._starts[i], self._bytes[i]

    def view(self, address: int, size: int) -> np.ndarray:
        start, data = self.find(address)
        if address + size > start + len(data):
            raise MemoryFault(f"{size} bytes at {address:#x} reach past the end of an array")
        return data[address - start : address - start + size]


def shared_place(warp, address: int):
    """(block, offset) of an address in the shared window."""
    rank = int(address) >> RANK_SHIFT
    blocks = warp.block.cluster.blocks
    if not 0 <= rank < len(blocks):
        raise MemoryFault(f"shared address {int(address):#x}: the cluster has {len(blocks)} blocks")
    if blocks[rank] is not warp.block and blocks[rank].has_ended():
        raise MemoryFault(f"shared address {int(address):#x} is of a block that has ended")
    return blocks[rank], int(address) & ((1 << RANK_SHIFT) - 1)


def shared_view(warp, address: int, size: int) -> np.ndarray:
    block, offset = shared_place(warp, address)
    if offset + size > len(block.shared):
        raise MemoryFault(f"{size} bytes at {offset} reach past the block's shared memory")
    return block.shared[offset : offset + size]


def _regions(warp, addresses: np.ndarray, lanes: np.ndarray, space: str):
    """(memory, lanes, offsets) for each piece of memory that the lanes address."""
    while len(lanes):
        first = int(addresses[lanes[0]])
        if space == "shared" or SHARED_WINDOW <= first < 2 * SHARED_WINDOW:
            block, _ = shared_place(warp, first % SHARED_WINDOW)
            base, data = first >> RANK_SHIFT << RANK_SHIFT, block.shared
        else:
            base, data = warp.memory.find(first)
        offsets = addresses[lanes] - base
        inside = (offsets >= 0) & (offsets < len(data))
        if not inside[0]:
            raise MemoryFault(f"offset {offsets[0]} in {len(data)} bytes of shared memory")
        yield data, lanes[inside], offsets[inside]
        lanes = lanes[~inside]


def _bytes_at(data: np.ndarray, offsets: np.ndarray, size: int) -> np.ndarray:
    if (offsets + size > len(data)).any():
        raise MemoryFault(f"{size} bytes at offset {offsets.max()} of {len(data)}")
    return offsets[:, None] + np.arange(size)


def _check_alignment(addresses: np.ndarray, lanes: np.ndarray, size: int) -> None:
    if (addresses[lanes] % size).any():
        raise MemoryFault(f"an access of {size} bytes is misaligned")


def _access(i, operand: Address):
    """(space, addresses, element dtype) of a load or a store."""
    space = next((s for s in ("shared", "param") if i.parts[1].split("::")[0] == s), "global")
    addresses = (address_reader_32 if space == "shared" else address_reader)(operand)
    return space, addresses, dtype_of(i.parts[-1])


def _elements(operand) -> tuple:
    return operand.elements if isinstance(operand, Vector) else (operand,)


@instruction("ld", "ldu")
def _load(i):
    destination = i.operands[0]
    if i.parts[-1] == "b128":
        halves = (destination, Register(destination.index + 1, False))
        i = dataclasses.replace(i, opcode=i.opcode.replace("b128", "b64"))
        destination = Vector(halves)
    space, addresses, dtype = _access(i, i.operands[1])
    writers = [writer(o, dtype) for o in _elements(destination)]
    element = np.dtype(dtype).itemsize
    size = element * len(writers)

    def load(warp, mask):
        where, lanes = addresses(warp), np.flatnonzero(mask)
        _check_alignment(where, lanes, size)
        values = np.zeros((WARP, size), np.uint8)
        for data, some, offsets in _regions(warp, where, lanes, space):
            values[some] = data[_bytes_at(data, offsets, size)]
        values = values.view(dtype)
        for j, write in enumerate(writers):
            write(warp, mask, values[:, j])

    return load


@instruction("st")
def _store(i):
    space, addresses, dtype = _access(i, i.operands[0])
    readers = [reader(o, dtype) for o in _elements(i.operands[1])]
    size = np.dtype(dtype).itemsize * len(readers)

    def store(warp, mask):
        where, lanes = addresses(warp), np.flatnonzero(mask)
        _check_alignment(where, lanes, size)
        values = np.stack([read(warp) for read in readers], 1).view(np.uint8)
        for data, some, offsets in _regions(warp, where, lanes, space):
            data[_bytes_at(data, offsets, size)] = values[some]

    return store


@instruction("cvta")
def _cvta(i):
    # Of shared memory the window is added or removed; the other spaces are one.
    to_space, shared = "to" in i.parts, any(p.startswith("shared") for p in i.parts)
    dtype = dtype_of(i.parts[-1])
    change = SHARED_WINDOW * (-1 if to_space else 1) if shared else 0
    value, write = reader(i.operands[1], "i8"), writer(i.operands[0], dtype)
    return lambda warp, mask: write(warp, mask, value(warp) + change)


@instruction("mapa")
def _mapa(i):
    if "shared::cluster" not in i.parts:
        raise NotImplementedError(f"instruction: {i.text}")
    address, rank = reader(i.operands[1], "u4"), reader(i.operands[2], "u4")
    write = writer(i.operands[0], "u4")
    low = np.uint32((1 << RANK_SHIFT) - 1)
    shift = np.uint32(RANK_SHIFT)
    return lambda warp, mask: write(warp, mask, (address(warp) & low) | (rank(warp) << shift))


@instruction("prefetch", "prefetchu", "fence", "membar", "griddepcontrol")
def _nothing(i):
    return lambda warp, mask: None


def parameter_symbol_address(launch, symbol: Symbol, block) -> int:
    """Of a shared variable the window's address, of a parameter or constant its place."""
    if symbol.space == "shared":
        return block.rank << RANK_SHIFT | symbol.offset
    base = launch.parameter_address if symbol.space == "param" else launch.constant_address
    return base + symbol.offset
