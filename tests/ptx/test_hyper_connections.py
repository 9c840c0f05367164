"""The CUDA kernel of hyper-connections, as nvcc compiles it for sm_90, in the emulator."""

import functools
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import pytest

from tests.ptx import warp_instructions  # noqa: F401
from tests.ptx.emulator import GlobalMemory, lanes, launch, parse
from tests.ptx.emulator.lanes import WARP, address_reader, address_reader_32, reader, writer
from tests.ptx.emulator.mbarrier import barrier_at
from tests.ptx.emulator.memory import shared_view
from tests.ptx.emulator.tma import GARBAGE_BYTE
from tests.test_ops_hyper_connections import (
    EPS,
    NORM_EPS,
    ROUNDS,
    check_post,
    check_pre,
    random_gates,
    random_spread,
)

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="there is no nvcc to compile with"
)
SOURCES = Path(__file__).parents[2] / "ffi"
THREADS, MAX_SHARED_BYTES = 384, 227 << 10


def _send(i):
    """A store into another block's memory that completes bytes of a barrier there, some time."""
    to, signal = address_reader_32(i.operands[0]), address_reader_32(i.operands[2])
    values = [reader(o, "f4") for o in i.operands[1].elements]

    def run(warp, mask):
        data = np.stack([read(warp) for read in values], 1).view(np.uint8)
        for lane in np.flatnonzero(mask):
            target = shared_view(warp, int(to(warp)[lane]), 16)
            barrier = barrier_at(warp, int(signal(warp)[lane]))

            def finish(target=target, barrier=barrier, value=data[lane]):
                target[:] = value
                barrier.complete(16)

            target[:] = GARBAGE_BYTE
            warp.block.cluster.copy_later(finish)

    return run


def _groups(warp):
    """Of each lane its groups of copies, those under way in each; the last is not committed."""
    if not hasattr(warp, "copy_groups"):
        warp.copy_groups = [[set()] for _ in range(WARP)]
    return warp.copy_groups


def _copy(i):
    to, source = address_reader_32(i.operands[0]), address_reader(i.operands[1])
    count = reader(i.operands[3], "u4")

    def run(warp, mask):
        for lane in np.flatnonzero(mask):
            target = shared_view(warp, int(to(warp)[lane]), 16)
            value = np.zeros(16, np.uint8)
            if size := int(count(warp)[lane]):
                value[:size] = warp.memory.view(int(source(warp)[lane]), size)
            target[:] = GARBAGE_BYTE
            group, token = _groups(warp)[lane][-1], object()
            group.add(token)

            def finish(target=target, value=value, group=group, token=token):
                target[:] = value
                group.remove(token)

            warp.block.cluster.copy_later(finish)

    return run


def _commit(i):
    def run(warp, mask):
        for lane in np.flatnonzero(mask):
            _groups(warp)[lane].append(set())

    return run


def _wait_for_groups(i):
    pending = reader(i.operands[0], "u4")

    def run(warp, mask):
        latest = int(pending(warp)[0]) + 1
        if any(group for lane in np.flatnonzero(mask) for group in _groups(warp)[lane][:-latest]):
            raise lanes.Blocked

    return run


def _rsqrt(i):
    value, write = reader(i.operands[1], "f4"), writer(i.operands[0], "f4")
    return lambda warp, mask: write(warp, mask, 1 / np.sqrt(value(warp)))


def _multiply(i):
    """d = a b + c of a [16, 8], b [8, 8]; lane l has rows l / 4 and columns 2 (l % 4) onwards."""
    writers = [writer(o, "f4") for o in i.operands[0].elements]
    upper, lower = (reader(o, "u4") for o in i.operands[1].elements)
    right = reader(i.operands[2].elements[0], "u4")
    sums = [reader(o, "f4") for o in i.operands[3].elements]

    def matrix(words):
        halves = np.stack([words << np.uint32(16), words & np.uint32(0xFFFF0000)], 1).view("f4")
        return halves.reshape(8, 8).astype("f8")

    def run(warp, mask):
        b = matrix(right(warp)).T
        products = [matrix(upper(warp)) @ b, matrix(lower(warp)) @ b]
        for j, (read, write) in enumerate(zip(sums, writers, strict=True)):
            column = products[j // 2].reshape(8, 4, 2)[:, :, j % 2].reshape(WARP)
            write(warp, mask, (column + read(warp)).astype("f4"))

    return run


INSTRUCTIONS = {
    "mma.sync.aligned.m16n8k8": _multiply,
    "rsqrt": _rsqrt,
    "st.async": _send,
    "cp.async.cg.shared.global": _copy,
    "cp.async.commit_group": _commit,
    "cp.async.wait_group": _wait_for_groups,
    "setmaxnreg": lambda i: lambda warp, mask: None,
}


@functools.cache
def ptx():
    command = ["nvcc", "-std=c++17", "-O3", "-arch=compute_90a", "-ptx"]
    command += [SOURCES / "cuda" / "hyper_connections.cu", "-I", SOURCES / "include"]
    command += ["-isystem", jax.ffi.include_dir()]
    with tempfile.NamedTemporaryFile(suffix=".ptx") as output:
        subprocess.run([*command, "-o", output.name], check=True)
        return Path(output.name).read_text()


@functools.cache
def kernel(name):
    return parse(ptx(), name)


def run(num_tokens, width, clusters, spreads=True, seed=0):
    """(new streams or None, x, post, comb) and the inputs."""
    spread, gates = random_spread(num_tokens, width), random_gates(width)
    results = (
        np.full((num_tokens, 4, width), np.nan, ml_dtypes.bfloat16),
        np.full((num_tokens, width), np.nan, ml_dtypes.bfloat16),
        np.full((num_tokens, 4), np.nan, np.float32),
        np.full((num_tokens, 4, 4), np.nan, np.float32),
    )
    memory = GlobalMemory()
    pointers = [memory.place(a) for a in (*spread, *gates)]
    problem = struct.pack(
        "@PPPPPPPPiiiiffPPPP",
        *pointers,
        *(num_tokens, width, (width // 256).bit_length() - 1, ROUNDS, EPS, NORM_EPS),
        *(memory.place(a) for a in results),
    )
    ranks = width // 256
    with mock.patch.dict(lanes._BUILDERS, INSTRUCTIONS):
        launch(
            kernel(f"HcPreILb{int(spreads)}E"),
            grid=(ranks * clusters,),
            block=THREADS,
            cluster=ranks,
            arguments=[problem],
            memory=memory,
            dynamic_shared_bytes=MAX_SHARED_BYTES,
            seed=seed,
        )
    return results, spread, gates


def check(num_tokens, width, clusters, seed=0):
    (new, *collapsed), spread, gates = run(num_tokens, width, clusters, seed=seed)
    check_post(new, *spread)
    check_pre(collapsed, new, gates)


@pytest.mark.parametrize(("num_tokens", "width", "clusters"), [(33, 256, 1), (3, 512, 1)])
def test_post_pre(num_tokens, width, clusters):
    """More tiles than are under way at a time, and blocks that add up together."""
    check(num_tokens, width, clusters)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize(("num_tokens", "width", "clusters"), [(89, 256, 2), (50, 512, 1)])
def test_schedules(num_tokens, width, clusters, seed):
    check(num_tokens, width, clusters, seed)


def test_pre():
    (_, *collapsed), (_, streams, _, _), gates = run(5, 256, 1, spreads=False)
    check_pre(collapsed, streams, gates)
