"""The lightning indexer against the oracle, over whole sequences."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.config import Config
from dsv4_jax.layers.indexer import Indexer
from dsv4_jax.layers.linear import products
from dsv4_jax.layers.rotary import Rotary
from dsv4_jax.numerics import Numerics
from dsv4_jax.ops.indexer_queries import rotated_queries
from tests.checkpoints import random_config, random_tensors
from tests.layers import CHAINED, assert_close, gated, load, run, whole_sequence
from tests.oracles import indexer as oracle
from tests.oracles.weights import below, float64

CONFIG = random_config(index_topk=5)
W = below(random_tensors(CONFIG, seed=7), "layers.2.attn.indexer.")
D, RANK = CONFIG["hidden_size"], CONFIG["q_lora_rank"]


def inputs(num_tokens, seed=0, std=1.0):
    rng = np.random.default_rng(seed)
    x, q_lora = (std * rng.standard_normal((2, num_tokens, n)) for n in (D, RANK))
    return x.astype(np.float32), q_lora.astype(np.float32)


@cache
def compress_and_select(config):
    def call(module, x, q_lora):
        view = whole_sequence(config, *x.shape[:2])
        keys = gated(module.compressor, x)
        projected = module.queries(module.wq_b(q_lora), *products(x, module.linears()))
        nothing = jnp.zeros((*x.shape[:2], config.head_dim))
        window = nothing[:, :, None], nothing, jnp.ones(config.head_dim)
        frequencies = Rotary.of_layer(config, 4).frequencies()
        streams = keys, keys
        _, prepared = view.write(*window, frequencies, config.rms_norm_eps, streams, projected)
        return module(prepared, view)

    return call


def selected(x, q_lora, w=W, config=CONFIG):
    """Ids [b, t, k] the layer chooses among the visible entries."""
    typed = Config.from_dict(config)
    module = load(Indexer(typed, 4, Numerics.EXACT), w)
    return np.asarray(run(module, compress_and_select(typed), x, q_lora))


def check(x, q_lora, w=W, config=CONFIG, clear=True):
    actual = selected(x, q_lora, w, config)
    for row in range(len(x)):
        expected = oracle.select(
            x[row].astype(np.float64), q_lora[row].astype(np.float64), float64(w), config
        )
        assert not clear or expected.margin > 1e-5
        for p, ids in enumerate(expected.ids):
            chosen = actual[row, p]
            assert (chosen[len(ids) :] == -1).all()
            np.testing.assert_array_equal(np.sort(chosen[: len(ids)]), ids)
    return actual


@pytest.mark.parametrize("num_tokens", [20, 23, 24, 100, 128])
def test_selection(num_tokens):
    check(*inputs(num_tokens))


def queries(module, q_lora, positions):
    q = module.wq_b(q_lora).reshape(*q_lora.shape[:2], module.num_heads, module.head_dim)
    frequencies = Rotary.of_layer(Config.from_dict(CONFIG), 4).frequencies()
    return rotated_queries(q, positions, frequencies, quantize=False)


def test_queries():
    _, q_lora = inputs(70)
    module = load(Indexer(Config.from_dict(CONFIG), 4, Numerics.EXACT), W)
    positions = np.tile(np.arange(70), (2, 1))
    q = run(module, queries, q_lora, positions)
    for row in range(2):
        expected = oracle.queries(q_lora[row].astype(np.float64), float64(W), CONFIG)
        assert_close(q[row], expected, CHAINED)


@pytest.mark.parametrize("num_tokens", [24, 100])
def test_equal_scores_prefer_the_lower_entry(num_tokens):
    """Zero head weights of either sign make all scores zeros of either sign."""
    w = W | {"weights_proj.weight": np.zeros_like(W["weights_proj.weight"])}
    x, q_lora = inputs(num_tokens)
    x[:, ::2] *= -1
    actual = check(x, q_lora, w, clear=False)
    np.testing.assert_array_equal(actual[:, -1], np.tile(np.arange(5), (2, 1)))


def test_repeated_tokens_tie_from_the_third_entry_on():
    """A window of equal tokens has equal pooled values, but every key has its own rotation."""
    x, q_lora = inputs(1)
    check(np.repeat(x, 100, axis=1), np.repeat(q_lora, 100, axis=1), clear=False)


def test_negative_head_weights():
    """The entries with the largest products are the worst ones."""
    rows = W["weights_proj.weight"]
    x, q_lora = inputs(100)
    x[..., 0] = 3.0
    towards = np.zeros_like(rows)
    towards[:, 0] = -abs(rows[:, 0]) - 0.1
    check(x, q_lora, W | {"weights_proj.weight": towards})


@pytest.mark.parametrize("std", [1e-3, 30.0])
def test_magnitudes(std):
    x, q_lora = inputs(100)
    check(x, (std * q_lora).astype(np.float32), clear=std > 1)


def test_top_1():
    config = CONFIG | {"index_topk": 1}
    check(*inputs(100), config=config)
