"""The multi-token prediction block against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv4_jax.config import Config
from dsv4_jax.layers.mtp import MTPBlock
from dsv4_jax.numerics import Numerics
from dsv4_jax.transformer import Transformer, draft_logits
from tests.checkpoints import random_config, random_tensors
from tests.layers import CHAINED, assert_close, load, run, whole_sequence
from tests.oracles import model as oracle
from tests.oracles import mtp
from tests.oracles.weights import below

# One backbone layer is enough to have streams.
CONFIG = random_config(
    mtp=True, num_hidden_layers=1, compress_ratios=[4, 0], num_hash_layers=0, index_topk=4
)
TENSORS = random_tensors(CONFIG, seed=12)
WINDOW = CONFIG["sliding_window"]


@pytest.mark.parametrize("num_tokens", [1, WINDOW + 1])
def test_draft(num_tokens):
    rng = np.random.default_rng(13)
    shape = (2, num_tokens, CONFIG["hc_mult"], CONFIG["hidden_size"])
    streams = (3 * rng.standard_normal(shape)).astype(np.float32)
    streams[1, 0] = 0
    next_ids = rng.integers(0, CONFIG["vocab_size"], (2, num_tokens))
    typed = Config.from_dict(CONFIG)
    module = load(MTPBlock(typed, Numerics.EXACT), below(TENSORS, "mtp.0."))

    def call(module, streams, embedding, ids):
        return module.draft(streams, embedding, ids, whole_sequence(typed, *ids.shape))[:2]

    embedding = TENSORS["embed.weight"][next_ids]
    hidden, drafted = run(module, call, streams, embedding, next_ids)
    logits = np.asarray(hidden, np.float64) @ TENSORS["head.weight"].T.astype(np.float64)
    for row in range(2):
        expected, further = mtp.draft(
            CONFIG, TENSORS, streams[row].astype(np.float64), next_ids[row]
        )
        assert_close(drafted[row], further, CHAINED)
        assert_close(logits[row], expected, CHAINED)


def test_a_draft_can_be_drafted_from():
    """The streams of one step are those of the next."""
    tokens = np.random.default_rng(14).integers(0, CONFIG["vocab_size"], 40)
    typed = Config.from_dict(CONFIG)
    module = load(MTPBlock(typed, Numerics.EXACT), below(TENSORS, "mtp.0."))
    _, seen = oracle.forward(CONFIG, TENSORS, tokens[:-2], capture=True)

    def twice(module, streams, first, second, first_ids, second_ids):
        view = whole_sequence(typed, *first_ids.shape)
        _, streams, _ = module.draft(streams, first, first_ids, view)
        view = whole_sequence(typed, *first_ids.shape)
        return module.draft(streams, second, second_ids, view)[1]

    following, after = tokens[None, 1:-1], tokens[None, 2:]
    embed = TENSORS["embed.weight"]
    actual = run(
        module, twice, seen.streams[-1][None], embed[following], embed[after], following, after
    )
    _, once = mtp.draft(CONFIG, TENSORS, seen.streams[-1], following[0])
    _, expected = mtp.draft(CONFIG, TENSORS, once, after[0])
    assert_close(actual[0], expected, CHAINED)


def test_draft_logits_of_the_model():
    tokens = np.random.default_rng(15).integers(0, CONFIG["vocab_size"], (1, 60))
    module = load(Transformer(Config.from_dict(CONFIG), jnp.float32, Numerics.EXACT), TENSORS)
    graph, params = nnx.split(module)
    actual = jax.jit(draft_logits)(graph, params, jnp.asarray(tokens, jnp.int32))
    _, seen = oracle.forward(CONFIG, TENSORS, tokens[0, :-1], capture=True)
    assert seen.margin > 1e-5
    expected, _ = mtp.draft(CONFIG, TENSORS, seen.streams[-1], tokens[0, 1:])
    assert_close(actual[0], expected, 4 * CHAINED)
