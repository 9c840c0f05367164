"""Tensor memory and block-scaled products of the emulator, by descriptors written out here."""

import numpy as np
import pytest

from tests.oracles import formats
from tests.ptx.snippets import run

SHARED = """
.shared .align 8 .b64 barrier;
.shared .align 4 .b32 address;
"""
N = 32
# Shared memory: 128 rows of A and N rows of B in the 128-byte swizzle, two blocks of scales.
A_BYTES, B_BYTES = 128 * 128, N * 128
INSTRUCTION = 1 << 7 | 1 << 10 | (N // 8) << 17 | (128 // 16) << 24

# Warp 0 fills shared memory with pointer_1's bytes, allocates, computes; all four warps read.
PROLOGUE = f"""
    mov.u32 %r0, %tid.x;
    mov.u32 %r20, barrier;
    mov.u32 %r21, dynamic;
    add.u32 %r21, %r21, 1023;
    and.b32 %r21, %r21, -1024;
    mov.u32 %r22, address;
    ld.param.u64 %d0, [pointer_0];
    ld.param.u64 %d1, [pointer_1];
    shr.u32 %r30, %r0, 5;
    setp.ne.u32 %p1, %r30, 0;
    @%p1 bra ready;
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r22], 64;
    elect.sync _|%p2, -1;
    @!%p2 bra ready;
    mbarrier.init.shared::cta.b64 [%r20], 1;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], {A_BYTES + B_BYTES + 1024};
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
        [%r21], [%d1], {A_BYTES + B_BYTES + 1024}, [%r20];
    ready:
    bar.warp.sync -1;
    tcgen05.fence::before_thread_sync;
    bar.sync 0;
    wait_copy:
    mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r20], 0;
    @!%p3 bra wait_copy;
    tcgen05.fence::after_thread_sync;
    ld.shared.u32 %r23, [%r22];
    add.u32 %r24, %r23, {N};
    add.u32 %r25, %r23, {N + 4};
    @%p1 bra computed;
    elect.sync _|%p2, -1;
    @!%p2 bra computed;
    shr.u32 %r26, %r21, 4;
    cvt.u64.u32 %d2, %r26;
    add.u64 %d3, %d2, {A_BYTES // 16};
    add.u64 %d4, %d2, {(A_BYTES + B_BYTES) // 16};
    add.u64 %d5, %d4, 32;
    or.b64 %d2, %d2, {1 << 16 | 64 << 32 | 1 << 46 | 2 << 61};
    or.b64 %d3, %d3, {1 << 16 | 64 << 32 | 1 << 46 | 2 << 61};
    or.b64 %d4, %d4, {1 << 16 | 8 << 32 | 1 << 46};
    or.b64 %d5, %d5, {1 << 16 | 8 << 32 | 1 << 46};
"""
COPY_SCALES = """
    tcgen05.cp.cta_group::1.32x128b.warpx4 [%r24], %d4;
    tcgen05.cp.cta_group::1.32x128b.warpx4 [%r25], %d5;
"""
MULTIPLY = """
    mov.u32 %r27, {instruction};
    mov.pred %p4, {accumulate};
    tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16
        [%r23], %d2, %d3, %r27, [%r24], [%r25], %p4;
"""
COMMIT = "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r20];\n"
EPILOGUE = f"""
    computed:
    bar.warp.sync -1;
    {{wait}}
    tcgen05.fence::after_thread_sync;
    shl.b32 %r31, %r30, {{lane_shift}};
    add.u32 %r32, %r23, %r31;
    tcgen05.ld.sync.aligned.32x32b.x{N}.b32 {{registers}}, [%r32];
    {{wait_load}}
    mad.wide.u32 %d10, %r0, {4 * N}, %d0;
    {{stores}}
    tcgen05.fence::before_thread_sync;
    bar.sync 0;
    tcgen05.fence::after_thread_sync;
    {{free}}
"""
WAIT_PRODUCT = """
    wait_product:
    mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r20], 1;
    @!%p3 bra wait_product;
"""
FREE = """
    @%p1 bra freed;
    tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r23, 64;
    freed:
"""
REGISTERS = ".reg .b32 %v<32>;\n"


def snippet(
    compute: str,
    wait: str = WAIT_PRODUCT,
    lane_shift: int = 21,
    wait_load: str = "tcgen05.wait::ld.sync.aligned;",
    free: str = FREE,
) -> str:
    registers = "{" + ", ".join(f"%v{i}" for i in range(N)) + "}"
    stores = "\n".join(f"st.global.u32 [%d10+{4 * i}], %v{i};" for i in range(N))
    epilogue = EPILOGUE.format(
        wait=wait,
        lane_shift=lane_shift,
        registers=registers,
        wait_load=wait_load,
        stores=stores,
        free=free,
    )
    return REGISTERS + PROLOGUE + compute + epilogue


def operands(seed=0):
    """(bytes of shared memory, values of A [128, 64], values of B [N, 64])."""
    rng = np.random.default_rng(seed)
    parts, values, scale_blocks = [], [], []
    for rows in (128, N):
        codes = rng.integers(0, 16, (rows, 64), np.uint8)
        scales = rng.integers(0, 127, (rows, 4), np.uint8)
        swizzled = np.zeros((rows, 128), np.uint8)
        for row in range(rows):
            for unit in range(2):
                place = (unit ^ row % 8) * 16
                packed = formats.packed(codes[row, unit * 32 : unit * 32 + 32])
                swizzled[row, place : place + 16] = packed
        block = np.full(512, 0x7F, np.uint8)
        for row in range(rows):
            start = row % 32 * 16 + row // 32 * 4
            block[start : start + 4] = scales[row]
        parts.append(swizzled.reshape(-1))
        scale_blocks.append(block)
        values.append(formats.E2M1[codes] * np.repeat(formats.E4M3[scales], 16, 1))
    return np.concatenate(parts + scale_blocks), *values


def multiply(body, seed=0, data=None):
    out = np.zeros((128, N), np.float32)
    data = operands()[0] if data is None else data
    options = {"threads": 128, "dynamic_shared_bytes": 1024 + len(data), "seed": seed}
    run(body, out, data, shared=SHARED, **options)
    return out


PRODUCT = MULTIPLY.format(instruction=INSTRUCTION, accumulate=0)


def test_product():
    data, a, b = operands()
    for seed in range(4):
        out = multiply(snippet(COPY_SCALES + PRODUCT + COMMIT), seed, data)
        np.testing.assert_array_equal(out, (a @ b.T).astype(np.float32))


def test_products_accumulate():
    data, a, b = operands()
    again = MULTIPLY.format(instruction=INSTRUCTION, accumulate=1)
    out = multiply(snippet(COPY_SCALES + PRODUCT + again + COMMIT), data=data)
    once = (a @ b.T).astype(np.float32)
    np.testing.assert_array_equal(out, (once + a @ b.T).astype(np.float32))


def swizzled_rows(data):
    """[rows, 32] bytes as the first of 128, in the 128-byte swizzle."""
    rows = np.zeros((len(data), 128), np.uint8)
    for row, units in enumerate(data.reshape(-1, 2, 16)):
        for unit in range(2):
            place = (unit ^ row % 8) * 16
            rows[row, place : place + 16] = units[unit]
    return rows.reshape(-1)


@pytest.mark.parametrize("scale_of_a", range(4))
def test_products_of_codes_take_one_scale_of_four(scale_of_a):
    rng = np.random.default_rng(scale_of_a)
    scale_of_b = (scale_of_a + 1) % 4
    parts, blocks, values = [], [], []
    for rows, chosen in ((128, scale_of_a), (N, scale_of_b)):
        codes = rng.integers(0, 0x7F, (rows, 32), np.uint8) | rng.choice([0, 0x80], (rows, 32))
        scales = rng.integers(117, 137, (rows, 4), np.uint8)
        block = np.full(512, 0xFF, np.uint8)
        for row in range(rows):
            start = row % 32 * 16 + row // 32 * 4
            block[start : start + 4] = scales[row]
        parts.append(swizzled_rows(codes.astype(np.uint8)))
        blocks.append(block)
        values.append(formats.E4M3[codes] * formats.E8M0[scales[:, chosen]][:, None])
    instruction = (N // 8) << 17 | 1 << 23 | (128 // 16) << 24 | scale_of_a << 29 | scale_of_b << 4
    product = MULTIPLY.format(instruction=instruction, accumulate=0)
    product = product.replace("mxf4nvf4.block_scale.block16", "mxf8f6f4.block_scale.block32")
    out = multiply(snippet(COPY_SCALES + product + COMMIT), data=np.concatenate(parts + blocks))
    np.testing.assert_array_equal(out, (values[0] @ values[1].T).astype(np.float32))


def test_products_of_bfloat16():
    rng = np.random.default_rng(0)
    bits = [rng.standard_normal((rows, 16)).astype(np.float32).view(np.uint32) >> 16
            for rows in (128, N)]  # fmt: skip
    a, b = ((half << 16).astype(np.uint32).view(np.float32).astype(np.float64) for half in bits)
    parts = [swizzled_rows(half.astype(np.uint16).view(np.uint8)) for half in bits]
    instruction = 1 << 4 | 1 << 7 | 1 << 10 | (N // 8) << 17 | (128 // 16) << 24
    product = MULTIPLY.format(instruction=instruction, accumulate=0)
    product = product.replace("mxf4nvf4.block_scale.block16", "f16")
    product = product.replace("%r27, [%r24], [%r25],", "%r27,")
    out = multiply(
        snippet(product + COMMIT), data=np.concatenate([*parts, np.zeros(1024, np.uint8)])
    )
    np.testing.assert_array_equal(out, (a @ b.T).astype(np.float32))


@pytest.mark.parametrize(
    ("kind", "instruction"),
    [("mxf8f6f4.block_scale.block32", 0), ("mxf8f6f4.block_scale.block32", 5 << 7 | 1 << 23),
     ("f16", 1 << 7 | 1 << 10), ("f16", 1 << 4)],
    ids=["scales not E8M0", "other codes", "sums in float16", "operands in float16"],
)  # fmt: skip
def test_other_formats_are_refused(kind, instruction):
    body = COPY_SCALES + MULTIPLY.format(instruction=instruction, accumulate=0) + COMMIT
    body = body.replace("mxf4nvf4.block_scale.block16", kind)
    if kind == "f16":
        body = body.replace("%r27, [%r24], [%r25],", "%r27,")
    with pytest.raises(NotImplementedError, match="descriptor"):
        multiply(snippet(body))


def test_order_of_issue_is_the_order_of_execution():
    body = snippet(PRODUCT + COPY_SCALES + COMMIT)
    assert all(np.isnan(multiply(body, seed)).all() for seed in range(4))


@pytest.mark.parametrize(
    "body",
    [
        snippet(COPY_SCALES + PRODUCT + COMMIT, wait=""),
        snippet(COPY_SCALES + PRODUCT + COMMIT, wait_load=""),
        snippet(COPY_SCALES.replace("[%r24]", "[%r25]") + PRODUCT + COMMIT),
        snippet(
            COPY_SCALES
            + MULTIPLY.format(instruction=INSTRUCTION, accumulate=1)
            + COMMIT
        ),
    ],
    ids=["no wait", "no wait for the load", "no scales of A", "added to garbage"],
)  # fmt: skip
def test_mistakes_leave_garbage(body):
    seen = []
    for seed in range(6):
        try:
            seen.append(np.isnan(multiply(body, seed)).any())
        except RuntimeError as error:
            seen.append("asynchronous" in str(error))
    assert any(seen)


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (snippet(COPY_SCALES + PRODUCT), Exception, "wait_product|try_wait|bra"),
        (snippet(COPY_SCALES + PRODUCT + COMMIT, lane_shift=20), RuntimeError, "warp's own"),
        (snippet(COPY_SCALES + PRODUCT + COMMIT, free=""), RuntimeError, "without freeing"),
        (
            snippet(COPY_SCALES.replace("[%r24]", "[%r24+64]") + PRODUCT + COMMIT),
            RuntimeError,
            "not allocated",
        ),
        (
            snippet(COPY_SCALES + MULTIPLY.format(instruction=0, accumulate=0) + COMMIT),
            NotImplementedError,
            "descriptor",
        ),
        (snippet("or.b64 %d4, %d4, 0x800000000000;\n" + COPY_SCALES + COMMIT), RuntimeError, "46"),
        (
            snippet(COPY_SCALES + PRODUCT + COMMIT).replace(
                "tcgen05.fence::before_thread_sync;\n    bar.sync 0;\n    tcgen05",
                "bar.sync 0;\n    tcgen05",
            ),
            RuntimeError,
            "before_thread_sync is missing",
        ),
        (
            snippet(COPY_SCALES + PRODUCT + COMMIT).replace(
                "tcgen05.fence::after_thread_sync;\n    shl", "shl"
            ),
            RuntimeError,
            "after_thread_sync is missing",
        ),
        (
            snippet(COPY_SCALES + PRODUCT + COMMIT).replace(".b32 [%r22], 64;", ".b32 [%r22], 48;"),
            RuntimeError,
            "power of two",
        ),
    ],
    ids=[
        "no commit", "other lanes", "not freed", "not allocated", "formats", "version",
        "no fence before", "no fence after", "allocation",
    ],
)  # fmt: skip
def test_refused(body, error, message):
    with pytest.raises(error, match=message):
        multiply(body)


def test_products_are_issued_by_one_thread():
    body = snippet(COPY_SCALES + PRODUCT + COMMIT)
    second = "    elect.sync _|%p2, -1;\n    @!%p2 bra computed;\n"
    assert second in body
    with pytest.raises(RuntimeError, match="issued by 32 threads"):
        multiply(body.replace(second, ""))
