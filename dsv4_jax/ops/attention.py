"""Attention with one softmax over several sources of entries and a sink."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dsv4_jax.ops.product import product


class Source(NamedTuple):
    """Entries that are key and value at once, shared by runs of consecutive queries.

    Attributes:
        kv: [b, g, s, c]; each of the g groups serves t / g consecutive queries. g = 1 shares the
            entries among all queries, g = t gives every query its own.
        visible: [b, t, s], which of its group's entries a query sees.
    """

    kv: Float[Array, "b g s c"]
    visible: Bool[Array, "b t s"]


def attention(
    q: Float[Array, "b t h c"],
    sources: Sequence[Source],
    sink: Float[Array, "h"],
    scale: float,
) -> Float[Array, "b t h c"]:
    """o_h = Σ_s exp(scale·q_h·kv_s) kv_s / (Σ_s exp(scale·q_h·kv_s) + exp(sink_h)).

    The sums run over the visible entries of all sources. Logits, softmax and accumulators are
    float32; probabilities are rounded to q's dtype before they multiply the values. A query that
    sees nothing gets 0.

    Args:
        q: queries, any float dtype.
        sources: at least one; an entry that lies in two of them counts twice.
        sink: logit of each head that takes part in the denominator only, not scaled.
        scale: factor of the logits.

    Returns:
        [b, t, h, c] in q's dtype.
    """
    b, t, h, c = q.shape
    sink = sink.astype(jnp.float32)[:, None]
    logits = []
    for kv, visible in sources:
        groups = kv.shape[1]
        grouped = q.reshape(b, groups, t // groups, h, c)
        dots = product("bgthc,bgsc->bgths", grouped, kv)
        dots = dots.reshape(b, t, h, kv.shape[2]) * scale
        logits.append(jnp.where(visible[:, :, None], dots, -jnp.inf))
    peak = jnp.broadcast_to(sink, (b, t, h, 1))
    for x in logits:
        peak = jnp.maximum(peak, jnp.max(x, axis=-1, keepdims=True, initial=-jnp.inf))
    total = jnp.exp(sink - peak)
    output = jnp.zeros((b, t, h, c), jnp.float32)
    for x, (kv, _) in zip(logits, sources, strict=True):
        groups, num_entries = kv.shape[1:3]
        p = jnp.exp(x - peak)
        total = total + p.sum(axis=-1, keepdims=True)
        p = p.astype(q.dtype).reshape(b, groups, t // groups, h, num_entries)
        values = product("bgths,bgsc->bgthc", p, kv)
        output = output + values.reshape(b, t, h, c)
    return (output / total).astype(q.dtype)
