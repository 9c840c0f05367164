"""One matrix in another format: what is claimed to be exact is."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.checkpoint.convert import convert_matrices, convert_weight, converted
from tests.checkpoint_files import BF16
from tests.weight_formats import FORMATS, SHAPE, error, matrix, values


@pytest.mark.parametrize("target", FORMATS.values())
@pytest.mark.parametrize("source", FORMATS.values())
def test_a_matrix_in_every_pair_of_formats(source, target):
    arrays = matrix(source, SHAPE)
    old = values(arrays, source)
    (result,) = convert_matrices([arrays], [source], target)
    new = values(result.arrays, target)
    assert result.exact == np.array_equal(new, old)
    assert result.exact == (
        source in (target, "mxfp4") or (source, target) == ("fp8_block", "float")
    )
    assert result.relative_error == pytest.approx(error(new, old), rel=1e-3, abs=0)
    assert result.relative_error < 0.15
    again, exact = convert_weight(arrays, source, target)
    assert exact == result.exact
    for leaf, array in (arrays if source == target else result.arrays).items():
        assert np.asarray(again[leaf]).tobytes() == np.asarray(array).tobytes()
    if target == "nvfp4" != source:
        assert again["input_scale"] == 1


@pytest.mark.parametrize(("target", "span"), [("nvfp4", 17), ("fp8_block", 14)])
@pytest.mark.parametrize("source", ["mxfp4", "float"])
def test_values_of_mxfp4_are_kept_up_to_a_span(source, target, span):
    for lowest, expected in ((3 - span, True), (2 - span, False)):
        arrays = matrix("mxfp4", SHAPE, lowest=lowest, highest=3)
        old = values(arrays, "mxfp4")
        arrays, _ = convert_weight(arrays, "mxfp4", source)
        np.testing.assert_array_equal(values(arrays, source), old)
        new, exact = convert_weight(arrays, source, target)
        assert exact == np.array_equal(values(new, target), old) == expected


def test_w1_and_w3_share_a_scale():
    low, high = (matrix("mxfp4", SHAPE, i, e, e) for i, e in enumerate((-14, 3)))
    w1, w3 = convert_matrices([low, high], ["mxfp4"] * 2, "nvfp4")
    assert w1.arrays["scale_2"] == w3.arrays["scale_2"] == 2.0 ** (3 - 8)
    for result, old in ((w1, low), (w3, high)):
        assert result.exact
        np.testing.assert_array_equal(values(result.arrays, "nvfp4"), values(old, "mxfp4"))
        np.testing.assert_array_equal(result.arrays["weight"], old["weight"])
    lower = matrix("mxfp4", SHAPE, 0, -15, -15)
    w1, w3 = convert_matrices([lower, high], ["mxfp4"] * 2, "nvfp4")
    assert w1.arrays["scale_2"] == w3.arrays["scale_2"]
    assert not w1.exact
    assert convert_weight(lower, "mxfp4", "nvfp4")[1]


def test_a_shared_scale_is_that_of_the_larger_matrix():
    small, large = (matrix("float", SHAPE, seed) for seed in (0, 1))
    large["weight"] = large["weight"] * BF16(64)
    w1, w3 = convert_matrices([small, large], ["float"] * 2, "nvfp4")
    amax = np.abs(values(large, "float")).max()
    np.testing.assert_allclose(w1.arrays["scale_2"], amax / (6 * 448), rtol=1e-6)
    assert w1.arrays["scale_2"] == w3.arrays["scale_2"]


def test_half_a_group_of_mxfp4():
    arrays = matrix("mxfp4", (4, 48))
    new, exact = convert_weight(arrays, "mxfp4", "nvfp4")
    assert exact and new["scale"].shape == (4, 3)
    np.testing.assert_array_equal(values(new, "nvfp4"), values(arrays, "mxfp4"))


def test_float32_becomes_bfloat16():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((16, 32)).astype(np.float32)
    new, exact = convert_weight({"weight": w}, "float", "float")
    assert not exact and new["weight"].dtype == jnp.bfloat16
    new, exact = convert_weight({"weight": w.astype(BF16).astype(np.float32)}, "float", "float")
    assert exact and new["weight"].dtype == jnp.bfloat16


@pytest.mark.parametrize(("code", "byte", "exact"), [(1, 1, False), (1, 2, True), (0, 0, True)])
def test_exactness_is_not_claimed_for_values_that_backends_flush(code, byte, exact):
    arrays = {
        "weight": np.full((2, 16), code * 17, np.uint8),
        "scale": np.full((2, 1), byte, np.uint8),
    }
    assert convert_weight(arrays, "mxfp4", "float")[1] == exact


@pytest.mark.parametrize("target", ["nvfp4", "mxfp4", "fp8_block"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_refused(target, value):
    w = np.ones((4, 32), np.float32)
    w[1, 2] = value
    with pytest.raises(ValueError, match="arrays: got values that are NaN or infinite"):
        convert_weight({"weight": w}, "float", target)


def test_what_bfloat16_cannot_hold_is_refused():
    w = np.full((4, 32), np.finfo(np.float32).max, np.float32)
    with pytest.raises(ValueError, match="arrays: got values that float cannot hold"):
        convert_weight({"weight": w}, "float", "float")


def test_bad_arguments():
    w = {"weight": np.ones((4, 40), np.float32)}
    with pytest.raises(ValueError, match="arrays: got 40 inputs, nvfp4 needs a multiple of 16"):
        convert_weight(w, "float", "nvfp4")
    with pytest.raises(ValueError, match="weight_format: got 'fp8', expected one of float, fp8_b"):
        convert_weight(w, "float", "fp8")
    with pytest.raises(ValueError, match="experts: got 'fp4', expected one of nvfp4, mxfp4, fp8"):
        converted({}, {}, "fp4")
    with pytest.raises(ValueError, match="linears: got 'nvfp4', expected one of fp8, bf16"):
        converted({}, {}, linears="nvfp4")
