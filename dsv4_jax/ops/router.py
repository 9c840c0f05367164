"""From gate logits to experts and weights."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import dsv4_ffi
from dsv4_jax.ops.dispatch import dispatch
from dsv4_jax.ops.topk import topk_select

# What a warp of the kernels holds.
MAX_KERNEL_TOP_K = 16
MAX_KERNEL_EXPERTS = 1024

Routing = tuple[Float[Array, "*batch k"], Int[Array, "*batch k"]]


def gate_scores(logits: Float[Array, "*batch e"]) -> Float[Array, "*batch e"]:
    """sqrt(softplus(logits)), float32, stable for large |logits|."""
    softplus = jax.nn.softplus(logits.astype(jnp.float32))
    # The derivative of sqrt at the zero of an underflow is infinite.
    zero = softplus == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, softplus)))


def normalized_weights(
    scores: Float[Array, "*batch e"], ids: Int[Array, "*batch k"], scale: float
) -> Float[Array, "*batch k"]:
    """Scores at the chosen ids, divided by their sum, times `scale`."""
    chosen = jnp.take_along_axis(scores, ids, axis=-1)
    # The floor keeps a token whose scores all underflow from 0 / 0.
    return chosen / jnp.maximum(chosen.sum(-1, keepdims=True), 1e-20) * scale


def activation_topk(
    logits: Float[Array, "*batch e"],
    bias: Float[Array, "e"],
    top_k: int,
    scale: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "*batch k"], Int[Array, "*batch k"]]:
    """Scored routing: the bias decides who is chosen, the unbiased scores how much they weigh.

    score = sqrt(softplus(logit)) in float32, ids = top-k of score + bias, weights = chosen scores
    divided by their sum, times `scale`. Gradient flows to the logits through the weights, straight
    through the selection; none flows to the bias.

    Args:
        logits: [..., E], computed in float32.
        bias: [E].
        top_k: experts of a token, at most E.
        scale: what the weights of a token add up to.
        implementation: "ffi" and "pallas" (top_k up to 16), "xla" or None for the fastest.

    Returns:
        (weights float32, ids int32), [..., k] each, by descending biased score; the lower expert
        wins ties, NaN counts as +inf. Kernels round a score differently in its last
        digits (1e-6), so experts closer than that may change places.

    Raises:
        ValueError: top_k is not within [1, E].
        NotImplementedError: the kernel asked for does not support the arguments.
    """
    return dispatch(
        implementation,
        {"ffi": _ffi, "pallas": _pallas, "xla": _xla},
        logits.astype(jnp.float32),
        bias.astype(jnp.float32),
        top_k=check_top_k(top_k, logits.shape[-1]),
        scale=scale,
    )


def check_top_k(top_k: int, num_experts: int) -> int:
    """`top_k`, or ValueError where so many experts cannot be chosen."""
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k: got {top_k}, expected 1 <= top_k <= {num_experts} (experts)")
    return top_k


def check_kernel(
    name: str,
    num_experts: int,
    top_k: int,
    max_experts: int = MAX_KERNEL_EXPERTS,
    max_top_k: int = MAX_KERNEL_TOP_K,
) -> None:
    """NotImplementedError for what the routing kernels do not hold."""
    if top_k > max_top_k:
        raise NotImplementedError(f"{name}: the kernel's top_k is at most {max_top_k}")
    if num_experts > max_experts:
        raise NotImplementedError(f"{name}: the kernel takes at most {max_experts} experts")


def _xla(logits: Array, bias: Array, *, top_k: int, scale: float) -> Routing:
    scores = gate_scores(logits)
    biased = jax.lax.stop_gradient(scores + bias)
    biased = jnp.where(jnp.isnan(biased), jnp.inf, biased)
    ids = topk_select(biased, top_k, implementation="xla")[1]
    return normalized_weights(scores, ids, scale), ids


def straight_through(
    kernel: Callable[..., Routing], logits_of: Callable[..., Array], scale: float
) -> Callable[..., Routing]:
    """`kernel` with derivatives: those of the weights at the ids that it chose.

    Args:
        kernel: (*arrays) -> (weights, ids), not differentiable.
        logits_of: (*arrays) -> logits [..., E], differentiable.
        scale: what the weights add up to.
    """
    route = jax.custom_jvp(kernel)

    @route.defjvp
    def _(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Routing, tuple]:
        weights, ids = route(*primals)

        def weigh(*arrays: Array) -> Array:
            known = jnp.maximum(ids, 0)
            weighed = normalized_weights(gate_scores(logits_of(*arrays)), known, scale)
            return jnp.where(ids >= 0, weighed, 0.0)

        _, weights_dot = jax.jvp(weigh, primals, tangents)
        return (weights, ids), (weights_dot, np.zeros(ids.shape, jax.dtypes.float0))

    return route


def _ffi(logits: Array, bias: Array, *, top_k: int, scale: float) -> Routing:
    num_experts = logits.shape[-1]
    check_kernel("activation_topk", num_experts, top_k)
    shape = (*logits.shape[:-1], top_k)
    call = partial(
        dsv4_ffi.call,
        "activation_topk",
        (jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)),
        vmap_method="expand_dims",
        scale=np.float32(scale),
    )
    return straight_through(
        lambda *arrays: tuple(call(*arrays)), lambda logits, bias: logits, scale
    )(logits, bias)


def _pallas(logits: Array, bias: Array, *, top_k: int, scale: float) -> Routing:
    # Mosaic is not importable everywhere, and the import takes a second.
    import pallas_kernels.activation_topk as mosaic

    check_kernel("activation_topk", logits.shape[-1], top_k, mosaic.MAX_EXPERTS)

    def route(logits: Array, bias: Array) -> Routing:
        rows = logits.reshape(-1, logits.shape[-1])
        weights, ids = mosaic.activation_topk(rows, bias, top_k, scale)
        shape = (*logits.shape[:-1], top_k)
        return weights.reshape(shape), ids.reshape(shape)

    return straight_through(route, lambda logits, bias: logits, scale)(logits, bias)
