"""The NumPy oracle against independent figures and against what its equations imply."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.checkpoints import random_config, random_tensors
from tests.conftest import GOLDEN
from tests.oracles import indexer, model, mtp
from tests.oracles.attention import attention, core_attention, window
from tests.oracles.compressor import compressor, num_visible, pool
from tests.oracles.experts import clamped_swiglu
from tests.oracles.hyper_connections import hc_post, sinkhorn
from tests.oracles.rotary import frequencies, rotate
from tests.oracles.router import route, scored_ids, sqrt_softplus
from tests.oracles.topk import margin, top_k
from tests.oracles.weights import below, float64

CONFIG = json.loads((GOLDEN / "config.json").read_text())
LAYERS = range(CONFIG["num_hidden_layers"])
FULL_SIZE = {
    "qk_rope_head_dim": 64,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_scaling": {
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}


@pytest.fixture(scope="module")
def tensors():
    return load_file(GOLDEN / "model.safetensors")


@pytest.fixture(scope="module")
def outputs(golden, tensors):
    return [model.forward(CONFIG, tensors, row, capture=True) for row in golden["input_ids"]]


@pytest.fixture(scope="module")
def random_model():
    config = random_config(mtp=True)
    return config, float64(random_tensors(config, seed=3))


def attention_layer(random_model, ratio, **overrides):
    """(config, weights of an attention of this ratio) of the random model."""
    config, tensors = random_model
    layer = config["compress_ratios"].index(ratio)
    return config | overrides, below(tensors, f"layers.{layer}.attn.")


def hidden_states(num_tokens, config, seed=0):
    return np.random.default_rng(seed).standard_normal((num_tokens, config["hidden_size"]))


# The golden file: float32 results of another implementation. input_ids and logits are two
# sequences of 330 tokens. hidden_N holds the streams after layer N of sequence 0 at every 10th
# position. router_*_N are both sequences one after the other; the order within a row of a scored
# layer is not by score. greedy continues the first 250 tokens of sequence 0.


def test_golden_logits(golden, outputs):
    logits = np.stack([logits for logits, _ in outputs])
    assert abs(logits - golden["logits"]).max() < 5e-5


def test_golden_choices_are_clear(outputs):
    """No top-k decision is so close that float32 could have taken another."""
    smallest = min(seen.margin for _, seen in outputs)
    print(f"smallest top-k margin: {smallest:.2e}")
    assert smallest > 1e-5


@pytest.mark.parametrize("layer", LAYERS)
def test_golden_hidden_states(golden, outputs, layer):
    """Streams grow to 40, where 20 float32 roundings make 8e-5: the bound is relative to that."""
    streams = outputs[0][1].streams[layer][::10]
    peak = abs(streams).max()
    assert abs(streams - golden[f"hidden_{layer}"]).max() < 4e-6 * peak


@pytest.mark.parametrize("layer", LAYERS)
def test_golden_routing(golden, outputs, layer):
    weights = np.concatenate([seen.routing[layer].weights for _, seen in outputs])
    ids = np.concatenate([seen.routing[layer].ids for _, seen in outputs])
    expected_weights = golden[f"router_weights_{layer}"]
    expected_ids = golden[f"router_experts_{layer}"]
    if layer >= CONFIG["num_hash_layers"]:
        order, expected_order = ids.argsort(axis=1), expected_ids.argsort(axis=1)
        weights, ids = (np.take_along_axis(a, order, axis=1) for a in (weights, ids))
        expected_weights, expected_ids = (
            np.take_along_axis(a, expected_order, axis=1) for a in (expected_weights, expected_ids)
        )
    np.testing.assert_array_equal(ids, expected_ids)
    assert abs(weights - expected_weights).max() < 5e-5


def test_golden_greedy_tokens(golden, tensors):
    prompt, greedy = golden["input_ids"][0, : golden["prefill_len"]], golden["greedy"][0]
    logits = model.forward(CONFIG, tensors, np.concatenate([prompt, greedy]))
    np.testing.assert_array_equal(logits[len(prompt) - 1 : -1].argmax(axis=1), greedy)


def test_yarn_frequencies():
    published = """
        1.000000e0 6.876560e-1 4.728708e-1 3.251725e-1 2.236068e-1 1.537646e-1 1.057371e-1
        7.271077e-2 5.000000e-2 3.438280e-2 2.364354e-2 1.625862e-2 1.118034e-2 7.688228e-3
        5.286856e-3 3.635539e-3 2.265625e-3 1.396801e-3 8.496897e-4 5.080820e-4 2.969778e-4
        1.681800e-4 9.086784e-5 4.544423e-5 1.953125e-5 5.372313e-6 3.694303e-6 2.540410e-6
        1.746928e-6 1.201286e-6 8.260713e-7 5.680529e-7"""
    expected = np.array(published.split(), dtype=np.float64)
    for ratio in (4, 128):
        np.testing.assert_allclose(frequencies(FULL_SIZE, ratio), expected, rtol=1e-6)
    plain = frequencies(FULL_SIZE, 0)[[0, 1, 31]]
    np.testing.assert_allclose(plain, [1, 7.498942e-1, 1.333521e-4], rtol=1e-6)


def test_rotation_is_of_trailing_adjacent_pairs():
    x = np.array([[5.0, 6.0, 1.0, 0.0, 0.0, 2.0]])
    y = rotate(x, np.array([3]), np.array([0.5, 0.25]))
    expected = [5, 6, np.cos(1.5), np.sin(1.5), -2 * np.sin(0.75), 2 * np.cos(0.75)]
    np.testing.assert_allclose(y[0], expected, rtol=1e-15)
    back = rotate(y, np.array([3]), np.array([0.5, 0.25]), inverse=True)
    np.testing.assert_allclose(back, x, atol=1e-15)


def test_angle_is_one_float32_product():
    """At a million tokens a float32 angle is off the exact one by up to 0.06 rad."""
    omega, p = frequencies(FULL_SIZE, 0)[1:2], 1_048_575
    y = rotate(np.array([[1.0, 0.0]]), np.array([p]), omega)[0]
    angle = np.float64(np.float32(p) * np.float32(omega[0]))
    assert angle != p * omega[0]
    np.testing.assert_allclose(y, [np.cos(angle), np.sin(angle)], rtol=1e-12)


def test_sinkhorn():
    logits = np.array(
        [
            [0.3, -1.2, 0.8, 2.0],
            [1.5, 0.1, -0.7, 0.4],
            [-0.9, 2.2, 0.6, -0.3],
            [0.0, 0.5, 1.1, -1.6],
        ]
    )
    first = [
        [0.130789, 0.022157, 0.212848, 0.691085],
        [0.645774, 0.120906, 0.070630, 0.207501],
        [0.037000, 0.623562, 0.163676, 0.065078],
        [0.186435, 0.233374, 0.552844, 0.036335],
    ]
    final = [
        [0.124150, 0.017757, 0.188858, 0.669234],
        [0.629679, 0.099534, 0.064375, 0.206410],
        [0.047263, 0.672495, 0.195434, 0.084807],
        [0.198906, 0.210212, 0.551332, 0.039548],
    ]
    np.testing.assert_allclose(sinkhorn(logits, 1, 1e-6), first, atol=5.1e-7)
    np.testing.assert_allclose(sinkhorn(logits, 20, 1e-6), final, atol=5.1e-7)


def test_mixing_matrix_is_transposed():
    comb = np.array([[[0.0, 1.0], [0.25, 0.0]]])
    streams = np.array([[[1.0, 2.0], [10.0, 20.0]]])
    mixed = hc_post(np.array([[100.0, 0.0]]), streams, np.array([[1.0, 2.0]]), comb)
    np.testing.assert_array_equal(mixed, [[[102.5, 5.0], [201.0, 2.0]]])


def test_sqrt_softplus():
    x = np.array([-10.0, -2, 0, 1, 5, 20])
    expected = [0.00673787, 0.35626958, 0.83255461, 1.14597630, 2.23756907, 4.47213596]
    np.testing.assert_allclose(sqrt_softplus(x), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("p", "first", "csa", "hca"),
    [
        (2, 0, 0, 0),
        (3, 0, 1, 0),
        (126, 0, 31, 0),
        (127, 0, 32, 1),
        (128, 1, 32, 1),
        (255, 128, 64, 2),
        (1_048_575, 1_048_448, 262_144, 8192),
    ],
)
def test_visibility(p, first, csa, hca):
    np.testing.assert_array_equal(window(p, 128), np.arange(first, p + 1))
    assert (num_visible(p, 0), num_visible(p, 4), num_visible(p, 128)) == (0, csa, hca)


def seen_tokens(config, w, ratio, num_tokens, query):
    """Tokens whose hidden state changes the attention's output at `query`."""
    x = hidden_states(num_tokens, config)
    before = attention(x, w, ratio, config)[0][query]
    seen = []
    for token in range(num_tokens):
        changed = x.copy()
        changed[token] += 1.0
        if not np.array_equal(attention(changed, w, ratio, config)[0][query], before):
            seen.append(token)
    return seen


