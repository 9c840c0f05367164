"""What the attention kernels need beyond `hopper`: both operands of a warpgroup's product in shared
memory, one of them with its columns along the rows, plain asynchronous copies, and matrices from
shared memory into a warp's registers.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import ml_dtypes
import numpy as np

from tests.ptx import hopper
from tests.ptx.emulator import lanes
from tests.ptx.emulator.lanes import address_reader, address_reader_32, reader, writer
from tests.ptx.emulator.memory import RANK_SHIFT, shared_view
from tests.ptx.emulator.tma import GARBAGE_BYTE
from tests.ptx.hopper import _GROUP, _THREAD, _a_operand, _b_operand, _products


@contextlib.contextmanager
def instructions() -> Iterator[None]:
    builders = {
        "wgmma.mma_async.sync.aligned": _product,
        "cp.async.cg.shared.global": _copy,
        "cp.async.wait_all": _land,
        "ldmatrix.sync.aligned.m8n8.x4": _load_matrices,
        "cp.async.bulk.prefetch.L2.global": _nothing,
        "griddepcontrol.launch_dependents": _nothing,
        "griddepcontrol.wait": _nothing,
        "cvt.rni.f64.f64": lambda i: _integral(i, np.rint, "f8"),
        "cvt.rni.f32.f32": lambda i: _integral(i, np.rint, "f4"),
        "cvt.rzi.f32.f32": lambda i: _integral(i, np.trunc, "f4"),
    }
    with hopper.instructions(), mock.patch.dict(lanes._BUILDERS, builders):
        yield


def _nothing(i):
    return lambda warp, mask: None


def _integral(i, rounded, kind: str):
    read, write = reader(i.operands[1], kind), writer(i.operands[0], kind)
    return lambda warp, mask: write(warp, mask, rounded(read(warp)).astype(kind))


def _copy(i):
    to, source = address_reader_32(i.operands[0]), address_reader(i.operands[1])

    def run(warp, mask):
        for lane in np.flatnonzero(mask):
            target, address = shared_view(warp, int(to(warp)[lane]), 16), int(source(warp)[lane])
            target[:] = GARBAGE_BYTE
            warp.__dict__.setdefault("copies", []).append((target, address))

    return run


def _land(i):
    def run(warp, mask):
        for target, address in warp.__dict__.pop("copies", []):
            target[:] = warp.memory.view(address, 16)

    return run


def _load_matrices(i):
    transposed = "trans" in i.parts
    rows = address_reader_32(i.operands[1])
    write = [writer(o, "u4") for o in i.operands[0].elements]

    def run(warp, mask):
        addresses = rows(warp).copy()
        for number, write_words in enumerate(write):
            at = [int(address) for address in addresses[8 * number : 8 * number + 8]]
            if any(address % 16 for address in at):
                raise RuntimeError(f"{i.text}: a row that is not at a multiple of 16")
            matrix = np.stack([shared_view(warp, address, 16).copy() for address in at])
            matrix = matrix.view("u2").T if transposed else matrix.view("u2")
            low, high = (matrix[_GROUP, 2 * _THREAD + j].astype("u4") for j in range(2))
            write_words(warp, mask, low | high << 16)

    return run


def _bfloat16(operand: np.ndarray) -> np.ndarray:
    return operand.view(ml_dtypes.bfloat16).astype("f8")


def _columns(warp, descriptor: int, columns: int) -> np.ndarray:
    """[16, columns] of panels of 64 columns, rows of 128 bytes swizzled over 128 bytes."""
    start, panel, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    operand = np.zeros((16, 2 * columns), np.uint8)
    for row in range(16):
        for part in range(columns // 8):
            address = start + row // 8 * stride + row % 8 * 128 + part // 8 * panel + part % 8 * 16
            address ^= (address >> 7 & 7) << 4
            address |= warp.block.rank << RANK_SHIFT
            operand[row, 16 * part : 16 * part + 16] = shared_view(warp, address, 16)
    return _bfloat16(operand)


def _product(i):
    columns = int(next(part for part in i.parts if part.startswith("m64"))[4:].split("k")[0])
    accumulators = i.operands[0].elements
    read_acc = [reader(o, "f4") for o in accumulators]
    write = [writer(o, "f4") for o in accumulators]
    registers = getattr(i.operands[1], "elements", None)
    read_a = [reader(o, "u4" if registers else "u8") for o in registers or [i.operands[1]]]
    descriptor, accumulate = reader(i.operands[2], "u8"), reader(i.operands[3], "pred")
    transposed = reader(i.operands[-1], "u4")
    a_transposed = None if registers else reader(i.operands[-2], "u4")

    def run(warp, mask):
        where, adds = int(descriptor(warp)[0]), bool(accumulate(warp)[0])
        left = None if registers else int(read_a[0](warp)[0])

        def finish():
            if registers:
                a = _a_operand([read(warp) for read in read_a], e4m3=False)
            else:
                first = warp.index % 4 * 16
                if a_transposed(warp)[0]:
                    rows = _columns(warp, left, 64).T
                else:
                    rows = _bfloat16(_b_operand(warp, left, 64))
                a = rows[first : first + 16]
            if transposed(warp)[0]:
                b = _columns(warp, where, columns)
            else:
                b = _bfloat16(_b_operand(warp, where, columns)).T
            product = a @ b
            for j in range(len(write)):
                value = product[_GROUP + j // 2 % 2 * 8, j // 4 * 8 + 2 * _THREAD + j % 2]
                if adds:
                    value = value + read_acc[j](warp)
                write[j](warp, mask, value.astype("f4"))

        _products(warp).open.append(finish)

    return run
