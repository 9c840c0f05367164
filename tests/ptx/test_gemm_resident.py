"""The kernel of gemm for up to 64 rows on Hopper, compiled to PTX and executed on the CPU."""

import functools
import re
import struct

import numpy as np
import pytest

from tests.ptx import attention_instructions, nvrtc
from tests.ptx.emulator import Deadlock, GlobalMemory, launch, parse
from tests.ptx.test_gemm import ENUMERATORS, FFI, SHARED_BYTES, Problem

pytestmark = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))


@functools.cache
def compiled(arguments, mutant=()):
    """The kernel; `mutant` is (text, replacement)."""
    headers = {"cuda_runtime.h": "#pragma once\n", "cuda_bf16.h": "#pragma once\n"}
    if mutant:
        source = (FFI / "cuda" / "gemm_resident.cuh").read_text()
        assert source.count(mutant[0]) == 1
        headers["gemm_resident.cuh"] = source.replace(*mutant)
    source = f"""
        #include "gemm_resident.cuh"
        namespace dsv4 {{
        template __global__ void ResidentGemm<{arguments}>(const __grid_constant__ ResidentParams);
        }}
    """
    include = [FFI / "cuda", FFI / "include"]
    text = nvrtc.compile_ptx(source, architecture="compute_90a", include=include, headers=headers)
    (entry,) = (e for e in re.findall(r"\.entry (\w+)\(", text) if "ResidentGemm" in e)
    return parse(text, entry)


def multiply(problems, tokens, ranks, sharers_log2, clusters, tokens_at_once, seed=0, mutant=()):
    """Products of one input; `clusters` are those of each weight format."""
    num_rows, groups, k = problems[0].x.shape
    blocks = -(-k // 128)
    used = list(dict.fromkeys(p.weight.weight_format for p in problems))
    memory = GlobalMemory()
    segments, parts, num_segments, first = b"", [], 0, 0
    for weight_format, num_clusters in zip(used, clusters, strict=True):
        first_segment, tiles = num_segments, 0
        for problem in problems:
            n = problem.weight.shape[0]
            if problem.weight.weight_format != weight_format:
                continue
            segments += problem.segment(memory) + struct.pack("<2i", n // groups, tiles)
            num_segments += 1
            tiles += -(-n // (256 >> sharers_log2))
        parts += [first_segment, num_segments, tiles, first, num_clusters]
        first += num_clusters
    params = struct.pack(
        "<Q17i4x",
        memory.place(problems[0].x.view(np.uint16).reshape(-1)),
        num_rows,
        groups * k,
        k,
        blocks,
        sharers_log2,
        -(-blocks // ranks),
        tokens_at_once,
        *(parts + 5 * [0])[:10],
    )
    arguments = ", ".join([str(tokens), *(ENUMERATORS[f] for f in used)])
    with attention_instructions.instructions():
        launch(
            compiled(arguments, mutant),
            grid=(ranks, first),
            block=512,
            arguments=[params + segments.ljust(8 * 56, b"\0")],
            memory=memory,
            cluster=ranks,
            dynamic_shared_bytes=SHARED_BYTES,
            seed=seed,
        )


@pytest.mark.parametrize(
    ("weight_format", "shape", "groups", "round_input", "plan"),
    [
        ("mxfp4", (3, 140, 416), 1, False, (16, 2, 1, [2], 16)),
        ("nvfp4", (11, 130, 392), 1, True, (16, 1, 2, [2], 16)),
        ("fp8_block", (35, 256, 136), 2, True, (64, 2, 1, [1], 32)),
        ("bf16", (17, 65, 136), 1, False, (32, 2, 0, [1], 16)),
    ],
)
def test_products(weight_format, shape, groups, round_input, plan):
    problem = Problem(weight_format, *shape, groups, round_input, f32=weight_format != "mxfp4")
    multiply([problem], *plan)
    problem.check()


def test_segments_of_two_formats():
    problems = [
        Problem("fp8_block", 5, 128, 264, round_input=True),
        Problem("bf16", 5, 64, 264),
        Problem("fp8_block", 5, 64, 264, f32=False),
    ]
    multiply(problems, 16, 2, 2, [2, 1], 16)
    for problem in problems:
        problem.check()


MUTANTS = {
    "sums are added up before all have come": (
        "        WaitBarrier(&shared.barriers->ready, parity);",
        "",
    ),
    "sums are sent before the last ones have been added up": (
        "          WaitBarrier(&shared.barriers->taken, parity ^ 1);",
        "",
    ),
    "weights are decoded into products under way": ("WaitProductsExcept<0>()", ""),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    def error(seed):
        problem = Problem("mxfp4", 20, 256, 256)
        multiply([problem], 32, 2, 1, [1], 16, seed, mutant)
        return problem.error

    assert any(_fails(error, seed) for seed in range(3))


def _fails(error, seed):
    try:
        return not error(seed) <= 1e-6
    except (Deadlock, RuntimeError):
        return True
