"""What is minimised and one optimiser step; pure functions."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from indexer import TaughtIndexer
from jax import Array
from optimizer import Recipe
from weights import Flat, is_trained, straight_through, unflatten


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a step reads and writes.

    Attributes:
        params: what the gradient moves, float32.
        biases: of the scored routers, moved by their loads.
        fixed: hash tables.
        optimizer: its state.
        step: steps taken.
        skipped: steps whose gradient was not finite.
    """

    params: Flat
    biases: Flat
    fixed: Flat
    optimizer: Any
    step: Array
    skipped: Array

    @classmethod
    def start(cls, arrays: Flat, recipe: Recipe) -> "TrainState":
        params = {name: array for name, array in arrays.items() if is_trained(name)}
        biases = {name: array for name, array in arrays.items() if name.endswith("gate.bias")}
        fixed = {n: a for n, a in arrays.items() if n not in params and n not in biases}
        counter = jnp.zeros((), jnp.int32)
        optimizer = recipe.transformation().init(params)
        return cls(params, biases, fixed, optimizer, counter, counter.copy())

    @property
    def arrays(self) -> Flat:
        return {**self.params, **self.biases, **self.fixed}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Metrics:
    """Of one step.

    Attributes:
        loss: nats per token.
        draft_loss: of the MTP block, nats per token.
        divergence: of the indexers, nats per query, mean over layers.
        gradient_norm: before clipping.
        peak_load: tokens of the busiest expert of any scored layer, relative to an equal share.
    """

    loss: Array
    draft_loss: Array
    divergence: Array
    gradient_norm: Array
    peak_load: Array


class Losses(NamedTuple):
    """What a batch costs, and the tokens per expert for each router bias."""

    text: Array
    draft: Array
    divergence: Array
    loads: Flat


def losses(
    graph: nnx.GraphDef, arrays: Flat, rows: Array, dense: Array, quantized: Array
) -> Losses:
    """Runs the model at the default matmul precision.

    The library's own functions keep every float32 product from being rounded. Gradients of
    bfloat16 products are such products, and on a GPU several times as slow as TF32 ones.

    Args:
        rows: int32 [batch, length + 2]; the first token is only read, the last only drafted.
        dense: 1.0 for CSA layers to attend to every entry, 0.0 to those their indexer selects.
        quantized: 1.0 to round indexer queries and keys as they are stored, 0.0 not to.
    """
    model = nnx.merge(graph, unflatten(arrays))
    taught = []
    for block in model.layers:
        if block.attn.ratio == 4:
            block.attn.indexer = TaughtIndexer(block.attn, dense, quantized)
            taught.append(block.attn.indexer)
    tokens, following, after = rows[:, :-2], rows[:, 1:-1], rows[:, 2:]
    views = [model.whole_sequence(*tokens.shape) for _ in model.layers]
    streams, seen = model.streams(tokens, views)
    routed = {f"layers.{i}": ids for i, ids in enumerate(seen.router_ids)}
    draft = jnp.zeros(())
    if model.mtp:
        embedded = model.embed(following, model.dtype)
        view = model.whole_sequence(*tokens.shape)
        hidden, _, (_, ids, _) = model.mtp[0].draft(streams, embedded, following, view)
        draft = mean_nats(model.head(hidden, jnp.float32), after)
        routed["mtp.0"] = ids
    loads = {}
    for name, array in arrays.items():
        if name.endswith("gate.bias"):
            chosen = routed[".".join(name.split(".")[:2])].reshape(-1)
            loads[name] = jnp.zeros(array.shape).at[chosen].add(1.0)
    text = mean_nats(model.logits(streams), following)
    divergence = sum((t.divergence for t in taught), jnp.zeros(())) / max(len(taught), 1)
    return Losses(text, draft, divergence, loads)


def mean_nats(logits: Array, targets: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def step(
    graph: nnx.GraphDef, recipe: Recipe, state: TrainState, rows: Array, total_steps: Array
) -> tuple[TrainState, Metrics]:
    """One update; a step whose gradient is not finite changes nothing but the counters."""
    learning_rate, balance_rate = recipe.schedule(state.step, total_steps)
    quantized = (state.step >= recipe.quantized_from * total_steps).astype(jnp.float32)
    dense = (state.step < recipe.dense_until * total_steps).astype(jnp.float32)
    others = {**state.biases, **state.fixed}

    def total(params: Flat) -> tuple[Array, Losses]:
        weights = straight_through({**params, **others}, quantized)
        each = losses(graph, weights, rows, dense, quantized)
        return each.text + recipe.draft_weight * each.draft + each.divergence, each

    (_, each), gradient = jax.value_and_grad(total, has_aux=True)(state.params)
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(norm)
    updates, optimizer = recipe.transformation().update(gradient, state.optimizer, state.params)
    params = jax.tree.map(lambda p, u: p + learning_rate * u, state.params, updates)
    biases = {
        name: bias + balance_rate * jnp.sign(each.loads[name].mean() - each.loads[name])
        for name, bias in state.biases.items()
    }
    params, biases, optimizer = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, biases, optimizer),
        (state.params, state.biases, state.optimizer),
    )
    peak = jnp.stack([load.max() / load.mean() for load in each.loads.values()]).max()
    skipped = state.skipped + ~finite
    return (
        TrainState(params, biases, state.fixed, optimizer, state.step + 1, skipped),
        Metrics(each.text, each.draft, each.divergence, norm, peak),
    )


@partial(jax.jit, static_argnames=("recipe", "length"), donate_argnames="state")
def run_steps(
    graph: nnx.GraphDef,
    recipe: Recipe,
    state: TrainState,
    stream: Array,
    starts: Array,
    total_steps: Array,
    length: int,
) -> tuple[TrainState, Metrics]:
    """Takes the steps of `starts` in one program.

    Args:
        stream: int32 [num_tokens], on the device.
        starts: int32 [steps, batch], where in `stream` each sequence begins.
        total_steps: int32 scalar, where the schedule ends.
        length: tokens predicted in each sequence.

    Returns:
        (state, metrics of each step [steps])
    """

    def body(state: TrainState, begin: Array) -> tuple[TrainState, Metrics]:
        rows = stream[begin[:, None] + jnp.arange(length + 2)]
        return step(graph, recipe, state, rows, total_steps)

    return jax.lax.scan(body, state, starts)
