"""The expert kernels for sm_90, compiled to PTX and executed on the CPU."""

import functools
import pathlib
import re
import struct

import ml_dtypes
import numpy as np
import pytest

from tests.oracles import experts, formats
from tests.packed_weights import tile, weight_arrays
from tests.ptx import moe_instructions, nvrtc
from tests.ptx.emulator import Deadlock, GlobalMemory, launch, parse

pytestmark = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))

FFI = pathlib.Path(__file__).parents[2] / "ffi"
LIMIT = 10.0
# Sums in float32 now and then round to the other neighbour in bfloat16.
TOLERANCE = 1e-3
GARBAGE = 0xA5
FEW, MANY, MANY_FP8 = "2, 16", "4, 64", "4, 32"
FORMATS = {"mxfp4": "kMxfp4", "nvfp4": "kNvfp4", "fp8_block": "kFp8Block"}
CONSTANTS = {
    "shared_bytes": "sizeof(Shape::Shared)",
    "threads": "kMoeThreads",
    "prepare_threads": "kPrepareThreads",
    "max_rows": "Shape::kMaxRows",
    "reorder": "2 - Shape::kWarpProducts",
}


@functools.cache
def compiled(weight_format, shape, mutant=()):
    """(Prepare, Moe, their constants); `mutant` is (file, text, replacement)."""
    headers = {"cuda_runtime.h": "#pragma once\n"}
    if mutant:
        file, text, replacement = mutant
        source = (FFI / "cuda" / file).read_text()
        assert source.count(text) == 1
        headers[file] = source.replace(text, replacement)
    constants = "".join(
        f'extern "C" __constant__ int {name} = {value};' for name, value in CONSTANTS.items()
    )
    source = f"""
        #include "moe_kernel.cuh"
        namespace dsv4 {{
        using Shape = MoeShape<WeightFormat::{FORMATS[weight_format]}, {shape}>;
        template __global__ void Moe<Shape>(const __grid_constant__ MoeProblem);
        {constants}
        }}
    """
    include = [FFI / "cuda", FFI / "include"]
    text = nvrtc.compile_ptx(source, architecture="compute_90a", include=include, headers=headers)
    numbers = {name: int(re.search(rf"\b{name} = (\d+)", text)[1]) for name in CONSTANTS}
    numbers["reorder"] -= 1
    return parse(text, "Prepare"), parse(text, "3MoeI"), numbers


class Arrays:
    """Places arrays in the emulator's memory and keeps them."""

    def __init__(self):
        self.memory = GlobalMemory()

    def put(self, array):
        return self.memory.place(np.ascontiguousarray(array))

    def garbage(self, num_bytes):
        return self.put(np.full(num_bytes, GARBAGE, np.uint8))

    def weight(self, weight):
        return struct.pack(
            "<3Q", *(self.put(a) for a in (weight.codes, weight.scales, weight.global_scale))
        )


