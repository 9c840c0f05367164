"""Models with a part of their compressed attention taken away."""

import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_jax
from dsv4_jax import Numerics
from dsv4_jax.variants import without
from tests.checkpoints import random_config, write_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One layer of each kind."""
    directory = tmp_path_factory.mktemp("model")
    kinds = {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128], "num_hash_layers": 1}
    write_checkpoint(directory, random_config(**kinds), seed=0)
    return dsv4_jax.load(directory, dtype=jnp.float32, numerics=Numerics.EXACT)


@pytest.fixture(scope="module")
def tokens(model):
    return np.random.default_rng(0).integers(3, model.config.vocab_size - 1, (1, 240))


def last_logits(model, tokens):
    return np.asarray(model.forward(tokens))[0, -1]


def test_windows_reach_back_no_further_than_their_layers(model, tokens):
    masked = without(model, "compressed")
    reach = model.config.num_hidden_layers * (model.config.sliding_window - 1)
    changed = tokens.copy()
    changed[0, : tokens.shape[1] - 1 - reach] += 1
    before, after = last_logits(masked, tokens), last_logits(masked, changed)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)
    assert np.abs(last_logits(model, tokens) - last_logits(model, changed)).max() > 1e-3
    changed = tokens.copy()
    changed[0, -2] += 1
    assert np.abs(last_logits(masked, changed) - before).max() > 1e-3


def test_random_selection_takes_as_many_visible_entries(model, tokens):
    _, own = model.forward(tokens, capture=True)
    _, seen = without(model, "selection").forward(tokens, capture=True)
    different = 0
    for ours, theirs in zip(own.selected, seen.selected, strict=True):
        if ours is None:
            assert theirs is None
            continue
        ours, theirs = np.asarray(ours)[0], np.asarray(theirs)[0]
        for position, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a, b = set(a[a >= 0]), set(b[b >= 0])
            assert len(a) == len(b)
            assert max(b, default=0) < max((position + 1) // 4, 1)
            different += a != b
    assert different > 150


def test_the_model_stays_as_it_is(model, tokens):
    before = last_logits(model, tokens)
    for part in ("compressed", "selection"):
        without(model, part)
    assert np.array_equal(last_logits(model, tokens), before)


def test_unknown_part(model):
    with pytest.raises(ValueError, match="part: got 'heads'"):
        without(model, "heads")
