"""Multi-query attention over a sliding window and compressed entries."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsv4_jax.cache.handle import LayerView
from dsv4_jax.config import Config
from dsv4_jax.layers.compressor import Compressor
from dsv4_jax.layers.indexer import Indexer
from dsv4_jax.layers.linear import Linear
from dsv4_jax.layers.norms import RMSNorm
from dsv4_jax.layers.parameter import parameter
from dsv4_jax.layers.rotary import Rotary
from dsv4_jax.numerics import Numerics
from dsv4_jax.ops.attention import Source, attention
from dsv4_jax.ops.norms import rms_normalize

# Up to this many entries per selected one, masking all entries is cheaper than gathering the
# selected ones for every query of a chunk.
_MASK_FACTOR = 16


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
        positions = view.chunk.positions
        with jax.named_scope("attention projections"):
            q_lora = self.q_norm(self.wq_a(x))
            q = self.wq_b(q_lora).reshape(*x.shape[:2], self.num_heads, self.head_dim)
            kv = self.kv_norm(self.wkv(x))
        q = self.rotary(rms_normalize(q, self.eps), positions)
        kv = self.rotary(kv, positions)

        sources = [view.window(view.storage("csa").encode(kv), x.dtype)]
        selected = None
        if self.ratio == 4:
            source, selected = self._sparse_entries(x, q_lora, view)
            sources.append(source)
        elif self.ratio:
            self.compressor(x, view, "hca")
            visible = self._visible(view, view.num_entries("hca"))
            sources.append(Source(view.entries("hca", x.dtype)[:, None], visible))

        o = attention(q, sources, self.sink[...], self.head_dim**-0.5)
        return self._project_out(self.rotary(o, positions, inverse=True)), selected

    def _visible(self, view: LayerView, num_entries: int) -> Bool[Array, "b t n"]:
        """A query sees the entries whose last token is not after it."""
        complete = (view.chunk.positions + 1) // self.ratio
        return jnp.arange(num_entries) < complete[..., None]

    def _sparse_entries(
        self, x: Float[Array, "b t d"], q_lora: Float[Array, "b t q"], view: LayerView
    ) -> tuple[Source, Int[Array, "b t k"]]:
        self.compressor(x, view, "csa")
        self.indexer.compressor(x, view, "csa_keys")
        num_entries = view.num_entries("csa")
        visible = self._visible(view, num_entries)
        if num_entries <= self.indexer.top_k:
            selected = jnp.where(visible, jnp.arange(num_entries), -1)
            return Source(view.entries("csa", x.dtype)[:, None], visible), selected
        selected = self.indexer(x, q_lora, view, visible)
        b, t, k = selected.shape
        if t == 1 or num_entries > _MASK_FACTOR * k:
            return Source(view.entries("csa", x.dtype, selected), selected >= 0), selected
        row, query = jnp.arange(b)[:, None, None], jnp.arange(t)[:, None]
        # Index -1 would wrap around; num_entries is dropped.
        target = jnp.where(selected < 0, num_entries, selected)
        chosen = jnp.zeros_like(visible).at[row, query, target].set(True, mode="drop")
        return Source(view.entries("csa", x.dtype)[:, None], chosen), selected

    @jax.named_scope("attention projections")
    def _project_out(self, o: Float[Array, "b t h c"]) -> Float[Array, "b t d"]:
        """Heads in consecutive groups, each through its own low-rank matrix, then one to d."""
        b, t = o.shape[:2]
        return self.wo_b(self.wo_a.grouped(o.reshape(b, t, self.num_groups, -1)))
