"""Tensor memory and the tcgen05 instructions, with products of bfloat16, and of block-scaled E4M3
and E2M1 numbers.

Order and fences. The products and copies of one block run in order of issue; `tcgen05.commit`
arrives at a barrier after those before it. A launch is `strict` about what the ISA demands and
kernels of CUTLASS leave to the assembler: a load's registers are garbage until `tcgen05.wait`; a
warp that has passed a barrier executes `tcgen05.fence::after_thread_sync` before its next tcgen05
operation, and one that has loaded from tensor memory `tcgen05.fence::before_thread_sync` before
it arrives at a barrier of its block.
"""

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from tests.oracles import formats
from tests.ptx.emulator.lanes import (
    GARBAGE,
    address_reader_32,
    instruction,
    only_lane,
    reader,
    writer,
)
from tests.ptx.emulator.mbarrier import barrier_at
from tests.ptx.emulator.memory import shared_view
from tests.ptx.emulator.tma import swizzled

LANES, COLUMNS = 128, 512
# Both codes of a byte, the low nibble first.
_E2M1_PAIRS = np.stack([np.tile(formats.E2M1, 16), np.repeat(formats.E2M1, 16)], 1)
_UE4M3 = np.where(np.arange(256) < 127, formats.E4M3, np.nan)


class TensorFences:
    def __init__(self, strict: bool):
        self._strict = strict
        self._needs_before = self._needs_after = False

    def synced(self) -> None:
        self._needs_after = self._strict

    def loaded(self) -> None:
        self._needs_before = self._strict

    def fence(self, which: str) -> None:
        if which == "before":
            self._needs_before = False
        else:
            self._needs_after = False

    def check_before_sync(self, text: str) -> None:
        if self._needs_before:
            raise RuntimeError(f"{text}: tcgen05.fence::before_thread_sync is missing")

    def check_after_sync(self, text: str) -> None:
        if self._needs_after:
            raise RuntimeError(f"{text}: tcgen05.fence::after_thread_sync is missing")


class TensorMemory:
    def __init__(self, rng: np.random.Generator):
        self.words = np.full((LANES, COLUMNS), GARBAGE & 0xFFFFFFFF, np.uint32)
        self.owned = np.zeros(COLUMNS, bool)
        self._from_above = rng.integers(2)

    def allocate(self, count: int) -> int:
        if count < 32 or count & (count - 1):
            raise RuntimeError(f"{count} columns of tensor memory, expected a power of two from 32")
        starts = range(0, COLUMNS, count)
        for start in reversed(starts) if self._from_above else starts:
            if not self.owned[start : start + count].any():
                self.owned[start : start + count] = True
                return start
        raise RuntimeError("tensor memory is oversubscribed")

    def free(self, start: int, count: int) -> None:
        if not self.owned[start : start + count].all():
            raise RuntimeError("columns of tensor memory are freed that were not allocated")
        self.owned[start : start + count] = False

    def columns(self, start: int, count: int) -> slice:
        if start + count > COLUMNS or not self.owned[start : start + count].all():
            raise RuntimeError(f"columns {start}..{start + count - 1} were not allocated")
        return slice(start, start + count)


def _split_address(address: int) -> tuple[int, int]:
    return address >> 16 & 0x7F, address & 0xFFFF


@instruction("tcgen05.fence::before_thread_sync", "tcgen05.fence::after_thread_sync")
def _fence(i):
    which = "before" if "before" in i.opcode else "after"
    return lambda warp, mask: warp.tensor_fences.fence(which)


@instruction("tcgen05.relinquish_alloc_permit")
def _relinquish(i):
    return lambda warp, mask: None


@instruction("tcgen05.alloc")
def _alloc(i):
    to, count = address_reader_32(i.operands[0]), reader(i.operands[1], "u4")

    def alloc(warp, mask):
        start = warp.block.tensor_memory.allocate(int(count(warp)[0]))
        shared_view(warp, int(to(warp)[0]), 4)[:] = np.frombuffer(np.uint32(start).tobytes(), "u1")

    return alloc


@instruction("tcgen05.dealloc")
def _dealloc(i):
    address, count = (reader(o, "u4") for o in i.operands)

    def dealloc(warp, mask):
        warp.tensor_fences.check_after_sync(i.text)
        warp.block.tensor_memory.free(int(address(warp)[0]), int(count(warp)[0]))

    return dealloc


# Of a matrix descriptor: swizzle, bytes of a row.
_LAYOUTS = {0: ("none", 16), 2: ("128B", 128), 4: ("64B", 64), 6: ("32B", 32)}


