"""Routed experts and sorted rows on tcgen05: the sequence of kernels that the handlers launch."""

import functools
import struct

import ml_dtypes
import numpy as np
import pytest

from tests.oracles import formats
from tests.packed_weights import tile, weight_arrays
from tests.ptx import decoded_gemm, moe_instructions, nvrtc
from tests.ptx.decoded_gemm import FFI, HEADERS, INPUT_THREADS, ROUNDINGS, THREADS
from tests.ptx.emulator import GlobalMemory, launch, parse
from tests.ptx.test_moe import LIMIT, Experts, error

pytestmark = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))

PLAN_THREADS, SUM_THREADS = 1024, 256
# Sums in float32 now and then round to the other neighbour in bfloat16.
TOLERANCE = 1e-3


@functools.cache
def around():
    """PlanExperts, SumRoutes, ClearUnusedRows."""
    include = [FFI / "cuda", FFI / "include"]
    text = nvrtc.compile_ptx('#include "decoded_moe_sm100.cuh"', include=include, headers=HEADERS)
    return [parse(text, name) for name in ("PlanExperts", "SumRoutes", "ClearUnusedRows")]


class Call:
    """Arrays of one call in the emulator's memory, and the launches."""

    def __init__(self, weight_format, tile_rows, codes, rounded, seed=0):
        self.memory = GlobalMemory()
        variant = decoded_gemm.Variant(weight_format, tile_rows, codes)
        self.kernels = decoded_gemm.compiled(variant, pairs=True)
        self.rounding = ROUNDINGS["codes" if codes else "bfloat16" if rounded else "none"]
        self.tile_rows, self.seed = tile_rows, seed

    def put(self, array):
        return self.memory.place(np.ascontiguousarray(array))

    def garbage(self, num_bytes):
        return self.put(np.full(num_bytes + 16, 0xA5, np.uint8))

    def launch(self, kernel, grid, block, *arguments, dynamic_bytes=0):
        with moe_instructions.instructions():
            launch(
                kernel,
                grid=grid,
                block=block,
                arguments=arguments,
                memory=self.memory,
                dynamic_shared_bytes=dynamic_bytes,
                seed=self.seed,
            )

    def plan(self, num_tokens, top_k, num_experts, *, routes=(0, 0, 0), group_sizes=0):
        self.num_rows = num_tokens * top_k
        self.max_blocks = self.num_rows // self.tile_rows + min(self.num_rows, num_experts)
        self.blocks, self.count = self.garbage(16 * self.max_blocks), self.garbage(4)
        self.source, self.weight, self.route = (self.garbage(4 * self.num_rows) for _ in range(3))
        arguments = struct.pack(
            "<4Q4i5Q",
            *routes,
            group_sizes,
            num_tokens,
            top_k,
            num_experts,
            self.tile_rows,
            *(self.blocks, self.count, self.source, self.weight, self.route),
        )
        self.launch(around()[0], (1,), PLAN_THREADS, arguments)
        self.rows = struct.pack("<2Qi4x", self.blocks, self.count, self.num_rows)

    def inputs(self, x, source, tiles, width):
        arguments = struct.pack("<3Q", x, source, tiles) + self.rows
        arguments += struct.pack("<3i4x", 1, width, self.rounding)
        self.launch(self.kernels.inputs, (width // 128, self.max_blocks), INPUT_THREADS, arguments)

    def product(self, kernel, weights, inputs, sink, blocks=2):
        n, k = weights[0].shape
        gemm = b"".join(decoded_gemm.matrix(self.memory, [w]) for w in weights)
        gemm += struct.pack("<Q", inputs) + self.rows + struct.pack("<4i", n, k, 1, n)
        dynamic_bytes = self.kernels.dynamic_bytes
        self.launch(kernel, (blocks,), THREADS, gemm, sink, dynamic_bytes=dynamic_bytes)


def moe(model, weight_format, tile_rows, codes, rounded, seed=0):
    call = Call(weight_format, tile_rows, codes, rounded, seed)
    w1, w3, w2 = model.weights
    (num_tokens, d), (f, _) = model.x.shape, w1.shape
    ids, routing_weights, valid = model.routes
    routes = [call.put(a) for a in (ids, valid, routing_weights)]
    call.plan(num_tokens, ids.shape[1], len(w1.global_scale), routes=routes)
    tiles = call.garbage(2 * call.num_rows * d)
    call.inputs(call.put(model.x.view(np.uint16)), call.source, tiles, d)
    hidden = call.garbage(2 * call.num_rows * f)
    sink = struct.pack("<2Qif", hidden, call.weight, f, LIMIT)
    call.product(call.kernels.pairs, (w1, w3), tiles, sink)
    if rounded:
        call.inputs(0, 0, hidden, f)
    sink = struct.pack("<Qq?7x", tiles, d, False)
    call.product(call.kernels.product, (w2, w2), hidden, sink)
    out = np.full((num_tokens, d), np.nan, np.float32)
    sums = struct.pack("<3Q3i4x", tiles, call.route, call.put(out), num_tokens, ids.shape[1], d)
    call.launch(around()[1], (-(-num_tokens * d // 8 // SUM_THREADS),), SUM_THREADS, sums)
    return out


@pytest.mark.parametrize(
    ("weight_format", "tile_rows", "codes", "rounded", "sizes"),
    [
        ("mxfp4", 64, True, True, (5, 2, 2, 256, 128)),
        ("fp8_block", 128, True, True, (6, 2, 2, 128, 128)),
        ("nvfp4", 64, False, True, (4, 1, 2, 128, 128)),
        ("mxfp4", 128, False, False, (3, 1, 2, 128, 128)),
    ],
)
def test_experts(weight_format, tile_rows, codes, rounded, sizes):
    model = Experts(weight_format, *sizes)
    y = moe(model, weight_format, tile_rows, codes, rounded)
    assert error(y, model.expected(rounded)) <= TOLERANCE
    assert not y[1].any()


def test_several_blocks_of_rows_of_an_expert():
    model = Experts("mxfp4", 70, 2, 2, 128, 128)
    y = moe(model, "mxfp4", 64, True, True)
    assert error(y, model.expected(True)) <= TOLERANCE


def test_inputs_become_codes_where_they_are():
    """Also a kernel that overwrites values before they are read is noticed."""
    mutant = "decoded_inputs_sm100.cuh", "  __syncthreads();  // codes overwrite", "  // codes"
    x = np.random.default_rng(0).standard_normal((64, 128)).astype(ml_dtypes.bfloat16)
    variant = decoded_gemm.Variant("mxfp4", 64, codes=True)

    def tiles_of(steps, mutant=None):
        call = Call("mxfp4", 64, True, True)
        call.kernels = decoded_gemm.compiled(variant, pairs=mutant is None, mutant=mutant)
        call.rows, call.max_blocks = struct.pack("<2Qi4x", 0, 0, 64), 1
        tiles = np.zeros(64 * 256, np.uint8)
        place, source = call.put(tiles), call.put(x.view(np.uint16))
        for call.rounding, x_place in steps(source):
            call.inputs(x_place, 0, place, 128)
        return tiles[: 64 * (128 + 4)]

    expected = tiles_of(lambda source: [(ROUNDINGS["codes"], source)])
    in_place = lambda source: [(ROUNDINGS["none"], source), (ROUNDINGS["codes"], 0)]  # noqa: E731
    np.testing.assert_array_equal(tiles_of(in_place), expected)
    assert (tiles_of(in_place, mutant) != expected).any()


@pytest.mark.parametrize(
    "sizes", [[3, 0, 66], [0, 0], [1, 1, 1], [5, 90]], ids=["gaps", "none", "ones", "too-many"]
)
def test_sorted_rows(sizes):
    """Rows behind the groups become zeros; sizes beyond the rows there are lead nowhere."""
    rng = np.random.default_rng(0)
    n, k, num_rows = 192, 128, 75
    arrays, values = weight_arrays("mxfp4", (len(sizes), n, k), spread=2)
    x = rng.standard_normal((num_rows, k)).astype(ml_dtypes.bfloat16)
    call = Call("mxfp4", 64, True, True)
    call.plan(num_rows, 1, len(sizes), group_sizes=call.put(np.array(sizes, np.int32)))
    tiles = call.garbage(2 * num_rows * k)
    call.inputs(call.put(x.view(np.uint16)), 0, tiles, k)
    y = np.full((num_rows, n), 0x7FFF, np.uint16)
    place = call.put(y)
    weight = tile("mxfp4", arrays)
    sink = struct.pack("<Qq?7x", place, n, False)
    call.product(call.kernels.product, (weight, weight), tiles, sink)
    clear = [struct.pack("<Q", p) for p in (call.blocks, call.count, place)]
    clear += [struct.pack("<q", size) for size in (num_rows, n)]
    call.launch(around()[2], (2,), SUM_THREADS, *clear)
    rows = formats.fp8_rows(x.astype(np.float64), 128)[2]
    group = np.repeat(np.arange(len(sizes)), sizes)[:num_rows]
    expected = np.zeros((num_rows, n))
    expected[: len(group)] = np.einsum("rk,rnk->rn", rows[: len(group)], values[group])
    found = y.view(ml_dtypes.bfloat16).astype(np.float64)
    assert np.linalg.norm(found - expected) <= 2e-3 * np.linalg.norm(expected)
    assert not found[len(group) :].any()
