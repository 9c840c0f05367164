"""Compressors: many tokens' hidden states to one entry."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float32

from dsv4_jax.cache.flush import OVERLAP_RATIO
from dsv4_jax.config import Config
from dsv4_jax.layers.linear import Linear
from dsv4_jax.layers.norms import RMSNorm
from dsv4_jax.layers.parameter import parameter
from dsv4_jax.numerics import Numerics
from dsv4_jax.ops.flush import Gated


class Compressor(nnx.Module):
    """Pools `ratio` tokens per entry by a softmax gate per channel, everything in float32.

    With ratio 4 an entry also pools the 4 tokens before, through a second set of channels.
    `linears` say which products of the hidden states it takes; `ops.flush` makes entries of them.
    """

    def __init__(self, config: Config, ratio: int, width: int, numerics: Numerics):
        channels = 2 * width if ratio == OVERLAP_RATIO else width
        self.wkv = Linear(config.hidden_size, channels, numerics)
        self.wgate = Linear(config.hidden_size, channels, numerics)
        self.ape = parameter(ratio, channels, init="zeros")
        self.norm = RMSNorm(width, config.rms_norm_eps)

    def linears(self) -> list[tuple[Linear, DTypeLike | None]]:
        """What `layers.linear.products` makes of the hidden states: value and gate."""
        return [(self.wkv, jnp.float32), (self.wgate, jnp.float32)]

    def gated(
        self, value: Float32[Array, "b t channels"], gate: Float32[Array, "b t channels"]
    ) -> Gated:
        """What a view's flush folds into the tail; the entries that this completes are stored."""
        return Gated(value, gate, self.ape[...], self.norm.weight[...])
