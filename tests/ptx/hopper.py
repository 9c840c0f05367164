"""What the kernels of sm_90 need beyond the emulator's instructions: products of warps and
warpgroups on bfloat16 and E4M3 operands, and arithmetic on pairs of bfloat16 numbers.

The products of a warpgroup take effect when `wgmma.wait_group` says that they are complete, not
before: registers or shared memory that are changed too early give wrong numbers. The instructions
are the emulator's only within `instructions()`.
"""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import ml_dtypes
import numpy as np

from tests.ptx.emulator import lanes
from tests.ptx.emulator.lanes import (
    LANES,
    RANK_SHIFT,
    WARP,
    address_reader,
    address_reader_32,
    reader,
    writer,
)
from tests.ptx.emulator.mbarrier import barrier_at
from tests.ptx.emulator.memory import shared_view
from tests.ptx.emulator.tma import GARBAGE_BYTE

_BUILDERS: dict[str, Callable] = {}
_GROUP, _THREAD = LANES // 4, LANES % 4
_SWIZZLE_128B = 1


@contextlib.contextmanager
def instructions() -> Iterator[None]:
    with mock.patch.dict(lanes._BUILDERS, _BUILDERS):
        yield


def _instruction(*opcodes: str):
    def register(builder):
        _BUILDERS.update(dict.fromkeys(opcodes, builder))
        return builder

    return register


def _halves(words: np.ndarray, kind: object = ml_dtypes.bfloat16) -> np.ndarray:
    """The two numbers of each word in float64, [..., 2]."""
    return words.astype("u4").view("u2").view(kind).reshape(-1, 2).astype("f8")


def _elementwise(i, function, kind: str):
    sources = [reader(o, "u4") for o in i.operands[1:]]
    write = writer(i.operands[0], "u4")

    def run(warp, mask):
        result = function(*(_halves(read(warp)) for read in sources))
        if kind == "mask":
            bits = np.where(result, 0xFFFF, 0).astype("u2")
        else:
            bits = result.astype("f4").astype(ml_dtypes.bfloat16).view("u2")
        write(warp, mask, bits.reshape(WARP, 2).view("u4")[:, 0])

    return run


for _opcode, _function in {
    "add.rn.bf16x2": np.add,
    "sub.rn.bf16x2": np.subtract,
    "mul.rn.bf16x2": np.multiply,
}.items():
    _instruction(_opcode)(lambda i, f=_function: _elementwise(i, f, "number"))
_instruction("set.lt.u32.bf16x2")(lambda i: _elementwise(i, np.less, "mask"))


@_instruction("max.u16x2")
def _max_of_halves(i):
    a, b = (reader(o, "u4") for o in i.operands[1:])
    write = writer(i.operands[0], "u4")

    def run(warp, mask):
        largest = np.maximum(a(warp).copy().view("u2"), b(warp).copy().view("u2"))
        write(warp, mask, largest.view("u4"))

    return run


@_instruction("bfi")
def _bit_field_insert(i):
    field, base, start, length = (reader(o, "u4") for o in i.operands[1:])
    write = writer(i.operands[0], "u4")

    def run(warp, mask):
        inside = ((1 << length(warp).astype("u8")) - 1 << start(warp).astype("u8")).astype("u4")
        write(warp, mask, field(warp) << start(warp) & inside | base(warp) & ~inside)

    return run


@_instruction("cvt.rn.satfinite.e4m3x2.f32")
def _to_e4m3(i):
    high, low = (reader(o, "f4") for o in i.operands[1:])
    write = writer(i.operands[0], "u2")

    def run(warp, mask):
        pair = np.stack([low(warp), high(warp)], 1).clip(-448, 448)
        write(warp, mask, pair.astype(ml_dtypes.float8_e4m3fn).view("u2")[:, 0])

    return run


@_instruction("cvt.rn.f16x2.e4m3x2")
def _from_e4m3(i):
    read, write = reader(i.operands[1], "u2"), writer(i.operands[0], "u4")

    def run(warp, mask):
        codes = np.ascontiguousarray(read(warp)).view(ml_dtypes.float8_e4m3fn)
        write(warp, mask, codes.astype("f2").view("u4"))

    return run


@_instruction("cvt.rn.f16x2.f32")
def _to_halves(i):
    high, low = (reader(o, "f4") for o in i.operands[1:])
    write = writer(i.operands[0], "u4")

    def run(warp, mask):
        write(warp, mask, np.stack([low(warp), high(warp)], 1).astype("f2").view("u4")[:, 0])

    return run


