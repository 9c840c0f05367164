"""Multi-token prediction: one more block that drafts the token after the next."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv4_jax.cache.handle import LayerView
from dsv4_jax.config import Config
from dsv4_jax.layers.block import Block
from dsv4_jax.layers.hyper_connections import HyperHead
from dsv4_jax.layers.linear import Linear
from dsv4_jax.layers.norms import RMSNorm
from dsv4_jax.numerics import Numerics


class MTPBlock(Block):
    """Joins the backbone's streams at t with the embedding of token t+1.

    The block itself is window-only with scored routing.
    """

    def __init__(self, config: Config, numerics: Numerics):
        super().__init__(config, ratio=0, hash_routing=False, numerics=numerics)
        d = config.hidden_size
        self.e_proj = Linear(d, d, numerics)
        self.h_proj = Linear(d, d, numerics)
        self.enorm = RMSNorm(d, config.rms_norm_eps)
        self.hnorm = RMSNorm(d, config.rms_norm_eps)
        self.norm = RMSNorm(d, config.rms_norm_eps)
        self.hc_head = HyperHead(config)

    def draft(
        self,
        streams: Float[Array, "b t n d"],
        next_embedding: Float[Array, "b t d"],
        next_ids: Int[Array, "b t"],
        view: LayerView,
    ) -> tuple[
        Float[Array, "b t d"],
        Float[Array, "b t n d"],
        tuple[Float[Array, "b t k"], Int[Array, "b t k"], Int[Array, "b t s"] | None],
    ]:
        """Returns (input of the shared head, streams for a further speculative step, seen).

        What is seen is the block's routing, as `Block` returns it.

        Args:
            streams: the backbone's, before its final collapse.
            next_embedding: embedding of the token after each position.
            next_ids: its id.
        """
        embedded = self.e_proj(self.enorm(next_embedding))[..., None, :]
        mixed = embedded.astype(jnp.float32) + self.h_proj(self.hnorm(streams)).astype(jnp.float32)
        streams, seen = self(mixed.astype(streams.dtype), next_ids, view)
        return self.norm(self.hc_head(streams)), streams, seen
