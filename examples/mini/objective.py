"""What is minimised, one optimiser step, and the held-out measure; pure functions."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from data import BOS_ID, EOS_ID
from flax import nnx
from jax import Array
from optimizer import Recipe
from weights import Flat, is_trained, straight_through, unflatten

from dsv4_jax.transformer import forward


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a step reads and writes.

    Attributes:
        params: what the gradient moves, float32.
        biases: of the scored routers, moved by their loads.
        fixed: hash tables and the indexer.
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
        gradient_norm: before clipping.
        peak_load: tokens of the busiest expert of any scored layer, relative to an equal share.
    """

    loss: Array
    gradient_norm: Array
    peak_load: Array


def logits_and_routing(
    graph: nnx.GraphDef, params: nnx.State, tokens: Array
) -> tuple[Array, tuple[Array, ...]]:
    """`dsv4_jax.forward` at the default matmul precision, and each layer's expert ids.

    The library's own keeps every float32 product from being rounded. Gradients of bfloat16
    products are such products, and on a GPU several times as slow as TF32 ones.
    """
    model = nnx.merge(graph, params)
    views = [model.whole_sequence(*tokens.shape) for _ in model.layers]
    streams, seen = model.streams(tokens, views)
    return model.logits(streams), seen.router_ids


def loss(
    graph: nnx.GraphDef, params: Flat, others: Flat, rows: Array, quantized: Array
) -> tuple[Array, Flat]:
    """(mean cross-entropy in nats, tokens per expert for each router bias among `others`).

    Args:
        params, others: all parameters; the gradient is taken in `params`.
        rows: int32 [batch, length + 1]; each token but the first is predicted.
        quantized: 1.0 to round the weights as they are stored, 0.0 not to.
    """
    weights = straight_through({**params, **others}, quantized)
    logits, expert_ids = logits_and_routing(graph, unflatten(weights), rows[:, :-1])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
    loads = {}
    for name, array in others.items():
        if name.endswith("gate.bias"):
            chosen = expert_ids[int(name.split(".")[1])].reshape(-1)
            loads[name] = jnp.zeros(array.shape).at[chosen].add(1.0)
    return nats.mean(), loads


def step(
    graph: nnx.GraphDef, recipe: Recipe, state: TrainState, rows: Array, total_steps: Array
) -> tuple[TrainState, Metrics]:
    """One update; a step whose gradient is not finite changes nothing but the counters."""
    learning_rate, balance_rate = recipe.schedule(state.step, total_steps)
    quantized = (state.step >= recipe.quantized_from * total_steps).astype(jnp.float32)
    (mean_nats, loads), gradient = jax.value_and_grad(loss, argnums=1, has_aux=True)(
        graph, state.params, {**state.biases, **state.fixed}, rows, quantized
    )
    norm = optax.global_norm(gradient)
    finite = jnp.isfinite(norm)
    updates, optimizer = recipe.transformation().update(gradient, state.optimizer, state.params)
    params = jax.tree.map(lambda p, u: p + learning_rate * u, state.params, updates)
    biases = {
        name: bias + balance_rate * jnp.sign(loads[name].mean() - loads[name])
        for name, bias in state.biases.items()
    }
    params, biases, optimizer = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, biases, optimizer),
        (state.params, state.biases, state.optimizer),
    )
    peak = jnp.stack([load.max() / load.mean() for load in loads.values()]).max()
    skipped = state.skipped + ~finite
    return (
        TrainState(params, biases, state.fixed, optimizer, state.step + 1, skipped),
        Metrics(mean_nats, norm, peak),
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
        rows = stream[begin[:, None] + jnp.arange(length + 1)]
        return step(graph, recipe, state, rows, total_steps)

    return jax.lax.scan(body, state, starts)


@jax.jit
def text_nats(graph: nnx.GraphDef, params: nnx.State, batches: Array) -> Array:
    """Cross-entropy summed over the text tokens of batches, int32 [n, batch, length + 1]."""

    def total(rows: Array) -> Array:
        logits = forward(graph, params, rows[:, :-1])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
        return jnp.where(is_text(rows[:, 1:]), nats, 0.0).sum()

    return jax.lax.map(total, batches).sum()


def is_text(ids: Array | np.ndarray) -> Array | np.ndarray:
    """Document boundaries carry no bytes; padding is written as BOS."""
    return (ids != BOS_ID) & (ids != EOS_ID)
