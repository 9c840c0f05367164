"""Training the indexer: its scores learn where the attention heads look.

The loss of the language model gives a top-k no gradient. Beside it the indexer of each CSA layer
is moved towards the attention that the heads give to the compressed entries: the Kullback-Leibler
divergence from the heads' mass, summed over heads and normalised over the entries, to the softmax
of the indexer's scores. Nothing but the indexer receives that gradient.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from dsv4_jax.cache.handle import Prepared, Projected, WholeSequence
from dsv4_jax.formats import indexer_key
from dsv4_jax.layers.attention import Attention
from dsv4_jax.layers.compressor import Compressor
from dsv4_jax.layers.linear import Linear
from dsv4_jax.ops.indexer import indexer_scores
from dsv4_jax.ops.norms import rms_normalize
from dsv4_jax.ops.topk import topk_select
from dsv4_jax.ops.valid_lens import compute_valid_lens


def rounded(x: Array, amount: Array) -> Array:
    """x moved by `amount` (0 to 1) towards its MXFP4 value, the gradient unchanged."""
    return x + amount.astype(x.dtype) * jax.lax.stop_gradient(indexer_key.round_trip(x) - x)


class Detached(Linear):
    """A linear whose input gets no gradient; `observe` is shown the input."""

    def __init__(self, linear: Linear, observe: Callable[[Array], None] = lambda x: None):
        for name, value in vars(linear).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        self.observe = observe

    def __call__(self, x: Array, out_dtype: DTypeLike | None = None) -> Array:
        self.observe(x)
        return super().__call__(jax.lax.stop_gradient(x), out_dtype)


class DetachedCompressor:
    """A compressor whose input gets no gradient."""

    def __init__(self, compressor: Compressor):
        self.compressor = compressor
        self.gated = compressor.gated

    def linears(self) -> list[tuple[Linear, DTypeLike | None]]:
        return [(Detached(linear), dtype) for linear, dtype in self.compressor.linears()]


class TaughtIndexer:
    """Stands in for a layer's indexer while the model is trained.

    Args:
        attention: the CSA layer.
        dense: 1.0 to select every visible entry (warm-up), 0.0 for the top k.
        quantized: 1.0 to round queries and keys to MXFP4, 0.0 not to.

    Attributes:
        divergence: after the call, the mean over queries that see an entry, in nats.
    """

    top_k = 0  # Selection takes part however few the entries are.

    def __init__(self, attention: Attention, dense: Array, quantized: Array):
        self.attention = attention
        self.indexer = attention.indexer
        self.compressor = DetachedCompressor(self.indexer.compressor)
        self.wq_b = Detached(self.indexer.wq_b, self._keep)
        self.dense, self.quantized = dense, quantized
        self.divergence = jnp.zeros(())

    def _keep(self, q_lora: Array) -> None:
        self.q_lora = q_lora

    def linears(self) -> list[tuple[Linear, DTypeLike | None]]:
        return [(Detached(linear), dtype) for linear, dtype in self.indexer.linears()]

    def queries(self, q: Array, weights: Array) -> Projected:
        return self.indexer.queries(q, weights)._replace(quantize=False)

    def __call__(self, prepared: Prepared, view: WholeSequence) -> Array:
        """Ids [b, t, n] of the selected entries, -1 elsewhere."""
        num_entries = view.num_entries(self.attention.ratio)
        valid = compute_valid_lens(view.chunk.positions, self.attention.ratio)
        visible = jnp.arange(num_entries) < valid[..., None]
        mass = self.attention_mass(view, visible)
        q = rounded(prepared.q, self.quantized)
        keys = rounded(view.entries("csa_keys", q.dtype), self.quantized)
        scores = indexer_scores(q, keys, prepared.weights)
        top_k = min(self.indexer.top_k, num_entries)
        top = topk_select(jax.lax.stop_gradient(scores), top_k, visible)[0]
        # With its threshold a row's selection is one comparison; ties select a little more.
        selected = visible & ((scores >= top[..., -1:]) | (self.dense > 0))
        self.divergence = divergence(mass, scores, selected)
        return jnp.where(selected, jnp.arange(num_entries), -1)

    def attention_mass(self, view: WholeSequence, visible: Array) -> Array:
        """What the heads give to each visible entry, summed over heads, [b, t, n] float32.

        Computed from the values that the attention itself computes.
        """
        a, q_lora = self.attention, self.q_lora
        dtype = q_lora.dtype
        q = a.wq_b(q_lora).reshape(*q_lora.shape[:2], a.num_heads, a.head_dim)
        q = a.rotary(rms_normalize(q, a.eps), view.chunk.positions)
        q, window, entries, sink = jax.lax.stop_gradient(
            (q, view.window(dtype), view.entries("csa", dtype), a.sink[...])
        )
        scale = a.head_dim**-0.5
        b, t, h, c = q.shape
        groups = window.kv.shape[1]
        near = jnp.einsum(
            "bgthc,bgsc->bgths", q.reshape(b, groups, t // groups, h, c), window.kv
        ).reshape(b, t, h, -1)
        near = jnp.where(window.visible[:, :, None], near.astype(jnp.float32) * scale, -jnp.inf)
        far = jnp.einsum("bthc,bnc->bthn", q, entries).astype(jnp.float32) * scale
        far = jnp.where(visible[:, :, None], far, -jnp.inf)
        total = jnp.logaddexp(jax.nn.logsumexp(near, axis=-1), sink[:, None].T)
        total = jnp.logaddexp(total, jax.nn.logsumexp(far, axis=-1))
        return jnp.exp(far - total[..., None]).sum(axis=2)


def divergence(mass: Array, scores: Array, selected: Array) -> Array:
    """KL(mass normalised over the selected || softmax of their scores), mean over queries."""
    mass = jnp.where(selected, mass, 0.0)
    target = mass / jnp.maximum(mass.sum(-1, keepdims=True), 1e-20)
    log_predicted = jax.nn.log_softmax(jnp.where(selected, scores, -1e9), axis=-1)
    log_target = jnp.log(jnp.maximum(target, 1e-20))
    per_query = (target * (log_target - log_predicted)).sum(-1)
    sees = selected.any(-1)
    return jnp.where(sees, per_query, 0.0).sum() / jnp.maximum(sees.sum(), 1)
