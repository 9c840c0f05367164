"""Compressors: many tokens' hidden states to one entry."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsv4_jax.cache.flush import OVERLAP_RATIO
from dsv4_jax.config import Config
from dsv4_jax.layers.linear import Linear
from dsv4_jax.layers.norms import RMSNorm
from dsv4_jax.layers.parameter import parameter
from dsv4_jax.numerics import Numerics
from dsv4_jax.ops.flush import Gated


class Compressor(nnx.Module):
    """Pools `ratio` tokens per entry by a softmax gate per channel, everything in float32.

    With ratio 4 an entry also pools the 4 tokens before, through a second set of channels. The
    products are made here; `ops.flush` makes entries of them.
    """

    def __init__(self, config: Config, ratio: int, width: int, numerics: Numerics):
        channels = 2 * width if ratio == OVERLAP_RATIO else width
        self.wkv = Linear(config.hidden_size, channels, numerics)
        self.wgate = Linear(config.hidden_size, channels, numerics)
        self.ape = parameter(ratio, channels, init="zeros")
        self.norm = RMSNorm(width, config.rms_norm_eps)

    @jax.named_scope("compressors")
    def __call__(self, x: Float[Array, "b t d"]) -> Gated:
        """What a view's flush folds into the tail; the entries that this completes are stored."""
        value, gate = self.wkv(x, jnp.float32), self.wgate(x, jnp.float32)
        return Gated(value, gate, self.ape[...], self.norm.weight[...])
