"""Experts against the oracle."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv4_jax.config import Config
from dsv4_jax.formats import fp8_block, mxfp4, nvfp4
from dsv4_jax.kernels import Kernels
from dsv4_jax.layers.experts import MoE, RoutedExperts, SharedExpert, clamped_swiglu
from dsv4_jax.numerics import Numerics
from tests.checkpoints import random_config, random_tensors
from tests.layers import CHAINED, assert_close, load, run
from tests.oracles import experts as oracle
from tests.oracles import formats
from tests.oracles.weights import below, float64

CONFIG = random_config()
E, K, D = CONFIG["n_routed_experts"], CONFIG["num_experts_per_tok"], CONFIG["hidden_size"]
TENSORS = random_tensors(CONFIG, seed=5)
FFN = below(TENSORS, "layers.4.ffn.")


def normal(*shape, seed=0, std=1.0):
    return (std * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def routed(x, weights, ids, valid=None, tensors=FFN, config=CONFIG):
    module = load(RoutedExperts(Config.from_dict(config), Numerics.EXACT), tensors, "experts")
    valid = np.ones(len(x), bool) if valid is None else valid
    return np.asarray(run(module, RoutedExperts.__call__, x, weights, ids, valid))


def expected_routed(x, weights, ids, tensors=FFN, config=CONFIG):
    w = below(float64(tensors), "experts.")
    x, weights = x.astype(np.float64), weights.astype(np.float64)
    return oracle.routed_experts(x, weights, ids, w, config)


def random_routes(n, seed=1):
    rng = np.random.default_rng(seed)
    ids = rng.permuted(np.tile(np.arange(E), (n, 1)), axis=1)[:, :K]
    return rng.uniform(0.1, 1.5, (n, K)).astype(np.float32), ids


def test_clamped_swiglu():
    values = np.array([-1e4, -50, -10.5, -10, -1, -0.0, 0, 1, 10, 10.5, 50, 1e4], np.float32)
    gate, up = (a.ravel() for a in np.meshgrid(values, values))
    actual = clamped_swiglu(jnp.asarray(gate), jnp.asarray(up), 10.0)
    expected = oracle.clamped_swiglu(gate.astype(np.float64), up.astype(np.float64), 10.0)
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("n", [1, 2, 17, 128, 130])
def test_routed_experts(n):
    x = normal(n, D)
    weights, ids = random_routes(n)
    assert_close(routed(x, weights, ids), expected_routed(x, weights, ids), CHAINED)


def test_all_tokens_to_the_same_experts():
    x, ids = normal(70, D), np.tile([E - 1, 0, 4], (70, 1))
    weights, _ = random_routes(70)
    assert_close(routed(x, weights, ids), expected_routed(x, weights, ids), CHAINED)


def test_an_expert_may_be_chosen_twice_by_a_token():
    x, ids = normal(9, D), np.tile([3, 3, 8], (9, 1))
    weights, _ = random_routes(9)
    assert_close(routed(x, weights, ids), expected_routed(x, weights, ids), CHAINED)


def test_clamp_is_reached_on_both_sides():
    x = normal(20, D, std=30.0)
    weights, ids = random_routes(20)
    tensors = below(float64(FFN), "experts.")
    up = np.concatenate([x @ tensors[f"{e}.w3.weight"].T for e in range(E)])
    gate = np.concatenate([x @ tensors[f"{e}.w1.weight"].T for e in range(E)])
    assert up.min() < -10 < 10 < up.max()
    assert gate.min() < -10 < 10 < gate.max()
    assert_close(routed(x, weights, ids), expected_routed(x, weights, ids), CHAINED)


def test_zero_rows_and_zero_weights_give_zero():
    x = normal(6, D)
    x[2] = 0
    weights, ids = random_routes(6)
    weights[4] = 0
    y = routed(x, weights, ids)
    assert not y[[2, 4]].any()
    assert_close(y, expected_routed(x, weights, ids), CHAINED)


def test_padding_is_left_out():
    """Rows that are not valid give 0 and take nothing from the others, whatever they hold."""
    x = normal(40, D)
    weights, ids = random_routes(40)
    valid = np.arange(40) % 3 != 1
    clean = expected_routed(x, weights, ids) * valid[:, None]
    x[~valid] = np.nan
    ids[~valid] = 0
    y = routed(x, weights, ids, valid)
    assert_close(y, clean, CHAINED)
    assert not y[~valid].any()


def test_no_valid_row():
    weights, ids = random_routes(3)
    assert not routed(normal(3, D), weights, ids, np.zeros(3, bool)).any()


def test_weight_multiplies_the_hidden_state():
    """Linear in the weight, although silu and clamp are not linear in x."""
    x, ids = normal(5, D), np.tile([1, 2, 3], (5, 1))
    weights = np.zeros((5, K), np.float32)
    weights[:, 0] = np.arange(5)
    once = expected_routed(x, np.eye(1, K).repeat(5, axis=0).astype(np.float32), ids)
    assert_close(routed(x, weights, ids), np.arange(5)[:, None] * once, CHAINED)


@pytest.mark.parametrize("magnitude", [0.0, 1.0, 30.0])
def test_shared_expert(magnitude):
    w = below(FFN, "shared_experts.")
    module = load(SharedExpert(Config.from_dict(CONFIG), Numerics.EXACT), w)
    x = normal(7, D, std=magnitude)
    expected = oracle.expert(x.astype(np.float64), float64(w), CONFIG["swiglu_limit"])
    assert_close(run(module, SharedExpert.__call__, x), expected, CHAINED)


@pytest.mark.parametrize(("layer", "hash_routing"), [(0, True), (4, False)])
def test_moe(layer, hash_routing):
    w = below(TENSORS, f"layers.{layer}.ffn.")
    module = load(MoE(Config.from_dict(CONFIG), hash_routing, Numerics.EXACT), w)
    x = normal(2, 33, D)
    token_ids = np.random.default_rng(1).integers(0, CONFIG["vocab_size"], (2, 33))
    y, weights, ids = run(module, MoE.__call__, x, token_ids, np.ones((2, 33), bool))
    for row in range(2):
        expected, routing = oracle.moe(
            x[row].astype(np.float64), token_ids[row], float64(w), CONFIG
        )
        assert routing.margin > 1e-5
        np.testing.assert_array_equal(ids[row], routing.ids)
        assert_close(weights[row], routing.weights)
        assert_close(y[row], expected, CHAINED)


QUANTIZE = {
    "fp8_block": jax.jit(fp8_block.quantize),
    "mxfp4": jax.jit(mxfp4.quantize),
    "nvfp4": jax.jit(nvfp4.quantize),
}


def decoded(linear):
    return linear.decoded(jnp.float32)


def pack(linear, weight_format):
    """Quantises a loaded linear and returns the float64 values that it then has."""
    arrays = QUANTIZE[weight_format](linear.weight[...])
    linear.repack(weight_format)
    for name, array in zip(("weight", "scale", "scale_2"), arrays, strict=False):
        setattr(linear, name, nnx.Param(array))
    if weight_format == "nvfp4":
        linear.input_scale = nnx.Param(jnp.full(linear.stack, jnp.nan))
    return np.asarray(run(linear, decoded), np.float64)


def test_routed_and_shared_experts_in_formats_of_their_own():
    module = load(MoE(Config.from_dict(CONFIG), False, Numerics.EXACT), FFN)
    tensors = float64(FFN)
    for name in ("w1", "w2", "w3"):
        for e, values in enumerate(pack(getattr(module.experts, name), "mxfp4")):
            tensors[f"experts.{e}.{name}.weight"] = values
        values = pack(getattr(module.shared_experts, name), "nvfp4")
        tensors[f"shared_experts.{name}.weight"] = values
    x = normal(1, 9, D)
    y, _, _ = run(module, MoE.__call__, x, np.zeros((1, 9), int), np.ones((1, 9), bool))
    expected, _ = oracle.moe(x[0].astype(np.float64), np.zeros(9, int), tensors, CONFIG)
    assert_close(y[0], expected, CHAINED)


def test_a_gate_in_nvfp4():
    """Scores are those of the gate's NVFP4 values and x in bfloat16."""
    numerics = replace(Numerics.EXACT, gate="nvfp4")
    module = load(MoE(Config.from_dict(CONFIG), False, numerics), FFN)
    gate = formats.to_bfloat16(FFN["gate.weight"].astype(np.float64))
    module.gate.quantize_gate()
    tensors = float64(FFN) | {"gate.weight": formats.nvfp4(gate)[3]}
    x = formats.to_bfloat16(normal(1, 9, D).astype(np.float64)).astype(np.float32)
    y, weights, ids = run(module, MoE.__call__, x, np.zeros((1, 9), int), np.ones((1, 9), bool))
    expected, routing = oracle.moe(x[0].astype(np.float64), np.zeros(9, int), tensors, CONFIG)
    assert routing.margin > 1e-5
    np.testing.assert_array_equal(ids[0], routing.ids)
    assert_close(weights[0], routing.weights)
    assert_close(y[0], expected, CHAINED)


