"""Models with a part of their compressed attention taken away."""

import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_jax
from dsv4_jax.variants import without


@pytest.fixture(scope="module")
def mini():
    return dsv4_jax.load("mini", dtype=jnp.float32)


@pytest.fixture(scope="module")
def tokens(mini):
    return np.random.default_rng(0).integers(3, mini.config.vocab_size, (1, 896))


def last_logits(model, tokens):
    return np.asarray(model.forward(tokens))[0, -1]


def test_windows_reach_back_no_further_than_their_layers(mini, tokens):
    masked = without(mini, "compressed")
    reach = mini.config.num_hidden_layers * (mini.config.sliding_window - 1)
    changed = tokens.copy()
    changed[0, : tokens.shape[1] - 1 - reach] += 1
    before, after = last_logits(masked, tokens), last_logits(masked, changed)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-4)
    assert np.abs(last_logits(mini, tokens) - last_logits(mini, changed)).max() > 0.1
    changed = tokens.copy()
    changed[0, -2] += 1
    assert np.abs(last_logits(masked, changed) - before).max() > 0.1


def test_random_selection_takes_as_many_visible_entries(mini, tokens):
    _, own = mini.forward(tokens, capture=True)
    _, seen = without(mini, "selection").forward(tokens, capture=True)
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
    assert different > 500


def test_the_model_stays_as_it_is(mini, tokens):
    before = last_logits(mini, tokens)
    for part in ("compressed", "selection"):
        without(mini, part)
    assert np.array_equal(last_logits(mini, tokens), before)


def test_unknown_part(mini):
    with pytest.raises(ValueError, match="part: got 'heads'"):
        without(mini, "heads")
