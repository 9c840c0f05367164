"""Whether kernels predict what XLA predicts: the mini model's decode steps on held-out text.

    python -m benchmarks.agreement [FILES AND DIRECTORIES]

Each window of the text is fed token by token, all windows at once, so that every operation of a
decode step takes part. All rows compare with XLA's decode steps of the same numerics: kernels, and
what no kernel can be asked to beat, XLA itself where it adds up in another order, which it does
where it computes whole windows at once (`Model.forward`). A last bit that differs somewhere may
change an E4M3 code, an expert or a selected entry, and grows within a few layers to what the
formats' rounding is worth.

`relative_l2` is the norm of the difference of log probabilities over that of the reference, both
less their mean over the vocabulary. Where the likeliest tokens differ, `gap` is by how many bits
the reference finds the other's choice less likely than its own; `gap_in_noise` is the same in
standard deviations, over the vocabulary, of what the two differ by at that token. A gap within four
standard deviations of a difference of two such values is a near tie.
"""

import argparse
import math
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
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
from dsv4_jax.model import MINI_DIRECTORY, Model
from dsv4_jax.numerics import Numerics
from dsv4_jax.text.tokenizer import Tokenizer
from dsv4_jax.transformer import prefill_step

NEAR_TIE_NOISE = 4 * math.sqrt(2)
# The released weights' numerics, and without rounding before packed weights (W4A16, W8A16).
POLICIES = {
    "e4m3": Numerics.CHECKPOINT,
    "bf16": replace(Numerics.CHECKPOINT, activations="bf16"),
}


@dataclass(frozen=True)
class Run:
    """One way to compute the same predictions."""

    name: str
    activations: str
    kernels: Kernels = Kernels.XLA
    dtype: str = "bfloat16"
    whole_windows: bool = False

    def predictions(self, tokens: Int[np.ndarray, "b t"]) -> Float[np.ndarray, "b t-1 v"]:
        """Log probabilities of what follows each token."""
        numerics = POLICIES[self.activations]
        model = dsv4_jax.load("mini", dtype=self.dtype, kernels=self.kernels, numerics=numerics)
        compute = of_whole_windows if self.whole_windows else of_decode_steps
        return compute(model, tokens)


def runs(activations: str) -> list[Run]:
    """The reference first."""
    return [
        Run("XLA", activations),
        Run("kernels", activations, Kernels.FASTEST),
        Run("XLA, whole windows", activations, whole_windows=True),
        Run("XLA, float32", activations, dtype="float32", whole_windows=True),
    ]


def mini_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(MINI_DIRECTORY / "tokenizer.json")


def windows(tokenizer: Tokenizer, texts: Sequence[str], num_tokens: int) -> Int[np.ndarray, "b t"]:
    """BOS and the first tokens of each text that is long enough."""
    found = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
    return np.array([ids[:num_tokens] for ids in found if len(ids) >= num_tokens], np.int32)


def of_whole_windows(model: Model, tokens: Int[np.ndarray, "b t"]) -> Float[np.ndarray, "b t-1 v"]:
    """Log probabilities of what follows each token, from `Model.forward`."""
    return np.asarray(_log_softmax(model.forward(tokens[:, :-1])))


def of_decode_steps(model: Model, tokens: Int[np.ndarray, "b t"]) -> Float[np.ndarray, "b t-1 v"]:
    """Log probabilities of what follows each token, from decode steps alone."""
    batch, num_tokens = tokens.shape
    cache = model.new_cache(batch, batch * (-(-num_tokens // BLOCK_TOKENS) * BLOCK_TOKENS))
    cache.prepare_step([num_tokens - 1] * batch)
    found = _log_probabilities(model.graph, model.params, cache.arrays, tokens.T[:-1])
    return np.asarray(found).swapaxes(0, 1)


_log_softmax = jax.jit(jax.nn.log_softmax)


@partial(jax.jit, static_argnums=0)
def _log_probabilities(
    graph: nnx.GraphDef, params: nnx.State, arrays: CacheArrays, tokens: Int[Array, "t b"]
) -> Float[Array, "t b v"]:
    def step(arrays: CacheArrays, ids: Array) -> tuple[CacheArrays, Array]:
        packed, ids = jax.lax.optimization_barrier((params, ids))
        # What `decode_step` is for sequences that are not empty.
        logits, arrays = prefill_step(graph, packed, arrays, ids[:, None], jnp.ones_like(ids))
        return arrays, jax.nn.log_softmax(logits)

    return jax.lax.scan(step, arrays, tokens)[1]


def compare(
    found: Float[np.ndarray, "b t v"],
    reference: Float[np.ndarray, "b t v"],
    targets: Int[np.ndarray, "b t"],
    num_bytes: int,
) -> dict[str, Any]:
    """How two tables of log probabilities differ.

    Args:
        targets: the tokens that followed.
        num_bytes: of the text that they are.
    """

    def at(log_p: np.ndarray, ids: np.ndarray) -> np.ndarray:
        return np.take_along_axis(log_p, ids[..., None], axis=-1)[..., 0]

    def bits(log_p: np.ndarray) -> float:
        return -float(at(log_p, targets).sum(dtype=np.float64)) / math.log(2) / num_bytes

    noise, size = ((log_p.std(-1) / math.log(2)) for log_p in (found - reference, reference))
    chosen, best = found.argmax(-1), reference.argmax(-1)
    differs = chosen != best
    gap = (at(reference, best) - at(reference, chosen))[differs] / math.log(2)
    in_noise = gap / noise[differs]

    def quantile(values: np.ndarray, share: float) -> float:
        return float(np.quantile(values, share)) if values.size else 0.0

    return {
        "tokens": targets.size,
        "bits_per_byte": bits(found),
        "difference": bits(found) - bits(reference),
        "relative_l2": float(np.linalg.norm(noise) / np.linalg.norm(size)),
        "argmax_agreement": float(1 - differs.mean()),
        "no_near_tie": float((in_noise > NEAR_TIE_NOISE).sum() / targets.size),
        "above_quarter_bit": float((gap > 0.25).sum() / targets.size),
        "gap_median": quantile(gap, 0.5),
        "gap_largest": quantile(gap, 1),
        "gap_in_noise_median": quantile(in_noise, 0.5),
        "gap_in_noise_99": quantile(in_noise, 0.99),
        "gap_in_noise_largest": quantile(in_noise, 1),
    }


def main() -> None:
    # Several processes share the device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--tokens", type=int, default=1024, help="of each window")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--jobs", type=int, help="processes; one for each run")
    parser.add_argument("--activations", nargs="+", choices=POLICIES, default=list(POLICIES))
    args = parser.parse_args()
    tokenizer = mini_tokenizer()
    tokens = windows(tokenizer, texts_of(args.paths, None), args.tokens)[: args.windows]
    num_bytes = sum(len(tokenizer.token_bytes(row[1:])) for row in tokens)
    chosen = [run for activations in args.activations for run in runs(activations)]
    rows = []
    with ProcessPoolExecutor(args.jobs or len(chosen), get_context("spawn")) as pool:
        results = pool.map(partial(Run.predictions, tokens=tokens), chosen)
        for run, log_p in zip(chosen, results, strict=True):
            if run == runs(run.activations)[0]:
                reference = log_p
            row = compare(log_p, reference, tokens[:, 1:], num_bytes)
            rows.append({"run": run.name, "activations": run.activations, **row})
            print(rows[-1], flush=True)
    harness.write_results("agreement", rows)


if __name__ == "__main__":
    main()
