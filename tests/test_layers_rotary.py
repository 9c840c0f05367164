"""Rotary embedding against the oracle."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.config import Config
from dsv4_jax.layers.rotary import Rotary
from tests.checkpoints import random_config
from tests.layers import assert_close, assert_rounded_once
from tests.oracles import rotary

TINY = random_config()
FULL_SIZE = random_config(
    head_dim=512,
    index_head_dim=128,
    qk_rope_head_dim=64,
    rope_scaling=TINY["rope_scaling"] | {"original_max_position_embeddings": 65536},
)
CONFIGS = [FULL_SIZE, TINY, random_config(rope_scaling=None)]


def of_layer(config, ratio):
    return Rotary.of_layer(Config.from_dict(config), ratio)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("ratio", [0, 4, 128])
@pytest.mark.parametrize("config", CONFIGS, ids=["full", "tiny", "no-yarn"])
def test_frequencies_are_bit_equal(config, ratio):
    """An ulp of frequency is 0.06 rad at a million tokens."""
    frequencies = of_layer(config, ratio).frequencies()
    expected = rotary.frequencies(config, ratio).astype(np.float32)
    np.testing.assert_array_equal(frequencies, expected)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("ratio", [0, 4])
@pytest.mark.parametrize("start", [0, 126, 65_530, 1_048_570])
def test_rotation(start, ratio, inverse):
    layer = of_layer(FULL_SIZE, ratio)
    positions = start + np.arange(6)
    x = normal(1, 6, 3, 128)
    y = layer(jnp.asarray(x), jnp.asarray(positions, jnp.int32)[None], inverse)
    omega = rotary.frequencies(FULL_SIZE, ratio)
    assert_close(y[0], rotary.rotate(x[0].astype(np.float64), positions, omega, inverse))


def test_leading_channels_and_position_zero_are_untouched():
    layer = of_layer(FULL_SIZE, 4)
    x = normal(1, 2, 512)
    y = np.asarray(layer(jnp.asarray(x), jnp.asarray([[0, 77]], jnp.int32)))
    np.testing.assert_array_equal(y[..., :448], x[..., :448])
    np.testing.assert_array_equal(y[0, 0], x[0, 0])
    assert abs(y[0, 1, 448:] - x[0, 1, 448:]).max() > 0.1


def test_channels_may_be_all_rotary():
    width = TINY["qk_rope_head_dim"]
    x, positions = normal(1, 5, width), np.arange(5)
    y = of_layer(TINY, 0)(jnp.asarray(x), jnp.asarray(positions, jnp.int32)[None])
    omega = rotary.frequencies(TINY, 0)
    assert_close(y[0], rotary.rotate(x[0].astype(np.float64), positions, omega))


def test_inverse_undoes():
    layer = of_layer(FULL_SIZE, 128)
    x, positions = jnp.asarray(normal(2, 4, 64)), jnp.asarray([[0, 1, 127, 128], [5, 9, 2, 70_000]])
    back = layer(layer(x, positions), positions, inverse=True)
    assert_close(back, np.asarray(x, np.float64))


def test_every_sequence_has_its_positions():
    layer = of_layer(FULL_SIZE, 4)
    x = np.repeat(normal(1, 3, 2, 64), 2, axis=0)
    positions = jnp.asarray([[0, 1, 2], [300, 301, 302]], jnp.int32)
    y = layer(jnp.asarray(x), positions)
    omega = rotary.frequencies(FULL_SIZE, 4)
    for row in range(2):
        expected = rotary.rotate(x[row].astype(np.float64), np.asarray(positions[row]), omega)
        assert_close(y[row], expected)


def test_bfloat16_is_rotated_in_float32():
    layer = of_layer(FULL_SIZE, 0)
    x = jnp.asarray(normal(1, 4, 64), jnp.bfloat16)
    positions = np.array([0, 100, 1000, 100_000])
    y = layer(x, jnp.asarray(positions, jnp.int32)[None])
    exact = rotary.rotate(np.asarray(x[0], np.float64), positions, rotary.frequencies(FULL_SIZE, 0))
    assert_rounded_once(y[0], exact)
