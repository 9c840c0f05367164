"""Compressors: many tokens' hidden states to one entry."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv4_jax.cache.flush import OVERLAP_RATIO
from dsv4_jax.cache.handle import LayerView, PoolName
from dsv4_jax.config import Config
from dsv4_jax.formats.hadamard import hadamard
from dsv4_jax.layers.linear import Linear
from dsv4_jax.layers.norms import RMSNorm
from dsv4_jax.layers.parameter import parameter
from dsv4_jax.layers.rotary import Rotary
from dsv4_jax.numerics import Numerics


class Compressor(nnx.Module):
    """Pools `ratio` tokens per entry by a softmax gate per channel, everything in float32.

    With ratio 4 an entry also pools the 4 tokens before, through a second set of channels. The
    pooled entry is rounded to the model's dtype, normalised and rotated at its first token.
    """

    def __init__(self, config: Config, ratio: int, width: int, numerics: Numerics):
        channels = 2 * width if ratio == OVERLAP_RATIO else width
        self.ratio = ratio
        self.rotary = Rotary.of_layer(config, ratio)
        self.wkv = Linear(config.hidden_size, channels, numerics)
        self.wgate = Linear(config.hidden_size, channels, numerics)
        self.ape = parameter(ratio, channels, init="zeros")
        self.norm = RMSNorm(width, config.rms_norm_eps)

    def rows(
        self, x: Float[Array, "b t d"], positions: Int[Array, "b t"]
    ) -> Float[Array, "b t 2 w"]:
        """(value, score) of every token, float32."""
        value = self.wkv(x, jnp.float32)
        ape = self.ape[...].astype(jnp.float32)[positions % self.ratio]
        return jnp.stack([value, self.wgate(x, jnp.float32) + ape], axis=2)

    @jax.named_scope("compressors")
    def __call__(self, x: Float[Array, "b t d"], view: LayerView, pool: PoolName) -> None:
        """Folds the chunk into the pool's tail and appends the entries that it completes."""
        rows = self.rows(x, view.chunk.positions)
        completed = view.chunk.completed(self.ratio)
        if pool == "hca":
            pooled = view.accumulate(rows, self.ratio)
        else:
            pooled = view.pool_overlapping("csa_tail" if pool == "csa" else "key_tail", rows)
        entries = self.rotary(self.norm(pooled.astype(x.dtype)), completed.ids * self.ratio)
        if pool == "csa_keys":
            entries = hadamard(entries)
        view.append(pool, completed, view.storage(pool).encode(entries))
