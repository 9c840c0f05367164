"""Routing against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.config import Config
from dsv4_jax.formats import nvfp4
from dsv4_jax.layers.router import Router
from dsv4_jax.ops.topk import topk_select
from tests.checkpoints import random_config
from tests.layers import assert_close, load, run
from tests.oracles.router import normalized, route, sqrt_softplus
from tests.oracles.weights import float64

CONFIG = random_config()
E, K, D = CONFIG["n_routed_experts"], CONFIG["num_experts_per_tok"], CONFIG["hidden_size"]
FACTOR = CONFIG["routed_scaling_factor"]


def normal(*shape, seed=0, std=1.0):
    return (std * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def dense_gate(std=1.0, bias_std=0.2):
    return {
        "weight": normal(E, D, seed=1, std=std / np.sqrt(D)),
        "bias": normal(E, seed=2, std=bias_std),
    }


def hash_gate():
    table = np.random.default_rng(3).permuted(
        np.tile(np.arange(E), (CONFIG["vocab_size"], 1)), axis=1
    )
    return {"weight": dense_gate()["weight"], "tid2eid": table[:, :K]}


def routed(gate, x, token_ids=None, **options):
    mode = "hash" if "tid2eid" in gate else "dense"
    module = load(Router(Config.from_dict(CONFIG), mode, **options), gate)
    token_ids = np.zeros(x.shape[:2], int) if token_ids is None else token_ids
    weights, ids = run(module, Router.__call__, x, token_ids)
    assert weights.dtype == np.float32
    assert ids.dtype == np.int32
    return np.asarray(weights), np.asarray(ids)


@pytest.mark.parametrize("std", [0.1, 1.0, 10.0])
def test_scored_routing(std):
    gate, x = dense_gate(std), normal(2, 40, D)
    weights, ids = routed(gate, x)
    for row in range(2):
        expected = route(x[row].astype(np.float64), None, float64(gate), CONFIG)
        assert expected.margin > 1e-5
        np.testing.assert_array_equal(ids[row], expected.ids)
        assert_close(weights[row], expected.weights)


def test_bias_selects_but_does_not_weigh():
    gate, x = dense_gate(bias_std=5.0), normal(1, 40, D)
    weights, ids = routed(gate, x)
    scores = sqrt_softplus(x[0].astype(np.float64) @ gate["weight"].T.astype(np.float64))
    favourites = set(np.argsort(-gate["bias"])[:2])
    assert all(favourites <= set(row) for row in ids[0])
    assert_close(weights[0], normalized(scores, ids[0], FACTOR))


def test_equal_scores_prefer_the_lower_expert():
    gate = dense_gate() | {"bias": np.zeros(E, np.float32)}
    weights, ids = routed(gate, np.zeros((1, 2, D), np.float32))
    np.testing.assert_array_equal(ids, np.tile(np.arange(K), (1, 2, 1)))
    np.testing.assert_allclose(weights, FACTOR / K, rtol=1e-6)


def test_ties_behind_a_leader():
    bias = np.zeros(E, np.float32)
    bias[7] = 1.0
    _, ids = routed(dense_gate() | {"bias": bias}, np.zeros((1, 1, D), np.float32))
    np.testing.assert_array_equal(ids[0, 0], [7, 0, 1])


@pytest.mark.parametrize("k", [1, 3, 8])
def test_topk_order(k):
    """Descending, the lower index first among equals, zeros of both signs equal."""
    scores = np.array([[-0.0, 2.0, 0.0, -1.0, 2.0, -0.0, 2.0, 0.0]], np.float32)
    values, ids = topk_select(jnp.asarray(scores), k)
    np.testing.assert_array_equal(ids[0], [1, 4, 6, 0, 2, 5, 7, 3][:k])
    np.testing.assert_array_equal(values[0], scores[0, [1, 4, 6, 0, 2, 5, 7, 3][:k]])


def test_topk_of_valid_entries():
    scores = jnp.array([[5.0, 1.0, 1.0, 7.0], [5.0, 1.0, 1.0, 7.0], [5.0, 1.0, 1.0, 7.0]])
    valid = jnp.array([[False, True, True, True], [False, False, True, False], [False] * 4])
    values, ids = topk_select(scores, 2, valid)
    np.testing.assert_array_equal(ids, [[3, 1], [2, -1], [-1, -1]])
    np.testing.assert_array_equal(values, [[7, 1], [1, -np.inf], [-np.inf, -np.inf]])


@pytest.mark.parametrize("k", [0, 5])
def test_topk_of_too_many_is_refused(k):
    with pytest.raises(ValueError, match=f"k: got {k}"):
        topk_select(jnp.zeros((2, 4)), k)


@pytest.mark.parametrize("logit", [-30.0, 25.0, 1e4])
def test_extreme_gate_logits(logit):
    """softplus must neither overflow nor lose small values."""
    gate = dense_gate() | {"weight": np.full((E, D), logit / D, np.float32)}
    gate["weight"][3] *= 1.2
    x = np.ones((1, 1, D), np.float32)
    weights, ids = routed(gate, x)
    expected = route(x[0].astype(np.float64), None, float64(gate), CONFIG)
    np.testing.assert_array_equal(ids[0], expected.ids)
    # exp of a logit of 30 carries its rounding of 30 · 2^-24.
    assert_close(weights[0], expected.weights, 2.0**-24 * 64)


def test_scores_that_all_underflow_give_no_nan():
    gate = dense_gate() | {"weight": np.full((E, D), -1e4, np.float32)}
    weights, _ = routed(gate, np.ones((1, 1, D), np.float32))
    np.testing.assert_array_equal(weights, np.zeros((1, 1, K)))


def test_hash_routing_gathers_weights():
    gate, x = hash_gate(), normal(2, 30, D)
    token_ids = np.random.default_rng(4).integers(0, CONFIG["vocab_size"], (2, 30))
    token_ids[0, :2] = 0, CONFIG["vocab_size"] - 1
    weights, ids = routed(gate, x, token_ids)
    for row in range(2):
        expected = route(x[row].astype(np.float64), token_ids[row], float64(gate), CONFIG)
        np.testing.assert_array_equal(ids[row], expected.ids)
        assert_close(weights[row], expected.weights)
    np.testing.assert_allclose(weights.sum(axis=-1), FACTOR, rtol=1e-6)


def test_uniform_hash_weights():
    gate, x = hash_gate(), normal(1, 4, D)
    weights, ids = routed(gate, x, np.full((1, 4), 9), hash_weights="uniform")
    np.testing.assert_array_equal(ids[0], np.tile(gate["tid2eid"][9], (4, 1)))
    np.testing.assert_allclose(weights, FACTOR / K, rtol=1e-6)


@pytest.mark.parametrize("mode", ["dense", "hash"])
def test_bfloat16_operands(mode):
    """Both operands rounded, whatever they are stored as."""
    gate = dense_gate() if mode == "dense" else hash_gate()
    x = normal(1, 30, D)
    token_ids = np.random.default_rng(4).integers(0, CONFIG["vocab_size"], (1, 30))
    weights, ids = routed(gate, x, token_ids, operands="bfloat16")
    rounded = gate | {"weight": np.asarray(jnp.asarray(gate["weight"], jnp.bfloat16), np.float32)}
    x = np.asarray(jnp.asarray(x[0], jnp.bfloat16), np.float64)
    expected = route(x, token_ids[0], float64(rounded), CONFIG)
    assert expected.margin > 1e-5
    np.testing.assert_array_equal(ids[0], expected.ids)
    assert_close(weights[0], expected.weights)


@pytest.mark.parametrize("mode", ["dense", "hash"])
def test_a_packed_gate(mode):
    gate = dense_gate() if mode == "dense" else hash_gate()
    module = load(Router(Config.from_dict(CONFIG), mode, operands="nvfp4"), gate)
    module.quantize_gate()
    x = normal(1, 30, D)
    token_ids = np.random.default_rng(4).integers(0, CONFIG["vocab_size"], (1, 30))
    weights, ids = run(module, Router.__call__, x, token_ids)
    packed = nvfp4.quantize(jnp.asarray(gate["weight"], jnp.bfloat16))
    decoded = gate | {"weight": np.asarray(nvfp4.dequantize(*packed, jnp.float32))}
    x = np.asarray(jnp.asarray(x[0], jnp.bfloat16), np.float64)
    expected = route(x, token_ids[0], float64(decoded), CONFIG)
    assert expected.margin > 1e-5
    np.testing.assert_array_equal(ids[0], expected.ids)
    assert_close(weights[0], expected.weights)


def test_only_a_packed_gate_is_packed():
    module = load(Router(Config.from_dict(CONFIG), "dense"), dense_gate())
    with pytest.raises(ValueError, match="operands: got 'stored', quantize_gate expects 'nvfp4'"):
        module.quantize_gate()


def test_the_implementation_is_passed_on():
    module = load(Router(Config.from_dict(CONFIG), "dense", implementation="ffi"), dense_gate())
    with pytest.raises(NotImplementedError, match="x in bfloat16, not float32"):
        module(jnp.zeros((1, 2, D)), jnp.zeros((1, 2), jnp.int32))


@pytest.mark.parametrize("mode", ["dense", "hash"])
def test_warmup_leaves_nothing_to_compile(mode, caplog):
    gate = dense_gate() if mode == "dense" else hash_gate()
    module = load(Router(Config.from_dict(CONFIG), mode), gate)
    module.warmup([3], jnp.float32)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        module(jnp.ones((1, 3, D)), jnp.ones((1, 3), jnp.int32))
    assert "Compiling" not in caplog.text


def test_hash_routing_masks_ids_outside_the_table():
    gate, x = hash_gate(), normal(1, 3, D)
    weights, ids = routed(gate, x, np.array([[5, -1, CONFIG["vocab_size"]]]))
    np.testing.assert_array_equal(ids[0], [gate["tid2eid"][5], [-1] * K, [-1] * K])
    np.testing.assert_array_equal(weights[0, 1:], np.zeros((2, K)))


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"mode": "sparse"}, "mode"),
        ({"mode": "hash", "hash_weights": "equal"}, "hash_weights"),
        ({"mode": "dense", "hash_weights": "uniform"}, "hash_weights"),
        ({"mode": "dense", "operands": "float16"}, "operands"),
    ],
)
def test_bad_options_are_refused(options, argument):
    # With annotations checked, as in these tests, a Literal is refused before the body runs.
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        Router(Config.from_dict(CONFIG), **options)
