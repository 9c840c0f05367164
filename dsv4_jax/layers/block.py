"""One layer: attention and experts, each between a collapse and a spread of the streams."""

from flax import nnx
from jaxtyping import Array, Float, Int

from dsv4_jax.cache.handle import LayerView
from dsv4_jax.config import Config
from dsv4_jax.layers.attention import Attention
from dsv4_jax.layers.experts import MoE
from dsv4_jax.layers.hyper_connections import Collapsed, HyperConnection, Spread
from dsv4_jax.layers.norms import RMSNorm
from dsv4_jax.numerics import Numerics
from dsv4_jax.ops.hyper_connections import hc_post

# Routing weights, expert ids, selected entries or None.
Seen = tuple[Float[Array, "b t k"], Int[Array, "b t k"], Int[Array, "b t s"] | None]


class Block(nnx.Module):
    """X -> hc_post(Attention(norm(hc_pre(X)))) -> hc_post(MoE(norm(hc_pre(X)))).

    The spread of one sub-block and the collapse for the next are one operation, also from layer to
    layer: `enter` or `enter_after`, then `between`, whose result is left to the next layer.
    """

    def __init__(self, config: Config, ratio: int, hash_routing: bool, numerics: Numerics):
        self.hc_attn = HyperConnection(config)
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, ratio, numerics)
        self.hc_ffn = HyperConnection(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = MoE(config, hash_routing, numerics)

    def enter(self, streams: Float[Array, "b t n d"]) -> Collapsed:
        """The streams collapsed for the attention."""
        return self.hc_attn.pre(streams, self.attn_norm)

    def enter_after(self, before: Spread) -> Collapsed:
        """The same, from what the layer before left; element 0 are the streams between the two."""
        return self.hc_attn.post_pre(before, self.attn_norm)

    def between(
        self, entered: Collapsed, token_ids: Int[Array, "b t"], view: LayerView
    ) -> tuple[Spread, Seen]:
        """The layer up to the last spread, for `hc_post` or the next layer's `enter_after`."""
        streams, x, post, comb = entered
        y, selected = self.attn(x, view)
        streams, x, post, comb = self.hc_ffn.post_pre((y, streams, post, comb), self.ffn_norm)
        y, weights, ids = self.ffn(x, token_ids, view.chunk.valid)
        return (y, streams, post, comb), (weights, ids, selected)

    def __call__(
        self, streams: Float[Array, "b t n d"], token_ids: Int[Array, "b t"], view: LayerView
    ) -> tuple[Float[Array, "b t n d"], Seen]:
        """The layer by itself, from streams to streams."""
        left, seen = self.between(self.enter(streams), token_ids, view)
        return hc_post(*left), seen
