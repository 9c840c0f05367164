"""Gated feed-forward experts: routed and shared."""

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsv4_jax.config import Config
from dsv4_jax.layers.linear import Linear, products
from dsv4_jax.layers.router import Router
from dsv4_jax.numerics import Numerics
from dsv4_jax.ops.experts import (
    Weights,
    clamped_swiglu,
    experts_in_tiles,
    experts_with_shared,
    routed_experts,
)


def _tiled(expert: "SharedExpert | RoutedExperts") -> Weights:
    w1, w3, w2 = (w.blocks.get_value() for w in (expert.w1, expert.w3, expert.w2))
    return w1, w3, w2


class SharedExpert(nnx.Module):
    """The expert that every token passes: w2 · swiglu(w1 · x, w3 · x)."""

    def __init__(self, config: Config, numerics: Numerics):
        d, f = config.hidden_size, config.moe_intermediate_size
        self.limit = config.swiglu_limit
        self.w1 = Linear(d, f, numerics)
        self.w2 = Linear(f, d, numerics)
        self.w3 = Linear(d, f, numerics)

    @jax.named_scope("experts")
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        gate, up = products(x, [(self.w1, None), (self.w3, None)])
        return self.w2(clamped_swiglu(gate, up, self.limit).astype(x.dtype))


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

    @jax.named_scope("experts")
    def __call__(
        self,
        x: Float[Array, "n d"],
        weights: Float[Array, "n k"],
        expert_ids: Int[Array, "n k"],
        valid: Bool[Array, "n"],
    ) -> Float[Array, "n d"]:
        """Σ_k expert_{id_k}(x; weight_k), float32; rows that are not valid give 0.

        The routing weight multiplies before w2.
        """
        if self.w1.is_tiled:
            return routed_experts(
                x,
                weights,
                expert_ids,
                valid,
                *_tiled(self),
                limit=self.limit,
                round_input=self.w1.rounds_input,
            )
        return experts_in_tiles(
            x,
            weights,
            expert_ids,
            valid,
            (self.w1.of_tiles, self.w3.of_tiles, self.w2.of_tiles),
            num_experts=self.num_experts,
            limit=self.limit,
        )


class MoE(nnx.Module):
    """Router, routed experts and the shared expert."""

    def __init__(self, config: Config, hash_routing: bool, numerics: Numerics):
        mode = "hash" if hash_routing else "dense"
        self.gate = Router(config, mode, operands=numerics.gate)
        self.experts = RoutedExperts(config, numerics)
        self.shared_experts = SharedExpert(config, numerics)

    def __call__(
        self, x: Float[Array, "b t d"], token_ids: Int[Array, "b t"], valid: Bool[Array, "b t"]
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t k"], Int[Array, "b t k"]]:
        """Returns (output, routing weights, expert ids)."""
        weights, ids = self.gate(x, token_ids)
        b, t, d = x.shape
        k = ids.shape[-1]
        rows = x.reshape(b * t, d)
        routes = weights.reshape(-1, k), ids.reshape(-1, k), valid.reshape(-1)
        routed, shared = self.experts, self.shared_experts
        if (
            routed.w1.is_tiled
            and shared.w1.is_tiled
            and routed.w1.rounds_input == shared.w1.rounds_input
        ):
            with jax.named_scope("experts"):
                y = experts_with_shared(
                    rows,
                    *routes,
                    _tiled(routed),
                    _tiled(shared),
                    limit=routed.limit,
                    round_input=routed.w1.rounds_input,
                )
        else:
            sums = routed(rows, *routes)
            y = sums + shared(rows).astype(sums.dtype)
        return y.reshape(b, t, d).astype(x.dtype), weights, ids
