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
    "shared_bytes_8": "sizeof(ClusterShared<8>)",
    "shared_bytes_16": "sizeof(ClusterShared<16>)",
    "cluster_threads": "kClusterThreads",
}
RUNTIME = "#pragma once\n#define INFINITY __int_as_float(0x7f800000)\n"


@functools.cache
def compiled():
    """PTX of all kernels, and their constants."""
    constants = "".join(
        f'extern "C" __constant__ int {name} = {value};' for name, value in CONSTANTS.items()
    )
    source = f"""
        #include "attention_cluster.cuh"
        #include "attention_kernel.cuh"
        namespace dsv4 {{
        template __global__ void Combine<2>(const __grid_constant__ AttentionProblem);
        template __global__ void AttendInCluster<8>(const __grid_constant__ ClusterProblem);
        template __global__ void AttendInCluster<16>(const __grid_constant__ ClusterProblem);
        {constants}
        }}
    """
    text = nvrtc.compile_ptx(
        source,
        architecture="compute_90a",
        include=[FFI / "cuda", FFI / "include"],
        headers={"cuda_runtime.h": RUNTIME},
    )
    return text, {name: int(re.search(rf"\b{name} = (\d+)", text)[1]) for name in CONSTANTS}


@functools.cache
def kernel(name):
    text, _ = compiled()
    return parse(text, re.search(rf"\.entry (\w*{name}\w*)", text)[1])


def divisor(value):
    shift = 31 + max(int(value) - 1, 0).bit_length()
    return value, -(-(1 << shift) // int(value)) if value else 0, shift


class Problem:
    """A case in the kernels' memory; what they leave out of the output stays NaN."""

    def __init__(self, case):
        self.memory, self.kept = GlobalMemory(), []
        b, t, h, c = case.q.shape
        self.output = np.full(case.q.shape, np.nan, ml_dtypes.bfloat16).view(np.uint16)
        records = [self.put(plane[LAYER]) for plane in case.ring]
        records += [0, 0] if case.new is None else [self.put(plane) for plane in case.new]
        records += [self.put(plane[POOL_LAYER]) for plane in case.pool] if case.ratio else [0, 0]
        self.attention = struct.pack(
            "<13Qf6iiIi?3xiiIiiIii4x",
            *(self.put(x) for x in (case.q.astype(ml_dtypes.bfloat16).view(np.uint16), case.sink)),
            self.put(case.omega),
            *records,
            self.put(case.table),
            0 if case.ids is None else self.put(case.ids),
            *(self.put(x) for x in (case.start, case.length)),
            case.scale,
            *(b * t, t, h, c, 2 * len(case.omega), case.window),
            *divisor(case.ring[0].shape[2]),
            case.new is not None,
            0 if case.ids is None else case.ids.shape[2],
            *divisor(case.ratio),
            *divisor(case.per_block),
            case.table.shape[1] if case.ratio else 0,
        )

    def put(self, array):
        self.kept.append(np.ascontiguousarray(array))
        return self.memory.place(self.kept[-1]) if array.size else 0

    def launch(self, name, problem, **options):
        with attention_instructions.instructions():
            launch(kernel(name), arguments=[problem], memory=self.memory, **options)
        return self.output.view(ml_dtypes.bfloat16).astype(np.float64)


def run(case, max_splits, num_blocks):
    """The kernels of 64 heads on `num_blocks` thread blocks."""
    _, numbers = compiled()
    b, t, h, c = case.q.shape
    problem, tiles = Problem(case), -(-h // 64)
    num_items = b * t * tiles * max_splits
    parts = np.full((num_items, 64, c // 2 + 2), np.nan, np.float32)
    packed = problem.attention + struct.pack(
        "<4i2Q", max_splits, 1, tiles, num_items, problem.put(parts), problem.put(problem.output)
    )
    found = problem.launch(
        "Attend",
        packed,
        grid=[num_items if max_splits == 2 else min(num_items, num_blocks)],
        cluster=2 if max_splits == 2 else 1,
        block=numbers["threads"],
        dynamic_shared_bytes=numbers["shared_bytes"],
    )
    if max_splits > 2:
        return problem.launch("Combine", packed, grid=[b * t, h], block=256)
    return found


def run_in_clusters(case, heads_each, ranks):
    _, numbers = compiled()
    b, t, h, _ = case.q.shape
    problem = Problem(case)
    packed = struct.pack("<i4xQ", ranks.bit_length() - 1, problem.put(problem.output))
    return problem.launch(
        f"AttendInClusterILi{heads_each}E",
        problem.attention + packed,
        grid=[b * ranks, -(-h // heads_each), t],
        cluster=ranks,
        block=numbers["cluster_threads"],
        dynamic_shared_bytes=numbers[f"shared_bytes_{heads_each}"],
    )


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


@pytest.mark.parametrize(
    ("start", "heads_each", "ranks", "options"),
    [
        ([40], 8, 2, {"heads": 2, "exponent": 60}),
        ([5, 17], 16, 2, {"heads": 18, "ratio": 4, "top_k": 14, "length": [1, 0]}),
        ([60], 8, 8, {"heads": 3, "ratio": 4, "top_k": 14}),
        ([300], 16, 2, {"heads": 3, "ratio": 128, "t": 2, "length": [2]}),
    ],
)
def test_attention_in_clusters(start, heads_each, ranks, options):
    case = full_size(np.random.default_rng(0), start, **options)
    found, correct = run_in_clusters(case, heads_each, ranks), expected(case)
    assert not wrong_in_bfloat16(found, correct).any()


def test_attention_in_clusters_searches_many_slots_in_turns():
    case = full_size(np.random.default_rng(0), [7900], heads=1, ratio=4)
    found, correct = run_in_clusters(case, 8, 2), expected(case)
    assert not wrong_in_bfloat16(found, correct).any()
