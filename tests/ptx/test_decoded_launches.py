"""The launches of gemm, moe_ffn and grouped_gemm on sm_100, host code and kernels, on the CPU."""

import ctypes
import pathlib

import jax.ffi
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.formats import tiled
from dsv4_jax.ops import experts as experts_op
from tests.oracles import formats
from tests.packed_weights import tile, weight_arrays
from tests.ptx import host, moe_instructions
from tests.ptx.decoded_gemm import FFI
from tests.ptx.emulator import GlobalMemory
from tests.ptx.test_moe import LIMIT, Experts, error

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(host.NVCC is None, reason="there is no nvcc on the PATH"),
]
HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    return host.build(
        [FFI / "cuda" / "decoded_sm100.cu", HERE / "launch_decoded.cu"],
        tmp_path_factory.mktemp("launcher"),
        architecture="100f",
        include=[FFI / "cuda", FFI / "include", pathlib.Path(jax.ffi.include_dir())],
    )


class Call:
    def __init__(self, launcher):
        self.launcher, self.memory = launcher, GlobalMemory()

    def put(self, array):
        array = np.ascontiguousarray(array)
        array = array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array
        return self.memory.place(array if array.size else np.zeros(16, array.dtype))

    def weight(self, weight):
        return [self.put(np.array(a)) for a in (weight.codes, weight.scales, weight.global_scale)]

    def run(self, name, *arguments):
        function = getattr(self.launcher.library, name)
        function.restype = ctypes.c_char_p

        def call():
            message = function(*arguments)
            if message is not None:
                raise ValueError(message.decode())

        with moe_instructions.instructions():
            return host.run(self.launcher, call, self.memory)


def pointers(addresses):
    return (ctypes.c_void_p * len(addresses))(*addresses)


def workspace(call, num_bytes):
    return ctypes.c_void_p(call.put(np.full(num_bytes, 0xA5, np.uint8)))


@pytest.mark.parametrize(
    ("num_rows", "groups", "segments"),
    [
        (37, 1, [("mxfp4", True, 130), ("bf16", False, 70), ("fp8_block", True, 64)]),
        (70, 1, [("nvfp4", True, 100), ("fp8_block", True, 128)]),
        (20, 2, [("fp8_block", False, 256)]),
        (130, 1, [("mxfp4", True, 64)]),
    ],
)
def test_gemm(launcher, num_rows, groups, segments):
    rng = np.random.default_rng(num_rows)
    k = 520
    x = rng.standard_normal((num_rows, groups, k)).astype(ml_dtypes.bfloat16)
    exact = x.astype(np.float64)
    rounded = formats.fp8_rows(exact.reshape(-1, k), 128)[2].reshape(x.shape)
    call, arrays, outs, expected = Call(launcher), [], [], []
    for weight_format, rounds, n in segments:
        weights, values = weight_arrays(weight_format, (n, k), spread=2)
        outs.append(np.full((num_rows, n), np.nan, np.float32))
        arrays += [*call.weight(tile(weight_format, weights)), call.put(outs[-1])]
        inputs = rounded if rounds else exact
        y = np.einsum("mgk,gnk->mgn", inputs, values.reshape(groups, n // groups, k))
        expected.append(y.reshape(num_rows, n))
    integers = ctypes.c_int * len(segments)
    copies = len({rounds for _, rounds, _ in segments})
    copy_bytes = -(-num_rows // 8) * 8 * groups * -(-k // 128) * 256
    call.run(
        "launch_gemm",
        ctypes.c_void_p(call.put(x)),
        *(num_rows, groups, k, len(segments)),
        integers(*(tiled.FORMATS.index(f) for f, _, _ in segments)),
        integers(*(rounds for _, rounds, _ in segments)),
        integers(*(n for _, _, n in segments)),
        pointers(arrays),
        workspace(call, copies * copy_bytes),
    )
    for out, y in zip(outs, expected, strict=True):
        assert error(out, y) <= 1e-6


@pytest.mark.parametrize(
    ("weight_format", "sizes", "round_input"),
    [
        ("mxfp4", (5, 2, 3, 256, 256), True),
        ("nvfp4", (3, 1, 2, 256, 256), False),
        ("fp8_block", (68, 2, 2, 256, 256), True),
    ],
)
def test_moe(launcher, weight_format, sizes, round_input):
    """In as much workspace as the operation gives."""
    model = Experts(weight_format, *sizes)
    num_tokens, top_k, num_experts, d, f = sizes
    ids, weights, valid = model.routes
    call = Call(launcher)
    out = np.full((num_tokens, d), np.nan, np.float32)
    arrays = [call.put(a) for a in (model.x, weights, ids, valid)]
    arrays += [a for w in model.weights for a in call.weight(w)] + [call.put(out)]
    num_rows = num_tokens * top_k
    plan = experts_op._plan_sizes(num_rows, num_experts, d)
    (num_bytes,) = experts_op._workspace(
        *plan, 2 * num_tokens * d, 2 * num_rows * f, 2 * num_rows * d
    ).shape
    arguments = [tiled.FORMATS.index(weight_format), pointers(arrays), *sizes]
    arguments += [ctypes.c_float(LIMIT), ctypes.c_bool(round_input)]
    names = call.run(
        "launch_moe", *arguments, workspace(call, num_bytes), ctypes.c_int64(num_bytes)
    )
    assert len(names) == 5 + round_input
    assert error(out, model.expected(round_input)) <= 1e-3
    with pytest.raises(ValueError, match="workspace: got 1000 bytes"):
        call.run("launch_moe", *arguments, workspace(call, 1000), ctypes.c_int64(1000))


def test_grouped(launcher):
    rng = np.random.default_rng(0)
    num_rows, k, n, sizes = 80, 256, 256, np.array([3, 0, 70], np.int32)
    weights, values = weight_arrays("fp8_block", (3, n, k), spread=2)
    x = rng.standard_normal((num_rows, k)).astype(ml_dtypes.bfloat16)
    call = Call(launcher)
    out = np.full((num_rows, n), 0x7FFF, np.uint16)
    weight = call.weight(tile("fp8_block", weights))
    arrays = [call.put(x), call.put(sizes), *weight, call.put(out)]
    plan = experts_op._plan_sizes(num_rows, 3, n)
    (num_bytes,) = experts_op._workspace(*plan, 2 * num_rows * k).shape
    call.run(
        "launch_grouped",
        tiled.FORMATS.index("fp8_block"),
        pointers(arrays),
        *(num_rows, 3, k, n),
        ctypes.c_bool(False),
        workspace(call, num_bytes),
        ctypes.c_int64(num_bytes),
    )
    found = out.view(ml_dtypes.bfloat16).astype(np.float64)
    expected = np.einsum(
        "rk,rnk->rn", x[:73].astype(np.float64), values[np.repeat([0, 1, 2], sizes)]
    )
    assert error(found[:73], expected) <= 2e-3 and not found[73:].any()
