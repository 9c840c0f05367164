"""Branches, barriers, shuffles, memory and transaction barriers of the emulator."""

import numpy as np
import pytest

from tests.ptx.emulator import Deadlock, MemoryFault, parse
from tests.ptx.snippets import kernel_text, places, run

LANES = np.arange(32)


def test_lanes_that_branch_apart_meet_again():
    out = np.zeros(32, np.uint32)
    # Each lane counts to its own number; the shuffle afterwards needs all of them.
    body = (
        places(4)
        + """
        mov.u32 %r1, 0;
        loop:
        setp.ge.u32 %p1, %r1, %r0;
        @%p1 bra done;
        add.u32 %r1, %r1, 1;
        bra loop;
        done:
        shfl.sync.idx.b32 %r2, %r1, 31, 31, -1;
        mad.lo.u32 %r3, %r2, 100, %r1;
        st.global.u32 [%d0], %r3;
    """
    )
    run(body, out)
    np.testing.assert_array_equal(out, 3100 + LANES)


def test_lanes_end_apart():
    out = np.zeros(32, np.uint32)
    body = (
        places(4)
        + """
        setp.lt.u32 %p1, %r0, 9;
        @%p1 bra more;
        ret;
        more:
        st.global.u32 [%d0], 1;
    """
    )
    run(body, out)
    np.testing.assert_array_equal(out, LANES < 9)


