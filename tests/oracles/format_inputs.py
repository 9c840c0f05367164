"""Inputs that number formats get wrong, and the comparison of results to the bit."""

import ml_dtypes
import numpy as np

FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
SMALLEST_NORMAL = np.finfo(np.float32).tiny


def neighbours(x, dtype: np.dtype) -> np.ndarray:
    """x, and the next values of `dtype` below and above it."""
    x = np.asarray(x, dtype)
    down, up = (np.nextafter(x, np.asarray(to, dtype)) for to in (-np.inf, np.inf))
    return np.concatenate([x, down, up])


def finite_rows(width: int, magnitudes: np.ndarray, dtype: np.dtype, seed: int = 0) -> np.ndarray:
    """Finite rows [n, width] for a format with these magnitudes (ascending from 0).

    Random rows over the whole range of exponents; zeros of both signs; subnormal numbers; every
    tie between two values and its neighbours under several scales; largest magnitudes at the
    format's largest value and at powers of two, and beside them; the ends of float32's range.
    """
    rng = np.random.default_rng(seed)
    rows = [rng.standard_normal((16, width)) * 10.0 ** rng.uniform(-36, 36, (16, 1))]
    rows.append(rng.standard_normal((16, width)))
    rows.append(np.stack([np.zeros(width), -np.zeros(width)]))
    rows.append(rng.uniform(-1, 1, (4, width)) * 2.0 ** np.array([[-149], [-130], [-127], [-126]]))
    ties = neighbours((magnitudes[1:] + magnitudes[:-1]) / 2, dtype).astype(np.float64)
    ties = np.concatenate([ties, -ties])
    for exponent in (0, -3, 17, -60):
        filled = np.resize(rng.permutation(ties), (-(-ties.size // (width - 1)), width))
        # Each row starts with the largest magnitude, so that its scale is 2^exponent.
        filled = np.concatenate([np.full((len(filled), 1), magnitudes[-1]), filled], -1)
        rows.append(filled[:, :width] * 2.0**exponent)
    for amax in (magnitudes[-1], 1.0, 1e-4, 6 * SMALLEST_NORMAL, 2.0**100, 3e38):
        beside = neighbours([amax], dtype).astype(np.float64)
        rows.append(rng.uniform(-1, 1, (3, width)) * amax / 2)
        rows[-1][:, width // 2] = beside
    largest = float(ml_dtypes.finfo(dtype).max)
    rows.append(np.where(rng.random((2, width)) < 0.5, largest, -largest))
    return np.concatenate(rows).astype(dtype)


def special_rows(width: int, dtype: np.dtype) -> np.ndarray:
    """Rows with an infinity or a NaN somewhere, beside ordinary numbers."""
    rows = np.random.default_rng(1).standard_normal((6, width))
    rows[0, 0], rows[1, width - 1], rows[2, width // 2] = np.inf, -np.inf, np.nan
    rows[3] = np.inf
    rows[4, :2] = np.inf, np.nan
    rows[5, 0] = -np.nan
    return rows.astype(dtype)


def flushed(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 numbers as zeros of their sign: some backends do that."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(0.0, x), x)


def assert_same(found, expected: np.ndarray, dtype=None) -> None:
    """Equal to the bit, NaN being NaN and subnormal results counting as zeros."""
    found = np.asarray(found)
    if dtype is not None:
        assert found.dtype == dtype
    with np.errstate(over="ignore"):
        expected = np.asarray(expected).astype(found.dtype)
    found, expected = (flushed(np.asarray(x, np.float64)) for x in (found, expected))
    np.testing.assert_array_equal(found, expected)
    signed = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(found)[signed], np.signbit(expected)[signed])