@pytest.mark.parametrize(
    ("ratio", "query", "expected"),
    [
        (0, 0, [0]),
        (0, 1, [0, 1]),
        (0, 2, [1, 2]),
        (0, 6, [5, 6]),
        (4, 2, [1, 2]),
        (4, 3, [0, 1, 2, 3]),
        (4, 6, [0, 1, 2, 3, 5, 6]),
        (4, 7, [0, 1, 2, 3, 4, 5, 6, 7]),
        (128, 7, [6, 7]),
    ],
)
def test_influence(random_model, ratio, query, expected):
    config, w = attention_layer(random_model, ratio, sliding_window=2)
    assert seen_tokens(config, w, ratio, 9, query) == expected


@pytest.mark.parametrize(("query", "tokens"), [(126, 1), (127, 128), (128, 128), (254, 128)])
def test_dense_compressed_influence(random_model, query, tokens):
    """With a window of one token, a query sees itself and whole blocks of 128."""
    config, w = attention_layer(random_model, 128, sliding_window=1)
    x = hidden_states(256, config)
    before = attention(x, w, 128, config)[0][query]
    for token in (0, 1, 64, 126, 127, 128, 200, 253, 255):
        changed = x.copy()
        changed[token] += 1.0
        seen = not np.array_equal(attention(changed, w, 128, config)[0][query], before)
        assert seen == (token == query or (tokens == 128 and token < 128)), token


