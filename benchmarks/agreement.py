"""Whether kernels predict what XLA predicts: the mini model's decode steps on held-out text.

    python -m benchmarks.agreement [FILES AND DIRECTORIES]

Each window of the text is fed token by token, all windows at once, so that every operation of a
decode step takes part. Rows compare, with bfloat16 and XLA: kernels, and XLA in float32, which
shows what bfloat16 itself changes. Where the likeliest tokens differ, `largest_gap` is by how many
bits XLA finds the other's choice less likely than its own; `no_near_tie` is the share of tokens
where that is more than a quarter of a bit.
"""

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

import dsv4_jax
from benchmarks import harness
from benchmarks.quality import texts_of
from dsv4_jax.cache.paged import BLOCK_TOKENS
from dsv4_jax.cache.schema import CacheArrays
from dsv4_jax.kernels import Kernels
from dsv4_jax.model import Model
from dsv4_jax.transformer import decode_step

NEAR_TIE_BITS = 0.25


def windows(model: Model, texts: Sequence[str], num_tokens: int) -> Int[np.ndarray, "b t"]:
    """BOS and the first tokens of each text that is long enough."""
    assert model.tokenizer is not None
    found = [[model.tokenizer.bos_id, *model.tokenizer.encode(text)] for text in texts]
    return np.array([ids[:num_tokens] for ids in found if len(ids) >= num_tokens], np.int32)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _log_probabilities(
    graph: nnx.GraphDef, params: nnx.State, arrays: CacheArrays, tokens: Int[Array, "t b"]
) -> tuple[CacheArrays, Float[Array, "t b v"]]:
    def step(arrays: CacheArrays, ids: Array) -> tuple[CacheArrays, Array]:
        packed, ids = jax.lax.optimization_barrier((params, ids))
        logits, arrays = decode_step(graph, packed, arrays, ids)
        return arrays, jax.nn.log_softmax(logits)

    return jax.lax.scan(step, arrays, tokens)


def predictions(model: Model, tokens: Int[np.ndarray, "b t"]) -> Float[np.ndarray, "b t-1 v"]:
    """Log probabilities of what follows each token, from decode steps alone."""
    batch, num_tokens = tokens.shape
    cache = model.new_cache(batch, batch * (-(-num_tokens // BLOCK_TOKENS) * BLOCK_TOKENS))
    first, cache = model.prefill(cache, tokens[:, :1], np.ones(batch, np.int32))
    cache.prepare_step([num_tokens - 2] * batch)
    cache.arrays, found = _log_probabilities(
        model.graph, model.params, cache.arrays, tokens.T[1:-1]
    )
    first = jax.nn.log_softmax(first)
    return np.concatenate([np.asarray(first)[:, None], np.asarray(found).swapaxes(0, 1)], axis=1)


def compare(
    name: str, found: np.ndarray, reference: np.ndarray, tokens: np.ndarray, num_bytes: int
) -> dict[str, Any]:
    """One row: what both paid for the text, and where their choices differ."""

    def bits(log_p: np.ndarray) -> float:
        paid = np.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)
        return -float(paid.sum(dtype=np.float64)) / math.log(2) / num_bytes

    chosen, best = found.argmax(-1), reference.argmax(-1)
    taken = np.take_along_axis(reference, chosen[..., None], axis=-1)[..., 0]
    gap = (reference.max(-1) - taken)[chosen != best] / math.log(2)
    return {
        "model": name,
        "tokens": chosen.size,
        "bits_per_byte": bits(found),
        "difference": bits(found) - bits(reference),
        "argmax_agreement": float((chosen == best).mean()),
        "no_near_tie": float((gap > NEAR_TIE_BITS).sum() / chosen.size),
        "largest_gap": float(gap.max(initial=0)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--tokens", type=int, default=1024, help="of each window")
    parser.add_argument("--windows", type=int, default=32)
    args = parser.parse_args()
    texts = texts_of(args.paths, None)
    models = {
        "XLA, bfloat16": dsv4_jax.load("mini", dtype=jnp.bfloat16, kernels=Kernels.XLA),
        "kernels, bfloat16": dsv4_jax.load("mini", dtype=jnp.bfloat16),
        "XLA, float32": dsv4_jax.load("mini", dtype=jnp.float32, kernels=Kernels.XLA),
    }
    reference = models["XLA, bfloat16"]
    tokens = windows(reference, texts, args.tokens)[: args.windows]
    assert reference.tokenizer is not None
    texts = [reference.tokenizer.decode(row[1:].tolist()) for row in tokens]
    num_bytes = sum(len(text.encode()) for text in texts)
    found = {name: predictions(model, tokens) for name, model in models.items()}
    expected = found["XLA, bfloat16"]
    rows = [compare(name, each, expected, tokens, num_bytes) for name, each in found.items()]
    harness.write_results("agreement", rows)


if __name__ == "__main__":
    main()
