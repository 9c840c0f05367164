"""The sparse attention kernels for sm_90, compiled to PTX and executed on the CPU."""

import functools
import pathlib
import re
import struct

import ml_dtypes
import numpy as np
import pytest

from tests.attention_cases import LAYER, POOL_LAYER, expected, full_size, wrong_in_bfloat16
from tests.ptx import attention_instructions, nvrtc
from tests.ptx.emulator import GlobalMemory, launch, parse

pytestmark = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))

FFI = pathlib.Path(__file__).parents[2] / "ffi"
CONSTANTS = {
    "shared_bytes": "sizeof(AttentionShared)",
    "threads": "kAttentionThreads",
}
RUNTIME = "#pragma once\n#define INFINITY __int_as_float(0x7f800000)\n"


@functools.cache
def compiled():
    """(Attend, Combine, their constants)."""
    constants = "".join(
        f'extern "C" __constant__ int {name} = {value};' for name, value in CONSTANTS.items()
    )
    source = f"""
        #include "attention_kernel.cuh"
        namespace dsv4 {{
        template __global__ void Combine<2>(const __grid_constant__ AttentionProblem);
        {constants}
        }}
    """
    text = nvrtc.compile_ptx(
        source,
        architecture="compute_90a",
        include=[FFI / "cuda", FFI / "include"],
        headers={"cuda_runtime.h": RUNTIME},
    )
    numbers = {name: int(re.search(rf"\b{name} = (\d+)", text)[1]) for name in CONSTANTS}
    return parse(text, "Attend"), parse(text, "Combine"), numbers


def run(case, max_splits, num_blocks):
    """The kernels on `num_blocks` thread blocks; what they leave out stays NaN."""
    attend, combine, numbers = compiled()
    memory, kept = GlobalMemory(), []

    def put(array):
        kept.append(np.ascontiguousarray(array))
        return memory.place(kept[-1]) if array is not None and kept[-1].size else 0

    b, t, h, c = case.q.shape
    tiles = -(-h // 64)
    num_items = b * t * tiles * max_splits
    parts = np.full((num_items, 64, c + 2), np.nan, np.float32)
    o = np.full((b, t, h, c), np.nan, ml_dtypes.bfloat16).view(np.uint16)
    records = [put(plane[LAYER]) for plane in case.ring]
    records += [0, 0] if case.new is None else [put(plane) for plane in case.new]
    records += [put(plane[POOL_LAYER]) for plane in case.pool] if case.ratio else [0, 0]
    problem = struct.pack(
        "<13Qf7i?3x4i4x4i2Q",
        *(put(x) for x in (case.q.astype(ml_dtypes.bfloat16).view(np.uint16), case.sink)),
        put(case.omega),
        *records,
        put(case.table),
        0 if case.ids is None else put(case.ids),
        *(put(x) for x in (case.start, case.length)),
        case.scale,
        *(b * t, t, h, c, 2 * len(case.omega), case.window, case.ring[0].shape[2]),
        case.new is not None,
        *(0 if case.ids is None else case.ids.shape[2], case.ratio),
        *(case.per_block, case.table.shape[1] if case.ratio else 0),
        *(max_splits, 1, tiles, num_items),
        *(memory.place(parts), memory.place(o)),
    )
    with attention_instructions.instructions():
        launch(
            attend,
            grid=[num_items if max_splits == 2 else min(num_items, num_blocks)],
            cluster=2 if max_splits == 2 else 1,
            block=numbers["threads"],
            dynamic_shared_bytes=numbers["shared_bytes"],
            arguments=[problem],
            memory=memory,
        )
        if max_splits > 2:
            launch(combine, grid=[b * t, h], block=256, arguments=[problem], memory=memory)
    return o.view(ml_dtypes.bfloat16).astype(np.float64)


@pytest.mark.parametrize(
    ("start", "max_splits", "num_blocks", "options"),
    [
        ([300], 1, 1, {"heads": 3}),
        ([40], 1, 1, {"heads": 2, "exponent": 60}),
        ([60], 2, 2, {"heads": 2, "ratio": 4, "top_k": 14}),
        ([5, 260, 17], 1, 2, {"heads": 66, "ratio": 4, "top_k": 30, "length": [1, 1, 0]}),
        ([126, 300], 2, 8, {"heads": 3, "ratio": 128, "t": 2, "length": [2, 1]}),
        ([126, 300], 3, 5, {"heads": 3, "ratio": 128, "t": 2, "length": [2, 1]}),
    ],
)
def test_attention(start, max_splits, num_blocks, options):
    case = full_size(np.random.default_rng(0), start, **options)
    found, correct = run(case, max_splits, num_blocks), expected(case)
    assert not wrong_in_bfloat16(found, correct).any()
