"""Lightning indexer: scores compressed entries and keeps the best for every query."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsv4_jax.cache.handle import LayerView
from dsv4_jax.config import Config
from dsv4_jax.formats import indexer_key
from dsv4_jax.formats.hadamard import hadamard
from dsv4_jax.layers.compressor import Compressor
from dsv4_jax.layers.linear import Linear
from dsv4_jax.layers.rotary import Rotary
from dsv4_jax.numerics import Numerics


class Indexer(nnx.Module):
    """Queries from the low-rank query, keys from a compressor of its own.

    Both are rotated by the Hadamard matrix before they are rounded to MXFP4 (Q3); without the
    rounding it cancels in the products.
    """

    def __init__(self, config: Config, ratio: int, numerics: Numerics):
        self.num_heads = config.index_n_heads
        self.head_dim = config.index_head_dim
        self.top_k = config.index_topk
        self.quantize = numerics.quantize_indexer
        self.rotary = Rotary.of_layer(config, ratio)
        self.wq_b = Linear(config.q_lora_rank, self.num_heads * self.head_dim, numerics)
        self.weights_proj = Linear(config.hidden_size, self.num_heads, numerics)
        self.compressor = Compressor(config, ratio, self.head_dim, numerics)

    def queries(
        self, q_lora: Float[Array, "b t q"], positions: Int[Array, "b t"]
    ) -> Float[Array, "b t h c"]:
        q = self.wq_b(q_lora).reshape(*q_lora.shape[:-1], self.num_heads, self.head_dim)
        q = hadamard(self.rotary(q, positions))
        return indexer_key.round_trip(q) if self.quantize else q

    @jax.named_scope("indexer")
    def __call__(
        self,
        x: Float[Array, "b t d"],
        q_lora: Float[Array, "b t q"],
        view: LayerView,
        visible: Bool[Array, "b t n"],
    ) -> Int[Array, "b t k"]:
        """Ids of the top_k visible entries, -1 where there are fewer; keys are in the cache."""
        scale = (self.head_dim * self.num_heads) ** -0.5
        weights = self.weights_proj(x, jnp.float32) * scale
        q = self.queries(q_lora, view.chunk.positions)
        return view.top_entries(q, weights, visible, self.top_k, mxfp4_queries=self.quantize)
