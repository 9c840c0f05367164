"""Times of the operations that a decode step consists of, each with the arguments it has there."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from dsv4_jax.bench.cost import (
    Cost,
    Limits,
    entries_seen,
    entry_bytes,
    indexer_cost,
    linear_flops,
    share_read,
)
from dsv4_jax.bench.report import draw_bars, table
from dsv4_jax.bench.steps import filled_cache
from dsv4_jax.bench.timing import device_time_us
from dsv4_jax.cache.schema import CacheArrays, CacheSchema
from dsv4_jax.kernels import running
from dsv4_jax.layers.linear import Linear
from dsv4_jax.model import Model
from dsv4_jax.ops.dispatch import dispatch, observed, operation_name
from dsv4_jax.transformer import decode_step

Path = tuple[Any, ...]


@dataclass(frozen=True)
class Operation:
    """A call of `ops.dispatch.dispatch` with its arrays, sorted by where they come from.

    Attributes:
        implementations, static: of the call.
        structure: of its arrays as a pytree.
        weights: {position among the leaves: parameter}.
        kept: {position: array of the cache}, as layers before may have changed it.
        others: {position: array}, activations and small things.
        paths: of the parameters.
    """

    implementations: Mapping[str, Callable[..., Any]]
    static: dict[str, Any]
    structure: Any
    weights: dict[int, Array]
    kept: dict[int, Array]
    others: dict[int, Array]
    paths: tuple[Path, ...]

    @property
    def name(self) -> str:
        """The operation, and the modules that its weights belong to."""
        modules = dict.fromkeys(".".join(map(str, _in_layer(path)[:-1])) for path in self.paths)
        return " ".join([operation_name(self.implementations), *modules])

    @property
    def kind(self) -> tuple[Any, ...]:
        """The same for calls that differ in their layer only."""
        leaves = {**self.weights, **self.kept, **self.others}
        return self.name, *((i, x.shape, str(x.dtype)) for i, x in sorted(leaves.items()))

    def __call__(self, leaves: Mapping[int, Array]) -> Any:
        arrays = jax.tree.unflatten(self.structure, [leaves[i] for i in range(len(leaves))])
        return dispatch(None, self.implementations, *arrays, **self.static)

    def updates(self) -> tuple[dict[int, int], int]:
        """({position of an array of the cache: position of its successor}, bytes of the rest)."""
        results = jax.tree.leaves(jax.eval_shape(self, self.weights | self.kept | self.others))
        found: dict[int, int] = {}
        for position, array in self.kept.items():
            for i, result in enumerate(results):
                if i not in found.values() and _form(result) == _form(array):
                    found[position] = i
                    break
        rest = (x for i, x in enumerate(results) if i not in found.values())
        return found, sum(x.size * x.dtype.itemsize for x in rest)


def operations(
    model: Model, arrays: CacheArrays, tokens: Int[Array, "b"]
) -> dict[tuple[Any, ...], list[Operation]]:
    """Those of one decode step, by kind, in the order in which they first run."""
    parameters = _leaves(model.params)
    pools = {_form(x): x for x in jax.tree.leaves(arrays) if x.ndim > 2}
    calls: list[Operation] = []

    def step(params: nnx.State, arrays: CacheArrays, tokens: Array) -> list[dict[int, Array]]:
        known = {id(leaf): i for i, (_, leaf) in enumerate(_leaves(params))}
        others: list[dict[int, Array]] = []

        def observe(implementations: Any, given: tuple[Any, ...], static: dict[str, Any]) -> None:
            leaves, structure = jax.tree.flatten(given)
            used = {i: parameters[known[id(x)]] for i, x in enumerate(leaves) if id(x) in known}
            weights = {i: leaf for i, (_, leaf) in used.items()}
            kept = {i: pools[_form(x)] for i, x in enumerate(leaves) if _form(x) in pools}
            paths = tuple(path for path, _ in used.values())
            call = Operation(implementations, static, structure, weights, kept, {}, paths)
            calls.append(call)
            elsewhere = weights.keys() | kept.keys()
            others.append({i: x for i, x in enumerate(leaves) if i not in elsewhere})

        with observed(observe):
            decode_step(model.graph, params, arrays, tokens)
        return others

    found: dict[tuple[Any, ...], list[Operation]] = {}
    values = jax.jit(step)(model.params, arrays, tokens)
    for call, others in zip(calls, values, strict=True):
        operation = replace(call, others=others)
        found.setdefault(operation.kind, []).append(operation)
    return found


@dataclass(frozen=True)
class Table:
    """Measured times; a row for each kind of operation, whose "all us" is that of all its calls."""

    title: str
    rows: list[dict[str, Any]]

    @classmethod
    def measured(
        cls,
        title: str,
        model: Model,
        batch: int,
        context: int,
        limits: Limits | None,
        chosen: Sequence[str] = (),
    ) -> "Table":
        """Times the operations of a step of `batch` sequences that hold `context` tokens.

        Args:
            limits: of the device, or None where none are known.
            chosen: names of operations; without any, all.

        Raises:
            ValueError: the step has no operation of a chosen name.
        """
        arrays = filled_cache(model, batch, context, 1).arrays
        rows = []
        with running(model.kernels):
            found = operations(model, arrays, jnp.zeros(batch, jnp.int32)).values()
            names = {operation_name(calls[0].implementations) for calls in found}
            if unknown := [name for name in chosen if name not in names]:
                raise ValueError(
                    f"operation: got {unknown[0]!r}, expected one of this step's: "
                    + ", ".join(sorted(names))
                )
            for calls in found:
                first, num_calls = calls[0], len(calls)
                if chosen and operation_name(first.implementations) not in chosen:
                    continue
                us = time_us(first)
                needed = cost(first, model, arrays.schema, batch, context)
                floor = needed.floor_us(limits) if limits else None
                rows.append(_row(first.name, num_calls, us, floor))
        return cls(title, rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"title": self.title, "operations": self.rows}

    def render(self) -> str:
        """Text of several lines."""
        total = sum(row["all us"] for row in self.rows)
        return "\n".join([self.title, *table(self.rows), f"all of them {total:,.1f} us"])

    def draw(self, path: pathlib.Path) -> None:
        """Time of one call of each beside its floor.

        Raises:
            ImportError: matplotlib is missing.
        """
        bars = [(row["operation"], row["us"], row["floor_us"]) for row in self.rows]
        draw_bars(path, self.title, bars)


def _row(name: str, num_calls: int, us: float, floor: float | None) -> dict[str, Any]:
    return {
        "operation": name,
        "calls": num_calls,
        "us": us,
        "floor_us": floor,
        "us/floor": us / floor if floor else None,
        "all us": num_calls * us,
    }


def time_us(operation: Operation) -> float:
    """Device time of one call; what it changes of the cache, it changes in place."""
    successors, _ = operation.updates()
    state = {i: operation.kept[i] for i in successors}
    cold = operation.weights | {i: x for i, x in operation.kept.items() if i not in state}

    def call(
        state: dict[int, Array], cold: dict[int, Array], others: dict[int, Array]
    ) -> tuple[dict[int, Array], list[Array]]:
        results = jax.tree.leaves(operation(state | cold | others))
        rest = [x for i, x in enumerate(results) if i not in successors.values()]
        return {i: results[n] for i, n in successors.items()}, rest

    return device_time_us(call, state, cold, operation.others, cold=(1,), carried=1)


def cost(
    operation: Operation, model: Model, schema: CacheSchema, num_rows: int, context: int
) -> Cost:
    """What must be read, written and computed. Of the cache that is what attention reads."""
    config = model.config
    _, result_bytes = operation.updates()
    num_bytes = float(result_bytes + sum(x.nbytes for x in operation.others.values()))
    for path, leaf in zip(operation.paths, operation.weights.values(), strict=True):
        num_bytes += leaf.nbytes * share_read(config, path, num_rows)
    linears = {
        path: module
        for path, module in nnx.iter_modules(nnx.merge(model.graph, model.params))
        if isinstance(module, Linear)
    }
    used = {path[:n] for path in operation.paths for n in range(len(path))} & linears.keys()
    flops = sum((linear_flops(config, linears[path], num_rows) for path in used), 0.0)
    total = Cost(num_bytes, flops)
    name = operation_name(operation.implementations)
    if name == "sparse_attention":
        seen = num_rows * entries_seen(config, operation.static["ratio"], context)
        width = config.num_attention_heads * config.head_dim
        return total + Cost(float(seen * entry_bytes(schema.entries)), 4.0 * width * seen)
    if name.startswith("indexer"):
        return total + indexer_cost(config, num_rows, 1, context, schema.keys)
    return total


def _leaves(params: nnx.State) -> list[tuple[Path, Array]]:
    """Every array of the parameters with the path of its parameter."""
    return [
        (path, leaf)
        for path, variable in nnx.to_flat_state(params)
        for leaf in jax.tree.leaves(variable)
    ]


def _form(x: Any) -> tuple[Any, ...]:
    return *x.shape, np.dtype(x.dtype)


def _in_layer(path: Path) -> Path:
    return path[2:] if path[0] == "layers" else path
