"""The router's CUDA kernels, as nvcc compiles them for sm_90, in the emulator."""

import contextlib
import dataclasses
import functools
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from tests.oracles.router import normalized, scored_ids, sqrt_softplus
from tests.ptx import attention_instructions, warp_instructions  # noqa: F401
from tests.ptx.emulator import GlobalMemory, lanes, launch, machine, parse
from tests.ptx.test_hyper_connections import INSTRUCTIONS
from tests.test_ops_grouped import expected_plan

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="there is no nvcc to compile with"
)
SOURCES = Path(__file__).parents[2] / "ffi"
SCALE = 2.5


class Variables(bytearray):
    """The kernel's global variables: zero at first, kept from launch to launch."""

    def ljust(self, *_):
        return self


@functools.cache
def ptx(name: str) -> str:
    command = ["nvcc", "-std=c++17", "-O3", "-arch=compute_90a", "-ptx", SOURCES / "cuda" / name]
    command += ["-I", SOURCES / "include", "-isystem", jax.ffi.include_dir()]
    with tempfile.NamedTemporaryFile(suffix=".ptx") as output:
        subprocess.run([*command, "-o", output.name], check=True)
        return Path(output.name).read_text()


@functools.cache
def kernel(file: str, mangled: str):
    """The one whose mangled name has this in it."""
    text = ptx(file)
    (name,) = [n for n in re.findall(r"\.entry\s+([\w$]+)", text) if mangled in n]
    parsed = parse(text, name)
    return dataclasses.replace(parsed, constants=Variables(parsed.constants))