@pytest.mark.parametrize(
    ("weight_format", "activations"), [("fp8_block", "e4m3"), ("mxfp4", "nvfp4")]
)
def test_tokens_do_not_depend_on_each_other(weight_format, activations):
    """Neither on a token with an outlier, nor on what stands in padding."""
    numerics = replace(Numerics.EXACT, activations=activations)
    module = load(RoutedExperts(Config.from_dict(CONFIG), numerics), FFN, "experts")
    for linear in (module.w1, module.w2, module.w3):
        pack(linear, weight_format)
    x = normal(6, D)
    x[1] = 0
    weights, ids = random_routes(6)
    valid = np.arange(6) < 5
    calm = np.asarray(run(module, RoutedExperts.__call__, x, weights, ids, valid))
    x[3, 7] = 1e4 * abs(x).max()
    x[5] = np.nan
    y = np.asarray(run(module, RoutedExperts.__call__, x, weights, ids, valid))
    others = [0, 1, 2, 4]
    np.testing.assert_array_equal(y[others], calm[others])
    assert not y[1].any() and not y[5].any()
    assert np.isfinite(y).all() and y[3].any()


def test_nvfp4_activations_of_routed_experts():
    """x, and the hidden state after its routing weight, to NVFP4 with a global scale per row."""
    numerics = replace(Numerics.EXACT, activations="nvfp4")
    module = load(RoutedExperts(Config.from_dict(CONFIG), numerics), FFN, "experts")
    linears = (module.w1, module.w2, module.w3)
    w1, w2, w3 = (pack(linear, "nvfp4") for linear in linears)
    x = normal(5, D)
    weights, ids = random_routes(5)
    expected = np.zeros((5, D))

    def rounded(row):
        return formats.nvfp4(row[None])[3][0]

    for n in range(5):
        for weight, e in zip(weights[n], ids[n], strict=True):
            gate, up = w1[e] @ rounded(x[n]), w3[e] @ rounded(x[n])
            hidden = oracle.clamped_swiglu(gate, up, CONFIG["swiglu_limit"]) * weight
            expected[n] += w2[e] @ rounded(hidden)
    y = run(module, RoutedExperts.__call__, x, weights, ids, np.ones(5, bool))
    assert_close(y, expected, CHAINED)
    for linear in linears:
        linear.arrange(Kernels(nvfp4_gemm="ffi"), jnp.float32)
        assert linear.is_swizzled
    # Their products are rounded to bfloat16, and codes next to a middle to the other side.
    y = run(module, RoutedExperts.__call__, x, weights, ids, np.ones(5, bool))
    assert_close(y, expected, 0.05)