@pytest.mark.parametrize(
    ("mode", "by", "clamp", "expected"),
    [
        ("up", 3, 0, np.maximum(LANES - 3, LANES % 3 * 0 + np.where(LANES < 3, LANES, 0))),
        ("down", 5, 31, np.where(LANES + 5 < 32, LANES + 5, LANES)),
        ("bfly", 7, 31, LANES ^ 7),
        ("idx", 12, 31, np.full(32, 12)),
        ("idx", 2, 31 | 24 << 8, LANES // 8 * 8 + 2),
    ],
)
def test_shuffle(mode, by, clamp, expected):
    out = np.zeros(32, np.uint32)
    body = (
        places(4)
        + f"""
        shfl.sync.{mode}.b32 %r1|%p1, %r0, {by}, {clamp}, -1;
        st.global.u32 [%d0], %r1;
    """
    )
    run(body, out)
    np.testing.assert_array_equal(out, expected)


def test_vote_and_election():
    out = np.zeros(32, np.uint32)
    body = (
        places(4)
        + """
        setp.eq.u32 %p1, %r0, 4;
        vote.sync.ballot.b32 %r1, %p1, -1;
        vote.sync.any.pred %p2, %p1, -1;
        vote.sync.all.pred %p3, %p1, -1;
        selp.u32 %r2, 32, 0, %p2;
        selp.u32 %r3, 64, 0, %p3;
        elect.sync _|%p4, -1;
        selp.u32 %r4, 128, 0, %p4;
        or.b32 %r1, %r1, %r2;
        or.b32 %r1, %r1, %r3;
        or.b32 %r1, %r1, %r4;
        st.global.u32 [%d0], %r1;
    """
    )
    run(body, out)
    np.testing.assert_array_equal(out, np.where(LANES == 0, 16 + 32 + 128, 16 + 32))


REVERSE = (
    places(4)
    + """
    shl.b32 %r1, %r0, 2;
    mov.u32 %r2, buffer;
    add.u32 %r3, %r2, %r1;
    st.shared.u32 [%r3], %r0;
    {barrier}
    sub.u32 %r4, 508, %r1;
    add.u32 %r4, %r2, %r4;
    ld.shared.u32 %r5, [%r4];
    st.global.u32 [%d0], %r5;
"""
)
BUFFER = ".shared .align 4 .b8 buffer[512];"


def test_barrier_of_a_block():
    for seed in range(5):
        out = np.zeros(128, np.uint32)
        body = REVERSE.format(barrier="bar.sync 0;")
        run(body, out, shared=BUFFER, threads=128, seed=seed)
        np.testing.assert_array_equal(out, 127 - np.arange(128))


def test_missing_barrier_reads_garbage():
    out = np.zeros(128, np.uint32)
    run(REVERSE.format(barrier=""), out, shared=BUFFER, threads=128)
    assert (out == 0xFFFFFFFF).any()


NEIGHBOUR = (
    places(4)
    + """
    mov.u32 %r10, %cluster_ctarank;
    xor.b32 %r11, %r10, 1;
    mov.u32 %r2, buffer;
    mad.lo.u32 %r3, %r0, 4, %r2;
    mapa.shared::cluster.u32 %r4, %r3, %r11;
    {before}
    mad.lo.u32 %r5, %r10, 1000, %r0;
    st.shared::cluster.u32 [%r4], %r5;
    {after}
    ld.shared.u32 %r6, [%r3];
    mul.wide.u32 %d1, %r10, 128;
    add.u64 %d0, %d0, %d1;
    st.global.u32 [%d0], %r6;
"""
)


SYNC_CLUSTER = """
    barrier.cluster.arrive.release.aligned;
    barrier.cluster.wait.acquire.aligned;
"""


def test_cluster_writes_to_each_other():
    for seed in range(5):
        out = np.zeros((2, 32), np.uint32)
        run(
            NEIGHBOUR.format(before="", after=SYNC_CLUSTER),
            out,
            shared=BUFFER,
            cluster=2,
            seed=seed,
        )
        np.testing.assert_array_equal(out, [LANES + 1000, LANES])


def test_block_that_has_ended_cannot_be_written():
    leave = "setp.eq.u32 %p1, %r10, 0;\n@%p1 bra end;"
    body = NEIGHBOUR.format(before=leave, after="") + "end:"
    with pytest.raises(MemoryFault, match="ended"):
        for seed in range(8):
            run(body, np.zeros((2, 32), np.uint32), shared=BUFFER, cluster=2, seed=seed)


def test_vectors_in_memory():
    x = np.arange(128, dtype=np.float32)
    out = np.zeros(128, np.float32)
    body = (
        places(16, 2)
        + """
        ld.global.v4.f32 {%f0, %f1, %f2, %f3}, [%d1];
        st.global.v2.f32 [%d0], {%f1, %f0};
        st.global.v2.f32 [%d0+8], {%f3, %f2};
    """
    )
    run(body, out, x)
    np.testing.assert_array_equal(out.reshape(-1, 2), x.reshape(-1, 2)[:, ::-1])


def test_narrow_loads_extend():
    x = np.arange(120, 152, dtype=np.uint8)
    out = np.zeros((2, 32), np.uint32)
    body = """
        mov.u32 %r0, %tid.x;
        ld.param.u64 %d0, [pointer_0];
        mad.wide.u32 %d0, %r0, 4, %d0;
        ld.param.u64 %d1, [pointer_1];
        cvt.u64.u32 %d2, %r0;
        add.u64 %d1, %d1, %d2;
        ld.global.u8 %r1, [%d1];
        ld.global.s8 %r2, [%d1];
        st.global.u32 [%d0], %r1;
        st.global.u32 [%d0+128], %r2;
    """
    run(body, out, x)
    np.testing.assert_array_equal(out, [x, x.view(np.int8).astype(np.uint32)])


def test_generic_addresses_reach_shared_memory():
    out = np.zeros(32, np.uint32)
    body = (
        places(4)
        + """
        mov.u64 %d1, buffer;
        cvta.shared.u64 %d2, %d1;
        mad.wide.u32 %d2, %r0, 4, %d2;
        st.u32 [%d2], %r0;
        cvta.to.shared.u64 %d3, %d2;
        cvt.u32.u64 %r1, %d3;
        ld.shared.u32 %r2, [%r1];
        st.global.u32 [%d0], %r2;
    """
    )
    run(body, out, shared=BUFFER)
    np.testing.assert_array_equal(out, LANES)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("st.global.u32 [%d0+128], %r0;", "past|outside|offset"),
        ("st.global.u32 [%d0+2], %r0;", "misaligned"),
        ("mov.u32 %r1, 8192;\nst.shared.u32 [%r1], %r0;", "offset"),
        ("mov.u32 %r1, 0x1000400;\nst.shared.u32 [%r1], %r0;", "cluster has 1"),
        ("mov.u64 %d1, 64;\nld.global.u32 %r1, [%d1];", "outside"),
    ],
)
def test_access_outside_of_memory(body, message):
    with pytest.raises(MemoryFault, match=message):
        run(places(4) + body, np.zeros(32, np.uint32), shared=BUFFER)