class MatrixDescriptor:
    """K-major rows in shared memory: groups of 8 rows, with or without a swizzle."""

    def __init__(self, bits: int):
        if bits >> 46 & 7 != 1:
            raise RuntimeError("matrix descriptor: bits 46-48 must be 1")
        self.start = (bits & 0x3FFF) << 4
        self.leading_bytes = (bits >> 16 & 0x3FFF) << 4
        self.stride_bytes = (bits >> 32 & 0x3FFF) << 4
        self.swizzle, self.row_bytes = _LAYOUTS[bits >> 61]

    def places(self, rows: int, count: int) -> np.ndarray:
        """Offsets in shared memory of `count` bytes of each row."""
        row, byte = np.arange(rows)[:, None], np.arange(count)
        place = self.start + row // 8 * self.stride_bytes + row % 8 * self.row_bytes
        if self.swizzle == "none":
            return place + byte // 16 * self.leading_bytes + byte % 16
        return swizzled(place + byte, self.swizzle)


@instruction("tcgen05.cp")
def _copy(i):
    if "32x128b" not in i.parts or "warpx4" not in i.parts:
        raise NotImplementedError(f"instruction: {i.text}")
    to, descriptor = address_reader_32(i.operands[0]), reader(i.operands[1], "u8")

    def copy(warp, mask):
        lane = only_lane(mask, i.text)
        warp.tensor_fences.check_after_sync(i.text)
        _, column = _split_address(int(to(warp)[lane]))
        places = MatrixDescriptor(int(descriptor(warp)[lane])).places(32, 16)

        for block in _issuing_blocks(i, warp):

            def finish(block=block):
                memory = block.tensor_memory
                words = block.shared[places].view(np.uint32)
                memory.words[:, memory.columns(column, 4)] = np.tile(words, (4, 1))

            warp.block.tensor_later(finish)

    return copy


def _issuing_blocks(i, warp) -> list:
    """This block, or with cta_group::2 the pair that this block leads."""
    if "cta_group::2" not in i.parts:
        return [warp.block]
    if warp.block.rank % 2:
        raise RuntimeError(f"{i.text}: issued by the odd block of a pair")
    return warp.block.cluster.blocks[warp.block.rank : warp.block.rank + 2]


@dataclasses.dataclass(frozen=True)
class Kind:
    """What one product of a kind takes: 32 bytes of K of every row, with or without scales."""

    operand_format: int  # of both operands, in the instruction descriptor
    width: int  # of K
    scales_per_step: int  # bytes of a row's word of scales; the descriptor says where they begin
    decode: Callable[[np.ndarray], np.ndarray]  # [rows, 32] bytes to [rows, width]

    @property
    def descriptor_mask(self) -> tuple[int, int]:
        """(bits that this emulator knows, what those of formats and modes must be)."""
        formats_bits = self.operand_format << 7 | self.operand_format << 10
        sizes = 63 << 17 | 31 << 24
        if not self.scales_per_step:
            return sizes, formats_bits | _FLOAT32_RESULT << 4
        ids = 0 if self.scales_per_step == 4 else 3 << 4 | 3 << 29
        return sizes | 1 << 23 | ids, formats_bits


_FLOAT32_RESULT = 1


def _from_bfloat16(data: np.ndarray) -> np.ndarray:
    return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


_E2M1, _E4M3, _BF16 = 1, 0, 1
_KINDS = {
    "kind::mxf4nvf4": Kind(_E2M1, 64, 4, lambda data: _E2M1_PAIRS[data].reshape(len(data), 64)),
    "kind::mxf8f6f4": Kind(_E4M3, 32, 1, lambda data: formats.E4M3[data]),
    "kind::f16": Kind(_BF16, 16, 0, _from_bfloat16),
}
# Of codes the only mode is the default.
_SCALE_MODES = {4: {"block16", "scale_vec::4X"}, 1: {"block32", "scale_vec::1X", "block_scale"}}


class ProductInstruction:
    """The instruction descriptor of a product."""

    def __init__(self, kind: Kind, bits: int):
        known, expected = kind.descriptor_mask
        if bits & ~known != expected:
            raise NotImplementedError(f"instruction descriptor {bits:#010x}")
        self.n = (bits >> 17 & 63) * 8
        self.m = (bits >> 24 & 31) * 16
        self.scales = formats.E8M0 if bits >> 23 & 1 else _UE4M3
        self.scale_id_a, self.scale_id_b = bits >> 29 & 3, bits >> 4 & 3
        if kind.scales_per_step == 1 and self.scales is _UE4M3:
            raise NotImplementedError(f"instruction descriptor {bits:#010x}")


