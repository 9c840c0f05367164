"""Residual streams around a sub-block: collapsed and normed before it, its output spread after it.

Manifold-constrained hyper-connections of DeepSeek-V4: n streams X_j of width d.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

import dsv4_ffi
from dsv4_jax.ops.dispatch import differentiable, dispatch
from dsv4_jax.ops.norms import rms_norm
from dsv4_jax.ops.product import product, sum_of_squares

# What the kernels hold.
KERNEL_STREAMS = 4
_WIDTH_MULTIPLE, _MAX_WIDTH = 256, 8192
# Of up to so many tokens the kernels split the channels further, so that all multiprocessors work.
_FEW_TOKENS = 256


class Gates(NamedTuple):
    """What decides how a sub-block reads the streams and writes to them.

    Attributes:
        fn: [(2 + n) n, n d], projection of the normalised streams; its rows are n that collapse,
            n that spread, and n x n that mix, [from, to].
        base: [(2 + n) n], added to the projections.
        scale: [3], factors of the three parts.
        norm_weight: [d], of the RMSNorm between collapse and sub-block.
    """

    fn: Float[Array, "rows nd"]
    base: Float[Array, "rows"]
    scale: Float[Array, "3"]
    norm_weight: Float[Array, "d"]


Collapsed = tuple[
    Float[Array, "*batch d"], Float32[Array, "*batch n"], Float32[Array, "*batch n n"]
]


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


def normalized_projection(
    streams: Float[Array, "*batch n d"], fn: Float[Array, "rows nd"], eps: float
) -> Float32[Array, "*batch rows"]:
    """fn · v / sqrt(mean(v²) + eps), v the concatenated streams."""
    n, d = streams.shape[-2:]
    v = streams.astype(jnp.float32).reshape(*streams.shape[:-2], n * d)
    scale = jax.lax.rsqrt(sum_of_squares(v) / v.shape[-1] + eps)
    return product("...i,oi->...o", v, fn.astype(jnp.float32)) * scale


def hc_pre(
    streams: Float[Array, "*batch n d"],
    gates: Gates,
    *,
    num_iterations: int,
    eps: float,
    norm_eps: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "*batch d"], Float32[Array, "*batch n"], Float32[Array, "*batch n n"]]:
    """What a sub-block reads, and how its output will be spread.

    With M = `normalized_projection(streams, fn, norm_eps)`, in three parts times their scale plus
    base: x = rms_norm(Σ_j (sigmoid(M_j) + eps) X_j), post = 2 sigmoid(M_{n+j}),
    comb = sinkhorn(M_{2n+nj+k}). float32 inside; the collapsed streams are rounded to their dtype
    before the norm, x is again. Differentiable.

    Args:
        streams: [..., n, d].
        gates: float32, or bfloat16 (promoted).
        num_iterations: rounds of `sinkhorn`, at least 1.
        eps: of the gates and of `sinkhorn`.
        norm_eps: of both root mean squares.
        implementation: "ffi" (4 bfloat16 streams of a width up to 8192 that 256 divides), "xla"
            or None for the fastest.

    Returns:
        (x [..., d] in the streams' dtype, post [..., n], comb [..., n (from), n (to)])

    Raises:
        ValueError: num_iterations is less than 1.
        NotImplementedError: the kernel asked for does not support the arguments.
    """
    return dispatch(
        implementation,
        {"ffi": _pre_ffi, "xla": _pre_xla},
        streams,
        _float32(gates),
        num_iterations=_checked(num_iterations),
        eps=eps,
        norm_eps=norm_eps,
    )


def hc_post(
    output: Float[Array, "*batch d"],
    streams: Float[Array, "*batch n d"],
    post: Float32[Array, "*batch n"],
    comb: Float32[Array, "*batch n n"],
    implementation: str | None = None,
) -> Float[Array, "*batch n d"]:
    """X'_k = post_k · output + Σ_j comb[j, k] · X_j in float32, rounded to the streams' dtype.

    Args:
        output: of the sub-block.
        streams: those that it was collapsed from.
        post, comb: of `hc_pre` or `hc_post_pre`.
        implementation: "ffi" (4 bfloat16 streams, a width that 8 divides), "xla" or None for the
            fastest.

    Raises:
        NotImplementedError: the kernel asked for does not support the arguments.
    """
    return dispatch(
        implementation, {"ffi": _post_ffi, "xla": _post_xla}, output, streams, post, comb
    )


def hc_post_pre(
    output: Float[Array, "*batch d"],
    streams: Float[Array, "*batch n d"],
    post: Float32[Array, "*batch n"],
    comb: Float32[Array, "*batch n n"],
    gates: Gates,
    *,
    num_iterations: int,
    eps: float,
    norm_eps: float,
    implementation: str | None = None,
) -> tuple[
    Float[Array, "*batch n d"],
    Float[Array, "*batch d"],
    Float32[Array, "*batch n"],
    Float32[Array, "*batch n n"],
]:
    """`hc_post` of one sub-block and `hc_pre` of the next.

    Arguments, implementations and errors are those of the two; `gates` are the next sub-block's.

    Returns:
        (new streams, x, post, comb)
    """
    return dispatch(
        implementation,
        {"ffi": _post_pre_ffi, "xla": _post_pre_xla},
        output,
        streams,
        post,
        comb,
        _float32(gates),
        num_iterations=_checked(num_iterations),
        eps=eps,
        norm_eps=norm_eps,
    )


def _float32(gates: Gates) -> Gates:
    return Gates(*(array.astype(jnp.float32) for array in gates))


def _checked(num_iterations: int) -> int:
    if num_iterations < 1:
        raise ValueError(f"num_iterations: got {num_iterations}, expected at least 1")
    return num_iterations


def _pre_xla(
    streams: Array, gates: Gates, *, num_iterations: int, eps: float, norm_eps: float
) -> Collapsed:
    n = streams.shape[-2]
    projected = normalized_projection(streams, gates.fn, norm_eps)
    pre, post, comb = (
        part * gates.scale[i] + base
        for i, (part, base) in enumerate(
            zip(
                jnp.split(projected, (n, 2 * n), axis=-1),
                jnp.split(gates.base, (n, 2 * n)),
                strict=True,
            )
        )
    )
    pre = jax.nn.sigmoid(pre) + eps
    post = 2 * jax.nn.sigmoid(post)
    comb = sinkhorn(comb.reshape(*comb.shape[:-1], n, n), num_iterations, eps)
    collapsed = product("...j,...jd->...d", pre, streams.astype(jnp.float32))
    return rms_norm(collapsed.astype(streams.dtype), gates.norm_weight, norm_eps), post, comb


def _post_xla(output: Array, streams: Array, post: Array, comb: Array) -> Array:
    mixed = product("...jk,...jd->...kd", comb, streams.astype(jnp.float32))
    spread = post[..., None] * output.astype(jnp.float32)[..., None, :]
    return (mixed + spread).astype(streams.dtype)


def _post_pre_xla(
    output: Array, streams: Array, post: Array, comb: Array, gates: Gates, **static: Any
) -> tuple[Array, ...]:
    streams = _post_xla(output, streams, post, comb)
    return (streams, *_pre_xla(streams, gates, **static))


def _check_kernel(
    name: str, streams: Array, width_multiple: int = 8, max_width: int | None = None
) -> None:
    n, d = streams.shape[-2:]
    if streams.dtype != jnp.bfloat16:
        raise NotImplementedError(
            f"{name}: the kernel takes streams in bfloat16, not {streams.dtype}"
        )
    if n != KERNEL_STREAMS:
        raise NotImplementedError(f"{name}: the kernel takes {KERNEL_STREAMS} streams, not {n}")
    if d % width_multiple:
        raise NotImplementedError(
            f"{name}: the kernel takes a width that {width_multiple} divides, not {d}"
        )
    if max_width is not None and d > max_width:
        raise NotImplementedError(f"{name}: the kernel takes a width up to {max_width}, not {d}")


def _attributes(*, num_iterations: int, eps: float, norm_eps: float) -> dict[str, Any]:
    return {
        "num_iterations": np.int32(num_iterations),
        "eps": np.float32(eps),
        "norm_eps": np.float32(norm_eps),
    }


def _shapes(streams: Array) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of streams, x, post and comb, all tokens in one axis."""
    tokens, (n, d) = int(np.prod(streams.shape[:-2])), streams.shape[-2:]
    return (
        jax.ShapeDtypeStruct((tokens, n, d), jnp.bfloat16),
        jax.ShapeDtypeStruct((tokens, d), jnp.bfloat16),
        jax.ShapeDtypeStruct((tokens, n), jnp.float32),
        jax.ShapeDtypeStruct((tokens, n, n), jnp.float32),
    )


def _call(
    name: str,
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    batch: tuple[int, ...],
    *arrays: Array,
    workspace: tuple[jax.ShapeDtypeStruct, ...] = (),
    **attributes: Any,
) -> tuple[Array, ...]:
    results = dsv4_ffi.call(name, (*shapes, *workspace), *arrays, **attributes)
    return tuple(result.reshape(*batch, *result.shape[1:]) for result in results[: len(shapes)])


def _workspace(streams: Array) -> tuple[jax.ShapeDtypeStruct]:
    """Of each part of the channels and token, what is summed over the channels."""
    tokens, _, width = _shapes(streams)[0].shape
    parts = width // (32 if tokens <= _FEW_TOKENS else _WIDTH_MULTIPLE)
    return (jax.ShapeDtypeStruct((parts, tokens, 28), jnp.float32),)


def _pre_ffi(streams: Array, gates: Gates, **static: Any) -> Collapsed:
    _check_kernel("hc_pre", streams, _WIDTH_MULTIPLE, _MAX_WIDTH)

    def kernel(streams: Array, gates: Gates) -> Any:
        shapes = _shapes(streams)
        return _call(
            "hc_pre",
            shapes[1:],
            streams.shape[:-2],
            streams.reshape(shapes[0].shape),
            *gates,
            workspace=_workspace(streams),
            **_attributes(**static),
        )

    def reference(*arrays: Any) -> Collapsed:
        return _pre_xla(*arrays, **static)

    return differentiable(kernel, reference)(streams, gates)


def _flat(streams: Array, *others: Array) -> tuple[Array, ...]:
    shapes = _shapes(streams)
    return tuple(
        array.reshape(shape.shape) for array, shape in zip((streams, *others), shapes, strict=True)
    )


def _post_ffi(output: Array, streams: Array, post: Array, comb: Array) -> Array:
    _check_kernel("hc_post", streams)

    def kernel(output: Array, streams: Array, post: Array, comb: Array) -> Array:
        flat, x, post, comb = _flat(streams, output.astype(streams.dtype), post, comb)
        (new,) = _call("hc_post", _shapes(streams)[:1], streams.shape[:-2], x, flat, post, comb)
        return new

    return differentiable(kernel, _post_xla)(output, streams, post, comb)


def _post_pre_ffi(
    output: Array, streams: Array, post: Array, comb: Array, gates: Gates, **static: Any
) -> tuple[Array, ...]:
    _check_kernel("hc_post_pre", streams, _WIDTH_MULTIPLE, _MAX_WIDTH)

    def kernel(output: Array, streams: Array, post: Array, comb: Array, gates: Gates) -> Any:
        flat, x, post, comb = _flat(streams, output.astype(streams.dtype), post, comb)
        return _call(
            "hc_post_pre",
            _shapes(streams),
            streams.shape[:-2],
            *(x, flat, post, comb, *gates),
            workspace=_workspace(streams),
            **_attributes(**static),
        )

    def reference(*arrays: Any) -> tuple[Array, ...]:
        return _post_pre_xla(*arrays, **static)

    return differentiable(kernel, reference)(output, streams, post, comb, gates)
