"""The dense router on tcgen05, as NVRTC compiles it, against the float64 oracle."""

import dataclasses
import functools
import pathlib
import re
import struct

import numpy as np
import pytest

from tests.oracles import formats
from tests.oracles.router import normalized, scored_ids, sqrt_softplus
from tests.ptx import (
    hopper,
    nvrtc,
    warp_instructions,  # noqa: F401
)
from tests.ptx.emulator import Deadlock, GlobalMemory, MemoryFault, launch, parse

pytestmark = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))

FFI = pathlib.Path(__file__).parents[2] / "ffi"
KERNEL = "router_dense_sm100.cuh"
SPLITS, THREADS, TILE_EXPERTS, SCALE = 8, 256, 32, 2.5
# What the gate needs of CUDA's header, and the constants of one that is for host compilers.
BF16 = """#pragma once
struct __nv_bfloat162 { unsigned bits; };
__device__ inline __nv_bfloat162 __float2bfloat162_rn(float x) {
  __nv_bfloat162 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %1;" : "=r"(pair.bits) : "f"(x));
  return pair;
}
__device__ inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  asm("mul.rn.bf16x2 %0, %0, %1;" : "+r"(a.bits) : "r"(b.bits));
  return a;
}
"""
CONSTANTS = re.findall(
    r"^constexpr.*;$", (FFI / "include/dsv4/router.h").read_text(), flags=re.MULTILINE
)
HEADERS = {
    "cuda_runtime.h": "#pragma once\n",
    "cuda_bf16.h": BF16,
    "climits": "#pragma once\n#define INT_MIN (-2147483647 - 1)\n#define INT_MAX 2147483647\n",
    "dsv4/router.h": "\n".join(
        ["#pragma once", "#include <cstdint>", "namespace dsv4 {", *CONSTANTS, "}"]
    ),
}


@functools.cache
def compiled(num_tokens, gate, mutant=None):
    headers = dict(HEADERS)
    if mutant:
        text, replacement = mutant
        source = (FFI / "cuda" / KERNEL).read_text()
        assert source.count(text) == 1, f"{text!r} is not unique"
        headers[KERNEL] = source.replace(text, replacement)
    source = f"""
        #include "{KERNEL}"
        namespace dsv4::sm100 {{
        template __global__ void DenseRouterKernel<{num_tokens}, {gate}>(
            const __grid_constant__ RouterProblem, const __grid_constant__ {gate});
        extern "C" __constant__ int dynamic_bytes = RouterTile<{num_tokens}>::kDynamicBytes;
        }}
    """
    text = nvrtc.compile_ptx(source, include=[FFI / "cuda", FFI / "include"], headers=headers)
    dynamic_bytes = int(re.search(r"dynamic_bytes = (\d+)", text)[1])
    return parse(text, "DenseRouterKernel"), dynamic_bytes


