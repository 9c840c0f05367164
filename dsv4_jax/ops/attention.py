"""Attention with one softmax over several sources of entries and a sink."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv4_jax.ops.product import product

# Up to this many entries per selected one, masking all entries is cheaper than gathering the
# selected ones for every query of a chunk.
_MASK_FACTOR = 16


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


def selected_source(
    entries: Callable[[Int[Array, "b t k"] | None], Float[Array, "b ..."]],
    ids: Int[Array, "b t k"],
    num_entries: int,
) -> Source:
    """The entries that each query selected, gathered for it or all of them masked.

    Args:
        entries: gives those at ids [b, t, k, c], or all [b, n, c] for None.
        ids: -1 for none.
        num_entries: n.
    """
    b, t, k = ids.shape
    if t == 1 or num_entries > _MASK_FACTOR * k:
        return Source(entries(ids), ids >= 0)
    row, query = jnp.arange(b)[:, None, None], jnp.arange(t)[:, None]
    # Index -1 would wrap around; num_entries is dropped.
    target = jnp.where(ids < 0, num_entries, ids)
    chosen = jnp.zeros((b, t, num_entries), bool).at[row, query, target].set(True, mode="drop")
    return Source(entries(None)[:, None], chosen)
