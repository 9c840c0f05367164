"""How well a model predicts texts."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int

from dsv4_jax.model import Model


@dataclass(frozen=True)
class Evaluation:
    """What a model paid for each token of some texts.

    Attributes:
        nats: per text, negative log-likelihood of its tokens, float64 [num_tokens].
        hits: per text, whether the likeliest token was the right one, bool [num_tokens].
        num_bytes: per text, in UTF-8; BOS is not counted.
        context: tokens of a window. Token i of a text has i % context tokens of it to look back
            at.
    """

    nats: tuple[Float64[np.ndarray, "..."], ...]
    hits: tuple[Bool[np.ndarray, "..."], ...]
    num_bytes: tuple[int, ...]
    context: int

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.nats))

    @property
    def bits_per_byte(self) -> float:
        return sum(nats.sum() for nats in self.nats) / math.log(2) / sum(self.num_bytes)

    def positions(self) -> Int[np.ndarray, "tokens"]:
        """Of every token of all texts: how many tokens it can look back at."""
        return np.concatenate([np.arange(len(nats)) % self.context for nats in self.nats])

    def bits_per_token(self, first: int, last: int) -> float:
        """Mean over tokens at positions in [first, last); NaN if there are none."""
        positions = self.positions()
        chosen = np.concatenate(self.nats)[(positions >= first) & (positions < last)]
        return float(chosen.mean()) / math.log(2) if len(chosen) else math.nan


@jax.jit
def _compare(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"]
) -> tuple[Float[Array, "b t"], Bool[Array, "b t"]]:
    log_probabilities = jax.nn.log_softmax(logits)
    nats = -jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]
    return nats, logits.argmax(-1) == targets


def evaluate(model: Model, texts: Sequence[str], context: int, batch: int = 1) -> Evaluation:
    """Cuts each text into windows and predicts each window from BOS and its own tokens.

    Args:
        model: with a tokenizer.
        texts: special-token strings in them are plain text.
        context: tokens of a window, BOS included; each has context - 1 tokens of the text to look
            back at, at most.
        batch: windows that are computed together.

    Raises:
        ValueError: no tokenizer, an empty text, or a context outside
            [1, max_position_embeddings].
    """
    if model.tokenizer is None:
        raise ValueError("texts: the model has no tokenizer")
    if not texts or not all(texts):
        raise ValueError("texts: got nothing to predict")
    longest = model.config.max_position_embeddings
    if not 1 <= context <= longest:
        raise ValueError(f"context: got {context}, expected 1 to {longest} tokens")
    windows = []
    for text in texts:
        ids = np.array(model.tokenizer.encode(text), np.int32)
        windows.append([ids[begin : begin + context] for begin in range(0, len(ids), context)])
    found = iter(_by_window(model, [w for each in windows for w in each], context, batch))
    per_text = [[next(found) for _ in each] for each in windows]
    return Evaluation(
        tuple(np.concatenate([nats for nats, _ in each]) for each in per_text),
        tuple(np.concatenate([hits for _, hits in each]) for each in per_text),
        tuple(len(text.encode()) for text in texts),
        context,
    )


def _by_window(
    model: Model, windows: list[Int[np.ndarray, "_"]], context: int, batch: int
) -> Iterator[tuple[Float64[np.ndarray, "_"], Bool[np.ndarray, "_"]]]:
    assert model.tokenizer is not None
    for begin in range(0, len(windows), batch):
        rows = windows[begin : begin + batch]
        inputs = np.full((batch, context), model.tokenizer.bos_id, np.int32)
        targets = np.zeros((batch, context), np.int32)
        for i, ids in enumerate(rows):
            inputs[i, 1 : len(ids)] = ids[:-1]
            targets[i, : len(ids)] = ids
        nats, hits = map(np.asarray, _compare(model.forward(inputs), targets))
        for i, ids in enumerate(rows):
            yield nats[i, : len(ids)].astype(np.float64), hits[i, : len(ids)]