def bfloat16(rng, *shape, std=1.0):
    """Bits, and the same numbers in float64."""
    bits = (rng.normal(0, std, shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@dataclasses.dataclass
class Gate:
    name: str
    arrays: list[np.ndarray]
    values: np.ndarray


def bfloat16_gate(rng, num_experts, width):
    bits, values = bfloat16(rng, num_experts, width, std=width**-0.5)
    return Gate("Bfloat16Gate", [bits], values)


def nvfp4_gate(rng, num_experts, width):
    codes = rng.integers(0, 16, (num_experts, width), np.uint8)
    scales = rng.integers(0x20, 0x50, (num_experts, width // 16), np.uint8)
    factor = np.array([0.1 * width**-0.5], np.float32)
    values = formats.E2M1[codes] * np.repeat(formats.E4M3[scales], 16, 1) * np.float64(factor)
    return Gate("Nvfp4Gate", [formats.packed(codes), scales, factor], values)


class Problem:
    def __init__(self, num_tokens, num_experts, width, k, make_gate=bfloat16_gate):
        rng = np.random.default_rng([num_tokens, num_experts, width])
        self.k, self.width = k, width
        self.x, x = bfloat16(rng, num_tokens, width)
        self.gate = make_gate(rng, num_experts, width)
        self.bias = rng.normal(0, 0.2, num_experts).astype(np.float32)
        self.logits = x @ self.gate.values.T

    def run(self, tile_tokens, seed=0, mutant=None, arrivals=None):
        kernel, dynamic_bytes = compiled(tile_tokens, self.gate.name, mutant)
        memory = GlobalMemory()
        (num_tokens, num_experts), k = self.logits.shape, self.k
        weights = np.full((num_tokens, k), np.nan, np.float32)
        ids = np.full((num_tokens, k), -7, np.int32)
        scores = np.full((num_tokens, num_experts), np.nan, np.float32)
        arrivals = np.zeros(SPLITS, np.uint32) if arrivals is None else arrivals
        place = memory.place
        problem = struct.pack("<2Q4if4x", place(self.x), place(self.bias), num_tokens, self.width,
                              num_experts, k, SCALE)  # fmt: skip
        problem += struct.pack("<4Q", *map(place, (scores, weights, ids, arrivals)))
        gate = struct.pack(f"<{len(self.gate.arrays)}Qq", *map(place, self.gate.arrays), self.width)
        with hopper.instructions():
            launch(
                kernel,
                grid=(SPLITS, -(-num_experts // TILE_EXPERTS)),
                block=THREADS,
                cluster=SPLITS,
                arguments=[problem, gate],
                memory=memory,
                dynamic_shared_bytes=dynamic_bytes,
                seed=seed,
            )
        return weights, ids

    def check(self, weights, ids):
        scores = sqrt_softplus(self.logits)
        expected = scored_ids((scores.astype(np.float32) + self.bias).astype("f8"), 0.0, self.k)
        np.testing.assert_array_equal(ids, expected)
        np.testing.assert_allclose(weights, normalized(scores, ids, SCALE), rtol=2e-5)


@pytest.mark.parametrize(
    ("tile_tokens", "sizes", "make_gate"),
    [
        (16, (3, 70, 520, 6), bfloat16_gate),
        (64, (50, 40, 1032, 4), bfloat16_gate),
        (16, (9, 300, 64, 8), bfloat16_gate),
        (16, (5, 40, 528, 6), nvfp4_gate),
    ],
)
def test_routing(tile_tokens, sizes, make_gate):
    problem = Problem(*sizes, make_gate)
    problem.check(*problem.run(tile_tokens))


def test_slices_of_several_rounds_and_counters_of_several_launches():
    problem = Problem(2, 33, 8 * 15 * 64 + 8, 2)
    arrivals = np.zeros(SPLITS, np.uint32)
    for seed in range(2):
        problem.check(*problem.run(16, seed, arrivals=arrivals))
    assert not arrivals.any()


# (what is wrong, source as it is, source as it would be)
WAIT_MUTANTS = [
    ("products before all have copied",
     "tcgen05::FenceBeforeSync();\n      __syncthreads();\n", "tcgen05::FenceBeforeSync();\n"),
    ("sums are sent before they are complete",
     "WaitBarrier(&shared.multiplied, parity);\n", "if (false) WaitBarrier(nullptr, parity);\n"),
    ("sums are added up before they are there",
     "if (warp == 0) SendSums();\n    SyncCluster();",
     "if (warp == 0) SendSums();\n    __syncthreads();"),
]  # fmt: skip

DATA_MUTANTS = [
    ("the next round waits for the first", "+= kRoundAtoms, parity ^= 1)", "+= kRoundAtoms)"),
    ("a round forgets those before", "/*accumulate=*/!first_round || ", "/*accumulate=*/"),
    ("parts are not swizzled", "PartOffset(row, part % kAtomParts)) = values[i];",
     "row * kAtomBytes + part % kAtomParts * 16) = values[i];"),
    ("sums go to the wrong tokens", "token / kOwnTokens)),", "0)),"),
    ("a split is forgotten", "s < kRouterSplits; ++s) logit", "s < kRouterSplits - 1; ++s) logit"),
    ("the first cluster selects", "== others;", "== 0;"),
    ("tokens that are not there", "return row < p.num_tokens\n", "return true\n"),
    ("experts of the next tile", "const int32_t expert = first_expert + row;",
     "const int32_t expert = first_expert + row + 1;"),
    ("tensor memory is not freed",
     "if (warp == 0) tcgen05::Deallocate<T::kColumns>(shared.tensor_memory);", ""),
]  # fmt: skip


def ids(mutants):
    return [re.sub(r"\W+", "-", name) for name, *_ in mutants]


def survives(problem, mutant):
    for seed in range(6):
        try:
            problem.check(*problem.run(16, seed, mutant))
        except (Deadlock, MemoryFault, RuntimeError, NotImplementedError, AssertionError):
            return False
    return True


@pytest.mark.parametrize("mutant", [m[1:] for m in WAIT_MUTANTS], ids=ids(WAIT_MUTANTS))
def test_missing_wait_is_noticed(mutant):
    assert not survives(Problem(11, 40, 1032, 3), mutant)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [m[1:] for m in DATA_MUTANTS], ids=ids(DATA_MUTANTS))
def test_mistake_in_the_data_is_noticed(mutant):
    assert not survives(Problem(11, 70, 8 * 15 * 64, 3), mutant)