def run(
    weight_format,
    shape,
    x,
    weights,
    *,
    routes=None,
    group_sizes=None,
    round_input=False,
    blocks=2,
    seed=0,
    mutant=(),
):
    """moe_ffn of routes (ids, weights, valid), or grouped_gemm of rows sorted by group."""
    prepare, moe, numbers = compiled(weight_format, shape, mutant)
    arrays = Arrays()
    num_tokens, width = x.shape
    d, f = weights[-1].shape
    num_experts = len(weights[-1].global_scale)
    top_k = 1 if routes is None else routes[0].shape[1]
    rows = num_tokens * top_k
    row_blocks = rows // numbers["max_rows"] + min(rows, num_experts)
    num_counters = 1 + 2 * row_blocks + d // 64
    counters = arrays.garbage(4 * num_counters)
    plan = struct.pack(
        "<6Qi4x",
        arrays.garbage(16 * row_blocks),
        *(arrays.garbage(4 * rows) for _ in range(3)),
        arrays.garbage(4),
        counters,
        num_counters,
    )
    given = arrays.put(x.view(np.uint16))
    ordered = arrays.garbage(2 * x.size)
    y = np.full((rows, d), 0x7FFF, np.uint16)
    out = np.full((num_tokens, d), np.nan, np.float32)
    if routes is None:
        routing = struct.pack(
            "<4Q3i4x", 0, 0, 0, arrays.put(group_sizes), num_tokens, 1, num_experts
        )
        hidden, place_y, place_out = ordered, arrays.put(y), 0
    else:
        ids, routing_weights, valid = routes
        routing = struct.pack(
            "<4Q3i4x",
            arrays.put(ids),
            arrays.put(valid),
            arrays.put(routing_weights),
            0,
            num_tokens,
            top_k,
            num_experts,
        )
        hidden, place_y, place_out = arrays.garbage(2 * rows * f), arrays.put(y), arrays.put(out)
    preparation = routing + plan
    preparation += struct.pack(
        "<3Q3i??2x",
        given,
        ordered,
        0 if place_out else place_y,
        width,
        d,
        numbers["max_rows"],
        round_input,
        numbers["reorder"],
    )
    no_weight = bytes(24)
    gate_up_down = [arrays.weight(weight) for weight in weights]
    problem = plan + b"".join([no_weight] * (3 - len(weights)) + gate_up_down)
    problem += struct.pack("<4Q", ordered, hidden, place_y, place_out)
    problem += struct.pack(
        "<4Q4if?3x",
        *(counters + 4 * n for n in (0, 1, 1 + row_blocks, 1 + 2 * row_blocks)),
        num_tokens,
        top_k,
        d,
        f,
        LIMIT,
        round_input,
    )
    with moe_instructions.instructions():
        launch(
            prepare,
            grid=(3,),
            block=numbers["prepare_threads"],
            arguments=[preparation],
            memory=arrays.memory,
            dynamic_shared_bytes=8 * num_experts,
            seed=seed,
        )
        launch(
            moe,
            grid=(blocks,),
            block=numbers["threads"],
            arguments=[problem],
            memory=arrays.memory,
            dynamic_shared_bytes=numbers["shared_bytes"],
            seed=seed,
        )
    return out if place_out else y.view(ml_dtypes.bfloat16)


def quantize(x, round_input):
    return formats.fp8_rows(x, 128)[2] if round_input else np.asarray(x, np.float64)


class Experts:
    """Random experts, tokens and routes; the second token is not valid, one id is out of range."""

    def __init__(self, weight_format, num_tokens, top_k, num_experts, d, f):
        rng = np.random.default_rng(num_tokens)
        shapes = ((num_experts, f, d), (num_experts, f, d), (num_experts, d, f))
        pairs = [weight_arrays(weight_format, s, seed=i, spread=2) for i, s in enumerate(shapes)]
        self.weights = [tile(weight_format, arrays) for arrays, _ in pairs]
        self.values = [values for _, values in pairs]
        x = rng.standard_normal((num_tokens, d))
        self.x = (x * (6 / np.std(x @ self.values[0][0].T))).astype(ml_dtypes.bfloat16)
        ids = rng.permuted(np.tile(np.arange(num_experts), (num_tokens, 1)), axis=1)[:, :top_k]
        ids[-1, 0] = num_experts if num_tokens > 2 else ids[-1, 0]
        valid = np.arange(num_tokens) != 1
        self.routes = (
            ids.astype(np.int32),
            rng.uniform(0.1, 1.5, ids.shape).astype(np.float32),
            valid,
        )

    def expected(self, round_input):
        ids, routing_weights, valid = self.routes
        w1, w3, w2 = self.values
        y = np.zeros(self.x.shape)
        for token, slot in np.argwhere(valid[:, None] & (ids < len(w1))):
            e = ids[token, slot]
            row = quantize(self.x[token].astype(np.float64), round_input)
            gate, up = formats.to_bfloat16(w1[e] @ row), formats.to_bfloat16(w3[e] @ row)
            hidden = experts.clamped_swiglu(gate, up, LIMIT) * routing_weights[token, slot]
            hidden = quantize(formats.to_bfloat16(hidden), round_input)
            y[token] += formats.to_bfloat16(w2[e] @ hidden)
        return y


