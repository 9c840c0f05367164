"""Compressors against the oracle, over whole sequences."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.config import Config
from dsv4_jax.layers.compressor import Compressor
from dsv4_jax.layers.rotary import Rotary
from dsv4_jax.numerics import Numerics
from dsv4_jax.ops.flush import Gated
from tests.checkpoints import random_config, random_tensors
from tests.layers import CHAINED, assert_close, gated, load, run, whole_sequence
from tests.oracles import compressor as oracle
from tests.oracles import indexer
from tests.oracles.weights import below, float64

CONFIG = random_config()
TENSORS = random_tensors(CONFIG, seed=6)
PARAMETERS = {
    "csa": below(TENSORS, "layers.2.attn.compressor."),
    "csa_keys": below(TENSORS, "layers.2.attn.indexer.compressor."),
    "hca": below(TENSORS, "layers.3.attn.compressor."),
}
RATIO = {"csa": 4, "csa_keys": 4, "hca": 128}
WIDTH = {
    "csa": CONFIG["head_dim"],
    "csa_keys": CONFIG["index_head_dim"],
    "hca": CONFIG["head_dim"],
}


def hidden_states(*shape, seed=0, std=1.0):
    x = std * np.random.default_rng(seed).standard_normal((*shape, CONFIG["hidden_size"]))
    return x.astype(np.float32)


def nothing(x, pool):
    """What a compressor of zeros makes of x."""
    tokens, width = x.shape[:2], WIDTH[pool]
    product = jnp.zeros((*tokens, 2 * width))
    return Gated(product, product, jnp.zeros((RATIO[pool], 2 * width)), jnp.zeros(width))


@cache
def append_and_read(pool):
    def call(module, x):
        config = Config.from_dict(CONFIG)
        view = whole_sequence(config, *x.shape[:2])
        frequencies = Rotary.of_layer(config, RATIO[pool]).frequencies()
        rest = frequencies, x.dtype, config.rms_norm_eps
        if pool == "hca":
            view.flush_hca(gated(module, x), *rest)
        elif pool == "csa":
            view.flush_csa(gated(module, x), nothing(x, "csa_keys"), *rest)
        else:
            view.flush_csa(nothing(x, "csa"), gated(module, x), *rest)
        return view.entries(pool, jnp.float32)

    return call


def entries(pool, w, x):
    """Entries of whole sequences x [b, t, d] that the layer leaves in its pool."""
    module = Compressor(Config.from_dict(CONFIG), RATIO[pool], WIDTH[pool], Numerics.EXACT)
    found = run(load(module, w), append_and_read(pool), x)
    return np.asarray(found)[:, : x.shape[1] // RATIO[pool]]


def expected_entries(pool, w, x):
    found = oracle.compressor(x.astype(np.float64), float64(w), RATIO[pool], CONFIG)
    if pool == "csa_keys":
        found = found @ indexer.hadamard_matrix(WIDTH[pool])
    return found


def check(pool, x, w=None, score=1.0):
    """`score` is the size of the scores: rounding them shifts the weights as much, relatively."""
    w = PARAMETERS[pool] if w is None else w
    actual = entries(pool, w, x)
    tolerance = CHAINED + 2 * np.spacing(np.float32(score))
    for row in range(len(x)):
        assert_close(actual[row], expected_entries(pool, w, x[row]), tolerance)
    return actual


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 9, 127, 128])
@pytest.mark.parametrize("pool", ["csa", "csa_keys"])
def test_overlapping(pool, num_tokens):
    check(pool, hidden_states(2, num_tokens))


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 129, 255])
def test_heavy(num_tokens):
    check("hca", hidden_states(2, num_tokens))


@pytest.mark.parametrize("pool", RATIO)
def test_pooled_values_of_any_size_keep_their_precision(pool):
    """Values 1e6 times larger: only the value path scales, the norm takes it out again."""
    w = PARAMETERS[pool] | {"wkv.weight": PARAMETERS[pool]["wkv.weight"] * np.float32(2**20)}
    check(pool, hidden_states(1, 260), w)


@pytest.mark.parametrize("pool", RATIO)
@pytest.mark.parametrize("score", [-200.0, 200.0])
def test_large_scores_do_not_overflow(pool, score):
    """All scores far from 0: only their differences count."""
    w = PARAMETERS[pool]
    shifted = w | {"ape": w["ape"] + np.float32(score)}
    check(pool, hidden_states(1, 260), shifted, score=abs(score))


@pytest.mark.parametrize("pool", RATIO)
def test_one_slot_takes_everything(pool):
    """A position with a far higher score is copied, per channel another one."""
    w = PARAMETERS[pool]
    ratio, channels = w["ape"].shape
    ape = np.zeros((ratio, channels), np.float32)
    ape[np.arange(channels) % ratio, np.arange(channels)] = 500.0
    check(pool, hidden_states(1, 260), w | {"ape": ape}, score=500.0)


@pytest.mark.parametrize("pool", RATIO)
def test_zero_tokens_give_zero_entries(pool):
    assert not check(pool, np.zeros((1, 260, CONFIG["hidden_size"]), np.float32)).any()


def test_first_entry_has_no_block_before():
    """The parameters of the other role do not reach entry 0 and do reach entry 1."""
    w, width = PARAMETERS["csa"], WIDTH["csa"]
    other = {name: w[name].copy() for name in ("wkv.weight", "wgate.weight")}
    for array in other.values():
        array[:width] += 1
    x = hidden_states(1, 8)
    before, after = entries("csa", w, x)[0], entries("csa", w | other, x)[0]
    np.testing.assert_array_equal(before[0], after[0])
    assert abs(before[1] - after[1]).max() > 0.1
    check("csa", x, w | other)


@pytest.mark.parametrize("pool", RATIO)
def test_entries_depend_on_their_own_tokens(pool):
    ratio = RATIO[pool]
    x = hidden_states(1, 4 * ratio)
    before = entries(pool, PARAMETERS[pool], x)
    x[0, ratio] += 1.0
    after = entries(pool, PARAMETERS[pool], x)
    changed = np.flatnonzero(abs(after - before)[0].max(axis=-1))
    assert list(changed) == ([1] if pool == "hca" else [1, 2])
