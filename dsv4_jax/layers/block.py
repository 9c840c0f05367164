"""One layer: attention and experts, each between a collapse and a spread of the streams."""

from flax import nnx
from jaxtyping import Array, Float, Int

from dsv4_jax.cache.handle import LayerView
from dsv4_jax.config import Config
from dsv4_jax.layers.attention import Attention
from dsv4_jax.layers.experts import MoE
from dsv4_jax.layers.hyper_connections import HyperConnection
from dsv4_jax.layers.norms import RMSNorm
from dsv4_jax.numerics import Numerics


class Block(nnx.Module):
    """X -> hc_post(Attention(norm(hc_pre(X)))) -> hc_post(MoE(norm(hc_pre(X))))."""

    def __init__(self, config: Config, ratio: int, hash_routing: bool, numerics: Numerics):
        self.hc_attn = HyperConnection(config)
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, ratio, numerics)
        self.hc_ffn = HyperConnection(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = MoE(config, hash_routing, numerics)

    def __call__(
        self, streams: Float[Array, "b t n d"], token_ids: Int[Array, "b t"], view: LayerView
    ) -> tuple[
        Float[Array, "b t n d"],
        tuple[Float[Array, "b t k"], Int[Array, "b t k"], Int[Array, "b t s"] | None],
    ]:
        """Returns (streams, (routing weights, expert ids, selected entries or None))."""
        x, post, comb = self.hc_attn.pre(streams)
        y, selected = self.attn(self.attn_norm(x), view)
        streams = self.hc_attn.post(y, streams, post, comb)
        x, post, comb = self.hc_ffn.pre(streams)
        y, weights, ids = self.ffn(self.ffn_norm(x), token_ids, view.chunk.valid)
        return self.hc_ffn.post(y, streams, post, comb), (weights, ids, selected)