def error(found, expected):
    return np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("weight_format", "shape", "sizes", "round_input", "blocks"),
    [
        ("mxfp4", FEW, (2, 2, 2, 1024, 512), False, 2),
        ("nvfp4", FEW, (3, 1, 2, 512, 512), True, 1),
        ("fp8_block", FEW, (3, 2, 2, 256, 256), True, 2),
        ("mxfp4", MANY, (5, 2, 2, 512, 256), True, 2),
        pytest.param("nvfp4", MANY, (35, 1, 1, 256, 256), False, 1, marks=pytest.mark.slow),
        ("fp8_block", MANY_FP8, (19, 1, 1, 256, 256), False, 2),
    ],
)
def test_experts(weight_format, shape, sizes, round_input, blocks):
    model = Experts(weight_format, *sizes)
    y = run(
        weight_format,
        shape,
        model.x,
        model.weights,
        routes=model.routes,
        round_input=round_input,
        blocks=blocks,
    )
    assert error(y, model.expected(round_input)) <= TOLERANCE
    assert not y[1].any()


@pytest.mark.parametrize(
    ("weight_format", "shape", "sizes", "round_input"),
    [("nvfp4", FEW, (2, 0, 18), True), ("mxfp4", MANY, (0, 5), False)],
)
def test_sorted_rows(weight_format, shape, sizes, round_input):
    rng = np.random.default_rng(0)
    d, f = 256, 512
    arrays, values = weight_arrays(weight_format, (len(sizes), d, f), spread=2)
    x = rng.standard_normal((sum(sizes) + 2, f)).astype(ml_dtypes.bfloat16)
    y = run(
        weight_format,
        shape,
        x,
        [tile(weight_format, arrays)],
        group_sizes=np.array(sizes, np.int32),
        round_input=round_input,
    )
    rows = quantize(x[: sum(sizes)].astype(np.float64), round_input)
    of_row = values[np.repeat(np.arange(len(sizes)), sizes)]
    assert error(y[: sum(sizes)], np.einsum("rk,rnk->rn", rows, of_row)) <= 2e-3
    assert not y[sum(sizes) :].astype(np.float32).any()


MUTANTS = {
    "hidden rows are read before they are written": (
        "moe_kernel.cuh",
        "            WaitFor((p.quantize ? p.rounded : p.hidden_done) + item.block,\n"
        "                    (p.quantize ? 1 : counts.hidden_tiles) * kConsumerWarps);\n",
        "",
    ),
    "results are combined before they are written": (
        "moe_kernel.cuh",
        "if (first == 0) WaitFor(p.columns_done + tile, *p.plan.num_blocks * kConsumerWarps);",
        "",
    ),
    "a stage is read before it is filled": (
        "moe_kernel.cuh",
        "      WaitBarrier(&shared.full[ring.slot], ring.parity);\n      const auto& from",
        "      const auto& from",
    ),
    "a stage is filled before it is released": (
        "moe_kernel.cuh",
        "    WaitBarrier(&shared.empty[ring.slot], ring.parity ^ 1);\n",
        "",
    ),
    "partial sums are added before all are there": (
        "moe_kernel.cuh",
        "      SyncThreads(kConsumerBarrier, kConsumers);\n",
        "",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    model = Experts("mxfp4", 1, 1, 1, 1024, 512)
    expected = model.expected(False)

    def fails(seed):
        try:
            y = run(
                "mxfp4", FEW, model.x, model.weights, routes=model.routes, seed=seed, mutant=mutant
            )
        except (Deadlock, RuntimeError):
            return True
        return not error(y, expected) <= TOLERANCE

    assert any(fails(seed) for seed in range(4))
