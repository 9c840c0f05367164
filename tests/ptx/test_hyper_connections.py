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
MAX_SHARED_BYTES = 227 << 10


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


INSTRUCTIONS = {
    "rsqrt": _rsqrt,
    "cp.async.cg.shared.global": _copy,
    "cp.async.commit_group": _commit,
    "cp.async.wait_group": _wait_for_groups,
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


def run(num_tokens, width, parts, groups, spreads=True, seed=0):
    """(new streams, x, post, comb) and the inputs."""
    spread, gates = random_spread(num_tokens, width), random_gates(width)
    new = np.full((num_tokens, 4, width), np.nan, ml_dtypes.bfloat16) if spreads else spread[1]
    sums = np.full((parts, num_tokens, 28), np.nan, np.float32)
    collapsed = (
        np.full((num_tokens, width), np.nan, ml_dtypes.bfloat16),
        np.full((num_tokens, 4), np.nan, np.float32),
        np.full((num_tokens, 4, 4), np.nan, np.float32),
    )
    memory = GlobalMemory()
    inputs = [memory.place(a) for a in (*spread, *gates)]
    outputs = [memory.place(a) for a in (new, sums, *collapsed)]

    def start(name, streams, grid, block):
        problem = struct.pack(
            "@PPPPPPPPiiiiffPPPPP",
            *(inputs[0], streams, *inputs[2:]),
            *(num_tokens, width, parts, ROUNDS, EPS, NORM_EPS),
            *outputs,
        )
        launch(
            kernel(name),
            grid=(grid,),
            block=block,
            arguments=[problem],
            memory=memory,
            dynamic_shared_bytes=MAX_SHARED_BYTES,
            seed=seed,
        )

    few = parts == width // 32
    with mock.patch.dict(lanes._BUILDERS, INSTRUCTIONS):
        name = f"ProjectILb{int(spreads)}ELi{1 if few else 8}E"
        start(name, inputs[1], parts * groups, 256 if few else 512)
        start(f"CollapseILi{8 if few else 1}E", outputs[0], num_tokens, 288)
    return (new, *collapsed), spread, gates


def check(num_tokens, width, parts, groups, **options):
    (new, *collapsed), spread, gates = run(num_tokens, width, parts, groups, **options)
    if options.get("spreads", True):
        check_post(new, *spread)
    check_pre(collapsed, new, gates)
    return new, *collapsed


def test_few_and_many_tokens():
    """The same bits from parts of one warp as of eight, of which several groups have a tile."""
    few, many = check(9, 256, 8, 1), check(9, 256, 1, 2)
    for a, b in zip(few, many, strict=True):
        np.testing.assert_array_equal(a, b)


def test_pre():
    check(3, 512, 2, 1, spreads=False)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize(
    ("num_tokens", "width", "parts", "groups"),
    [(41, 256, 1, 1), (66, 256, 8, 1), (17, 768, 3, 2), (3, 768, 24, 1)],
)
def test_schedules(num_tokens, width, parts, groups, seed):
    """More tiles than warps or teams, and widths that no power of two is."""
    check(num_tokens, width, parts, groups, seed=seed)
