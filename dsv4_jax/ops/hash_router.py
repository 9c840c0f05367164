"""Experts from a table of token ids."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import dsv4_ffi
from dsv4_jax.ops.dense_router import Gate, gate_logits, kernel_operands, num_tokens
from dsv4_jax.ops.dispatch import dispatch
from dsv4_jax.ops.router import (
    Routing,
    check_kernel,
    gate_scores,
    normalized_weights,
    straight_through,
)

# The kernel reads the gate's rows again for every token; with more a matrix product is faster.
FASTEST_FUSED_TOKENS = 256


def hash_router(
    token_ids: Int[Array, "*batch"],
    table: Int[Array, "v k"],
    scale: float,
    x: Float[Array, "*batch d"] | None = None,
    gate: Gate | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "*batch k"], Int[Array, "*batch k"]]:
    """ids = table[token id]; weights are the gate's scores there, or uniform.

    With x and gate ("gathered" weights): sqrt(softplus(x · gate[id])) divided by their sum, times
    `scale`; gradient flows to x and to a float gate. Without ("uniform"): scale / k.

    Args:
        token_ids: -1 is padding.
        table: expert ids of each token id.
        scale: what the weights of a token add up to.
        x: the tokens.
        gate: [E, d], float or NVFP4.
        implementation: "ffi" (one launch that reads the chosen rows of the gate alone: x in
            bfloat16 with a gate in bfloat16 or NVFP4), "xla" or None for the fastest.

    Returns:
        (weights float32, ids int32), [..., k] each. Where the token id is outside the table the
        row is masked: weights 0, ids -1.

    Raises:
        ValueError: a concrete token id is neither -1 nor in the table; x without gate or gate
            without x.
        NotImplementedError: the kernel asked for does not support the arguments.
    """
    _check_ids(token_ids, table.shape[0])
    if (x is None) != (gate is None):
        raise ValueError(
            "gate: got x without gate or gate without x, expected both (gathered weights) or none"
        )
    implementations = {"ffi": _ffi, "xla": _xla}
    if x is None or num_tokens(x) > FASTEST_FUSED_TOKENS:
        implementations = dict(reversed(implementations.items()))
    return dispatch(
        implementation,
        implementations,
        token_ids.astype(jnp.int32),
        table.astype(jnp.int32),
        x,
        gate,
        scale=scale,
    )


def _check_ids(token_ids: Array, vocab_size: int) -> None:
    if isinstance(token_ids, jax.core.Tracer):
        return
    ids = np.asarray(token_ids)
    outside = ids[(ids < -1) | (ids >= vocab_size)]
    if outside.size:
        raise ValueError(
            f"token_ids: got {outside[0]}, expected -1 (padding) to {vocab_size - 1} (the table)"
        )


def _xla(
    token_ids: Array, table: Array, x: Array | None, gate: Gate | None, *, scale: float
) -> Routing:
    known = ((token_ids >= 0) & (token_ids < table.shape[0]))[..., None]
    ids = jnp.take(table, token_ids, axis=0, mode="clip")
    if x is None or gate is None:
        weights = jnp.full(ids.shape, scale / table.shape[1], jnp.float32)
    else:
        weights = normalized_weights(gate_scores(gate_logits(x, gate)), ids, scale)
    return jnp.where(known, weights, 0.0), jnp.where(known, ids, -1)


def _ffi(
    token_ids: Array, table: Array, x: Array | None, gate: Gate | None, *, scale: float
) -> Routing:
    if x is None or gate is None:
        raise NotImplementedError("hash_router: uniform weights need no kernel")
    top_k = table.shape[1]
    check_kernel("hash_router", gate.shape[0], top_k)
    kernel_operands("hash_router", x, gate)

    def route(token_ids: Array, table: Array, x: Array, gate: Gate) -> Routing:
        shape = (token_ids.size, top_k)
        weights, ids = dsv4_ffi.call(
            "hash_router",
            (jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)),
            x.reshape(-1, x.shape[-1]),
            *kernel_operands("hash_router", x, gate),
            token_ids.reshape(-1),
            table,
            scale=np.float32(scale),
        )
        batched = (*token_ids.shape, top_k)
        return weights.reshape(batched), ids.reshape(batched)

    return straight_through(route, lambda token_ids, table, x, gate: gate_logits(x, gate), scale)(
        token_ids, table, x, gate
    )
