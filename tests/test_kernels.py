"""Which implementation of each operation a model runs: chosen in one place, obeyed everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_jax
from dsv4_jax import kernels
from dsv4_jax.kernels import Kernels, operations
from dsv4_jax.numerics import Numerics
from dsv4_jax.ops.dispatch import dispatch
from dsv4_jax.ops.quantize import nvfp4_quantize
from dsv4_jax.variants import rebuilt
from tests.checkpoints import random_config
from tests.weight_formats import checkpoint

# What the GEMM and MoE kernels hold.
CONFIG = random_config(
    hidden_size=256,
    moe_intermediate_size=256,
    o_lora_rank=128,
    num_hidden_layers=1,
    compress_ratios=[4],
    num_hash_layers=0,
    n_routed_experts=4,
)
NUMERICS = Numerics(gate="bfloat16")
# Of BF16 activations that are rounded after sums in another order.
TOLERANCE = 0.02


def xla(x):
    return x


def kernel(x):
    return x + 1


def refuses(x):
    raise NotImplementedError("not here")


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (Kernels.FASTEST, 0),
        (Kernels.XLA, 0),
        (Kernels("ffi"), 1),
        (Kernels("pallas"), 0),  # there is none: automatic
    ],
)
def test_what_dispatch_runs(chosen, expected):
    with kernels.running(chosen):
        assert dispatch(None, {"ffi": kernel, "xla": xla}, jnp.float32(0)) == expected
        assert dispatch("xla", {"ffi": kernel, "xla": xla}, jnp.float32(0)) == 0
    assert dispatch(None, {"ffi": kernel, "xla": xla}, jnp.float32(0)) == 0


def test_a_kernel_asked_for_never_falls_back():
    with kernels.running(Kernels("ffi")), pytest.raises(NotImplementedError, match="not here"):
        dispatch(None, {"ffi": refuses, "xla": xla}, jnp.float32(0))
    x = jnp.ones((1, 16), jnp.float16)
    with kernels.running(Kernels(quantize="ffi")), pytest.raises(NotImplementedError):
        nvfp4_quantize(x)
    with kernels.running(Kernels(gemm="ffi")):
        nvfp4_quantize(x)
    with (
        kernels.running(Kernels(quantize="pallas")),
        pytest.raises(ValueError, match="implementation: got 'pallas', expected one of 'ffi'"),
    ):
        nvfp4_quantize(x)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"got operation 'gem', expected one of .*experts, .*gemm"):
        Kernels(gem="ffi")
    with pytest.raises(ValueError, match="kernels: got 'cuda', expected one of xla, ffi, pallas"):
        Kernels("cuda")
    assert {"experts", "gemm", "indexer", "router", "topk"} <= set(operations())
    assert "dispatch" not in operations()


def test_what_jit_has_traced_is_kept_by_choice():
    @jax.jit
    def f(x):
        return dispatch(None, {"ffi": kernel, "xla": xla}, x)

    for chosen, expected in ((Kernels.XLA, 0), (Kernels("ffi"), 1), (Kernels.XLA, 0)):
        with kernels.running(chosen):
            assert f(jnp.float32(0)) == expected


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("kernels"), "mxfp4", config=CONFIG)


TOKENS = np.random.default_rng(0).integers(3, CONFIG["vocab_size"], (1, 40))


@pytest.fixture(scope="module")
def expected(directory):
    model = dsv4_jax.load(directory, dtype="bfloat16", numerics=NUMERICS, kernels=Kernels.XLA)
    return np.asarray(model.forward(TOKENS))


@pytest.mark.parametrize(
    "mix",
    [
        Kernels("xla", experts="ffi"),
        Kernels("xla", gemm="ffi", experts="ffi", dense_router="ffi", quantize="ffi"),
    ],
)
def test_a_model_on_kernels(mix, directory, expected):
    """The model holds the choice; the CPU handlers give what XLA gives."""
    model = dsv4_jax.load(directory, dtype="bfloat16", numerics=NUMERICS, kernels=mix)
    assert model.kernels == mix
    traced = jax.jit(dsv4_jax.forward, static_argnums=0).trace(model.graph, model.params, TOKENS)
    program = str(traced.jaxpr)
    for operation, call in (("gemm", "gemm"), ("experts", "moe_ffn"), ("dense_router",) * 2):
        asked = mix.implementation(operation, ("ffi", "xla")) == "ffi"
        assert (f"dsv4_{call}" in program) == asked
    difference = np.asarray(traced.lower().compile()(model.params, TOKENS)) - expected
    assert np.linalg.norm(difference) < TOLERANCE * np.linalg.norm(expected)


def test_only_stored_weights_are_saved_and_converted(directory, tmp_path):
    model = dsv4_jax.load(directory, dtype="bfloat16", kernels=Kernels("xla", gemm="ffi"))
    with pytest.raises(ValueError, match=r"load with kernels=Kernels.XLA .* to save"):
        model.save(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"load with kernels=Kernels.XLA .* to convert"):
        rebuilt(model, experts="nvfp4")


def test_kernels_that_are_for_one_device():
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    for chosen in (Kernels("ffi"), Kernels(experts="ffi")):
        with pytest.raises(ValueError, match=r"kernels: got Kernels\(.*\) with a mesh"):
            dsv4_jax.load("mini", mesh=mesh, kernels=chosen)


def test_a_program_serves_one_choice(directory):
    """A pure function that was compiled for one model is traced again for another."""
    models = [
        dsv4_jax.load(directory, dtype="float32", kernels=chosen)
        for chosen in (Kernels.XLA, Kernels("xla", dense_router="ffi"))
    ]
    traced = jax.jit(dsv4_jax.forward, static_argnums=0)
    traced.trace(models[0].graph, models[0].params, TOKENS)
    with pytest.raises(NotImplementedError, match="dense_router"):
        traced.trace(models[1].graph, models[1].params, TOKENS)
