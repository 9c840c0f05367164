"""Which experts a token goes to, and with what weights."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv4_jax.config import Config
from dsv4_jax.layers.parameter import parameter
from dsv4_jax.ops.product import product
from dsv4_jax.ops.router import activation_topk, gate_scores, normalized_weights


class Router(nnx.Module):
    """Scored ("dense") or table ("hash") routing, decided at construction.

    A dense router chooses by gate score plus bias. A hash router reads the ids from a table
    indexed by token id; its weights are the gate's scores at these ids ("gathered", what the
    released checkpoints need) or 1/k times the scaling factor ("uniform").
    """

    def __init__(
        self,
        config: Config,
        mode: str,
        hash_weights: str = "gathered",
    ):
        if mode not in ("dense", "hash"):
            raise ValueError(f"mode: got {mode!r}, expected 'dense' or 'hash'")
        if hash_weights not in ("gathered", "uniform"):
            raise ValueError(
                f"hash_weights: got {hash_weights!r}, expected 'gathered' or 'uniform'"
            )
        if mode == "dense" and hash_weights != "gathered":
            raise ValueError("hash_weights: only a router with mode='hash' takes it")
        self.mode = mode
        self.hash_weights = hash_weights
        self.num_experts = config.n_routed_experts
        self.top_k = config.num_experts_per_tok
        self.scale = config.routed_scaling_factor
        self.weight = parameter(config.n_routed_experts, config.hidden_size)
        if mode == "dense":
            self.bias = parameter(config.n_routed_experts, init="zeros")
        else:
            self.tid2eid = parameter(
                config.vocab_size, config.num_experts_per_tok, dtype=jnp.int32, init="experts"
            )

    def __call__(
        self, x: Float[Array, "b t d"], token_ids: Int[Array, "b t"]
    ) -> tuple[Float[Array, "b t k"], Int[Array, "b t k"]]:
        """Returns (weights float32, expert ids int32); everything is computed in float32.

        `token_ids` outside the table are padding and read some row of it; the caller leaves
        padding out of the experts.
        """
        logits = product("btd,ed->bte", x.astype(jnp.float32), self.weight[...].astype(jnp.float32))
        if self.mode == "dense":
            return activation_topk(logits, self.bias[...], self.top_k, self.scale)
        ids = jnp.take(self.tid2eid[...], token_ids, axis=0, mode="clip")
        if self.hash_weights == "uniform":
            return jnp.full(ids.shape, self.scale / self.top_k, jnp.float32), ids
        return normalized_weights(gate_scores(logits), ids, self.scale), ids
