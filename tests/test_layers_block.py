"""A whole layer against the oracle."""

import numpy as np
import pytest

from dsv4_jax.config import Config
from dsv4_jax.layers.block import Block
from dsv4_jax.numerics import Numerics
from tests.checkpoints import random_config, random_tensors
from tests.layers import CHAINED, assert_close, load, run, whole_sequence
from tests.oracles import model as oracle
from tests.oracles.weights import below, float64


@pytest.mark.parametrize(
    ("schedule", "layer", "num_tokens"),
    [
        ("flash", 0, 40),
        ("flash", 2, 131),
        ("flash", 3, 131),
        ("flash", 4, 131),
        ("pro", 1, 131),
    ],
)
def test_block(schedule, layer, num_tokens):
    """Window-only, sparse and dense layers, with hashed and scored routing."""
    config = random_config(schedule)
    typed, ratio = Config.from_dict(config), config["compress_ratios"][layer]
    w = below(random_tensors(config, seed=10), f"layers.{layer}.")
    module = load(Block(typed, ratio, layer < config["num_hash_layers"], Numerics.EXACT), w)
    rng = np.random.default_rng(16)
    streams = rng.standard_normal((2, num_tokens, config["hc_mult"], config["hidden_size"]))
    streams = (3 * streams).astype(np.float32)
    tokens = rng.integers(0, config["vocab_size"], (2, num_tokens))

    def call(module, streams, tokens):
        return module(streams, tokens, whole_sequence(typed, *tokens.shape))

    y, (weights, ids, selected) = run(module, call, streams, tokens)
    assert (selected is None) == (ratio != 4)
    for row in range(2):
        expected, routing, selection = oracle.block(
            streams[row].astype(np.float64), tokens[row], float64(w), ratio, config
        )
        assert min(routing.margin, selection.margin if selection else np.inf) > 1e-5
        assert_close(y[row], expected, CHAINED)
        np.testing.assert_array_equal(ids[row], routing.ids)
        assert_close(weights[row], routing.weights, CHAINED)
