"""Stored values that no header shows: what is wrong with them, and their form in params."""

import numpy as np

from dsv4_jax.checkpoint.plan import Leaf

_E8M0_NAN = 255
_SIGN_AND_MANTISSA = np.uint32(0x807FFFFF)
_LOWEST_SCALE_BITS = np.uint32(0x00400000)  # 2^-127, exponent byte 0


def problem(leaf: Leaf, values: np.ndarray, num_experts: int) -> str | None:
    """What is wrong with values as stored, or None: NaN scales, expert ids out of range."""
    if leaf.is_expert_table:
        outside = (values < 0) | (values >= num_experts)
        if outside.any():
            return f"expert id {values[outside][0]}, expected ids in [0, {num_experts})"
    if not leaf.is_scale:
        return None
    bad = values == _E8M0_NAN if values.dtype == np.uint8 else ~np.isfinite(values)
    if bad.any():
        return f"{bad.sum()} of {bad.size} scales are NaN or infinite"
    if values.dtype != leaf.dtype:
        bits = values.view(np.uint32)
        powers = (bits & _SIGN_AND_MANTISSA == 0) & (bits != 0) | (bits == _LOWEST_SCALE_BITS)
        if not powers.all():
            return f"scale {values[~powers][0]}, expected powers of two"
    return None


def converted(leaf: Leaf, values: np.ndarray) -> np.ndarray:
    """Values as stored, which have no `problem`, in the dtype they have in params."""
    if leaf.is_scale:
        bits = values.view(np.uint32)
        return np.where(bits == _LOWEST_SCALE_BITS, 0, bits >> 23).astype(np.uint8)
    return values.astype(leaf.dtype)
