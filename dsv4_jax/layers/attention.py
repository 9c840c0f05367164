"""Multi-query attention over a sliding window and compressed entries."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv4_jax.cache.handle import LayerView
from dsv4_jax.config import Config
from dsv4_jax.layers.compressor import Compressor
from dsv4_jax.layers.indexer import Indexer
from dsv4_jax.layers.linear import Linear, products
from dsv4_jax.layers.norms import RMSNorm
from dsv4_jax.layers.parameter import parameter
from dsv4_jax.layers.rotary import Rotary
from dsv4_jax.numerics import Numerics
from dsv4_jax.ops.flush import Gated
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
        self.batch_invariant = numerics.batch_invariant
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
        selects = self.ratio == 4 and view.num_entries(self.ratio) > self.indexer.top_k
        with jax.named_scope("attention projections"):
            q_lora, kv, *gated = products(x, self._inputs(selects))
            q_lora = self.q_norm(q_lora)
            queries = [(self.wq_b, None), *([(self.indexer.wq_b, None)] if selects else [])]
            q, *index_q = products(q_lora, queries)
            q = q.reshape(*x.shape[:2], self.num_heads, self.head_dim)
        streams: tuple[Gated, ...] = ()
        projected = None
        if self.ratio == 4:
            value, gate, key_value, key_gate, *weights = gated
            keys = self.indexer.compressor.gated(key_value, key_gate)
            streams = (self.compressor.gated(value, gate), keys)
            projected = self.indexer.queries(*index_q, *weights) if selects else None
        elif self.ratio:
            streams = (self.compressor.gated(*gated),)
        frequencies = self.rotary.frequencies()
        q, prepared = view.write(
            q, kv, self.kv_norm.weight[...], frequencies, self.eps, streams, projected
        )

        ids = selected = None
        if prepared is not None:
            ids = selected = self.indexer(prepared, view)
        elif self.ratio == 4:
            selected = self._all_entries(view)
        scale = self.head_dim**-0.5
        o = view.attend(
            *(q, self.sink[...], frequencies, scale, self.ratio, ids),
            batch_invariant=self.batch_invariant,
        )
        return self._project_out(o), selected

    def _inputs(self, selects: bool) -> list[tuple[Linear, DTypeLike | None]]:
        """The linears of the hidden states."""
        linears: list[tuple[Linear, DTypeLike | None]] = [(self.wq_a, None), (self.wkv, None)]
        if self.ratio:
            linears += self.compressor.linears()
        if self.ratio == 4:
            linears += self.indexer.compressor.linears()
        return linears + (self.indexer.linears() if selects else [])

    def _all_entries(self, view: LayerView) -> Int[Array, "b t k"]:
        """Ids of the entries that each query sees, -1 for the others."""
        ids = jnp.arange(view.num_entries(self.ratio))
        valid = compute_valid_lens(view.chunk.positions, self.ratio)
        return jnp.where(ids < valid[..., None], ids, -1)

    @jax.named_scope("attention projections")
    def _project_out(self, o: Float[Array, "b t h c"]) -> Float[Array, "b t d"]:
        """Heads in consecutive groups, each through its own low-rank matrix, then one to d."""
        b, t = o.shape[:2]
        return self.wo_b(self.wo_a.grouped(o.reshape(b, t, self.num_groups, -1)))
