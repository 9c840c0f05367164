"""What the mini model does, beside predicting: recall of names, expert load, drafts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tokenizers import Tokenizer

from dsv4_jax.decoding.evaluate import Evaluation
from dsv4_jax.mini.text import Document
from dsv4_jax.model import Model
from dsv4_jax.transformer import draft_logits, forward

_WORD = re.compile(r"[A-Za-z_]\w{5,}")
# Of a name's tokens the first says which name is meant; two or more are to be reproduced.
_FEWEST_TOKENS = 3
DISTANCES = (1, 129, 513, 1025, 2048)


@dataclass(frozen=True)
class Occurrence:
    """A name that never occurs in the training text, in a held-out text.

    Attributes:
        text: index of the text.
        first, last: tokens after the name's first one, [first, last).
        distance: tokens since the name stood in the same window; None if it did not.
    """

    text: int
    first: int
    last: int
    distance: int | None


def names_of(documents: Sequence[Document]) -> set[str]:
    return {name for document in documents for name in _WORD.findall(document.text)}


def occurrences(
    documents: Sequence[Document], known: set[str], tokenizer: Tokenizer, context: int
) -> list[Occurrence]:
    """Every occurrence of names that are not `known`, windows of `context` tokens apart."""
    found = []
    for i, document in enumerate(documents):
        offsets = tokenizer.encode(document.text, add_special_tokens=False).offsets
        ends = np.array([end for _, end in offsets])
        last_seen: dict[tuple[str, int], int] = {}
        for match in _WORD.finditer(document.text):
            # The token that holds the first letter may begin before it.
            first = int(np.searchsorted(ends, match.start(), side="right"))
            last = int(np.searchsorted(ends, match.end(), side="left")) + 1
            window = first // context
            if match[0] in known or last - first < _FEWEST_TOKENS or window != last // context:
                continue
            before = last_seen.get((match[0], window))
            found.append(Occurrence(i, first + 1, last, None if before is None else first - before))
            last_seen[match[0], window] = first
    return found


def recall(evaluation: Evaluation, places: Sequence[Occurrence]) -> dict[str, list[int]]:
    """[reproduced, of] by distance since the name stood there last; "new" for never."""
    counts = {"new": [0, 0]}
    for low, high in pairwise(DISTANCES):
        counts[f"{low}-{high - 1}"] = [0, 0]
    for place in places:
        if place.distance is None:
            key = "new"
        else:
            i = int(np.searchsorted(DISTANCES, place.distance, side="right"))
            key = f"{DISTANCES[i - 1]}-{DISTANCES[i] - 1}"
        counts[key][0] += int(evaluation.hits[place.text][place.first : place.last].all())
        counts[key][1] += 1
    return counts


def first_windows(model: Model, documents: Sequence[Document], context: int) -> np.ndarray:
    """BOS and the beginning of every document that is long enough, int32 [n, context]."""
    assert model.tokenizer is not None
    ids = [model.tokenizer.encode(document.text) for document in documents]
    rows = [[model.tokenizer.bos_id, *each[: context - 1]] for each in ids if len(each) >= context]
    return np.array(rows, np.int32)


def expert_load(model: Model, windows: np.ndarray) -> list[list[int]]:
    """Tokens that each expert of each layer receives."""
    num_experts = model.config.n_routed_experts
    load = np.zeros((model.config.num_hidden_layers, num_experts), int)
    for row in windows:
        _, seen = model.forward(row[None], capture=True)
        for layer, ids in enumerate(seen.router_ids):
            load[layer] += np.bincount(np.asarray(ids).reshape(-1), minlength=num_experts)
    return load.tolist()


@jax.jit
def _agreement(model_graph: object, params: object, row: Array) -> tuple[Array, Array]:
    own = forward(model_graph, params, row)[:, 1:]  # of the tokens that are drafted
    drafts = draft_logits(model_graph, params, row)
    same = own.argmax(-1) == drafts.argmax(-1)
    # The chance that speculative sampling keeps a token drawn from the draft's distribution.
    overlap = jnp.minimum(jax.nn.softmax(own), jax.nn.softmax(drafts)).sum(-1)
    return same.mean(), overlap.mean()


def draft_acceptance(model: Model, windows: np.ndarray) -> dict[str, float]:
    """How often the MTP block's token is the model's own: greedily, and when sampling."""
    each = np.array(
        [_agreement(model.graph, model.params, jnp.asarray(row[None])) for row in windows]
    )
    greedy, sampled = each.mean(axis=0)
    return {"greedy": float(greedy), "sampled": float(sampled)}
