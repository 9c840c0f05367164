"""The KV entry record and its rounding."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.formats import kv_entry
from tests.oracles import formats
from tests.oracles.format_inputs import BFLOAT16, FLOAT32, assert_same, finite_rows, special_rows

DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
# (width, rotary channels)
RECORDS = pytest.mark.parametrize(("width", "rope_dim"), [(512, 64), (576, 64), (64, 0)])


encode = jax.jit(kv_entry.encode, static_argnums=1)
decode = jax.jit(kv_entry.decode, static_argnums=(2, 3))
round_trip = jax.jit(kv_entry.round_trip, static_argnums=1)


@RECORDS
@DTYPES
def test_record(width, rope_dim, dtype):
    x = finite_rows(width, formats.E4M3[:127], dtype)
    nope = width - rope_dim
    body, scales = encode(jnp.asarray(x), rope_dim)
    assert body.shape == (len(x), width + rope_dim)
    codes, expected_scales, _ = formats.fp8_rows(x[:, :nope], 64)
    np.testing.assert_array_equal(body[:, :nope], codes)
    rope = formats.to_bfloat16(x[:, nope:].astype(np.float64)).astype(np.float32)
    bits = rope.view(np.uint32) >> 16
    np.testing.assert_array_equal(body[:, nope::2], bits & 255)
    np.testing.assert_array_equal(body[:, nope + 1 :: 2], bits >> 8)
    padding = np.zeros((len(x), 8 - nope // 64))
    np.testing.assert_array_equal(scales, np.concatenate([expected_scales, padding], -1))


@RECORDS
@DTYPES
def test_round_trip_is_decoded_record(width, rope_dim, dtype):
    x = jnp.asarray(finite_rows(width, formats.E4M3[:127], dtype))
    body, scales = encode(x, rope_dim)
    decoded = decode(body, scales, rope_dim, dtype)
    assert_same(decoded, formats.kv_entry(np.asarray(x), rope_dim), dtype)
    found = round_trip(x, rope_dim)
    assert found.dtype == dtype
    np.testing.assert_array_equal(
        np.asarray(found).view(np.uint8), np.asarray(decoded).view(np.uint8)
    )


@DTYPES
@pytest.mark.parametrize(("width", "rope_dim"), [(48, 16), (16, 16), (1000, 0)])
def test_round_trip_of_any_width(width, rope_dim, dtype):
    x = np.random.default_rng(0).standard_normal((2, 5, width)).astype(dtype)
    found = round_trip(jnp.asarray(x), rope_dim)
    assert_same(found, formats.kv_entry(x, rope_dim), dtype)


def test_rotary_channels_are_bfloat16():
    x = np.random.default_rng(0).standard_normal((4, 80)).astype(np.float32)
    found = np.asarray(round_trip(jnp.asarray(x), 16))[:, 64:]
    expected = x[:, 64:].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(found, expected)
    assert (found != x[:, 64:]).any()


def test_float32_record_decodes_to_the_same_in_bfloat16():
    x = np.random.default_rng(0).standard_normal((4, 512)).astype(np.float32)
    body, scales = encode(jnp.asarray(x), 64)
    narrow = decode(body, scales, 64, jnp.bfloat16)
    assert_same(narrow, formats.kv_entry(x, 64), jnp.bfloat16)


@DTYPES
def test_infinities_and_nan(dtype):
    """In an E4M3 group they make the group NaN; a rotary channel keeps them to itself."""
    x = np.concatenate([special_rows(64, dtype), special_rows(16, dtype)], -1)
    for found in (
        round_trip(jnp.asarray(x), 16),
        decode(*encode(jnp.asarray(x), 16), 16, dtype),
    ):
        assert np.isnan(np.asarray(found, np.float32)[:, :64]).all()
        assert_same(found[:, 64:], formats.to_bfloat16(x[:, 64:].astype(np.float64)), dtype)


def test_leading_axes_and_vmap():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 80)), jnp.float32)
    whole = encode(x, 16)
    assert [part.shape for part in whole] == [(2, 3, 96), (2, 3, 8)]
    single = jax.jit(jax.vmap(jax.vmap(lambda row: kv_entry.encode(row, 16))))(x)
    for found, expected in zip(whole, single, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_empty():
    body, scales = encode(jnp.zeros((0, 512), jnp.bfloat16), 64)
    assert (body.shape, scales.shape) == ((0, 576), (0, 8))
    assert decode(body, scales, 64, jnp.bfloat16).shape == (0, 512)
    assert round_trip(jnp.zeros((0, 48), jnp.float32), 16).shape == (0, 48)


def test_gradient_passes_the_rotary_channels_only():
    x = jnp.linspace(-3, 3, 80)
    gradient = jax.jit(jax.grad(lambda x: kv_entry.round_trip(x, 16).sum()))(x)
    np.testing.assert_array_equal(gradient, np.repeat([0, 1], [64, 16]))


@pytest.mark.parametrize(("width", "rope_dim"), [(48, 16), (640, 64), (64, 65), (64, -64)])
def test_widths_that_no_record_holds(width, rope_dim):
    with pytest.raises(ValueError, match=rf"x: {width} channels with rope_dim {rope_dim} leave"):
        kv_entry.encode(jnp.zeros((1, width), jnp.float32), rope_dim)


def test_planes_of_another_record():
    body, scales = encode(jnp.zeros((1, 512), jnp.float32), 64)
    with pytest.raises(ValueError, match="body: 504 channels with rope_dim 72 leave 432"):
        kv_entry.decode(body, scales, 72, jnp.float32)
    with pytest.raises(ValueError, match="scales: got 7 bytes, expected 8"):
        kv_entry.decode(body, scales[:, :7], 64, jnp.float32)


@pytest.mark.parametrize("rope_dim", [-1, 49])
def test_round_trip_refuses_impossible_rope_dim(rope_dim):
    with pytest.raises(ValueError, match=f"rope_dim: got {rope_dim}, expected 0 to 48"):
        kv_entry.round_trip(jnp.zeros((1, 48), jnp.float32), rope_dim)
