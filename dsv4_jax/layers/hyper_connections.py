"""Manifold-constrained hyper-connections: several residual streams, mixed by every sub-block."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsv4_jax.config import Config
from dsv4_jax.layers.parameter import parameter
from dsv4_jax.ops.product import product, sum_of_squares


def sinkhorn(
    logits: Float[Array, "*batch n n"], num_iterations: int, eps: float
) -> Float[Array, "*batch n n"]:
    """Softmax over the last axis, then alternating normalisation; the last one is over axis -2.

    Each sum has eps added; eps is also added to every element after the softmax. The first row
    normalisation is the softmax, so there are `num_iterations` of each kind.
    """
    mix = jax.nn.softmax(logits, axis=-1) + eps
    mix = mix / (mix.sum(-2, keepdims=True) + eps)

    def iteration(mix: Array, _: None) -> tuple[Array, None]:
        mix = mix / (mix.sum(-1, keepdims=True) + eps)
        mix = mix / (mix.sum(-2, keepdims=True) + eps)
        return mix, None

    return jax.lax.scan(iteration, mix, length=num_iterations - 1)[0]


def _normalized_projection(
    streams: Float[Array, "*batch n d"], fn: Float[Array, "rows nd"], eps: float
) -> Float[Array, "*batch rows"]:
    """fn · v / rms(v), v the concatenated streams; float32."""
    v = streams.astype(jnp.float32).reshape(*streams.shape[:-2], -1)
    scale = jax.lax.rsqrt(sum_of_squares(v) / v.shape[-1] + eps)
    return product("...i,oi->...o", v, fn.astype(jnp.float32)) * scale


class HyperConnection(nnx.Module):
    """Collapses the streams for one sub-block and spreads its output over them again.

    Everything inside is float32; inputs and outputs have the streams' dtype.
    """

    def __init__(self, config: Config):
        n = config.hc_mult
        self.num_streams = n
        self.num_iterations = config.hc_sinkhorn_iters
        self.eps = config.hc_eps
        self.norm_eps = config.rms_norm_eps
        self.fn = parameter((2 + n) * n, n * config.hidden_size)
        self.base = parameter((2 + n) * n, init="zeros")
        self.scale = parameter(3, init="ones")

    def pre(
        self, streams: Float[Array, "b t n d"]
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t n"], Float[Array, "b t n n"]]:
        """Returns (input of the sub-block, post weights, mixing matrix [from, to] stream)."""
        n = self.num_streams
        projected = _normalized_projection(streams, self.fn[...], self.norm_eps)
        pre, post, comb = (
            part * self.scale[i] + base
            for i, (part, base) in enumerate(
                zip(
                    jnp.split(projected, (n, 2 * n), axis=-1),
                    jnp.split(self.base[...], (n, 2 * n)),
                    strict=True,
                )
            )
        )
        pre = jax.nn.sigmoid(pre) + self.eps
        post = 2 * jax.nn.sigmoid(post)
        comb = sinkhorn(comb.reshape(*comb.shape[:-1], n, n), self.num_iterations, self.eps)
        collapsed = product("btj,btjd->btd", pre, streams.astype(jnp.float32))
        return collapsed.astype(streams.dtype), post, comb

    def post(
        self,
        output: Float[Array, "b t d"],
        streams: Float[Array, "b t n d"],
        post: Float[Array, "b t n"],
        comb: Float[Array, "b t n n"],
    ) -> Float[Array, "b t n d"]:
        """X'_k = post_k · output + Σ_j comb[j, k] · X_j."""
        mixed = product("btjk,btjd->btkd", comb, streams.astype(jnp.float32))
        spread = post[..., None] * output.astype(jnp.float32)[..., None, :]
        return (mixed + spread).astype(streams.dtype)


class HyperHead(nnx.Module):
    """Collapses the streams at the end: y = Σ_j (sigmoid(M_j) + eps) X_j."""

    def __init__(self, config: Config):
        self.eps = config.hc_eps
        self.norm_eps = config.rms_norm_eps
        self.fn = parameter(config.hc_mult, config.hc_mult * config.hidden_size)
        self.base = parameter(config.hc_mult, init="zeros")
        self.scale = parameter(1, init="ones")

    def __call__(self, streams: Float[Array, "b t n d"]) -> Float[Array, "b t d"]:
        projected = _normalized_projection(streams, self.fn[...], self.norm_eps)
        weights = jax.nn.sigmoid(projected * self.scale[...] + self.base[...]) + self.eps
        y = product("btj,btjd->btd", weights, streams.astype(jnp.float32))
        return y.astype(streams.dtype)
