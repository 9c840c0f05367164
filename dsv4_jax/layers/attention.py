"""Multi-query attention over a sliding window and compressed entries."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv4_jax.cache.handle import LayerView
from dsv4_jax.config import Config
from dsv4_jax.layers.compressor import Compressor
from dsv4_jax.layers.indexer import Indexer
from dsv4_jax.layers.linear import Linear
from dsv4_jax.layers.norms import RMSNorm
from dsv4_jax.layers.parameter import parameter
from dsv4_jax.layers.rotary import Rotary
from dsv4_jax.numerics import Numerics
from dsv4_jax.ops.valid_lens import compute_valid_lens


class Attention(nnx.Module):
    """Window-only (ratio 0), compressed sparse (4) or heavily compressed (128) attention.

    One vector per token is key and value of all heads. Its rotation at the key's position is
    undone at the query's position on the output, which leaves the relative one.
    """

    def __init__(self, config: Config, ratio: int, numerics: Numerics):
        d, h, c = config.hidden_size, config.num_attention_heads, config.head_dim
        groups, rank = config.o_groups, config.o_lora_rank
        self.ratio = ratio
        self.num_heads, self.head_dim, self.num_groups = h, c, groups
        self.eps = config.rms_norm_eps
        self.rotary = Rotary.of_layer(config, ratio)
        self.wq_a = Linear(d, config.q_lora_rank, numerics)
        self.q_norm = RMSNorm(config.q_lora_rank, self.eps)
        self.wq_b = Linear(config.q_lora_rank, h * c, numerics)
        self.wkv = Linear(d, c, numerics)
        self.kv_norm = RMSNorm(c, self.eps)
        self.sink = parameter(h, init="zeros")
        self.wo_a = Linear(h * c // groups, groups * rank, numerics)
        self.wo_b = Linear(groups * rank, d, numerics)
        if ratio:
            self.compressor = Compressor(config, ratio, c, numerics)
        if ratio == 4:
            self.indexer = Indexer(config, ratio, numerics)

    @jax.named_scope("attention")
    def __call__(
        self, x: Float[Array, "b t d"], view: LayerView
    ) -> tuple[Float[Array, "b t d"], Int[Array, "b t k"] | None]:
        """Returns (output, ids of the selected entries in a CSA layer or None)."""
        with jax.named_scope("attention projections"):
            q_lora = self.q_norm(self.wq_a(x))
            q = self.wq_b(q_lora).reshape(*x.shape[:2], self.num_heads, self.head_dim)
            kv = self.wkv(x)
        frequencies = self.rotary.frequencies()
        q = view.append_swa(q, kv, self.kv_norm.weight[...], frequencies, self.eps)

        ids = selected = None
        if self.ratio == 4:
            keys = self.indexer.compressor(x)
            view.flush_csa(self.compressor(x), keys, frequencies, x.dtype, self.eps)
            ids, selected = self._select(x, q_lora, view)
        elif self.ratio:
            view.flush_hca(self.compressor(x), frequencies, x.dtype, self.eps)

        scale = self.head_dim**-0.5
        o = view.attend(q, self.sink[...], frequencies, scale, self.ratio, ids)
        return self._project_out(o), selected

    def _select(
        self, x: Float[Array, "b t d"], q_lora: Float[Array, "b t q"], view: LayerView
    ) -> tuple[Int[Array, "b t k"] | None, Int[Array, "b t k"]]:
        """Ids for the attention, None while it sees all entries; and what these are."""
        num_entries = view.num_entries("csa")
        valid = compute_valid_lens(view.chunk.positions, self.ratio)
        visible = jnp.arange(num_entries) < valid[..., None]
        if num_entries <= self.indexer.top_k:
            return None, jnp.where(visible, jnp.arange(num_entries), -1)
        ids = self.indexer(x, q_lora, view, visible)
        return ids, ids

    @jax.named_scope("attention projections")
    def _project_out(self, o: Float[Array, "b t h c"]) -> Float[Array, "b t d"]:
        """Heads in consecutive groups, each through its own low-rank matrix, then one to d."""
        b, t = o.shape[:2]
        return self.wo_b(self.wo_a.grouped(o.reshape(b, t, self.num_groups, -1)))
