"""Gate logits to experts and weights in one Mosaic GPU kernel, one warpgroup a token."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

MAX_EXPERTS = 1024
WARPGROUP = 128
# log1p(u) / u on [0, 1], relative error 3e-8, highest power first.
LOG1P = (
    0.005232692696,
    -0.02950523235,
    0.07822594047,
    -0.1366324425,
    0.1910600662,
    -0.2484298199,
    0.3331909776,
    -0.4999949336,
    0.9999999404,
)
TAKEN = -(2**31)


def _sqrt_softplus(x: jax.Array) -> jax.Array:
    """sqrt(max(x, 0) + log1p(exp(-|x|))); the backend has no log1p."""
    u = jnp.exp2(jnp.abs(x) * -1.442695041)
    p = jnp.full_like(u, LOG1P[0])
    for coefficient in LOG1P[1:]:
        p = p * u + coefficient
    return jnp.sqrt(jnp.maximum(x, 0.0) + p * u)


def _ordered_keys(x: jax.Array) -> jax.Array:
    """int32 keys above TAKEN in the order of the numbers, NaN like +inf."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == x, x, jnp.inf), jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def activation_topk(
    logits: jax.Array, bias: jax.Array, top_k: int, scale: float, interpret: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Routes logits [N, E] float32 with bias [E] float32.

    Args:
        logits, bias: any E up to `MAX_EXPERTS`; multiples of 128 are not copied.
        top_k: experts of a token, at most E.
        scale: what the weights of a token add up to.
        interpret: a `plgpu.InterpretGPUParams`, to run on a CPU.

    Returns:
        (weights float32, ids int32), [N, top_k] each, best score plus bias first, the lower
        expert first among equals, NaN like +inf.

    Raises:
        NotImplementedError: this jax is older than 0.11.
    """
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(
            f"activation_topk: the Mosaic GPU kernel needs jax 0.11, this is {jax.__version__}"
        )
    num_tokens, num_experts = logits.shape
    shape = (num_tokens, top_k)
    if num_tokens == 0:
        return jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32)
    padding = -num_experts % WARPGROUP
    if padding:
        logits = jnp.pad(logits, ((0, 0), (0, padding)))
        bias = jnp.pad(bias, (0, padding))

    def body(logits_gmem, bias_gmem, weights_gmem, ids_gmem):
        token = jax.lax.axis_index("token")
        scores = _sqrt_softplus(logits_gmem[token])
        experts = jax.lax.iota(jnp.int32, num_experts + padding)
        keys = _ordered_keys(scores + bias_gmem[...])
        if padding:
            keys = jnp.where(experts < num_experts, keys, TAKEN)
        chosen = []
        for rank in range(top_k):
            best = jnp.max(keys)
            expert = jnp.min(jnp.where(keys == best, experts, num_experts))
            ids_gmem[token, rank] = expert
            here = experts == expert
            chosen.append(jnp.max(jnp.where(here, scores, 0.0)))
            keys = jnp.where(here, TAKEN, keys)
        total = chosen[0]
        for score in chosen[1:]:
            total = total + score
        factor = scale / jnp.maximum(total, 1e-20)
        for rank in range(top_k):
            weights_gmem[token, rank] = chosen[rank] * factor

    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.int32),
        ),
        grid=(num_tokens,),
        grid_names=("token",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(logits, bias)