@_instruction("redux.sync.add")
def _sum_of_lanes(i):
    value, write = reader(i.operands[1], "u4"), writer(i.operands[0], "u4")
    return lambda warp, mask: write(
        warp, mask, np.full(WARP, value(warp)[mask].sum(dtype="u4"), "u4")
    )


@_instruction(
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
)
def _bulk_load_to_cluster(i):
    to, signal = address_reader_32(i.operands[0]), address_reader_32(i.operands[3])
    source, count, ranks = (
        address_reader(i.operands[1]),
        reader(i.operands[2], "u4"),
        reader(i.operands[4], "u2"),
    )
    offset = (1 << RANK_SHIFT) - 1

    def run(warp, mask):
        for lane in np.flatnonzero(mask):
            size, address = int(count(warp)[lane]), int(source(warp)[lane])
            destination, barrier = int(to(warp)[lane]) & offset, int(signal(warp)[lane]) & offset
            if size % 16 or address % 16 or destination % 16:
                raise RuntimeError(f"{i.text}: size and addresses must be multiples of 16")
            for rank in range(16):
                if not int(ranks(warp)[lane]) >> rank & 1:
                    continue
                window = rank << RANK_SHIFT
                target = shared_view(warp, window | destination, size)
                target[:] = GARBAGE_BYTE

                def finish(target=target, address=address, size=size, at=window | barrier):
                    target[:] = warp.memory.view(address, size)
                    barrier_at(warp, at).complete(size)

                warp.block.cluster.copy_later(finish)

    return run


@_instruction("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16")
def _store_transposed(i):
    rows = address_reader_32(i.operands[0])
    matrices = [reader(o, "u4") for o in i.operands[1].elements]

    def run(warp, mask):
        addresses = rows(warp)
        for number, words in enumerate(matrices):
            matrix = np.zeros((8, 8), "u2")
            for half in range(2):
                matrix[2 * _THREAD + half, _GROUP] = words(warp) >> 16 * half & 0xFFFF
            for row in range(8):
                address = int(addresses[8 * number + row])
                if address % 16:
                    raise RuntimeError(f"{i.text}: a row at {address:#x}, not a multiple of 16")
                shared_view(warp, address, 16)[:] = matrix[row].view(np.uint8)

    return run


@_instruction("cp.async.bulk.shared::cluster.shared::cta")
def _copy_to_cluster(i):
    to, source, signal = (address_reader_32(i.operands[j]) for j in (0, 1, 3))
    size = reader(i.operands[2], "u4")

    def run(warp, mask):
        for lane in np.flatnonzero(mask):
            at, bytes_ = int(to(warp)[lane]), int(size(warp)[lane])
            barrier = int(signal(warp)[lane])
            target = shared_view(warp, at, bytes_)
            copied = shared_view(warp, int(source(warp)[lane]), bytes_)
            target[:] = GARBAGE_BYTE

            def finish(target=target, copied=copied, barrier=barrier):
                target[:] = copied
                barrier_at(warp, barrier).complete(len(target))

            warp.block.cluster.copy_later(finish)

    return run


@_instruction("st.async.shared::cluster.mbarrier::complete_tx::bytes")
def _store_in_cluster(i):
    to, signal = address_reader_32(i.operands[0]), address_reader_32(i.operands[2])
    stored = i.operands[1]
    kind = "u8" if i.parts[-1] == "b64" else "u4"
    values = [reader(o, kind) for o in getattr(stored, "elements", (stored,))]

    def run(warp, mask):
        words = np.stack([read(warp) for read in values], 1).astype(kind)
        lanes_on = np.flatnonzero(mask)
        targets = [shared_view(warp, int(to(warp)[lane]), words[0].nbytes) for lane in lanes_on]
        barriers = signal(warp).copy()
        for target in targets:
            target[:] = GARBAGE_BYTE

        def finish():
            for target, lane in zip(targets, lanes_on, strict=True):
                target[:] = words[lane].view(np.uint8)
                barrier_at(warp, int(barriers[lane])).complete(len(target))

        warp.block.cluster.copy_later(finish)

    return run


@_instruction("setmaxnreg", "wgmma.fence")
def _nothing(i):
    return lambda warp, mask: None


