"""Attention of the three kinds of layers against the oracle."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv4_jax.cache import handle
from dsv4_jax.cache.handle import Chunk, StepCache
from dsv4_jax.cache.schema import CacheSchema, new_arrays
from dsv4_jax.config import Config
from dsv4_jax.layers.attention import Attention
from dsv4_jax.numerics import Numerics
from dsv4_jax.ops.attention import Source
from dsv4_jax.ops.attention import attention as attention_op
from tests.checkpoints import random_config, random_tensors
from tests.layers import CHAINED, assert_close, load, run, whole_sequence
from tests.oracles import attention as oracle
from tests.oracles.weights import below, float64

CONFIG = random_config()
TENSORS = random_tensors(CONFIG, seed=8)
PARAMETERS = {ratio: below(TENSORS, f"layers.{i}.attn.") for i, ratio in ((1, 0), (2, 4), (3, 128))}
WINDOW = CONFIG["sliding_window"]


def hidden_states(*shape, seed=0, std=1.0):
    x = std * np.random.default_rng(seed).standard_normal((*shape, CONFIG["hidden_size"]))
    return x.astype(np.float32)


def layer(ratio, w, config):
    return load(Attention(Config.from_dict(config), ratio, Numerics.EXACT), w)


@cache
def over_whole_sequences(config):
    return lambda module, x: module(x, whole_sequence(config, *x.shape[:2]))


def attend(ratio, x, w, config=CONFIG):
    """(output, selected ids or None) of whole sequences x [b, t, d]."""
    return run(layer(ratio, w, config), over_whole_sequences(Config.from_dict(config)), x)


def check(ratio, x, w=None, config=CONFIG, clear=True):
    w = PARAMETERS[ratio] if w is None else w
    y, selected = attend(ratio, x, w, config)
    for row in range(len(x)):
        expected, selection = oracle.attention(x[row].astype(np.float64), float64(w), ratio, config)
        assert_close(y[row], expected, CHAINED)
        assert (selected is None) == (selection is None)
        if selection is not None:
            assert not clear or selection.margin > 1e-5
            for chosen, ids in zip(np.asarray(selected)[row], selection.ids, strict=True):
                np.testing.assert_array_equal(np.sort(chosen[chosen >= 0]), ids)
    return np.asarray(y)


@pytest.mark.parametrize("num_tokens", [1, WINDOW + 1, 2 * WINDOW])
def test_window_edges(num_tokens):
    check(0, hidden_states(2, num_tokens))


@pytest.mark.parametrize("num_tokens", [1, 52, 130])
def test_csa_block_edges(num_tokens):
    """Up to 51 tokens top-k 12 takes all entries without choosing."""
    check(4, hidden_states(2, num_tokens))


@pytest.mark.parametrize("num_tokens", [1, 128, 257])
def test_hca_block_edges(num_tokens):
    check(128, hidden_states(2, num_tokens))


@pytest.mark.parametrize("index_topk", [1, 16])
def test_csa_reads_selected_entries(index_topk):
    """34 entries: few enough to gather the 1 selected, to mask 16, never to take all."""
    check(4, hidden_states(1, 136), config=CONFIG | {"index_topk": index_topk})


def test_equal_index_scores_prefer_the_lower_entry():
    name = "indexer.weights_proj.weight"
    w = PARAMETERS[4] | {name: np.zeros_like(PARAMETERS[4][name])}
    check(4, hidden_states(2, 130), w, clear=False)


@pytest.mark.parametrize("ratio", PARAMETERS)
def test_zero_rows(ratio):
    x = hidden_states(2, 130)
    x[:, [0, 5, 129]] = 0
    check(ratio, x, clear=False)
    assert not check(ratio, np.zeros_like(x), clear=False).any()


@pytest.mark.parametrize("ratio", PARAMETERS)
@pytest.mark.parametrize("magnitude", [1e-4, 1e4])
def test_magnitudes(ratio, magnitude):
    """Norms of queries and keys take the size of the hidden state out again."""
    check(ratio, hidden_states(2, 130, std=magnitude), clear=False)


@pytest.mark.parametrize("ratio", PARAMETERS)
def test_sink_takes_everything(ratio):
    w = PARAMETERS[ratio] | {"attn_sink": np.full(CONFIG["num_attention_heads"], 1e4, np.float32)}
    assert not check(ratio, hidden_states(2, 130), w).any()


@pytest.mark.parametrize("ratio", PARAMETERS)
def test_no_sink(ratio):
    sink = np.full(CONFIG["num_attention_heads"], -1e30, np.float32)
    check(ratio, hidden_states(2, 130), PARAMETERS[ratio] | {"attn_sink": sink})


@pytest.mark.parametrize("ratio", PARAMETERS)
def test_heads_have_their_own_sink(ratio):
    sink = np.array([1e4, 0.0, -1e4, 30.0], np.float32)
    check(ratio, hidden_states(2, 130), PARAMETERS[ratio] | {"attn_sink": sink})


def test_first_token_without_sink_returns_its_own_value():
    """One key has probability 1 whatever the logits: rotated back, the value is its norm."""
    sink = np.full(CONFIG["num_attention_heads"], -1e30, np.float32)
    w = PARAMETERS[0] | {"attn_sink": sink}
    x = hidden_states(1, 1)
    huge = w | {"wq_b.weight": 1e3 * w["wq_b.weight"]}
    np.testing.assert_allclose(check(0, x, w), check(0, x, huge), rtol=1e-5, atol=1e-6)


@partial(jax.jit, static_argnames="graph")
def step(graph, params, arrays, x):
    cache = StepCache(arrays, Chunk(arrays.lengths, jnp.array([x.shape[1]]), x.shape[1]))
    y, _ = nnx.merge(graph, params)(x, cache.layer(0))
    return y, cache.finish()


@pytest.mark.parametrize("ratio", PARAMETERS)
def test_chunks_through_a_cache(ratio):
    """What a chunk leaves in the cache is what the next one needs."""
    chunks = [1] * 9 + [117, 1, 1, 117] + [1] * 13
    config = CONFIG | {"num_hidden_layers": 1, "compress_ratios": [ratio], "num_hash_layers": 0}
    schema = CacheSchema.of(Config.from_dict(config), Numerics.EXACT, jnp.float32, "dense")
    arrays = new_arrays(schema, max_sequences=1, num_blocks=3)
    arrays = replace(arrays, block_table=jnp.array([[2, 0, 1]], jnp.int32))
    graph, params = nnx.split(layer(ratio, PARAMETERS[ratio], config))

    x, outputs = hidden_states(1, sum(chunks)), []
    with jax.default_matmul_precision("highest"):
        for chunk in np.split(x, np.cumsum(chunks)[:-1], axis=1):
            y, arrays = step(graph, params, arrays, jnp.asarray(chunk))
            outputs.append(y)
    expected, selection = oracle.attention(
        x[0].astype(np.float64), float64(PARAMETERS[ratio]), ratio, config
    )
    assert selection is None or selection.margin > 1e-5
    assert_close(np.concatenate(outputs, axis=1)[0], expected, CHAINED)


@pytest.mark.parametrize("wanted", [False, True])
def test_batch_invariance_reaches_the_operation(monkeypatch, wanted):
    asked = []

    def attend(q, *_, batch_invariant, **__):
        asked.append(batch_invariant)
        return q

    monkeypatch.setattr(handle, "sparse_attention", attend)
    config = Config.from_dict(
        CONFIG | {"num_hidden_layers": 1, "compress_ratios": [0], "num_hash_layers": 0}
    )
    numerics = replace(Numerics.EXACT, batch_invariant=wanted)
    schema = CacheSchema.of(config, numerics, jnp.float32, "dense")
    arrays = new_arrays(schema, max_sequences=1, num_blocks=3)
    module = load(Attention(config, 0, numerics), PARAMETERS[0])
    cache = StepCache(arrays, Chunk(arrays.lengths, jnp.array([1]), 1))
    module(jnp.asarray(hidden_states(1, 1)), cache.layer(0))
    assert asked == [wanted]


@pytest.mark.parametrize("magnitude", [0.0, 1.0, 100.0])
def test_op_over_two_sources(magnitude):
    """Shared and per-query entries, some hidden from some queries, one query seeing nothing."""
    rng = np.random.default_rng(9)
    b, t, h, c = 2, 6, 3, 16
    q = (magnitude * rng.standard_normal((b, t, h, c))).astype(np.float32)
    shared = rng.standard_normal((b, 1, 5, c)).astype(np.float32)
    own = rng.standard_normal((b, t, 4, c)).astype(np.float32)
    seen, own_seen = rng.random((b, t, 5)) < 0.6, rng.random((b, t, 4)) < 0.6
    seen[1, 2], own_seen[1, 2] = False, False
    sink = rng.standard_normal(h).astype(np.float32)
    sources = [
        Source(jnp.asarray(shared), jnp.asarray(seen)),
        Source(jnp.asarray(own), jnp.asarray(own_seen)),
    ]
    with jax.default_matmul_precision("highest"):
        actual = np.asarray(attention_op(jnp.asarray(q), sources, jnp.asarray(sink), c**-0.5))
    for row in range(b):
        for p in range(t):
            kv = np.concatenate([shared[row, 0][seen[row, p]], own[row, p][own_seen[row, p]]])
            expected = oracle.core_attention(
                q[row, p].astype(np.float64), kv.astype(np.float64), sink.astype(float), c**-0.5
            )
            # Logits of 1000 are rounded to 2^-14, which the exponential turns into an error.
            assert_close(actual[row, p], expected, CHAINED * max(magnitude, 1.0))
    assert not actual[1, 2].any()
