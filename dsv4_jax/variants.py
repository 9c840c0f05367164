"""Variants of a loaded model, to see what something is worth: a part missing, another format."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsv4_jax.cache.handle import LayerView
from dsv4_jax.checkpoint.convert import LEAVES, converted, converted_config
from dsv4_jax.layers.experts import RoutedExperts
from dsv4_jax.layers.indexer import Indexer
from dsv4_jax.layers.linear import Linear
from dsv4_jax.model import Model
from dsv4_jax.ops.topk import topk_select
from dsv4_jax.parallel.sharding import param_sharding
from dsv4_jax.transformer import Transformer

ABLATIONS = ("compressed", "selection")


def without(model: Model, part: str) -> Model:
    """The same weights with one part missing; `model` stays as it is.

    Args:
        model: any model.
        part: "compressed": every layer attends to its sliding window only. "selection": CSA
            layers attend to as many entries as before, but to visible ones drawn at random.

    Raises:
        ValueError: an unknown part.
    """
    modules: Transformer = nnx.merge(model.graph, model.params)
    for block in modules.layers:
        match part:
            case "compressed":
                block.attn.ratio = 0
            case "selection":
                if block.attn.ratio == 4:
                    indexer = RandomIndexer.__new__(RandomIndexer)
                    vars(indexer).update(vars(block.attn.indexer))
                    block.attn.indexer = indexer
            case _:
                raise ValueError(f"part: got {part!r}, expected one of {ABLATIONS}")
    return Model(*nnx.split(modules), model.tokenizer, model.mesh)


def with_experts(model: Model, experts: str) -> Model:
    """The model with its routed experts in another format; `model` stays as it is.

    Args:
        model: any model.
        experts: "nvfp4", "mxfp4", "fp8" or "bf16".

    Raises:
        ValueError: as `checkpoint.convert.converted`.
    """
    modules = nnx.merge(model.graph, model.params)
    linears: dict[tuple[Any, ...], Linear] = {
        path: module for path, module in nnx.iter_modules(modules) if isinstance(module, Linear)
    }
    params: dict[tuple[Any, ...], Array] = {
        path: variable[...] for path, variable in nnx.to_flat_state(model.params)
    }
    formats = {path: linear.weight_format for path, linear in linears.items()}
    params, formats = converted(params, formats, experts)
    modules.config = converted_config(model.config, formats, experts)
    parents = {path: m for path, m in nnx.iter_modules(modules) if isinstance(m, RoutedExperts)}
    for path, old in linears.items():
        if path[:-1] not in parents:
            continue
        linear = Linear(old.in_features, old.out_features, model.numerics, old.stack)
        linear.repack(formats[path])
        for leaf in LEAVES[formats[path]]:
            array = params[(*path, leaf)]
            if model.mesh is not None:
                sharding = param_sharding(model.mesh, (*path, leaf), array.shape)
                array = jax.device_put(array, sharding)
            setattr(linear, leaf, getattr(linear, leaf).replace(array))
        setattr(parents[path[:-1]], path[-1], linear)
    return Model(*nnx.split(modules), model.tokenizer, model.mesh)


class RandomIndexer(Indexer):
    """Selects among the visible entries at random, the same ones in every run."""

    def __call__(
        self,
        x: Float[Array, "b t d"],
        q_lora: Float[Array, "b t q"],
        view: LayerView,
        visible: Bool[Array, "b t n"],
    ) -> Int[Array, "b t k"]:
        scores = jax.random.uniform(jax.random.key(0), visible.shape)
        return topk_select(scores.astype(jnp.float32), self.top_k, visible)[1]
