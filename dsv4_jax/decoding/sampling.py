"""From logits to the next token, per sequence.

The filters apply in this order: temperature, top-k, top-p, min-p. Each looks at what the ones
before have left, renormalised:

- top-k keeps the k likeliest tokens;
- top-p keeps the likeliest tokens up to the one with which their probability reaches p;
- min-p keeps the tokens at least min_p times as likely as the likeliest.

Of equally likely tokens the lower id comes first, everywhere. NaN counts as -inf, which is never
sampled. A row without anything else gives token 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

# Below the normal numbers a backend may take a temperature for 0; all do here.
_COLDEST = float(np.finfo(np.float32).tiny)


def _require(name: str, value: object, ok: bool, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")


def _is_integer(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float, np.number)) and math.isfinite(value)


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: 0 keeps all.
        top_p: in (0, 1]; 1 keeps all.
        min_p: in [0, 1]; 0 keeps all.
        seed: in [0, 2**32). The t-th new token of a sequence depends on its logits, seed and t
            alone.
        max_new_tokens: at least 1.
        stop_token_ids: end the text, beside the model's end-of-sequence token, and are not part
            of it.
        stop: strings that end the text and are not part of it.

    Raises:
        ValueError: names the field.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    max_new_tokens: int = 256
    stop_token_ids: Sequence[int] = ()
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        t, p, m = self.temperature, self.top_p, self.min_p
        _require("temperature", t, _is_finite(t) and t >= 0, "a finite number >= 0")
        _require("top_p", p, _is_finite(p) and 0 < p <= 1, "a number in (0, 1]")
        _require("min_p", m, _is_finite(m) and 0 <= m <= 1, "a number in [0, 1]")
        for name, low, high in (
            ("top_k", 0, 2**31),
            ("seed", 0, 2**32),
            ("max_new_tokens", 1, 2**31),
        ):
            value = getattr(self, name)
            ok = _is_integer(value) and low <= value < high
            _require(name, value, ok, f"an integer in [{low}, {high})")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        ok = all(isinstance(s, str) and s for s in stop)
        _require("stop", self.stop, ok, "strings that are not empty")
        ids = tuple(self.stop_token_ids)
        ok = all(_is_integer(i) and 0 <= i < 2**31 for i in ids)
        _require("stop_token_ids", ids, ok, "token ids >= 0")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", ids)


@no_type_check  # JAX also builds such trees of things that are no arrays
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingArrays:
    """The options that decide a token, one value a sequence: data, so that none recompiles."""

    temperature: Float[Array | np.ndarray, "s"]
    top_k: Int[Array | np.ndarray, "s"]
    top_p: Float[Array | np.ndarray, "s"]
    min_p: Float[Array | np.ndarray, "s"]
    seed: UInt32[Array | np.ndarray, "s"]

    @classmethod
    def of(cls, params: Sequence[SamplingParams]) -> "SamplingArrays":
        def column(name: str, dtype: type) -> np.ndarray:
            return np.array([getattr(p, name) for p in params], dtype)

        return cls(
            column("temperature", np.float32),
            column("top_k", np.int32),
            column("top_p", np.float32),
            column("min_p", np.float32),
            column("seed", np.uint32),
        )


def _ordered(logits: Float[Array, "*batch v"]) -> Float[Array, "*batch v"]:
    """Logits that compare: NaN as -inf, +inf as the largest finite number."""
    return jnp.nan_to_num(logits, nan=-jnp.inf, neginf=-jnp.inf)


def greedy(logits: Float[Array, "*batch v"]) -> Int[Array, "*batch"]:
    """The likeliest token."""
    return jnp.argmax(_ordered(logits), axis=-1).astype(jnp.int32)


def filter_logits(
    logits: Float[Array, "v"],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
    min_p: Float[Array, ""],
) -> Float[Array, "v"]:
    """Log-weights of the tokens that may be sampled, 0 for the likeliest, -inf for the others.

    Args:
        logits: float32.
        temperature: above 0.
        top_k, top_p, min_p: as in `SamplingParams`.
    """
    logits = _ordered(logits)
    scaled = jnp.where(logits > -jnp.inf, (logits - jnp.max(logits)) / temperature, -jnp.inf)
    ids = jnp.arange(len(scaled))
    order = jnp.argsort(-scaled, stable=True)

    in_top_k = (top_k == 0) | (ids < top_k)
    weight = jnp.where(in_top_k, jnp.exp(scaled[order]), 0.0)
    before = jnp.pad(jnp.cumsum(weight)[:-1], (1, 0))
    in_top_p = (top_p >= 1) | (before < top_p * weight.sum())
    kept = (scaled[order] > -jnp.inf) & in_top_k & in_top_p & (weight >= min_p)

    last = order[jnp.maximum(kept.sum() - 1, 0)]
    among = (scaled > scaled[last]) | ((scaled == scaled[last]) & (ids <= last))
    return jnp.where(among, scaled, -jnp.inf)


def sample(
    logits: Float[Array, "s v"], options: SamplingArrays, steps: Int[Array, "s"]
) -> Int[Array, "s"]:
    """The next token of each sequence; pure.

    Args:
        logits: float32.
        options: per sequence.
        steps: how many new tokens each sequence has already; with its seed the only source of
            randomness, so that a sequence's tokens do not depend on the batch it is in.

    Returns:
        int32 ids.
    """

    def sampled(logits, options, step):
        positive = jnp.maximum(options.temperature, _COLDEST)
        weights = filter_logits(logits, positive, options.top_k, options.top_p, options.min_p)
        key = jax.random.fold_in(jax.random.key(options.seed), step)
        drawn = jax.random.categorical(key, weights).astype(jnp.int32)
        return jnp.where(options.temperature >= _COLDEST, drawn, greedy(logits))

    # The sort is worth skipping while nobody samples.
    return jax.lax.cond(
        jnp.any(options.temperature >= _COLDEST),
        lambda: jax.vmap(sampled)(logits, options, steps),
        lambda: greedy(logits),
    )
