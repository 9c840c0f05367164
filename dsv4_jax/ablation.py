"""A model with a part of its compressed attention taken away, to see what that part is worth."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsv4_jax.cache.handle import LayerView
from dsv4_jax.layers.indexer import Indexer
from dsv4_jax.model import Model
from dsv4_jax.ops.topk import topk_select
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