@pytest.mark.parametrize("shift", [1, 1000])
def test_window_attention_depends_on_relative_positions(random_model, shift):
    config, w = attention_layer(random_model, 0)
    x = hidden_states(60, config)
    here, there = (attention(x, w, 0, config, first_position=p)[0] for p in (0, shift))
    # The float32 angles of the two differ by an ulp of `shift` radians.
    np.testing.assert_allclose(here, there, atol=1e-4)


def test_selection_limits_attention(random_model):
    """With top-k 1 a query far on uses one entry, all candidates up to there."""
    config, w = attention_layer(random_model, 4, index_topk=1)
    x = hidden_states(40, config)
    selection = attention(x, w, 4, config)[1]
    assert [len(ids) for ids in selection.ids] == [min(num_visible(p, 4), 1) for p in range(40)]
    assert selection.margin < np.inf
    everything = attention(x, w, 4, config | {"index_topk": 10})[1]
    assert [list(ids) for ids in everything.ids] == [
        list(range(num_visible(p, 4))) for p in range(40)
    ]
    assert everything.margin == np.inf


def test_equal_scores_prefer_the_lower_index():
    scores = np.arange(90) % 3.0
    np.testing.assert_array_equal(
        scored_ids(scores[None], np.zeros(90), 30)[0], np.arange(2, 90, 3)
    )
    np.testing.assert_array_equal(top_k(scores, 32)[29:], [89, 1, 4])
    assert margin(scores, 31) == 0
    assert margin(scores, 30) == 1
    assert margin(scores, 90) == np.inf


def test_first_csa_entry_has_four_slots():
    """Equal scores: entry 0 is a mean over 4 own halves, entry 1 over 4 + 4."""
    a = np.arange(16.0).reshape(8, 2)
    entries = pool(a, np.zeros_like(a), 4)
    own, following = a[:, 1], a[:, 0]
    expected = [[own[:4].mean()], [(following[:4].sum() + own[4:].sum()) / 8]]
    np.testing.assert_allclose(entries, expected)


