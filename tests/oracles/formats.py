"""The number formats by their definitions: every value of a code, the nearest by trying all.

Values are float64. Where a rule is stated in float32 (the exponent of a scale, the scales of
NVFP4) each step is rounded to float32.
"""

import numpy as np

SMALLEST_NORMAL = 2.0**-126


def e2m1_value(code: int) -> float:
    sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
    magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -magnitude if sign else magnitude


def e4m3_value(code: int) -> float:
    sign, exponent, mantissa = code >> 7, (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        magnitude = mantissa / 8 * 2.0**-6
    else:
        magnitude = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -magnitude if sign else magnitude


def e8m0_value(code: int) -> float:
    return float("nan") if code == 255 else 2.0 ** (code - 127)


E2M1 = np.array([e2m1_value(code) for code in range(16)])
E4M3 = np.array([e4m3_value(code) for code in range(256)])
E8M0 = np.array([e8m0_value(code) for code in range(256)])


def nearest(x: np.ndarray, magnitudes: np.ndarray, sign_bit: int) -> np.ndarray:
    """The code of the nearest magnitude, of two equally near the even one, with x's sign."""
    even_first = np.concatenate(
        [np.arange(0, len(magnitudes), 2), np.arange(1, len(magnitudes), 2)]
    )
    distance = np.abs(np.minimum(np.abs(x), magnitudes[-1])[..., None] - magnitudes[even_first])
    code = even_first[distance.argmin(-1)]
    return (code + sign_bit * np.signbit(x)).astype(np.uint8)


def to_e2m1(x: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x), 7, nearest(x, E2M1[:8], 8)).astype(np.uint8)


def to_e4m3(x: np.ndarray) -> np.ndarray:
    return nearest(x, E4M3[:127], 128)


def nearest_multiple(
    x: np.ndarray, magnitudes: np.ndarray, unit: np.ndarray, factor: float
) -> np.ndarray:
    """The code whose magnitude * factor * unit is nearest to |x|, walking up from zero.

    A step is taken past the middle, and on it to an even code; the middle is the float32 product
    of its exact multiple of `factor` and unit. A zero unit leaves zero.
    """
    codes = np.zeros(x.shape, np.uint8)
    for code in range(1, len(magnitudes)):
        middle = to_float32((magnitudes[code - 1] + magnitudes[code]) / 2 * factor * unit)
        distance = np.abs(x) - middle
        codes[(distance > 0) | ((distance == 0) & (code % 2 == 0))] = code
    return np.where(unit > 0, codes, 0).astype(np.uint8)


def to_float32(x: np.ndarray) -> np.ndarray:
    """float64 rounded to float32 and back."""
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float64).astype(np.float32).astype(np.float64)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float64 rounded to eight significant bits, ties to even."""
    with np.errstate(invalid="ignore", over="ignore"):
        _, exponent = np.frexp(np.where(np.isfinite(x), x, 0))
        quantum = np.ldexp(1.0, np.maximum(exponent - 8, -133))
        rounded = np.rint(x / quantum) * quantum
        return np.where(np.abs(rounded) >= 2.0**128, np.copysign(np.inf, x), rounded)


def scale_code(amax: np.ndarray, largest: float, floor: float) -> np.ndarray:
    """The smallest power of two that is not below the float32 quotient; 255 if there is none."""
    amax = to_float32(np.maximum(amax, to_float32(floor)))
    quotient = to_float32(amax * to_float32(1 / largest))
    code = (E8M0[:255] < quotient[..., None]).sum(-1)
    return np.where(np.isfinite(quotient), code, 255).astype(np.uint8)


def grouped(x: np.ndarray, size: int) -> np.ndarray:
    """[..., n] to [..., ceil(n / size), size], filled up with zeros."""
    missing = -x.shape[-1] % size
    padded = np.concatenate([x, np.zeros((*x.shape[:-1], missing))], -1)
    return padded.reshape(*x.shape[:-1], padded.shape[-1] // size, size)


def ungrouped(groups: np.ndarray, width: int) -> np.ndarray:
    flat = groups.reshape(*groups.shape[:-2], groups.shape[-2] * groups.shape[-1])
    return flat[..., :width]


def fp8_rows(x: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(E4M3 codes, scale codes, values) of groups along the last axis."""
    x = np.asarray(x, np.float64)
    groups = grouped(x, size)
    scales = scale_code(np.abs(groups).max(-1), 448, 1e-4)
    factor = E8M0[scales][..., None]
    with np.errstate(invalid="ignore"):
        codes = to_e4m3(groups / factor)
    values = E4M3[codes] * factor
    return ungrouped(codes, x.shape[-1]), scales, ungrouped(values, x.shape[-1])


def fp8_blocks(w: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(E4M3 codes, scale codes, values) of a matrix [o, i], block after block."""
    w = np.asarray(w, np.float64)
    rows, columns = (range(0, n, size) for n, size in zip(w.shape, block, strict=True))
    codes, values = np.zeros(w.shape, np.uint8), np.zeros(w.shape)
    scales = np.zeros((len(rows), len(columns)), np.uint8)
    for r, row in enumerate(rows):
        for c, column in enumerate(columns):
            at = slice(row, row + block[0]), slice(column, column + block[1])
            scales[r, c] = scale_code(np.abs(w[at]).max(), 448, 1e-4)
            with np.errstate(invalid="ignore"):
                codes[at] = to_e4m3(w[at] / E8M0[scales[r, c]])
            values[at] = E4M3[codes[at]] * E8M0[scales[r, c]]
    return codes, scales, values


def mxfp4(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(E2M1 codes, scale codes, values) of groups of 32 along the last axis."""
    x = np.asarray(x, np.float64)
    x = np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(0.0, x), x)
    groups = grouped(x, 32)
    scales = scale_code(np.abs(groups).max(-1), 6, 6 * SMALLEST_NORMAL)
    factor = E8M0[scales][..., None]
    with np.errstate(invalid="ignore"):
        codes = to_e2m1(groups / factor)
    values = E2M1[codes] * factor
    return ungrouped(codes, x.shape[-1]), scales, ungrouped(values, x.shape[-1])


def nvfp4(w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float64, np.ndarray]:
    """(E2M1 codes, E4M3 scale codes, global scale, values) of a finite matrix [o, i]."""
    w = np.asarray(w, np.float64)
    global_scale = to_float32(np.abs(w).max(initial=0) * to_float32(1 / 2688))
    global_scale = np.maximum(global_scale, 2.0**-115)
    groups = grouped(w, 16)
    scales = nearest_multiple(np.abs(groups).max(-1), E4M3[:127], np.full((1, 1), global_scale), 6)
    unit = to_float32(E4M3[scales] * global_scale)[..., None]
    codes = nearest_multiple(groups, E2M1[:8], unit, 1) + 8 * np.signbit(groups)
    values = to_float32(E2M1[codes] * E4M3[scales][..., None] * global_scale)
    return ungrouped(codes, w.shape[-1]), scales, global_scale, ungrouped(values, w.shape[-1])


def packed(codes: np.ndarray) -> np.ndarray:
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).astype(np.uint8)


def kv_entry(x: np.ndarray, rope_dim: int) -> np.ndarray:
    """The values of an entry after Q2: E4M3 in groups of 64, then bfloat16."""
    x = np.asarray(x, np.float64)
    nope = x.shape[-1] - rope_dim
    return np.concatenate([fp8_rows(x[..., :nope], 64)[2], to_bfloat16(x[..., nope:])], -1)