def _scales(block, column: int, rows: int, kind: Kind, table, first: int) -> np.ndarray:
    """[rows, K]: of row r lane r % 32, column r / 32, a word of K scales, in each quarter."""
    memory = block.tensor_memory
    words = memory.words[:, memory.columns(column, -(-rows // 32))].reshape(4, 32, -1)
    if (words != words[0]).any():
        raise RuntimeError("scales are not the same in the four quarters of tensor memory")
    row_words = np.ascontiguousarray(words[0].T).reshape(-1)[:rows]
    count = kind.scales_per_step
    row_bytes = row_words.view(np.uint8).reshape(rows, 4)[:, first * (count == 1) :][:, :count]
    return np.repeat(table[row_bytes], kind.width // count, 1)


def _values(block, descriptor: MatrixDescriptor, rows: int, kind: Kind) -> np.ndarray:
    return kind.decode(block.shared[descriptor.places(rows, 32)])


@instruction("tcgen05.mma")
def _multiply(i):
    kind = next((_KINDS[part] for part in i.parts if part in _KINDS), None)
    scaled = kind is not None and kind.scales_per_step
    if kind is None or (scaled and not _SCALE_MODES[scaled] & set(i.parts)):
        raise NotImplementedError(f"instruction: {i.text}")
    accumulator_at = address_reader_32(i.operands[0])
    scales_at = [address_reader_32(o) for o in i.operands[4:6]] if scaled else []
    a_at, b_at = (reader(i.operands[k], "u8") for k in (1, 2))
    descriptor, accumulate_at = reader(i.operands[3], "u4"), reader(i.operands[-1], "pred")
    if len(i.operands) != (7 if scaled else 5):
        raise NotImplementedError(f"instruction: {i.text}")

    def multiply(warp, mask):
        lane = only_lane(mask, i.text)
        warp.tensor_fences.check_after_sync(i.text)
        blocks = _issuing_blocks(i, warp)
        product = ProductInstruction(kind, int(descriptor(warp)[lane]))
        if product.m != 128 * len(blocks):
            raise NotImplementedError(f"{i.text}: {product.m} rows")
        first_lane, column = _split_address(int(accumulator_at(warp)[lane]))
        if first_lane:
            raise RuntimeError(f"{i.text}: the accumulator does not begin at lane 0")
        columns = [_split_address(int(at(warp)[lane]) & 0x3FFFFFFF)[1] for at in scales_at]
        a = MatrixDescriptor(int(a_at(warp)[lane]))
        b = MatrixDescriptor(int(b_at(warp)[lane]))
        accumulate = bool(accumulate_at(warp)[lane])

        def finish():
            n = product.n
            b_rows = np.concatenate([_values(block, b, n // len(blocks), kind) for block in blocks])
            for block in blocks:
                memory = block.tensor_memory
                a_values, b_values = _values(block, a, 128, kind), b_rows
                if scaled:
                    a_column, b_column = columns
                    a_values = a_values * _scales(
                        block, a_column, 128, kind, product.scales, product.scale_id_a
                    )
                    b_values = b_values * _scales(
                        block, b_column, n, kind, product.scales, product.scale_id_b
                    )
                total = np.einsum("ik,jk->ij", a_values, b_values)  # without BLAS: no threads
                where = memory.columns(column, n)
                if accumulate:
                    total += memory.words[:, where].view(np.float32)
                memory.words[:, where] = total.astype(np.float32).view(np.uint32)

        warp.block.tensor_later(finish)

    return multiply


@instruction("tcgen05.commit")
def _commit(i):
    signal = address_reader_32(i.operands[0])
    multicast = reader(i.operands[1], "u2") if "multicast::cluster" in i.parts else None

    def commit(warp, mask):
        lane = only_lane(mask, i.text)
        address = int(signal(warp)[lane])
        addresses = [address]
        if multicast:
            chosen = int(multicast(warp)[lane])
            blocks = warp.block.cluster.blocks
            addresses = [b.rank << 24 | address & 0xFFFFFF for b in blocks if chosen >> b.rank & 1]

        def finish():
            for each in addresses:
                barrier_at(warp, each).arrive()

        warp.block.tensor_later(finish)

    return commit


@instruction("tcgen05.ld")
def _load(i):
    shape = re.search(r"32x32b\.x(\d+)\.b32", i.opcode)
    if not shape or "pack" in i.opcode:
        raise NotImplementedError(f"instruction: {i.text}")
    count, address = int(shape[1]), address_reader_32(i.operands[1])
    writers = [writer(o, "u4") for o in i.operands[0].elements]
    garbage = np.full(32, GARBAGE & 0xFFFFFFFF, np.uint32)

    def load(warp, mask):
        warp.tensor_fences.check_after_sync(i.text)
        first_lane, column = _split_address(int(address(warp)[0]))
        own = warp.index % 4 * 32
        if first_lane != own:
            raise RuntimeError(f"{i.text}: lane {first_lane}, the warp's own begin at {own}")
        memory = warp.block.tensor_memory
        columns = memory.columns(column, count)
        early = memory.words[own : own + 32, columns].copy()
        is_early = warp.rng.integers(2)

        def finish():
            values = early if is_early else memory.words[own : own + 32, columns]
            for k, write in enumerate(writers):
                write(warp, mask, values[:, k])

        if not warp.run.strict:
            finish()
            return
        for write in writers:
            write(warp, mask, garbage)
        warp.pending_loads.append(finish)
        warp.tensor_fences.loaded()

    return load


@instruction("tcgen05.wait::ld")
def _wait(i):
    def wait(warp, mask):
        for finish in warp.pending_loads:
            finish()
        warp.pending_loads.clear()

    return wait
