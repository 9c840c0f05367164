"""Bulk copies: boxes, swizzles, what lies outside, and that nothing is there before its time."""

import numpy as np
import pytest

from tests.ptx.emulator import GlobalMemory, MemoryFault, TensorMap, launch, parse
from tests.ptx.snippets import kernel_text, run

SHARED = ".shared .align 8 .b64 barrier;"

# One thread copies a box and waits; then all copy shared memory out, 32 * 4 bytes a round.
LOAD = """
    mov.u32 %r0, %tid.x;
    mov.u32 %r20, barrier;
    mov.u32 %r21, dynamic;
    add.u32 %r21, %r21, 1023;
    and.b32 %r21, %r21, -1024;
    ld.param.u64 %d9, [pointer_1];
    setp.ne.u32 %p1, %r0, 0;
    @%p1 bra wait;
    mbarrier.init.shared::cta.b64 [%r20], 1;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], {expected};
    {copy}
    wait:
    bar.warp.sync -1;
    {wait}
    ld.param.u64 %d0, [pointer_0];
    mov.u32 %r1, 0;
    next:
    mad.lo.u32 %r2, %r0, 4, %r21;
    add.u32 %r2, %r2, %r1;
    ld.shared.u32 %r3, [%r2];
    mad.wide.u32 %d1, %r0, 4, %d0;
    cvt.u64.u32 %d2, %r1;
    add.u64 %d1, %d1, %d2;
    st.global.u32 [%d1], %r3;
    add.u32 %r1, %r1, 128;
    setp.lt.u32 %p2, %r1, {bytes};
    @%p2 bra next;
"""
WAIT = """
    again:
    mbarrier.try_wait.parity.shared::cta.b64 %p7, [%r20], 0;
    @!%p7 bra again;
"""
BOX = (
    "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
    " [%r21], [%d9, {{{x}, {y}}}], [%r20];"
)


def load_box(matrix, box, corner, swizzle="none", wait=WAIT, late_wait="", seed=0):
    """The bytes of shared memory after the copy of a box (columns, rows) at (column, row)."""
    memory = GlobalMemory()
    rows, columns = matrix.shape
    tensor = TensorMap(memory.place(matrix), (columns, rows), (columns,), box, swizzle=swizzle)
    encoded = np.frombuffer(tensor.encode(), np.uint8)
    out = np.zeros(tensor.box_bytes, np.uint8)
    body = LOAD.format(
        copy=BOX.format(x=corner[0], y=corner[1]),
        expected=tensor.box_bytes,
        wait=wait,
        bytes=tensor.box_bytes,
    )
    launch(
        parse(kernel_text(body + late_wait, 2, SHARED), "snippet"),
        grid=(1,),
        block=32,
        arguments=[memory.place(a).to_bytes(8, "little") for a in (out, encoded)],
        memory=memory,
        dynamic_shared_bytes=1024 + tensor.box_bytes,
        seed=seed,
    )
    return out.reshape(box[::-1])


MATRIX = np.random.default_rng(0).integers(0, 255, (40, 320), np.uint8)


@pytest.mark.parametrize(
    ("corner", "columns", "rows"),
    [
        ((0, 0), slice(0, 128), slice(0, 8)),
        ((48, 5), slice(0, 128), slice(0, 8)),
        ((256, 36), slice(0, 64), slice(0, 4)),
        ((-16, -3), slice(16, 128), slice(3, 8)),
        ((400, 0), slice(0, 0), slice(0, 0)),
    ],
)
def test_box_is_zero_outside_of_the_tensor(corner, columns, rows):
    expected = np.zeros((8, 128), np.uint8)
    x, y = corner
    expected[rows, columns] = MATRIX[
        y + rows.start : y + rows.stop, x + columns.start : x + columns.stop
    ]
    np.testing.assert_array_equal(load_box(MATRIX, (128, 8), corner), expected)


@pytest.mark.parametrize(("swizzle", "row_bytes"), [("32B", 32), ("64B", 64), ("128B", 128)])
def test_swizzle(swizzle, row_bytes):
    got = load_box(MATRIX, (row_bytes, 16), (0, 0), swizzle).reshape(-1)
    expected = np.zeros_like(got)
    for row in range(16):
        for unit in range(row_bytes // 16):
            place = row * row_bytes + unit * 16
            # Within 128-byte lines the unit's number changes with the line's, modulo the period.
            place ^= (place // 128 % (row_bytes // 16)) * 16
            expected[place : place + 16] = MATRIX[row, unit * 16 : unit * 16 + 16]
    np.testing.assert_array_equal(got, expected)


def test_without_waiting_there_is_garbage():
    waits = {"wait": "", "late_wait": WAIT}
    seen = [load_box(MATRIX, (128, 8), (0, 0), **waits, seed=seed) for seed in range(4)]
    assert any((box == 0xFF).all() for box in seen)


def test_threads_must_outlive_their_copies():
    with pytest.raises(RuntimeError, match="before their asynchronous operations"):
        for seed in range(8):
            load_box(MATRIX, (128, 8), (0, 0), wait="", seed=seed)


def test_box_signals_all_its_bytes_wherever_it_lies():
    load_box(MATRIX, (128, 8), (10000, 10000))


@pytest.mark.parametrize(
    ("box", "swizzle"), [((8, 8), "none"), ((128, 8), "64B"), ((128, 300), "128B")]
)
def test_box_that_no_tensor_map_describes(box, swizzle):
    with pytest.raises(ValueError, match="box"):
        TensorMap(1 << 40, (320, 40), (320,), box, swizzle=swizzle)


def test_misaligned_box():
    body = LOAD.format(
        copy="add.u32 %r21, %r21, 128;\n" + BOX.format(x=0, y=0), expected=1, wait="", bytes=4
    )
    memory = GlobalMemory()
    tensor = TensorMap(memory.place(MATRIX), (320, 40), (320,), (128, 8), swizzle="128B")
    encoded = np.frombuffer(tensor.encode(), np.uint8)
    with pytest.raises(RuntimeError, match="misaligned"):
        launch(
            parse(kernel_text(body, 2, SHARED), "snippet"),
            grid=(1,),
            block=32,
            arguments=[memory.place(encoded).to_bytes(8, "little")] * 2,
            memory=memory,
            dynamic_shared_bytes=8192,
        )


BULK = (
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    " [%r21], [%d9], {size}, [%r20];"
)


def load_bulk(source, size, offset=""):
    out = np.zeros(256, np.uint8)
    copy = offset + BULK.format(size=size)
    body = LOAD.format(copy=copy, expected=size, wait=WAIT, bytes=256)
    run(body, out, source, shared=SHARED, dynamic_shared_bytes=2048)
    return out


def test_bulk_copy():
    source = np.arange(256, dtype=np.uint8)
    expected = np.where(np.arange(256) < 208, source, 0xFF)
    np.testing.assert_array_equal(load_bulk(source, 208), expected)


@pytest.mark.parametrize(("size", "offset"), [(200, ""), (208, "add.u64 %d9, %d9, 8;\n")])
def test_bulk_copy_of_odd_size_or_place(size, offset):
    with pytest.raises(RuntimeError, match="multiples of 16"):
        load_bulk(np.zeros(256, np.uint8), size, offset=offset)


def test_bulk_copy_beyond_the_array():
    with pytest.raises(MemoryFault, match="past the end"):
        load_bulk(np.zeros(192, np.uint8), 208)
