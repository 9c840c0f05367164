"""Variants of a loaded model, to see what something is worth: a part missing, another format."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from dsv4_jax.cache.flush import OVERLAP_RATIO
from dsv4_jax.cache.handle import LayerView, Prepared
from dsv4_jax.checkpoint import names
from dsv4_jax.checkpoint.convert import converted, converted_config
from dsv4_jax.kernels import Kernels
from dsv4_jax.layers.indexer import Indexer
from dsv4_jax.model import Model, assemble
from dsv4_jax.numerics import Numerics
from dsv4_jax.ops.topk import topk_select
from dsv4_jax.ops.valid_lens import compute_valid_lens
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


def rebuilt(
    model: Model,
    *,
    experts: str | None = None,
    linears: str | None = None,
    numerics: Numerics | None = None,
    kernels: Kernels | None = None,
) -> Model:
    """The model with weights in other formats, other numerics or kernels; `model` stays as it is.

    Args:
        model: one whose weights are as a checkpoint stores them.
        experts: format of the routed experts: "nvfp4", "mxfp4", "fp8" or "bf16".
        linears: format of the other packed matrices: "fp8" or "bf16".
        numerics, kernels: as for `dsv4_jax.load`.

    Raises:
        ValueError: as `checkpoint.convert.converted`; weights in the order of kernels.
    """
    model.check_stored("convert")
    modules: dict[tuple[Any, ...], Any] = dict(
        nnx.iter_modules(nnx.merge(model.graph, model.params))
    )
    formats = {
        spec.path[:-1]: modules[spec.path[:-1]].weight_format
        for spec in names.tensors(model.config)
        if spec.kind in ("linear", "expert")
    }
    params: dict[tuple[Any, ...], Array] = {
        path: variable[...] for path, variable in nnx.to_flat_state(model.params)
    }
    params, formats = converted(params, formats, experts, linears)
    config = converted_config(model.config, formats, experts)
    if model.mesh is not None:
        for path, array in params.items():
            params[path] = jax.device_put(array, param_sharding(model.mesh, path, array.shape))
    numerics, kernels = numerics or model.numerics, kernels or model.kernels
    parts = assemble(config, params, formats, model.dtype, numerics, kernels, model.mesh)
    return Model(*parts, model.tokenizer, model.mesh)


class RandomIndexer(Indexer):
    """Selects among the visible entries at random, the same ones in every run."""

    def __call__(self, prepared: Prepared, view: LayerView) -> Int[Array, "b t k"]:
        valid = compute_valid_lens(view.chunk.positions, OVERLAP_RATIO)[..., None]
        visible = jnp.arange(view.num_entries(OVERLAP_RATIO)) < valid
        scores = jax.random.uniform(jax.random.key(0), visible.shape)
        return topk_select(scores.astype(jnp.float32), self.top_k, visible)[1]
