"""Gated feed-forward experts: routed and shared."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsv4_jax.config import Config
from dsv4_jax.layers.linear import Linear
from dsv4_jax.layers.router import Router
from dsv4_jax.numerics import Numerics
from dsv4_jax.ops.grouped import route_plan, tile_size
from dsv4_jax.ops.product import product


def clamped_swiglu(
    gate: Float[Array, "*batch f"], up: Float[Array, "*batch f"], limit: float
) -> Float[Array, "*batch f"]:
    """silu(min(gate, limit)) · clamp(up, -limit, limit), float32; gate has no lower clamp."""
    gate = jnp.minimum(gate.astype(jnp.float32), limit)
    up = jnp.clip(up.astype(jnp.float32), -limit, limit)
    return jax.nn.silu(gate) * up


class SharedExpert(nnx.Module):
    """The expert that every token passes: w2 · swiglu(w1 · x, w3 · x)."""

    def __init__(self, config: Config, numerics: Numerics):
        d, f = config.hidden_size, config.moe_intermediate_size
        self.limit = config.swiglu_limit
        self.w1 = Linear(d, f, numerics)
        self.w2 = Linear(f, d, numerics)
        self.w3 = Linear(d, f, numerics)

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        return self.w2(clamped_swiglu(self.w1(x), self.w3(x), self.limit).astype(x.dtype))


class RoutedExperts(nnx.Module):
    """All routed experts of a layer, their weights stacked [E, out, in]."""

    def __init__(self, config: Config, numerics: Numerics):
        d, f = config.hidden_size, config.moe_intermediate_size
        self.num_experts = config.n_routed_experts
        self.limit = config.swiglu_limit
        stack = (self.num_experts,)
        self.w1 = Linear(d, f, numerics, stack)
        self.w2 = Linear(f, d, numerics, stack)
        self.w3 = Linear(d, f, numerics, stack)

    def __call__(
        self,
        x: Float[Array, "n d"],
        weights: Float[Array, "n k"],
        expert_ids: Int[Array, "n k"],
        valid: Bool[Array, "n"],
    ) -> Float[Array, "n d"]:
        """Σ_k expert_{id_k}(x; weight_k), float32; rows that are not valid give 0.

        The routing weight multiplies before w2. Rows are sorted by expert, groups padded to
        tiles, and each projection is one batched product over the tiles.
        """
        num_tokens, d = x.shape
        top_k = weights.shape[1]
        num_rows = num_tokens * top_k
        tile = tile_size(num_rows, self.num_experts)
        plan = route_plan(expert_ids.reshape(-1), jnp.repeat(valid, top_k), self.num_experts, tile)

        def project(linear: Linear, tiles: Array) -> Array:
            a, w = linear.operands(tiles, index=plan.tile_expert)
            y = product("gti,goi->gto", a, w)
            return y.astype(x.dtype)

        # Empty slots hold row num_rows, the zero row appended to tokens and weights.
        slots = plan.row_of_slot.reshape(-1, tile)
        tiles = jnp.concatenate([x, jnp.zeros((1, d), x.dtype)])[slots // top_k]
        tile_weights = jnp.append(weights.reshape(-1), 0.0)[slots]
        hidden = clamped_swiglu(project(self.w1, tiles), project(self.w3, tiles), self.limit)
        hidden = (hidden * tile_weights[..., None]).astype(x.dtype)
        y = project(self.w2, hidden).reshape(-1, d)
        y = jnp.concatenate([y, jnp.zeros((1, d), y.dtype)])[plan.slot_of_row]
        return y.reshape(num_tokens, top_k, d).astype(jnp.float32).sum(axis=1)


class MoE(nnx.Module):
    """Router, routed experts and the shared expert."""

    def __init__(self, config: Config, hash_routing: bool, numerics: Numerics):
        self.gate = Router(config, "hash" if hash_routing else "dense")
        self.experts = RoutedExperts(config, numerics)
        self.shared_experts = SharedExpert(config, numerics)

    def __call__(
        self, x: Float[Array, "b t d"], token_ids: Int[Array, "b t"], valid: Bool[Array, "b t"]
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t k"], Int[Array, "b t k"]]:
        """Returns (output, routing weights, expert ids)."""
        weights, ids = self.gate(x, token_ids)
        b, t, d = x.shape
        k = ids.shape[-1]
        routed = self.experts(
            x.reshape(b * t, d), weights.reshape(-1, k), ids.reshape(-1, k), valid.reshape(-1)
        )
        y = routed.reshape(b, t, d) + self.shared_experts(x).astype(jnp.float32)
        return y.astype(x.dtype), weights, ids
