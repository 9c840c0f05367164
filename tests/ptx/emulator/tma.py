"""Bulk copies between global and shared memory, plain and of boxes of tensors."""

import dataclasses
import struct

import numpy as np

from tests.ptx.emulator.lanes import Blocked, address_reader, address_reader_32, instruction, reader
from tests.ptx.emulator.mbarrier import barrier_at
from tests.ptx.emulator.memory import shared_place, shared_view

# Garbage as E2M1 codes is -6, as scales NaN.
GARBAGE_BYTE = 0xFF
SWIZZLES = ("none", "32B", "64B", "128B")
_MAGIC = 0x70616D5F726F736E
_FORMAT = "<QQBBB5x5Q4Q5H"  # 106 of 128 bytes; fake_cudart.cpp writes the same


def swizzled(address: np.ndarray, swizzle: str) -> np.ndarray:
    """Where a byte lies: the number of its 16-byte unit is exclusive-or'd with that of its row."""
    rows = {"none": 0, "32B": 1, "64B": 3, "128B": 7}[swizzle]
    return address ^ (address >> 7 & rows) << 4


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """A tensor in global memory, innermost dimension first, and the box that a copy takes of it."""

    address: int
    sizes: tuple[int, ...]  # elements
    strides: tuple[int, ...]  # bytes, of all dimensions but the first
    box: tuple[int, ...]  # elements
    element_bits: int = 8
    swizzle: str = "none"

    def __post_init__(self):
        inner = self.box[0] * self.element_bits // 8
        limit = {"none": 1 << 20, "32B": 32, "64B": 64, "128B": 128}[self.swizzle]
        if self.address % 16 or any(s % 16 for s in self.strides) or inner % 16:
            raise ValueError("address, strides and inner box bytes must be multiples of 16")
        if inner > limit or max(self.box) > 256:
            raise ValueError(f"box: {self.box} is too large for swizzle {self.swizzle}")

    @property
    def box_bytes(self) -> int:
        return int(np.prod(self.box)) * self.element_bits // 8

    def encode(self) -> bytes:
        """128 bytes, in a format of the emulator's own, for a kernel's parameters."""
        rank = len(self.sizes)
        data = struct.pack(
            _FORMAT, _MAGIC, self.address, rank, self.element_bits, SWIZZLES.index(self.swizzle),
            *self.sizes, *[0] * (5 - rank), *self.strides, *[0] * (5 - rank),
            *self.box, *[0] * (5 - rank),
        )  # fmt: skip
        return data.ljust(128, b"\0")

    @classmethod
    def decode(cls, data: bytes) -> "TensorMap":
        fields = struct.unpack_from(_FORMAT, data)
        magic, address, rank, bits, swizzle = fields[:5]
        if magic != _MAGIC:
            raise RuntimeError("the address is not that of a tensor map")
        sizes, strides, box = fields[5:10], fields[10:14], fields[14:19]
        return cls(address, sizes[:rank], strides[: rank - 1], box[:rank], bits, SWIZZLES[swizzle])

    def inside(self, corner: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """(byte offsets in the tensor, which are inside it) of the box at `corner`, row by row."""
        outer = np.indices(self.box[:0:-1]).reshape(len(self.box) - 1, -1)[::-1]
        rows = outer + np.array(corner[1:], np.int64)[:, None]
        row_inside = ((rows >= 0) & (rows < np.array(self.sizes[1:])[:, None])).all(0)
        starts = (rows * np.array(self.strides, np.int64)[:, None]).sum(0)
        first = corner[0] * self.element_bits // 8
        columns = first + np.arange(self.box[0] * self.element_bits // 8)
        column_inside = (columns >= 0) & (columns < self.sizes[0] * self.element_bits // 8)
        return starts[:, None] + columns, row_inside[:, None] & column_inside

    def places(self, shared_offset: int) -> np.ndarray:
        """Where in shared memory the box's bytes lie."""
        return swizzled(shared_offset + np.arange(self.box_bytes), self.swizzle)


def _tensor_bytes(warp, tensor: TensorMap) -> tuple[np.ndarray, int]:
    start, data = warp.memory.find(tensor.address)
    return data, tensor.address - start


def _box_lane(warp, operand, lane: int, read_map, read_coordinates):
    tensor = TensorMap.decode(warp.memory.view(int(read_map(warp)[lane]), 128).tobytes())
    return tensor, tuple(int(c(warp)[lane]) for c in read_coordinates)


@instruction("cp.async.bulk.tensor")
def _tensor_copy(i):
    if "im2col" in i.opcode or "reduce" in i.opcode:
        raise NotImplementedError(f"instruction: {i.text}")
    return _tensor_store(i) if i.parts[5] == "global" else _tensor_load(i)


def _tensor_load(i):
    destination, source, barrier = i.operands[:3]
    to, signal = address_reader_32(destination), address_reader_32(barrier)
    read_map, coordinates = reader(source.base, "u8"), [reader(c, "i4") for c in source.coordinates]
    multicast = reader(i.operands[3], "u2") if "multicast::cluster" in i.parts else None
    pair = "cta_group::2" in i.parts

    def copy(warp, mask):
        blocks = warp.block.cluster.blocks
        for lane in np.flatnonzero(mask):
            tensor, corner = _box_lane(warp, source, lane, read_map, coordinates)
            block, offset = shared_place(warp, to(warp)[lane])
            signal_address = int(signal(warp)[lane])
            _check_box(tensor, offset, len(block.shared))
            targets = [block]
            if multicast:
                chosen = int(multicast(warp)[lane])
                targets = [b for b in blocks if chosen >> b.rank & 1]
            for target in targets:
                # A multicast copy signals the barrier at the same offset of each destination
                # (with cta_group::2 in its pair's block of the barrier's parity).
                rank = signal_address >> 24
                if multicast:
                    rank = target.rank & ~1 | rank & 1 if pair else target.rank
                address = rank << 24 | signal_address & 0xFFFFFF
                _load_later(warp, tensor, corner, target, offset, address)

    return copy


def _check_box(tensor: TensorMap, offset: int, shared_bytes: int) -> None:
    # A swizzled box must begin where its pattern of rows begins.
    alignment = {"none": 128, "32B": 256, "64B": 512, "128B": 1024}[tensor.swizzle]
    if offset % (alignment if tensor.swizzle != "none" else 16):
        raise RuntimeError(f"a box at shared offset {offset} is misaligned")
    if offset + tensor.box_bytes > shared_bytes:
        raise RuntimeError("a box reaches past the end of shared memory")


def _load_later(warp, tensor, corner, block, offset, barrier_address):
    block.shared[offset : offset + tensor.box_bytes] = GARBAGE_BYTE

    def finish():
        offsets, inside = tensor.inside(corner)
        data, base = _tensor_bytes(warp, tensor)
        box = np.zeros(offsets.shape, np.uint8)
        box[inside] = data[base + offsets[inside]]
        block.shared[tensor.places(offset)] = box.reshape(-1)
        barrier_at(warp, barrier_address).complete(tensor.box_bytes)

    warp.block.cluster.copy_later(finish)


def _tensor_store(i):
    destination, source = i.operands[:2]
    read_map = reader(destination.base, "u8")
    coordinates = [reader(c, "i4") for c in destination.coordinates]
    read_source = address_reader_32(source)

    def copy(warp, mask):
        for lane in np.flatnonzero(mask):
            tensor, corner = _box_lane(warp, destination, lane, read_map, coordinates)
            block, offset = shared_place(warp, read_source(warp)[lane])
            _check_box(tensor, offset, len(block.shared))
            _store_later(warp, tensor, corner, block, offset)

    return copy


def _store_later(warp, tensor, corner, block, offset):
    group = warp.store_groups[-1]
    group.append(offset)

    def finish():
        offsets, inside = tensor.inside(corner)
        data, base = _tensor_bytes(warp, tensor)
        box = block.shared[tensor.places(offset)].reshape(offsets.shape)
        data[base + offsets[inside]] = box[inside]
        group.remove(offset)

    block.cluster.store_later(finish)


@instruction("cp.async.bulk.commit_group")
def _commit_stores(i):
    return lambda warp, mask: warp.store_groups.append([])


@instruction("cp.async.bulk.wait_group")
def _wait_for_stores(i):
    pending = reader(i.operands[0], "u4")

    def wait(warp, mask):
        committed = warp.store_groups[:-1]
        if any(committed[: len(committed) - int(pending(warp)[0])]):
            raise Blocked

    return wait


@instruction("cp.async.bulk.shared::cluster.global", "cp.async.bulk.shared::cta.global")
def _bulk_load(i):
    to, signal = address_reader_32(i.operands[0]), address_reader_32(i.operands[3])
    source, count = address_reader(i.operands[1]), reader(i.operands[2], "u4")

    def copy(warp, mask):
        for lane in np.flatnonzero(mask):
            size, address = int(count(warp)[lane]), int(source(warp)[lane])
            destination = int(to(warp)[lane])
            if size % 16 or address % 16 or destination % 16:
                raise RuntimeError(f"{i.text}: size and addresses must be multiples of 16")
            target = shared_view(warp, destination, size)
            signal_address = int(signal(warp)[lane])
            target[:] = GARBAGE_BYTE

            def finish(target=target, address=address, size=size, signal_address=signal_address):
                target[:] = warp.memory.view(address, size)
                barrier_at(warp, signal_address).complete(size)

            warp.block.cluster.copy_later(finish)

    return copy
