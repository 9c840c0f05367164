"""`forward`, prefill and decode against independent results and against the oracle."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_jax
from tests.checkpoints import random_config, write_checkpoint
from tests.conftest import GOLDEN
from tests.layers import CHAINED, assert_close
from tests.oracles import model as oracle

CONFIG = json.loads((GOLDEN / "config.json").read_text())
LAYERS = range(CONFIG["num_hidden_layers"])
TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def output(tiny, golden):
    return tiny.forward(golden["input_ids"], capture=True)


def test_logits(output, golden):
    error = abs(np.asarray(output[0]) - golden["logits"]).max()
    print(f"largest difference of a logit: {error:.2e}")
    assert error < TOLERANCE


@pytest.mark.parametrize("layer", LAYERS)
def test_hidden_states(output, golden, layer):
    """Sequence 0, every 10th position.

    Streams grow to 42. The golden ones are float32 results too and lie up to 8e-5 from the exact
    ones there, so 5e-5 holds for streams of size 10 and grows with them.
    """
    actual = np.asarray(output[1].hidden[layer])[0, ::10]
    peak = abs(golden[f"hidden_{layer}"]).max()
    assert abs(actual - golden[f"hidden_{layer}"]).max() < TOLERANCE * max(peak / 10, 1)


@pytest.mark.parametrize("layer", LAYERS)
def test_routing(output, golden, layer):
    """Both sequences one after the other; the golden order within a scored row is not by score."""
    expected_ids = golden[f"router_experts_{layer}"]
    expected_weights = golden[f"router_weights_{layer}"]
    ids = np.asarray(output[1].router_ids[layer]).reshape(expected_ids.shape)
    weights = np.asarray(output[1].router_weights[layer]).reshape(expected_ids.shape)
    order, expected_order = ids.argsort(axis=1), expected_ids.argsort(axis=1)
    if layer < CONFIG["num_hash_layers"]:
        np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(
        np.take_along_axis(ids, order, axis=1),
        np.take_along_axis(expected_ids, expected_order, axis=1),
    )
    sorted_weights = np.take_along_axis(weights, order, axis=1)
    expected = np.take_along_axis(expected_weights, expected_order, axis=1)
    assert abs(sorted_weights - expected).max() < TOLERANCE


def prefill(model, prompts):
    """(logits of the last tokens, cache) of two sequences; the third slot stays empty."""
    cache = model.new_cache(max_sequences=3, max_tokens=2048)
    tokens = np.concatenate([prompts, np.zeros_like(prompts[:1])])
    return model.prefill(cache, tokens, np.array([prompts.shape[1]] * 2 + [0]))


def test_prefill_then_single_steps(tiny, golden):
    """250 tokens of both sequences at once, then 80 of each one by one."""
    tokens, expected = golden["input_ids"], golden["logits"]
    prompt = int(golden["prefill_len"])
    logits, cache = prefill(tiny, tokens[:, :prompt])
    for position in range(prompt, tokens.shape[1]):
        error = abs(np.asarray(logits)[:2] - expected[:, position - 1]).max()
        assert error < TOLERANCE, position
        logits, cache = tiny.decode_step(cache, np.append(tokens[:, position], -1))
    assert abs(np.asarray(logits)[:2] - expected[:, -1]).max() < TOLERANCE


def test_greedy_tokens(tiny, golden):
    """Both sequences go on alone; the golden tokens continue the first."""
    logits, cache = prefill(tiny, golden["input_ids"][:, : golden["prefill_len"]])
    tokens = []
    for _ in range(golden["greedy"].shape[1]):
        best = np.asarray(logits).argmax(axis=1)
        tokens.append(best[0])
        logits, cache = tiny.decode_step(cache, np.append(best[:2], -1))
    np.testing.assert_array_equal(tokens, golden["greedy"][0])


@pytest.mark.parametrize(("schedule", "mtp"), [("flash", False), ("pro", True)])
def test_random_checkpoint(tmp_path, schedule, mtp):
    """Logits, streams, routing and selected entries."""
    config = random_config(schedule, mtp)
    tensors = write_checkpoint(tmp_path, config, seed=18)
    model = dsv4_jax.load(tmp_path, dtype=jnp.float32, numerics=dsv4_jax.Numerics.EXACT)
    tokens = np.random.default_rng(18).integers(0, config["vocab_size"], (2, 270))
    logits, seen = model.forward(tokens, capture=True)
    for row in range(2):
        expected, exact = oracle.forward(config, tensors, tokens[row], capture=True)
        print(f"{schedule}: smallest top-k margin {exact.margin:.1e}")
        assert exact.margin > 1e-5
        assert_close(logits[row], expected, 4 * CHAINED)
        for layer in range(config["num_hidden_layers"]):
            check_layer(seen, row, layer, exact)


def check_layer(seen, row, layer, exact):
    assert_close(seen.hidden[layer][row], exact.streams[layer], 4 * CHAINED)
    np.testing.assert_array_equal(seen.router_ids[layer][row], exact.routing[layer].ids)
    assert_close(seen.router_weights[layer][row], exact.routing[layer].weights, 4 * CHAINED)
    selected, selection = seen.selected[layer], exact.selection[layer]
    assert (selected is None) == (selection is None)
    if selection is not None:
        for chosen, ids in zip(np.asarray(selected)[row], selection.ids, strict=True):
            np.testing.assert_array_equal(np.sort(chosen[chosen >= 0]), ids)
