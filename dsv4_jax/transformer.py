"""The model as modules, and the pure functions that run it.

`graph, params = nnx.split(Transformer(...))` once; everything here takes the two, so that
`jax.jit`, `jax.grad` and `lax.scan` see plain pytrees. `graph` is static: config, dtype, numerics,
kernels and weight formats are in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dsv4_jax.cache.handle import Chunk, LayerView, StepCache, WholeSequence
from dsv4_jax.cache.schema import CacheArrays, CacheSchema
from dsv4_jax.config import Config
from dsv4_jax.kernels import Kernels, running
from dsv4_jax.layers.block import Block
from dsv4_jax.layers.hyper_connections import HyperHead
from dsv4_jax.layers.linear import Linear
from dsv4_jax.layers.mtp import MTPBlock
from dsv4_jax.layers.norms import RMSNorm
from dsv4_jax.layers.parameter import parameter
from dsv4_jax.numerics import Numerics
from dsv4_jax.ops.hyper_connections import hc_post
from dsv4_jax.ops.product import accumulation


# JAX builds this tree with leaves of its own kinds too; `no_type_check` lets them pass.
@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Capture:
    """What the layers did, one element per layer.

    Attributes:
        hidden: [b, t, streams, d], the residual streams after each layer.
        router_weights: [b, t, k] float32.
        router_ids: [b, t, k] int32.
        selected: [b, t, k] int32 ids of the compressed entries a CSA layer attended to, -1
            padded; None in other layers.
    """

    hidden: tuple[Float[Array, "b t n d"], ...]
    router_weights: tuple[Float[Array, "b t k"], ...]
    router_ids: tuple[Int[Array, "b t k"], ...]
    selected: tuple[Int[Array, "b t s"] | None, ...]


class Embedding(nnx.Module):
    """Rows of a table."""

    def __init__(self, config: Config):
        self.weight = parameter(config.vocab_size, config.hidden_size)

    def __call__(self, ids: Int[Array, "b t"], dtype: DTypeLike) -> Float[Array, "b t d"]:
        """Ids outside the table (padding) read some row of it."""
        return jnp.take(self.weight[...], ids, axis=0, mode="clip").astype(dtype)


class Transformer(nnx.Module):
    """embed -> blocks -> head, with the MTP blocks beside."""

    def __init__(
        self,
        config: Config,
        dtype: DTypeLike,
        numerics: Numerics,
        kernels: Kernels = Kernels.FASTEST,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.numerics = numerics
        self.kernels = kernels
        self.embed = Embedding(config)
        self.layers = nnx.List(
            [
                Block(config, ratio, config.is_hash_layer(i), numerics)
                for i, ratio in enumerate(config.layer_ratios)
            ]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hc_head = HyperHead(config)
        self.head = Linear(config.hidden_size, config.vocab_size, numerics)
        self.mtp = nnx.List(
            [MTPBlock(config, numerics) for _ in range(config.num_nextn_predict_layers)]
        )

    @property
    def exact(self) -> bool:
        """Whether float32 is all the rounding there is, and products are worth float64 sums."""
        return self.numerics == Numerics.EXACT and self.dtype == jnp.float32

    @contextmanager
    def running(self) -> Iterator[None]:
        """What is traced inside adds up and chooses kernels as this model does."""
        with accumulation(self.exact), running(self.kernels):
            yield

    def streams(
        self, tokens: Int[Array, "b t"], views: list[LayerView]
    ) -> tuple[Float[Array, "b t n d"], Capture]:
        """The residual streams after the last layer."""
        x = self.embed(tokens, self.dtype)
        x = jnp.broadcast_to(x[:, :, None], (*x.shape[:2], self.config.hc_mult, x.shape[-1]))
        hidden, seen = [], []
        entered = self.layers[0].enter(x)
        for i, (block, view) in enumerate(zip(self.layers, views, strict=True)):
            left, layer_seen = block.between(entered, tokens, view)
            seen.append(layer_seen)
            if i + 1 < len(self.layers):
                entered = self.layers[i + 1].enter_after(left)
                hidden.append(entered[0])
        hidden.append(hc_post(*left))
        weights, ids, selected = zip(*seen, strict=True)
        return hidden[-1], Capture(tuple(hidden), weights, ids, selected)

    @jax.named_scope("head")
    def logits(self, streams: Float[Array, "b t n d"]) -> Float[Array, "b t v"]:
        """Final collapse, norm and head; float32 products."""
        return self.head(self.norm(self.hc_head(streams)), jnp.float32)

    def whole_sequence(self, batch: int, num_tokens: int) -> WholeSequence:
        """The view of a layer that runs without a cache."""
        schema = CacheSchema.of(self.config, self.numerics, self.dtype, "dense")
        chunk = Chunk(
            jnp.zeros(batch, jnp.int32), jnp.full(batch, num_tokens, jnp.int32), num_tokens
        )
        return WholeSequence(schema, chunk)


def initialize(
    config: Config,
    key: PRNGKeyArray,
    dtype: DTypeLike = jnp.bfloat16,
    numerics: Numerics = Numerics.CHECKPOINT,
    kernels: Kernels = Kernels.FASTEST,
) -> tuple[nnx.GraphDef, nnx.State]:
    """A model with random float32 parameters.

    Args:
        config: sizes; `initializer_range` is the standard deviation of weights.
        key: a JAX random key.
        dtype: compute dtype.
        numerics: quantisation points.
        kernels: which implementation of each operation runs.

    Returns:
        (graph, params) as the pure functions take them.
    """
    graph, params = nnx.split(Transformer(config, dtype, numerics, kernels))
    leaves, treedef = jax.tree.flatten(params, is_leaf=lambda x: isinstance(x, nnx.Variable))

    def value(variable: nnx.Variable, key: PRNGKeyArray) -> nnx.Variable:
        spec = variable.get_value()
        match variable.get_metadata()["init"]:
            case "normal":
                array = jax.random.normal(key, spec.shape, spec.dtype) * config.initializer_range
            case "experts":
                tokens = jax.random.split(key, spec.shape[0])
                array = jax.vmap(
                    lambda k: jax.random.permutation(k, config.n_routed_experts)[: spec.shape[1]]
                )(tokens).astype(spec.dtype)
            case "ones":
                array = jnp.ones(spec.shape, spec.dtype)
            case _:
                array = jnp.zeros(spec.shape, spec.dtype)
        return variable.replace(array)

    keys = jax.random.split(key, len(leaves))
    return graph, jax.tree.unflatten(
        treedef, [value(v, k) for v, k in zip(leaves, keys, strict=True)]
    )


def forward(
    graph: nnx.GraphDef, params: nnx.State, tokens: Int[Array, "b t"], capture: bool = False
) -> Float[Array, "b t v"] | tuple[Float[Array, "b t v"], Capture]:
    """Logits of whole sequences that start at position 0; differentiable in `params`.

    Args:
        graph, params: the model.
        tokens: int32 ids.
        capture: also return what the layers did.

    Returns:
        float32 logits [b, t, vocab_size], with `capture` a pair (logits, Capture).
    """
    b, t = tokens.shape
    model = nnx.merge(graph, params)
    window = model.config.sliding_window
    # Whole windows let attention run in blocks; what is appended comes after every real query.
    padding = -t % window if t > window else 0
    padded = jnp.pad(tokens, ((0, 0), (0, padding)))
    with model.running():
        views: list[LayerView] = [model.whole_sequence(b, t + padding) for _ in model.layers]
        streams, seen = model.streams(padded, views)
        logits = model.logits(streams[:, :t])
    if not capture:
        return logits
    return logits, jax.tree.map(lambda x: x[:, :t], seen)


def prefill_step(
    graph: nnx.GraphDef,
    params: nnx.State,
    arrays: CacheArrays,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, "b"],
) -> tuple[Float[Array, "b v"], CacheArrays]:
    """Appends a chunk of tokens to each of the first b sequences.

    Pure: blocks for the new tokens must be in `arrays.block_table` (`Cache.prepare_step`,
    `Cache.reserve`), ids and lengths are not checked. Donate `arrays`.

    Args:
        tokens: int32 ids; row i continues the sequence in slot i.
        lengths: how many of the row's tokens count, 0 <= lengths <= t. 0 leaves a slot as it is.

    Returns:
        (logits at each row's last token, float32 [b, vocab_size], undefined for length 0; arrays)
    """
    b, t = tokens.shape
    model = nnx.merge(graph, params)
    with model.running():
        step = StepCache(arrays, Chunk(arrays.lengths[:b], lengths, t))
        views: list[LayerView] = [step.layer(i) for i in range(len(model.layers))]
        streams, _ = model.streams(tokens, views)
        if t > 1:
            last = jnp.maximum(lengths - 1, 0)[:, None, None, None]
            streams = jnp.take_along_axis(streams, last, axis=1)
        logits = model.logits(streams)
    return logits[:, 0], step.finish()


def decode_step(
    graph: nnx.GraphDef, params: nnx.State, arrays: CacheArrays, tokens: Int[Array, "b"]
) -> tuple[Float[Array, "b v"], CacheArrays]:
    """Appends one token to each of the first b sequences.

    Pure, like `prefill_step`. Token -1, or a slot whose sequence is empty, leaves the slot byte
    for byte as it is; its logits are undefined. In a loop of your own, pass `params` through
    `jax.lax.optimization_barrier` inside the body: else the compiler may decode packed weights
    once, ahead of the loop, and hold all of them.

    Returns:
        (float32 logits [b, vocab_size], arrays)
    """
    active = (tokens >= 0) & (arrays.lengths[: tokens.shape[0]] > 0)
    return prefill_step(graph, params, arrays, tokens[:, None], active.astype(jnp.int32))


def draft_logits(
    graph: nnx.GraphDef, params: nnx.State, tokens: Int[Array, "b t"]
) -> Float[Array, "b t-1 v"]:
    """What the first MTP block predicts at position t for token t+2, from tokens <= t+1.

    Raises:
        ValueError: the model has no MTP block.
    """
    model = nnx.merge(graph, params)
    with model.running():
        if not model.mtp:
            raise ValueError(
                "draft_logits: the model has no MTP block (num_nextn_predict_layers 0)"
            )
        b, t = tokens.shape
        streams, _ = model.streams(tokens, [model.whole_sequence(b, t) for _ in model.layers])
        following = tokens[:, 1:]
        hidden, _, _ = model.mtp[0].draft(
            streams[:, :-1],
            model.embed(following, model.dtype),
            following,
            model.whole_sequence(b, t - 1),
        )
        return model.head(hidden, jnp.float32)