def test_pooling_is_a_softmax_per_channel():
    a = np.stack([np.arange(128.0), np.arange(128.0)], axis=1)
    z = np.full((128, 2), -1e4)
    z[5, 0] = z[77, 1] = 1e4
    np.testing.assert_array_equal(pool(a, z, 128), [[5.0, 77.0]])


@pytest.mark.parametrize(("ratio", "num_tokens"), [(4, 3), (4, 4), (4, 7), (128, 127), (128, 128)])
def test_incomplete_blocks_give_no_entry(random_model, ratio, num_tokens):
    config, w = attention_layer(random_model, ratio)
    entries = compressor(hidden_states(num_tokens, config), below(w, "compressor."), ratio, config)
    assert entries.shape == (num_tokens // ratio, config["head_dim"])


def test_hadamard_cancels(random_model, monkeypatch):
    config, w = attention_layer(random_model, 4, index_topk=3)
    x = hidden_states(60, config)
    with_rotation, selection = attention(x, w, 4, config)
    monkeypatch.setattr(indexer, "hadamard_matrix", np.eye)
    without, plain_selection = attention(x, w, 4, config)
    assert abs(selection.margin - plain_selection.margin) < 1e-12 < selection.margin
    np.testing.assert_array_equal(with_rotation, without)


def test_hadamard_matrix_is_natural_order():
    h = indexer.hadamard_matrix(4) * 2
    np.testing.assert_array_equal(h, [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])


def test_hash_weights_are_gathered(random_model):
    config, tensors = random_model
    gate = below(tensors, "layers.0.ffn.gate.")
    x, ids = hidden_states(20, config), np.full(20, 7)
    routing = route(x, ids, gate, config)
    np.testing.assert_array_equal(routing.ids, np.tile(gate["tid2eid"][7], (20, 1)))
    factor = config["routed_scaling_factor"]
    np.testing.assert_allclose(routing.weights.sum(axis=1), factor, rtol=1e-14)
    assert np.ptp(routing.weights, axis=0).min() > 0.01


def test_bias_selects_but_does_not_weigh(random_model):
    config, tensors = random_model
    gate = below(tensors, "layers.4.ffn.gate.")
    x = hidden_states(20, config)
    favoured = gate | {"bias": gate["bias"] + 100 * (np.arange(config["n_routed_experts"]) == 4)}
    routing = route(x, np.zeros(20, int), favoured, config)
    assert (routing.ids[:, 0] == 4).all()
    scores = np.take_along_axis(sqrt_softplus(x @ gate["weight"].T), routing.ids, axis=1)
    expected = scores / scores.sum(axis=1, keepdims=True) * config["routed_scaling_factor"]
    np.testing.assert_allclose(routing.weights, expected, rtol=1e-14)


def test_clamp():
    """The gate is cut above only, the other factor on both sides."""
    silu = 10 / (1 + np.exp(-10.0))
    gate, up = np.array([50.0, 50.0, 50.0, -9.0, -50.0]), np.array([50.0, -50.0, 3.0, 1.0, 1.0])
    expected = [10 * silu, -10 * silu, 3 * silu, -9 / (1 + np.exp(9.0)), -50 / (1 + np.exp(50.0))]
    np.testing.assert_allclose(clamped_swiglu(gate, up, 10.0), expected, rtol=1e-7)


def test_sink_takes_probability_and_gives_no_value():
    q, kv = np.ones((2, 3)), np.array([[1.0, 2.0, 3.0]])
    out = core_attention(q, kv, np.array([6.0, -np.inf]), 1.0)
    np.testing.assert_allclose(out, [[0.5, 1.0, 1.5], [1.0, 2.0, 3.0]], rtol=1e-15)
    nothing = core_attention(q, kv[:0], np.zeros(2), 1.0)
    np.testing.assert_array_equal(nothing, np.zeros((2, 3)))
    hidden = core_attention(q, -1e3 * kv, np.zeros(2), 1.0)
    np.testing.assert_array_equal(hidden, np.zeros((2, 3)))


def test_later_tokens_change_nothing_before(random_model):
    config, tensors = random_model
    tokens = np.random.default_rng(1).integers(0, config["vocab_size"], 140)
    whole = model.forward(config, tensors, tokens)
    for length in (1, 3, 4, 127, 128, 133):
        part = model.forward(config, tensors, tokens[:length])
        np.testing.assert_allclose(part, whole[:length], rtol=1e-10, atol=1e-10)


def test_rounding_hooks_take_effect_where_they_belong(random_model):
    config, tensors = random_model
    tokens = np.random.default_rng(2).integers(0, config["vocab_size"], 30)
    exact = model.forward(config, tensors, tokens)
    widths: dict[str, set[int]] = {}
    for point in ("quantize_activations", "quantize_kv", "quantize_indexer"):
        seen = widths.setdefault(point, set())

        def coarse(x, seen=seen):
            seen.add(x.shape[-1])
            return np.round(x * 4) / 4

        config_1 = config | {"index_topk": 2}
        changed = model.forward(config_1, tensors, tokens, **{point: coarse})
        assert abs(changed - exact).max() > 1e-3
    d, f = config["hidden_size"], config["moe_intermediate_size"]
    low = config["o_groups"] * config["o_lora_rank"]
    assert widths == {
        "quantize_activations": {d, f, config["q_lora_rank"], low},
        "quantize_kv": {config["head_dim"]},
        "quantize_indexer": {config["index_head_dim"]},
    }


def test_mtp_block(random_model):
    """It uses the streams, the next tokens, its own parameters and the shared tables."""
    config, tensors = random_model
    tokens = np.random.default_rng(4).integers(0, config["vocab_size"], 30)
    _, seen = model.forward(config, tensors, tokens[:-1], capture=True)
    streams = seen.streams[-1]
    logits, drafted = mtp.draft(config, tensors, streams, tokens[1:])
    assert logits.shape == (29, config["vocab_size"])
    assert drafted.shape == streams.shape
    assert 1 < logits.std() < 10

    earlier = tokens[1:].copy()
    earlier[10] = (earlier[10] + 1) % config["vocab_size"]
    changed, _ = mtp.draft(config, tensors, streams, earlier)
    window_end = 10 + config["sliding_window"]
    # A matrix product may round a row differently when another row changes.
    moved = abs(changed - logits).max(axis=1) > 1e-9
    assert list(np.flatnonzero(moved)) == list(range(10, min(window_end, 29)))


@pytest.mark.parametrize(("projection", "norm"), [("e_proj", "enorm"), ("h_proj", "hnorm")])
def test_mtp_inputs_have_their_own_norm(random_model, projection, norm):
    """Without one projection, its norm does nothing, and the other norm does something."""
    config, tensors = random_model
    rng = np.random.default_rng(6)
    streams = rng.standard_normal((9, config["hc_mult"], config["hidden_size"]))
    next_ids = rng.integers(0, config["vocab_size"], 9)
    name = f"mtp.0.{projection}.weight"
    cut = tensors | {name: np.zeros_like(tensors[name])}
    before, _ = mtp.draft(config, cut, streams, next_ids)
    for changed in ("enorm", "hnorm"):
        weight = f"mtp.0.{changed}.weight"
        after, _ = mtp.draft(config, cut | {weight: tensors[weight] ** 2}, streams, next_ids)
        assert np.array_equal(after, before) == (changed == norm)


@pytest.mark.parametrize("schedule", ["flash", "pro"])
def test_random_checkpoints_are_not_degenerate(schedule):
    config = random_config(schedule)
    tensors = random_tensors(config, seed=3)
    assert all(t.std() > 0 for t in tensors.values() if t.size > 1)
    tokens = np.random.default_rng(5).integers(0, config["vocab_size"], 150)
    logits, seen = model.forward(config, tensors, tokens, capture=True)
    assert 1 < logits.std() < 10
    used = [len(np.unique(routing.ids)) for routing in seen.routing]
    assert used == [config["n_routed_experts"]] * len(used)
