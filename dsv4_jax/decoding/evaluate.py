"""How well a model predicts a text."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv4_jax.model import Model


class Evaluation(NamedTuple):
    """Attributes:
    nll: negative log-likelihood of all tokens, nats.
    num_tokens, num_bytes: of the text, in UTF-8; BOS is not counted.
    """

    nll: float
    num_tokens: int
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nll / math.log(2) / self.num_bytes


@jax.jit
def _nll(logits: Float[Array, "1 t v"], targets: Int[Array, "t"]) -> Float[Array, "t"]:
    log_probabilities = jax.nn.log_softmax(logits[0])
    return -jnp.take_along_axis(log_probabilities, targets[:, None], axis=1)[:, 0]


def evaluate(model: Model, text: str, context: int) -> Evaluation:
    """Cuts the text into windows and predicts each from BOS and its own tokens.

    Args:
        model: with a tokenizer.
        text: special-token strings in it are plain text.
        context: tokens of a window, BOS included; each has context - 1 tokens of the text to look
            back at, at most.

    Raises:
        ValueError: no tokenizer, an empty text, or a context outside
            [1, max_position_embeddings].
    """
    if model.tokenizer is None:
        raise ValueError("text: the model has no tokenizer")
    if not text:
        raise ValueError("text: got nothing to predict")
    longest = model.config.max_position_embeddings
    if not 1 <= context <= longest:
        raise ValueError(f"context: got {context}, expected 1 to {longest} tokens")
    ids = np.array(model.tokenizer.encode(text), np.int32)
    nll = 0.0
    for begin in range(0, len(ids), context):
        targets = ids[begin : begin + context]
        window = np.full(context, model.tokenizer.bos_id, np.int32)
        window[1 : len(targets)] = targets[:-1]
        padded = np.zeros(context, np.int32)
        padded[: len(targets)] = targets
        each = np.asarray(_nll(model.forward(window[None]), padded), np.float64)
        nll += float(each[: len(targets)].sum())
    return Evaluation(nll, len(ids), len(text.encode()))