def struct_bytes(layout, *values):
    """As a C++ compiler lays it out; the size is a multiple of 8."""
    data = struct.pack("@" + layout, *values)
    return data.ljust(-(-len(data) // 8) * 8, b"\0")


def values(layout, *items):
    return [struct.pack("@" + c, item) for c, item in zip(layout, items, strict=True)]


def outputs(num_tokens, k):
    return np.full((num_tokens, k), np.nan, np.float32), np.full((num_tokens, k), -7, np.int32)


def check_routing(weights, ids, logits, bias, k):
    scores = sqrt_softplus(logits.astype(np.float64))
    expected = scored_ids((scores.astype(np.float32) + bias).astype(np.float64), 0.0, k)
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_allclose(weights, normalized(scores, ids, SCALE), rtol=2e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("num_experts", "k", "variant"),
    [
        (256, 6, "ILi6ELi8ELb1"),
        (384, 6, "ILi6ELi12ELb1"),
        (20, 4, "ILi6ELi1ELb0"),
        (200, 16, "ILi16ELi12ELb0"),
        (1000, 6, "ILi6ELi32ELb0"),
    ],
)
def test_activation_topk(num_experts, k, variant, tied):
    rng = np.random.default_rng(num_experts)
    logits = rng.standard_normal((5, num_experts)).astype(np.float32)
    bias = rng.normal(0, 0.2, num_experts).astype(np.float32)
    logits[0].sort()  # one lane has the best
    if tied:
        logits, bias = np.round(logits), np.round(5 * bias)
    weights, ids = outputs(5, k)
    memory = GlobalMemory()
    pointers = [memory.place(a) for a in (logits, bias, weights, ids)]
    arguments = values("PPiiif", *pointers[:2], 5, num_experts, k, SCALE)
    arguments += values("PP", *pointers[2:])
    launch(
        kernel("router_topk.cu", variant),
        grid=(2, 1),
        block=128,
        arguments=arguments,
        memory=memory,
    )
    check_routing(weights, ids, logits, bias, k)


def bfloat16(rng, *shape, std=1.0):
    """Bits, and the same numbers in float64."""
    bits = (rng.normal(0, std, shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@contextlib.contextmanager
def dense_instructions():
    copies = {name: build for name, build in INSTRUCTIONS.items() if name.startswith("cp.async")}
    builders = copies | {"prefetch.global.L2": lambda i: lambda warp, mask: None}
    with attention_instructions.instructions(), mock.patch.dict(lanes._BUILDERS, builders):
        yield


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "width", "k", "shape"),
    [
        (3, 20, 520, 4, (1, 2, 12, 0)),
        (12, 20, 520, 6, (2, 2, 12, 0)),
        (18, 20, 200, 4, (1, 12, 0)),
        (1, 40, 64, 6, (1, 2, 12, 0)),
    ],
)
def test_dense_router(monkeypatch, num_tokens, num_experts, width, k, shape):
    """Several schedules and launches; each leaves the arena at zero."""
    # The blocks wait for each other.
    monkeypatch.setattr(machine, "CLUSTERS_AT_ONCE", 132)
    name = "".join(f"L{'ib'[i == len(shape) - 1]}{value}E" for i, value in enumerate(shape))
    if len(shape) == 4:
        kind, experts, columns, shared_bytes = "FewTokens", 16, 8 * shape[1] * 32, 0
    else:
        kind, experts, columns = "ManyTokens", 32, 256 * shape[0]
        shared_bytes = (64 + experts) * columns * 2 + 1024
    compiled = kernel("router_dense.cu", f"{kind}I{name}EENS_12Bfloat16Gate")
    num_tiles = -(-num_experts // experts)
    num_slices = -(-width // columns)
    lanes_of_quad = 32
    while lanes_of_quad * -(-num_experts // 4) > 256:
        lanes_of_quad //= 2
    for seed in range(2 if kind == "FewTokens" else 1):
        rng = np.random.default_rng(seed)
        x, x64 = bfloat16(rng, num_tokens, width)
        gate, gate64 = bfloat16(rng, num_experts, width, std=2 * width**-0.5)
        bias = rng.normal(0, 0.2, num_experts).astype(np.float32)
        weights, ids = outputs(num_tokens, k)
        memory = GlobalMemory()
        x, gate, bias_, weights_, ids_ = map(memory.place, (x, gate, bias, weights, ids))
        sizes = (num_tokens, width, num_experts, k)
        plan = (columns, num_slices, lanes_of_quad, 64)
        problem = struct_bytes("PPiiiifiiiIPP", x, bias_, *sizes, SCALE, *plan, weights_, ids_)
        with dense_instructions():
            launch(
                compiled,
                grid=(num_tiles, num_slices),
                block=288,
                dynamic_shared_bytes=shared_bytes,
                arguments=[problem, struct_bytes("Pq", gate, width)],
                memory=memory,
                seed=seed,
            )
        check_routing(weights, ids, x64 @ gate64.T, bias, k)
        assert not np.frombuffer(compiled.constants, np.uint8).any()


@pytest.mark.parametrize(("num_experts", "width", "k"), [(20, 72, 6), (256, 1024, 6), (16, 40, 16)])
def test_hash_router(num_experts, width, k):
    rng = np.random.default_rng(k)
    x, x64 = bfloat16(rng, 3, width)
    gate, gate64 = bfloat16(rng, num_experts, width, std=width**-0.5)
    table = np.array([rng.permutation(num_experts)[:k] for _ in range(9)], np.int32)
    token_ids = np.array([4, -1, 8], np.int32)
    weights, ids = outputs(3, k)
    memory = GlobalMemory()
    pointers = [memory.place(a) for a in (x, token_ids, table, weights, ids, gate)]
    problem = struct_bytes("PPPiiifPP", *pointers[:3], width, 9, k, SCALE, *pointers[3:5])
    launch(
        kernel("router_hash.cu", "Bfloat16Gate"),
        grid=(3,),
        block=2 * k * 32,
        arguments=[problem, struct_bytes("Pq", pointers[5], width)],
        memory=memory,
    )
    known = [0, 2]
    np.testing.assert_array_equal(ids, [table[4], [-1] * k, table[8]])
    expected = normalized(sqrt_softplus(x64 @ gate64.T)[known], ids[known], SCALE)
    np.testing.assert_allclose(weights[known], expected, rtol=2e-5)
    np.testing.assert_array_equal(weights[1], np.zeros(k))


@pytest.mark.parametrize(
    ("num_tokens", "k", "num_experts", "tile"),
    [(0, 6, 8, 1), (1, 6, 256, 1), (64, 6, 20, 4), (50, 3, 384, 3), (700, 2, 12, 32)],
)
def test_route_plan(num_tokens, k, num_experts, tile):
    rng = np.random.default_rng(num_tokens)
    num_rows = num_tokens * k
    experts = rng.integers(-1, num_experts + 1, num_rows).astype(np.int32)
    valid = rng.random(num_tokens) < 0.8
    expected = [np.array(a, np.int32) for a in expected_plan(experts, valid, num_experts, tile)]
    # The emulator has no empty arrays.
    actual = [np.full(max(len(a), 1), -9, np.int32) for a in expected]
    memory = GlobalMemory()
    place = [a if len(a) else np.zeros(1, a.dtype) for a in (experts, valid)]
    pointers = [memory.place(a) for a in (*place, *actual)]
    sizes = (num_rows, k, num_experts, tile, len(expected[0]))
    launch(
        kernel("router_plan.cu", "RoutePlan"),
        grid=(8,),
        block=512,
        cluster=8,
        dynamic_shared_bytes=4 * (20 * num_experts + 1),
        arguments=[struct_bytes("PPiiiiiPPPP", *pointers[:2], *sizes, *pointers[2:])],
        memory=memory,
    )
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a[: len(e)], e)