BARRIER = ".shared .align 8 .b64 barrier;\n" + BUFFER
WAIT = """
    wait_{name}:
    mbarrier.try_wait.parity.shared::cta.b64 %p7, [%r20], {parity};
    @%p7 bra done_{name};
    bra wait_{name};
    done_{name}:
"""
INIT = """
    mov.u32 %r20, barrier;
    setp.ne.u32 %p1, %r0, 0;
    @%p1 bra initialised;
    mbarrier.init.shared::cta.b64 [%r20], {count};
    initialised:
    bar.sync 0;
"""


def test_waiting_for_the_end_of_a_phase():
    out = np.zeros(64, np.uint32)
    body = (
        places(4)
        + INIT.format(count=32)
        + """
        setp.ge.u32 %p2, %r0, 32;
        @%p2 bra reader;
        st.global.u32 [%d0+128], 5;
        mbarrier.arrive.shared::cta.b64 _, [%r20];
        bra end;
        reader:
    """
        + WAIT.format(name="first", parity=0)
        + """
        ld.global.u32 %r1, [%d0];
        st.global.u32 [%d0+-128], %r1;
        end:
    """
    )
    for seed in range(5):
        out[:] = 0
        run(body, out, shared=BARRIER, threads=64, seed=seed)
        np.testing.assert_array_equal(out, 5)


def test_previous_phase_of_a_new_barrier_has_ended():
    body = places(4) + INIT.format(count=1) + WAIT.format(name="w", parity=1)
    run(body, np.zeros(32, np.uint32), shared=BARRIER)


def test_deadlock_names_the_place():
    body = places(4) + INIT.format(count=1) + WAIT.format(name="w", parity=0)
    with pytest.raises(Deadlock, match=r"warp 0: .*(try_wait|bra)"):
        run(body, np.zeros(32, np.uint32), shared=BARRIER)


def test_expected_bytes_that_never_come():
    body = (
        places(4)
        + INIT.format(count=32)
        + """
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], 16;
    """
        + WAIT.format(name="w", parity=0)
    )
    with pytest.raises(Deadlock):
        run(body, np.zeros(32, np.uint32), shared=BARRIER)


def test_too_many_arrivals():
    body = (
        places(4)
        + INIT.format(count=30)
        + """
        mbarrier.arrive.shared::cta.b64 _, [%r20], 20;
        mbarrier.arrive.shared::cta.b64 _, [%r20], 20;
    """
    )
    with pytest.raises(RuntimeError, match="more arrivals"):
        run(body, np.zeros(32, np.uint32), shared=BARRIER, threads=32)


def test_barrier_that_was_not_initialised():
    body = "mov.u32 %r20, barrier;\nmbarrier.arrive.shared::cta.b64 _, [%r20];"
    with pytest.raises(RuntimeError, match="no barrier"):
        run(body, shared=BARRIER)


def test_registers_and_labels_of_inner_scopes_are_their_own():
    out = np.zeros(32, np.uint32)
    body = (
        places(4)
        + """
        mov.u32 %r1, 1;
        { .reg .b32 %r1; mov.u32 %r1, 5; bra end; mov.u32 %r1, 9; end: add.u32 %r0, %r1, 0; }
        { .reg .b32 %r2; mov.u32 %r2, 7; bra end; mov.u32 %r2, 9; end: add.u32 %r0, %r0, %r2; }
        add.u32 %r0, %r0, %r1;
        st.global.u32 [%d0], %r0;
    """
    )
    run(body, out)
    np.testing.assert_array_equal(out, 13)


@pytest.mark.parametrize(
    ("body", "message"), [("bra nowhere;", "nowhere"), ("mov.u32 %q1, 1;", "%q1")]
)
def test_names_that_are_not_declared(body, message):
    with pytest.raises(ValueError, match=message):
        parse(kernel_text(body, 0), "snippet")


def test_kernel_is_found_by_a_part_of_its_name():
    assert parse(kernel_text("", 0), "snip").name == "snippet"
    with pytest.raises(ValueError, match="expected one"):
        parse(kernel_text("", 0), "other")
