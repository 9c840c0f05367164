"""Lightning indexer: scores compressed entries and keeps the best for every query."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from dsv4_jax.cache.handle import LayerView, Prepared, Projected
from dsv4_jax.config import Config
from dsv4_jax.layers.compressor import Compressor
from dsv4_jax.layers.linear import Linear
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
        self.wq_b = Linear(config.q_lora_rank, self.num_heads * self.head_dim, numerics)
        self.weights_proj = Linear(config.hidden_size, self.num_heads, numerics)
        self.compressor = Compressor(config, ratio, self.head_dim, numerics)

    def linears(self) -> list[tuple[Linear, DTypeLike | None]]:
        """What `layers.linear.products` makes of the hidden states: the heads' weights."""
        return [(self.weights_proj, jnp.float32)]

    def queries(self, q: Float[Array, "b t hc"], weights: Float32[Array, "b t h"]) -> Projected:
        """What a view prepares for scoring.

        Args:
            q: what `wq_b` makes of the low-rank query.
            weights: what `weights_proj` makes of the hidden state.
        """
        return Projected(
            q.reshape(*q.shape[:-1], self.num_heads, self.head_dim),
            weights,
            scale=(self.head_dim * self.num_heads) ** -0.5,
            quantize=self.quantize,
        )

    @jax.named_scope("indexer")
    def __call__(self, prepared: Prepared, view: LayerView) -> Int[Array, "b t k"]:
        """Ids of the top_k visible entries, -1 where there are fewer; keys are in the cache."""
        return view.top_entries(prepared, self.top_k)
