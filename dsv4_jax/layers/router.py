"""Which experts a token goes to, and with what weights."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv4_jax.config import Config
from dsv4_jax.formats import nvfp4
from dsv4_jax.layers.parameter import parameter
from dsv4_jax.ops.dense_router import Gate, Nvfp4Gate, dense_router
from dsv4_jax.ops.hash_router import hash_router

OPERANDS = ("stored", "bfloat16", "nvfp4")


class Router(nnx.Module):
    """Scored ("dense") or table ("hash") routing, decided at construction.

    A dense router chooses by gate score plus bias. A hash router reads the ids from a table
    indexed by token id; its weights are the gate's scores at these ids ("gathered", what the
    released checkpoints need) or 1/k times the scaling factor ("uniform").

    `operands` says what the gate multiplies. "stored", the reference's numerics: x and the weight
    as they are, promoted to float32 unless both are bfloat16, whose products are exact.
    "bfloat16": both rounded to it. "nvfp4": a weight packed by `quantize_gate`, x in bfloat16.
    Kernels take the last two, and the first where both are bfloat16. Where the mini model computes
    in float32, "bfloat16" changes an expert of 0.2 to 0.3 % of the tokens of a layer, "nvfp4" of
    16 to 19 % (`benchmarks/router_operands.py`).

    `implementation` is passed on to `ops.dense_router` or `ops.hash_router`; None takes the
    fastest.
    """

    def __init__(
        self,
        config: Config,
        mode: str,
        hash_weights: str = "gathered",
        operands: str = "stored",
        implementation: str | None = None,
    ):
        if mode not in ("dense", "hash"):
            raise ValueError(f"mode: got {mode!r}, expected 'dense' or 'hash'")
        if hash_weights not in ("gathered", "uniform"):
            raise ValueError(
                f"hash_weights: got {hash_weights!r}, expected 'gathered' or 'uniform'"
            )
        if mode == "dense" and hash_weights != "gathered":
            raise ValueError("hash_weights: only a router with mode='hash' takes it")
        if operands not in OPERANDS:
            raise ValueError(f"operands: got {operands!r}, expected one of {OPERANDS}")
        self.mode = mode
        self.hash_weights = hash_weights
        self.operands = operands
        self.implementation = implementation
        self.hidden_size = config.hidden_size
        self.top_k = config.num_experts_per_tok
        self.scale = config.routed_scaling_factor
        self.weight = parameter(config.n_routed_experts, config.hidden_size)
        if mode == "dense":
            self.bias = parameter(config.n_routed_experts, init="zeros")
        else:
            self.tid2eid = parameter(
                config.vocab_size, config.num_experts_per_tok, dtype=jnp.int32, init="experts"
            )

    def quantize_gate(self) -> None:
        """Packs the loaded weight, rounded to bfloat16, as NVFP4.

        Raises:
            ValueError: the router was not constructed with operands="nvfp4"; the width is not a
                multiple of 16.
        """
        if self.operands != "nvfp4":
            raise ValueError(f"operands: got {self.operands!r}, quantize_gate expects 'nvfp4'")
        packed, scale, scale_2 = nvfp4.quantize(self.weight[...].astype(jnp.bfloat16))
        self.weight, self.weight_scale = nnx.Param(packed), nnx.Param(scale)
        self.weight_scale_2 = nnx.Param(scale_2)

    def warmup(self, num_tokens: Sequence[int], dtype: DTypeLike = jnp.bfloat16) -> None:
        """Compiles, and loads onto the device, what calls with so many tokens of `dtype` need."""
        for n in num_tokens:
            x = jnp.zeros((1, n, self.hidden_size), dtype)
            jax.block_until_ready(self(x, jnp.zeros((1, n), jnp.int32)))

    @jax.named_scope("router")
    def __call__(
        self, x: Float[Array, "b t d"], token_ids: Int[Array, "b t"]
    ) -> tuple[Float[Array, "b t k"], Int[Array, "b t k"]]:
        """Returns (weights float32, expert ids int32); all after the product is in float32.

        A hash router masks `token_ids` outside its table, which are padding: weights 0, ids -1.
        """
        if self.mode == "hash" and self.hash_weights == "uniform":
            return hash_router(token_ids, self.tid2eid[...], self.scale)
        x, gate = self._operands(x)
        if self.mode == "hash":
            return hash_router(
                token_ids, self.tid2eid[...], self.scale, x, gate, self.implementation
            )
        return dense_router(x, gate, self.bias[...], self.top_k, self.scale, self.implementation)

    def _operands(self, x: Array) -> tuple[Array, Gate]:
        weight = self.weight[...]
        if self.operands == "stored":
            return x, weight
        if self.operands == "bfloat16":
            return x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)
        gate = Nvfp4Gate(weight, self.weight_scale[...], self.weight_scale_2[...])
        return x.astype(jnp.bfloat16), gate
