"""The prefill kernel of sparse attention for sm_90, compiled to PTX and executed on the CPU."""

import contextlib
import functools
import re
import struct
from collections.abc import Iterator
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

from tests.attention_cases import ROTARY, expected, full_size, wrong_in_bfloat16
from tests.oracles.sparse_attention import record_values
from tests.ptx import attention_instructions, nvrtc
from tests.ptx.emulator import lanes, launch, parse
from tests.ptx.emulator.lanes import address_reader, address_reader_32, reader
from tests.ptx.emulator.mbarrier import barrier_at
from tests.ptx.emulator.memory import RANK_SHIFT, shared_view
from tests.ptx.emulator.tma import GARBAGE_BYTE
from tests.ptx.hopper import _GROUP, _THREAD
from tests.ptx.test_attention import FFI, RUNTIME, Problem

pytestmark = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))

CONSTANTS = {"shared_bytes": "sizeof(PrefillShared)", "threads": "kPrefillThreads"}


@contextlib.contextmanager
def instructions() -> Iterator[None]:
    builders = {
        "cp.async.cg.shared.global": _copy_or_zeros,
        "cp.async.mbarrier.arrive.noinc": _arrive_after_copies,
        "stmatrix.sync.aligned.m8n8.x4.shared.b16": _store_matrices,
    }
    with attention_instructions.instructions(), mock.patch.dict(lanes._BUILDERS, builders):
        yield


class _Copy:
    """What the lanes of a warp copy at once, and what happens when it has landed."""

    def __init__(self):
        self.landed, self.then = False, []


def _copy_or_zeros(i):
    to, source = address_reader_32(i.operands[0]), address_reader(i.operands[1])
    size = reader(i.operands[3], "u4")

    def run(warp, mask):
        if (to(warp)[mask] % 16).any() or (source(warp)[mask] % 16).any():
            raise RuntimeError(f"{i.text}: an address that is not a multiple of 16")
        places = (to(warp).astype("i8") % (1 << RANK_SHIFT))[:, None] + np.arange(16)
        shared, exists = warp.block.shared, mask & (size(warp) == 16)
        shared[places[mask & ~exists]] = 0
        shared[places[exists]] = GARBAGE_BYTE
        parts = [warp.memory.view(int(address), 16) for address in source(warp)[exists]]
        copy = _Copy()
        warp.__dict__.setdefault("copies", []).append(copy)

        def finish():
            if parts:
                shared[places[exists]] = np.stack(parts)
            copy.landed = True
            for then in copy.then:
                then()

        warp.block.cluster.copy_later(finish)

    return run


def _arrive_after_copies(i):
    barriers = address_reader_32(i.operands[0])

    def run(warp, mask):
        barrier = barrier_at(warp, int(barriers(warp)[0]))
        warp.copies = [copy for copy in warp.copies if not copy.landed]
        missing = [len(warp.copies)]

        def landed():
            missing[0] -= 1
            if missing[0] <= 0:
                for _ in range(mask.sum()):
                    barrier.arrive()

        for copy in warp.copies:
            copy.then.append(landed)
        if not warp.copies:
            landed()

    return run


def _store_matrices(i):
    rows = address_reader_32(i.operands[0])
    matrices = [reader(o, "u4") for o in i.operands[1].elements]

    def run(warp, mask):
        addresses = rows(warp)
        for number, words in enumerate(matrices):
            matrix = np.zeros((8, 8), "u2")
            for half in range(2):
                matrix[_GROUP, 2 * _THREAD + half] = words(warp) >> 16 * half & 0xFFFF
            for row in range(8):
                address = int(addresses[8 * number + row])
                shared_view(warp, address, 16)[:] = matrix[row].view(np.uint8)

    return run


@functools.cache
def compiled():
    constants = "".join(
        f'extern "C" __constant__ int {name} = {value};' for name, value in CONSTANTS.items()
    )
    text = nvrtc.compile_ptx(
        f'#include "attention_prefill.cuh"\nnamespace dsv4 {{ {constants} }}',
        architecture="compute_90a",
        include=[FFI / "cuda", FFI / "include"],
        headers={"cuda_runtime.h": RUNTIME},
    )
    kernel = parse(text, re.search(r"\.entry (\w*AttendPrefill\w*)", text)[1])
    return kernel, {name: int(re.search(rf"\b{name} = (\d+)", text)[1]) for name in CONSTANTS}


def workspace(case):
    """[b, rows, c]; NaN where nothing may be read."""
    b, t, _, c = case.q.shape
    num_entries = case.table.shape[1] * case.per_block if case.ratio else 0
    rows = np.full((b, case.window - 1 + t + num_entries, c), np.nan)
    for s in range(b):
        tokens = record_values(*case.tokens[s], ROTARY)[-(case.window - 1 + t) :]
        rows[s, case.window - 1 + t - len(tokens) : case.window - 1 + t] = tokens
        entries = record_values(*case.entries[s], ROTARY)
        rows[s, case.window - 1 + t : case.window - 1 + t + len(entries)] = entries
    return rows.astype(ml_dtypes.bfloat16).view(np.uint16)


def run(case, num_blocks):
    kernel, numbers = compiled()
    b, t, h, _ = case.q.shape
    problem, tiles = Problem(case), -(-h // 64)
    packed = struct.pack(
        "<Q2iQ", problem.put(workspace(case)), tiles, b * t * tiles, problem.put(problem.output)
    )
    with instructions():
        launch(
            kernel,
            grid=[min(b * t * tiles, num_blocks)],
            block=numbers["threads"],
            arguments=[problem.attention + packed],
            memory=problem.memory,
            dynamic_shared_bytes=numbers["shared_bytes"],
        )
    return problem.output.view(ml_dtypes.bfloat16).astype(np.float64)


@pytest.mark.parametrize(
    ("start", "num_blocks", "options"),
    [
        ([2], 1, {"heads": 3, "t": 2}),
        ([60, 300], 2, {"heads": 66, "ratio": 4, "top_k": 30, "length": [1, 0]}),
        ([256], 1, {"heads": 2, "ratio": 128, "t": 2, "length": [1]}),
    ],
)
def test_attention_prefill(start, num_blocks, options):
    case = full_size(np.random.default_rng(0), start, **options)
    case.q *= 64  # so that peaks rise from tile to tile
    found, correct = run(case, num_blocks), expected(case)
    assert not wrong_in_bfloat16(found, correct).any()