def _a_operand(
    registers: list[np.ndarray], e4m3: bool, kind: object = ml_dtypes.bfloat16
) -> np.ndarray:
    """A warp's 16 rows; four registers, of rows g, g + 8, g, g + 8."""
    per_register = 4 if e4m3 else 2
    a = np.zeros((16, 8 * per_register))
    for number, words in enumerate(registers):
        if e4m3:
            codes = np.ascontiguousarray(words).view(np.uint8).view(ml_dtypes.float8_e4m3fn)
            values = codes.reshape(WARP, 4).astype("f8")
        else:
            values = _halves(words, kind)
        for j in range(per_register):
            column = per_register * _THREAD + j + number // 2 * 4 * per_register
            a[_GROUP + number % 2 * 8, column] = values[:, j]
    return a


@_instruction(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
)
def _warp_product(i):
    kind = np.float16 if "f16" in i.parts else ml_dtypes.bfloat16
    d, a, b, c = (o.elements for o in i.operands)
    read_a, read_b = ([reader(o, "u4") for o in operand] for operand in (a, b))
    read_c, write = [reader(o, "f4") for o in c], [writer(o, "f4") for o in d]

    def run(warp, mask):
        right = np.zeros((16, 8))
        for half, read in enumerate(read_b):
            for j in range(2):
                right[2 * _THREAD + j + 8 * half, _GROUP] = _halves(read(warp), kind)[:, j]
        product = _a_operand([read(warp) for read in read_a], False, kind) @ right
        for j in range(4):
            value = product[_GROUP + j // 2 * 8, 2 * _THREAD + j % 2] + read_c[j](warp)
            write[j](warp, mask, value.astype("f4"))

    return run


def _b_operand(warp, descriptor: int, rows: int) -> np.ndarray:
    """[rows, 32] bytes of a K-major operand in shared memory, swizzled over 128 bytes."""
    if descriptor >> 62 != _SWIZZLE_128B:
        raise NotImplementedError(f"descriptor {descriptor:#x}: another swizzle than 128 bytes")
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    operand = np.zeros((rows, 32), np.uint8)
    for row in range(rows):
        for part in (0, 16):
            address = start + row // 8 * stride + row % 8 * 128 + part
            address ^= (address >> 7 & 7) << 4
            address |= warp.block.rank << RANK_SHIFT
            operand[row, part : part + 16] = shared_view(warp, address, 16)
    return operand


class _Products:
    """The products of a warp that are under way."""

    def __init__(self):
        self.open: list[Callable] = []
        self.groups: list[list[Callable]] = []


def _products(warp) -> _Products:
    if not hasattr(warp, "warpgroup_products"):
        warp.warpgroup_products = _Products()
    return warp.warpgroup_products


@_instruction("wgmma.mma_async.sync.aligned")
def _warpgroup_product(i):
    rows = int(next(part for part in i.parts if part.startswith("m64"))[4:].split("k")[0])
    e4m3 = "e4m3" in i.parts
    accumulators, registers = i.operands[0].elements, i.operands[1].elements
    read_acc = [reader(o, "f4") for o in accumulators]
    write = [writer(o, "f4") for o in accumulators]
    read_a = [reader(o, "u4") for o in registers]
    descriptor, accumulate = reader(i.operands[2], "u8"), reader(i.operands[3], "pred")

    def run(warp, mask):
        where, adds = int(descriptor(warp)[0]), bool(accumulate(warp)[0])

        def finish():
            kind = ml_dtypes.float8_e4m3fn if e4m3 else ml_dtypes.bfloat16
            right = _b_operand(warp, where, rows).view(kind).astype("f8")
            product = _a_operand([read(warp) for read in read_a], e4m3) @ right.T
            for j in range(len(write)):
                value = product[_GROUP + j // 2 % 2 * 8, j // 4 * 8 + 2 * _THREAD + j % 2]
                if adds:
                    value = value + read_acc[j](warp)
                write[j](warp, mask, value.astype("f4"))

        _products(warp).open.append(finish)

    return run


@_instruction("wgmma.commit_group")
def _commit(i):
    def run(warp, mask):
        products = _products(warp)
        products.groups.append(products.open)
        products.open = []

    return run


@_instruction("wgmma.wait_group")
def _wait(i):
    pending = reader(i.operands[0], "u4")

    def run(warp, mask):
        groups = _products(warp).groups
        while len(groups) > pending(warp)[0]:
            for finish in groups.pop(0):
                finish()

    return run
