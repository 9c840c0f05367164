"""Instructions of the router's kernels that the emulator's other users do not need."""

import numpy as np

from tests.ptx.emulator.lanes import (
    LANES,
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
from tests.ptx.emulator.memory import shared_view

_REDUCTIONS = {"max": np.max, "min": np.min, "add": np.sum}


@instruction(*(f"redux.sync.{name}" for name in _REDUCTIONS))
def _reduce(i):
    dtype, function = dtype_of(i.parts[-1]), _REDUCTIONS[i.parts[2]]
    value, write = reader(i.operands[1], dtype), writer(i.operands[0], dtype)
    return lambda warp, mask: write(
        warp, mask, np.full(WARP, function(value(warp)[mask]), np.int64).astype(dtype)
    )


def _bitwise(i, function):
    value, write = reader(i.operands[1], dtype_of(i.parts[-1])), writer(i.operands[0], "u4")
    return lambda warp, mask: write(
        warp, mask, np.array([function(int(v)) for v in value(warp)], "u4")
    )


@instruction("brev")
def _reversed(i):
    return _bitwise(i, lambda v: int(f"{v:032b}"[::-1], 2))


@instruction("clz", "bfind.shiftamt")
def _leading_zeros(i):
    bits = 8 * np.dtype(dtype_of(i.parts[-1])).itemsize
    of_zero = bits if i.parts[0] == "clz" else 2**32 - 1
    return _bitwise(i, lambda v: bits - v.bit_length() if v else of_zero)


@instruction("bfi")
def _bit_field_insert(i):
    dtype = dtype_of(i.parts[-1])
    a, b = (reader(o, dtype) for o in i.operands[1:3])
    start, length = (reader(o, "u4") for o in i.operands[3:5])
    write, bits = writer(i.operands[0], dtype), 8 * np.dtype(dtype).itemsize

    def insert(warp, mask):
        values = []
        for x, y, s, n in zip(a(warp), b(warp), start(warp), length(warp), strict=True):
            field = ((1 << int(n)) - 1) << int(s)
            values.append((int(y) & ~field | int(x) << int(s) & field) & ((1 << bits) - 1))
        write(warp, mask, np.array(values, dtype))

    return insert


@instruction("mapa.u64")
def _generic_mapa(i):
    address, rank = reader(i.operands[1], "u8"), reader(i.operands[2], "u4")
    write, low = writer(i.operands[0], "u8"), np.uint64((1 << RANK_SHIFT) - 1)
    return lambda warp, mask: write(
        warp,
        mask,
        (address(warp) & low)
        | rank(warp).astype("u8") << np.uint64(RANK_SHIFT)
        | np.uint64(SHARED_WINDOW),
    )


@instruction("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
def _mma(i):
    """d = a b + c of a [16, 16], b [16, 8]; lane l has rows l / 4 and columns 2 (l % 4) onwards."""
    writers, *readers = (
        [access(o, dtype) for o in operand.elements]
        for operand, access, dtype in zip(
            i.operands, (writer, reader, reader, reader), ("f4", "u4", "u4", "f4"), strict=True
        )
    )
    group, quad = LANES // 4, 2 * (LANES % 4)

    def halves(bits):
        return np.stack([bits << np.uint32(16), bits & np.uint32(0xFFFF0000)]).view("f4")

    def multiply(warp, mask):
        a, b, c = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
        for j, read in enumerate(readers[0]):
            for k, half in enumerate(halves(read(warp))):
                a[group + 8 * (j % 2), quad + 8 * (j // 2) + k] = half
        for j, read in enumerate(readers[1]):
            for k, half in enumerate(halves(read(warp))):
                b[quad + 8 * j + k, group] = half
        for j, read in enumerate(readers[2]):
            c[group + 8 * (j // 2), quad + j % 2] = read(warp)
        d = (a @ b + c).astype("f4")
        for j, write in enumerate(writers):
            write(warp, mask, d[group + 8 * (j // 2), quad + j % 2])

    return multiply


def _atomic(i, function):
    """`function` of the old value and the operand gives the new one; "red" returns nothing."""
    shared, returns = "shared" in i.parts, i.parts[0] == "atom"
    address, operand = i.operands[-2:]
    addresses = (address_reader_32 if shared else address_reader)(address)
    operand, write = reader(operand, "u4"), writer(i.operands[0], "u4") if returns else None

    def update(warp, mask):
        where, operands, old = addresses(warp), operand(warp), np.zeros(WARP, "u4")
        for lane in np.flatnonzero(mask):
            address = int(where[lane])
            memory = shared_view(warp, address, 4) if shared else warp.memory.view(address, 4)
            value = memory.view("u4")
            old[lane] = value[0]
            value[0] = function(int(value[0]), int(operands[lane]))
        if write:
            write(warp, mask, old)

    return update


@instruction("atom.inc.u32", "atom.global.inc.u32")
def _atomic_wrapping_increment(i):
    return _atomic(i, lambda old, limit: 0 if old >= limit else old + 1)


@instruction("atom.shared.add.u32", "red.shared.add.u32")
def _atomic_add(i):
    return _atomic(i, lambda old, more: (old + more) % 2**32)
