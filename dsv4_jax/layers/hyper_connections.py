"""Manifold-constrained hyper-connections: several residual streams, mixed by every sub-block."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from dsv4_jax.config import Config
from dsv4_jax.layers.norms import RMSNorm
from dsv4_jax.layers.parameter import parameter
from dsv4_jax.ops.hyper_connections import Gates, hc_post_pre, hc_pre, normalized_projection
from dsv4_jax.ops.product import product

# The output of a sub-block, the streams from which its input was collapsed, how it is spread over
# them (post, comb): what `ops.hyper_connections.hc_post` takes.
Spread = tuple[
    Float[Array, "b t d"],
    Float[Array, "b t n d"],
    Float32[Array, "b t n"],
    Float32[Array, "b t n n"],
]
# The streams, the normed input of the next sub-block, and how its output will be spread.
Collapsed = tuple[
    Float[Array, "b t n d"],
    Float[Array, "b t d"],
    Float32[Array, "b t n"],
    Float32[Array, "b t n n"],
]


class HyperConnection(nnx.Module):
    """Collapses the streams for one sub-block and says how its output is spread over them.

    Everything inside is float32; inputs and outputs have the streams' dtype.
    """

    def __init__(self, config: Config):
        n = config.hc_mult
        self.num_iterations = config.hc_sinkhorn_iters
        self.eps = config.hc_eps
        self.norm_eps = config.rms_norm_eps
        self.fn = parameter((2 + n) * n, n * config.hidden_size)
        self.base = parameter((2 + n) * n, init="zeros")
        self.scale = parameter(3, init="ones")

    @jax.named_scope("hyper-connections")
    def pre(self, streams: Float[Array, "b t n d"], norm: RMSNorm) -> Collapsed:
        """From the streams to the sub-block's input after `norm`."""
        return streams, *hc_pre(streams, self._gates(norm), **self._static())

    @jax.named_scope("hyper-connections")
    def post_pre(self, before: Spread, norm: RMSNorm) -> Collapsed:
        """The same once the output of the sub-block before is spread."""
        return hc_post_pre(*before, self._gates(norm), **self._static())

    def _gates(self, norm: RMSNorm) -> Gates:
        return Gates(self.fn[...], self.base[...], self.scale[...], norm.weight[...])

    def _static(self) -> dict[str, Any]:
        return {
            "num_iterations": self.num_iterations,
            "eps": self.eps,
            "norm_eps": self.norm_eps,
        }


class HyperHead(nnx.Module):
    """Collapses the streams at the end: y = Σ_j (sigmoid(M_j) + eps) X_j."""

    def __init__(self, config: Config):
        self.eps = config.hc_eps
        self.norm_eps = config.rms_norm_eps
        self.fn = parameter(config.hc_mult, config.hc_mult * config.hidden_size)
        self.base = parameter(config.hc_mult, init="zeros")
        self.scale = parameter(1, init="ones")

    @jax.named_scope("hyper-connections")
    def __call__(self, streams: Float[Array, "b t n d"]) -> Float[Array, "b t d"]:
        projected = normalized_projection(streams, self.fn[...], self.norm_eps)
        weights = jax.nn.sigmoid(projected * self.scale[...] + self.base[...]) + self.eps
        y = product("btj,btjd->btd", weights, streams.astype(jnp.float32))
        return y.astype(streams.dtype)
