"""Experts on packed weights, and products of sorted rows, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_ffi
from dsv4_jax.ops.experts import experts_with_shared, routed_experts, sorted_gemm
from tests.oracles import experts, formats
from tests.packed_weights import tile, weight_arrays

missing = dsv4_ffi.missing(jax.default_backend().replace("gpu", "cuda"))
FFI = pytest.param("ffi", marks=pytest.mark.skipif(missing is not None, reason=missing or ""))
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["xla", FFI])
PACKED = ("mxfp4", "nvfp4", "fp8_block")
LIMIT = 10.0
TOLERANCE = 2e-3
D, F, E, N, K = 256, 256, 6, 9, 3


def float64(x):
    return np.asarray(x, np.float64)


def bfloat16(x):
    return formats.to_bfloat16(x)


def rounded(x):
    """Q1 in float64."""
    return formats.fp8_rows(x, 128)[2]


def error(found, expected):
    return np.linalg.norm(float64(found) - expected) / max(np.linalg.norm(expected), 1e-300)


# Compiled once for each shape: the reference is many small operations.
compiled_experts = jax.jit(
    routed_experts, static_argnames=("limit", "round_input", "implementation")
)
compiled_with_shared = jax.jit(
    experts_with_shared, static_argnames=("limit", "round_input", "implementation")
)
compiled_sorted = jax.jit(sorted_gemm, static_argnames=("round_input", "implementation"))


@functools.cache
def experts_of(weight_format, num_experts=E, d=D, f=F):
    return Experts(weight_format, num_experts, d, f)


class Experts:
    """Random weights of `num_experts` experts: tiled, and their values."""

    def __init__(self, weight_format, num_experts, d, f):
        shapes = ((num_experts, f, d), (num_experts, f, d), (num_experts, d, f))
        pairs = [
            weight_arrays(weight_format, shape, seed=i, spread=2) for i, shape in enumerate(shapes)
        ]
        self.num_experts, self.d = num_experts, d
        self.tiled = [tile(weight_format, arrays) for arrays, _ in pairs]
        self.values = [values for _, values in pairs]

    def inputs(self, num_tokens, seed=1):
        """x whose gates and ups are of the size of the limit, so that some are clamped."""
        x = np.random.default_rng(seed).standard_normal((num_tokens, self.d))
        size = np.std(x @ self.values[0][0].T)
        return jnp.asarray(x * (0.6 * LIMIT / size), jnp.bfloat16)

    def routes(self, num_tokens, top_k, seed=2):
        rng = np.random.default_rng(seed)
        ids = rng.permuted(np.tile(np.arange(self.num_experts), (num_tokens, 1)), axis=1)[:, :top_k]
        weights = rng.uniform(0.1, 1.5, (num_tokens, top_k)).astype(np.float32)
        return weights, ids.astype(np.int32)

    def expected(self, x, weights, ids, valid, round_input=False):
        """The oracle with the documented roundings, token by token."""
        quantize = rounded if round_input else float64
        w1, w3, w2 = self.values
        y = np.zeros(x.shape)
        for token, slot in np.argwhere(np.asarray(valid)[:, None] & (ids >= 0)):
            e = ids[token, slot]
            if e >= self.num_experts:
                continue
            row = quantize(float64(x[token]))
            gate, up = bfloat16(w1[e] @ row), bfloat16(w3[e] @ row)
            hidden = experts.clamped_swiglu(gate, up, LIMIT) * float64(weights[token, slot])
            y[token] += bfloat16(w2[e] @ quantize(bfloat16(hidden)))
        return y

    def run(self, x, weights, ids, valid, implementation, **options):
        return np.asarray(
            compiled_experts(
                x,
                jnp.asarray(weights),
                jnp.asarray(ids),
                jnp.asarray(valid),
                *self.tiled,
                limit=LIMIT,
                implementation=implementation,
                **options,
            )
        )

    def check(self, x, weights, ids, valid, implementation, round_input=False):
        y = self.run(x, weights, ids, valid, implementation, round_input=round_input)
        assert y.dtype == np.float32
        expected = self.expected(x, weights, ids, valid, round_input)
        assert np.isfinite(expected).all()
        assert error(y, expected) <= TOLERANCE
        return y


@IMPLEMENTATIONS
@pytest.mark.parametrize("weight_format", PACKED)
@pytest.mark.parametrize("round_input", [False, True])
def test_formats(weight_format, round_input, implementation):
    model = experts_of(weight_format)
    weights, ids = model.routes(N, K)
    model.check(model.inputs(N), weights, ids, np.ones(N, bool), implementation, round_input)


def test_weights_of_16_bits():
    model = experts_of("bf16")
    model.check(model.inputs(N), *model.routes(N, K), np.ones(N, bool), None)


@pytest.mark.parametrize(
    ("num_experts", "num_tokens", "top_k", "implementation"),
    [(1, 1, 1, "ffi"), (5, 7, 5, "xla"), (9, 1, 2, "ffi")],
)
def test_numbers_of_experts(num_experts, num_tokens, top_k, implementation):
    if implementation == "ffi" and missing is not None:
        pytest.skip(missing)
    model = experts_of("mxfp4", num_experts)
    routes = model.routes(num_tokens, top_k)
    model.check(model.inputs(num_tokens), *routes, np.ones(num_tokens, bool), implementation)


@IMPLEMENTATIONS
def test_all_tokens_to_one_expert(implementation):
    """Also more than once: an id may come twice in a row."""
    model = experts_of("nvfp4")
    weights, _ = model.routes(N, K)
    ids = np.full((N, K), E - 2, np.int32)
    model.check(model.inputs(N), weights, ids, np.ones(N, bool), implementation)


@IMPLEMENTATIONS
def test_padding_takes_no_part(implementation):
    """Neither tokens that are not valid, whatever they hold, nor ids outside [0, E)."""
    model = experts_of("mxfp4")
    x = model.inputs(N)
    weights, ids = model.routes(N, K)
    valid = np.arange(N) % 3 != 1
    ids[2, 1], ids[3, 0] = -1, E
    ids[~valid] = 0
    x = jnp.where(valid[:, None], x, jnp.nan)
    y = model.check(x, weights, ids, valid, implementation)
    assert not y[~valid].any()
    assert not model.run(x, weights, ids, np.zeros(N, bool), implementation).any()


def test_no_tokens():
    model = experts_of("mxfp4")
    x, valid = jnp.zeros((0, D), jnp.bfloat16), np.ones(0, bool)
    assert model.run(x, *model.routes(0, K), valid, None).shape == (0, D)


@IMPLEMENTATIONS
@pytest.mark.parametrize("round_input", [False, True])
def test_outlier_and_zeros(round_input, implementation):
    model, valid = experts_of("mxfp4"), np.ones(N, bool)
    x = model.inputs(N).at[2].set(0)
    weights, ids = model.routes(N, K)
    y = model.check(x.at[1, 5].mul(1e4), weights, ids, valid, implementation, round_input)
    assert np.isfinite(y).all()
    assert not y[2].any()
    others = np.arange(N) != 1
    without = model.run(x, weights, ids, valid, implementation, round_input=round_input)
    np.testing.assert_array_equal(y[others], without[others])


def check_with_shared(
    weight_format, shared_format, num_tokens, round_input, implementation, **size
):
    model, shared = (
        experts_of(weight_format, **size),
        experts_of(shared_format, 1, **sizes_of(size)),
    )
    x = model.inputs(num_tokens)
    weights, ids = model.routes(num_tokens, K)
    valid = np.arange(num_tokens) % 3 != 1
    y = compiled_with_shared(
        x,
        jnp.asarray(weights),
        jnp.asarray(ids),
        jnp.asarray(valid),
        tuple(model.tiled),
        jax.tree.map(lambda a: a[0], tuple(shared.tiled)),
        limit=LIMIT,
        round_input=round_input,
        implementation=implementation,
    )
    expected = model.expected(x, weights, ids, valid, round_input)
    one, everyone = np.ones((num_tokens, 1), np.float32), np.ones(num_tokens, bool)
    expected += shared.expected(x, one, np.zeros((num_tokens, 1), int), everyone, round_input)
    assert error(y, expected) <= TOLERANCE
    return np.asarray(y)


def sizes_of(size):
    return {name: size[name] for name in ("d", "f") if name in size}


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("weight_format", "shared_format", "num_tokens", "round_input"),
    [
        ("mxfp4", "fp8_block", 3, True),
        ("nvfp4", "fp8_block", 3, False),
        ("fp8_block", "mxfp4", N, True),
    ],
)
def test_with_shared(weight_format, shared_format, num_tokens, round_input, implementation):
    check_with_shared(weight_format, shared_format, num_tokens, round_input, implementation)


def test_errors_with_shared():
    model, shared = experts_of("mxfp4"), experts_of("fp8_block", 1)
    x, valid = model.inputs(2), jnp.ones(2, bool)
    routes = (*map(jnp.asarray, model.routes(2, 2)), valid)
    with pytest.raises(ValueError, match=r"shared w1: got \(256, 256\) in a stack \(1,\)"):
        experts_with_shared(x, *routes, tuple(model.tiled), tuple(shared.tiled), limit=LIMIT)


def test_errors():
    model, other = experts_of("mxfp4"), experts_of("nvfp4")
    x, valid = model.inputs(2), jnp.ones(2, bool)
    weights, ids = map(jnp.asarray, model.routes(2, 2))
    w1, w3, w2 = model.tiled

    def run(*tiled_weights, x=x, **options):
        return routed_experts(x, weights, ids, valid, *tiled_weights, limit=LIMIT, **options)

    wide = experts_of("mxfp4", f=512)
    with pytest.raises(ValueError, match=r"w2: got \(512, 256\), expected \(256, 512\)"):
        run(wide.tiled[0], wide.tiled[1], wide.tiled[0])
    with pytest.raises(ValueError, match="w3: got format 'nvfp4', w1 has 'mxfp4'"):
        run(w1, other.tiled[1], w2)
    fewer = experts_of("mxfp4", E - 1)
    with pytest.raises(ValueError, match=r"w2: got a stack \(5,\)"):
        run(w1, w3, fewer.tiled[2])
    with pytest.raises(ValueError, match="implementation"):
        run(w1, w3, w2, implementation="fast")
    with pytest.raises(NotImplementedError, match="bfloat16 inputs, not float32"):
        run(w1, w3, w2, x=x.astype(jnp.float32), implementation="ffi")
    narrow = experts_of("mxfp4", d=128)
    with pytest.raises(NotImplementedError, match="multiples of 256"):
        run(*narrow.tiled, x=x[:, :128], implementation="ffi")


@pytest.mark.skipif(missing is not None, reason=missing or "")
def test_handler_errors():
    model = experts_of("mxfp4")
    weights, ids = map(jnp.asarray, model.routes(2, 2))
    operands = [model.inputs(2), weights, ids, jnp.ones(2, bool)]
    operands += [a for w in model.tiled for a in (w.codes, w.scales, w.global_scale)]
    results = [
        jax.ShapeDtypeStruct((2, D), jnp.float32),
        jax.ShapeDtypeStruct((1 << 20,), jnp.uint8),
    ]

    def run(changed, array, weight_format=0):
        changed_operands = list(operands)
        changed_operands[changed] = array
        jax.block_until_ready(
            dsv4_ffi.call(
                "moe_ffn",
                results,
                *changed_operands,
                weight_format=np.int32(weight_format),
                limit=np.float32(LIMIT),
                round_input=False,
            )
        )

    for changed, array, message in [
        (0, operands[0].astype(jnp.float32), "x: got float32, expected bfloat16"),
        (1, weights[:1], "weights: got shape"),
        (2, ids[:, :1], "expert_ids: got shape"),
        (7, operands[7][:, :1], "w3 codes: got shape"),
        (11, operands[11][:, :-1], "w2 scales: got shape"),
        (12, operands[12][:-1], "w2 codes: got shape|w2 global_scale: got shape"),
    ]:
        with pytest.raises(Exception, match=message):
            run(changed, array)
    with pytest.raises(Exception, match="weight_format: got 7"):
        run(0, operands[0], weight_format=7)


def sorted_case(weight_format, sizes, n=256, k=256, round_input=False, rows=None):
    arrays, values = weight_arrays(weight_format, (len(sizes), n, k), spread=2)
    rows = sum(sizes) if rows is None else rows
    x = jnp.asarray(np.random.default_rng(3).standard_normal((rows, k)), jnp.bfloat16)
    quantize = rounded if round_input else float64
    expected = np.zeros((rows, n))
    ends = np.cumsum(sizes)
    for e, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        expected[end - size : end] = quantize(float64(x[end - size : end])) @ values[e].T
    return x, jnp.asarray(sizes, jnp.int32), tile(weight_format, arrays), expected


@IMPLEMENTATIONS
@pytest.mark.parametrize("weight_format", PACKED)
@pytest.mark.parametrize("sizes", [(5, 0, 1, 9), (0, 0, 15, 0), (0, 0, 0, 0)], ids=str)
def test_sorted_gemm(weight_format, sizes, implementation):
    round_input = sizes[0] == 5
    x, group_sizes, weight, expected = sorted_case(weight_format, sizes, round_input=round_input)
    y = compiled_sorted(
        x, group_sizes, weight, round_input=round_input, implementation=implementation
    )
    assert y.dtype == jnp.bfloat16
    assert error(y, expected) <= TOLERANCE


@IMPLEMENTATIONS
def test_rows_after_the_last_group(implementation):
    x, group_sizes, weight, expected = sorted_case("mxfp4", (2, 3), rows=9)
    y = compiled_sorted(x, group_sizes, weight, implementation=implementation)
    assert error(y, expected) <= TOLERANCE
    assert not np.asarray(y)[5:].any()


def test_sorted_gemm_errors():
    x, group_sizes, weight, _ = sorted_case("mxfp4", (2, 3))
    with pytest.raises(ValueError, match=r"group_sizes: got \[2, 4\], .* 5 rows or fewer"):
        sorted_gemm(x, group_sizes.at[1].set(4), weight)
    with pytest.raises(ValueError, match=r"group_sizes: got \[-1, 3\]"):
        sorted_gemm(x, group_sizes.at[0].set(-1), weight)
    with pytest.raises(ValueError, match=r"group_sizes: got \(1,\), weight is a stack \(2,\)"):
        sorted_gemm(x, group_sizes[:1], weight)
    with pytest.raises(ValueError, match="x: got width 64, weight has 256 inputs"):
        sorted_gemm(x[:, :64], group_sizes, weight)


@pytest.mark.gpu
@pytest.mark.parametrize("weight_format", PACKED)
@pytest.mark.parametrize("num_tokens", [1, 3, 8, 17, 64, 65, 130, 300])
@pytest.mark.parametrize("f", [256, 512])
def test_kernel_sizes(weight_format, num_tokens, f):
    model = experts_of(weight_format, num_experts=16, d=512, f=f)
    x = model.inputs(num_tokens)
    for top_k in (1, 6):
        weights, ids = model.routes(num_tokens, top_k)
        valid = np.random.default_rng(4).random(num_tokens) < 0.9
        for round_input in (False, True):
            model.check(x, weights, ids, valid, "ffi", round_input)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("weight_format", PACKED)
@pytest.mark.parametrize(("d", "f"), [(4096, 2048), (7168, 3072)])
def test_kernel_of_real_widths(weight_format, d, f):
    model = experts_of(weight_format, num_experts=7, d=d, f=f)
    for num_tokens in (2, 40):
        x = model.inputs(num_tokens)
        weights, ids = model.routes(num_tokens, 6)
        model.check(x, weights, ids, np.ones(num_tokens, bool), "ffi", True)


@pytest.mark.gpu
@pytest.mark.parametrize("weight_format", PACKED)
@pytest.mark.parametrize("round_input", [False, True])
@pytest.mark.parametrize("sizes", [(1, 0, 3), (0, 17, 5, 0), (0, 200), (0, 0)], ids=str)
def test_kernel_of_sorted_rows(weight_format, sizes, round_input):
    x, group_sizes, weight, expected = sorted_case(
        weight_format, sizes, 512, 512, round_input, rows=sum(sizes) + 2
    )
    y = compiled_sorted(x, group_sizes, weight, round_input=round_input, implementation="ffi")
    assert error(y, expected) <= TOLERANCE
    assert not np.asarray(y)[sum(sizes) :].any()


@pytest.mark.gpu
@pytest.mark.parametrize("weight_format", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("num_tokens", [1, 2, 7])
@pytest.mark.parametrize(("d", "f"), [(512, 256), (256, 768)])
def test_kernel_with_shared(weight_format, num_tokens, d, f):
    for round_input in (False, True):
        runs = [
            check_with_shared(weight_format, "fp8_block", num_tokens, round_input, "ffi", d=d, f=f)
            for _ in range(3)
        ]
        for run in runs[1:]:
            np.testing.assert_array_equal(run, runs[0])


@pytest.mark.gpu
def test_kernel_is_deterministic():
    """Bit for bit, also where tokens share experts and blocks are full."""
    model = experts_of("mxfp4", num_experts=4, d=512, f=256)
    x = model.inputs(200)
    weights, ids = model.routes(200, 3)
    runs = [model.run(x, weights, ids, np.ones(200, bool), "ffi") for _ in range(4)]
    for run in runs[1:]:
        np.testing.assert_array_equal(run, runs[0])
