"""Products of two NVFP4 operands against the float64 product of the decoded values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_ffi
from dsv4_jax.ops.nvfp4_gemm import nvfp4_gemm, nvfp4_grouped_gemm
from dsv4_jax.ops.quantize import nvfp4_quantize
from tests.oracles import formats
from tests.ptx.nvfp4_gemm import Problem, difference, random_problem

missing = dsv4_ffi.missing("cpu")
FFI = pytest.param("ffi", marks=pytest.mark.skipif(missing is not None, reason=missing or ""))
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["xla", FFI])


def operands(problem: Problem):
    def scales(blocks):
        # The padding, which the kernels must not read, is NaN.
        return jnp.asarray(blocks).view(jnp.float8_e4m3fn)

    tokens = (
        jnp.asarray(problem.tokens.packed),
        scales(problem.tokens.scales),
        jnp.asarray(problem.token_scales),
    )
    stacked = problem.group_sizes is not None
    select = np.stack if stacked else lambda arrays: arrays[0]
    weights = (
        jnp.asarray(select([w.packed for w in problem.weights])),
        scales(select([w.scales for w in problem.weights])),
        jnp.asarray(problem.weight_scales if stacked else problem.weight_scales[0]),
    )
    return tokens, weights


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(np.uint16)


@IMPLEMENTATIONS
@pytest.mark.parametrize("shape", [(1, 1, 32), (3, 130, 96), (17, 65, 320), (130, 40, 1056)])
def test_dense(shape, implementation):
    problem = random_problem(*shape)
    out = jax.jit(nvfp4_gemm, static_argnums=2)(*operands(problem), implementation)
    wrong, error = difference(problem, bits(out))
    assert wrong <= 2e-3 and error <= 2e-3


@IMPLEMENTATIONS
@pytest.mark.parametrize("sizes", [[3, 0, 60, 2], [0, 70], [1, 1, 1]])
def test_grouped(sizes, implementation):
    problem = random_problem(sum(sizes), 33, 160, sizes)
    group_sizes = jnp.asarray(sizes, jnp.int32)
    run = jax.jit(nvfp4_grouped_gemm, static_argnums=3)
    wrong, error = difference(problem, bits(run(*operands(problem), group_sizes, implementation)))
    assert wrong <= 2e-3 and error <= 2e-3


@pytest.mark.parametrize(
    ("tokens_width", "weights_width", "message"),
    [(64, 96, "weights: got width 96"), (48, 48, "tokens: got width 48")],
)
def test_widths(tokens_width, weights_width, message):
    tokens, _ = operands(random_problem(2, 2, tokens_width))
    _, weights = operands(random_problem(2, 2, weights_width))
    with pytest.raises(ValueError, match=message):
        nvfp4_gemm(tokens, weights)


def replaced(operand, index, array):
    return tuple(array if i == index else a for i, a in enumerate(operand))


@pytest.mark.skipif(missing is not None, reason=missing or "")
@pytest.mark.parametrize(
    ("which", "index", "change", "message"),
    [
        (0, 1, lambda a: jnp.concatenate([a, a]), "tokens_scales: got shape"),
        (0, 2, lambda a: a[:-1], "tokens_global_scale: got shape"),
        (1, 0, lambda a: a.astype(jnp.int8), "weights: got int8, expected uint8"),
        (1, 1, lambda a: a.view(jnp.uint8), "weights_scales: got uint8"),
        (1, 2, lambda a: a[None], "weights_global_scale: got shape"),
    ],
)
def test_handler_names_the_argument(which, index, change, message):
    both = list(operands(random_problem(3, 5, 64)))
    both[which] = replaced(both[which], index, change(both[which][index]))
    with pytest.raises(Exception, match=message):
        dsv4_ffi.call(
            "nvfp4_gemm", jax.ShapeDtypeStruct((3, 5), jnp.bfloat16), *both[0], *both[1]
        ).block_until_ready()


@pytest.mark.skipif(missing is not None, reason=missing or "")
def test_handler_refuses_sizes_beyond_the_tokens():
    tokens, weights = operands(random_problem(5, 3, 64, [2, 3]))
    with pytest.raises(Exception, match="group_sizes: got more than the tokens up to group 1"):
        nvfp4_grouped_gemm(tokens, weights, jnp.array([2, 4]), "ffi").block_until_ready()


def test_quantised_activations():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((9, 64)), rng.standard_normal((40, 64))
    x[3] *= 1e4
    x[4] = 0
    quantize = jax.jit(nvfp4_quantize, static_argnums=(1, 2))
    tokens = quantize(jnp.asarray(x, jnp.float32), True, "xla")
    weights = quantize(jnp.asarray(w, jnp.float32), False, "xla")
    out = np.asarray(nvfp4_gemm(tokens, weights, "xla"), np.float64)
    values = np.stack([formats.nvfp4(row[None].astype(np.float32))[3][0] for row in x])
    expected = values @ formats.nvfp4(w.astype(np.float32))[3].T
    for row in range(9):
        assert np.linalg.norm(out[row] - expected[row]) <= 3e-3 * np.linalg.norm(expected[row])
