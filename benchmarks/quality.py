"""What weight formats and activation policies cost: bits per byte, and errors layer by layer.

    python -m benchmarks.quality [FILES AND DIRECTORIES]

evaluates a model, converted to each format, on the standard library's modules that the mini model
never saw, or on FILES. Errors are those of the residual streams after each layer, against BF16
weights with nothing rounded: the norm of the difference over the norm, and the mean cosine. BOS,
whose streams are far larger than all others, does not count.

The mini model's experts were trained as MXFP4 and its linears as FP8: every format that holds
these values exactly differs in what it does to activations only. `weight_error` says what was lost.

On a CPU, where all of the text takes minutes for each row, it is the first 6,000 characters of each
file unless --characters says otherwise.
"""

import argparse
import itertools
import os
import time
from collections.abc import Iterator, Sequence
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
from jax import Array

import dsv4_jax
from benchmarks import harness
from dsv4_jax.checkpoint.convert import EXPERT_FORMATS, LINEAR_FORMATS
from dsv4_jax.decoding.evaluate import evaluate
from dsv4_jax.kernels import Kernels
from dsv4_jax.layers.linear import Linear
from dsv4_jax.mini.text import collect, held_out
from dsv4_jax.model import Model
from dsv4_jax.numerics import ACTIVATIONS, Numerics
from dsv4_jax.variants import rebuilt

CONTEXT = 2048
CPU_CHARACTERS = 6000
# Windows whose residual streams are compared.
COMPARED = 8
NO_CACHE_ROUNDING = replace(Numerics.CHECKPOINT, quantize_kv=False, quantize_indexer=False)


@dataclass(frozen=True)
class Variant:
    """A model in one form: formats as `variants.rebuilt` takes them, and numerics."""

    experts: str
    linears: str
    numerics: Numerics

    @property
    def formats(self) -> tuple[str, str]:
        return self.experts, self.linears

    @property
    def inputs(self) -> tuple[str, str]:
        """What activations become before experts and before other linears."""
        policy = self.numerics.activations
        of_fp8 = "e4m3" if policy == "nvfp4" else policy
        of_format = {"bf16": "bf16", "fp8": of_fp8}
        return of_format.get(self.experts, policy), of_format.get(self.linears, policy)

    def columns(self) -> dict[str, Any]:
        return {
            "experts": self.experts,
            "linears": self.linears,
            "activations": self.numerics.activations,
            "cache": "records" if self.numerics.quantize_kv else "dense",
            "gate": self.numerics.gate,
        }


REFERENCE = Variant("bf16", "bf16", Numerics.EXACT)


def variants(
    experts: Sequence[str], linears: Sequence[str], activations: Sequence[str]
) -> Iterator[Variant]:
    """The reference, each combination that differs in what is computed, and Q2, Q3 and gates."""
    yield REFERENCE
    seen = {(REFERENCE.formats, REFERENCE.inputs)}
    for formats in itertools.product(experts, linears):
        for policy in activations:
            numerics = replace(NO_CACHE_ROUNDING, activations=policy)
            variant = Variant(*formats, numerics)
            if (formats, variant.inputs) not in seen:
                seen.add((formats, variant.inputs))
                yield variant
    shipped = Variant(experts[0], linears[0], Numerics.CHECKPOINT)
    yield shipped
    for gate in ("bfloat16", "nvfp4"):
        yield replace(shipped, numerics=replace(Numerics.CHECKPOINT, gate=gate))


class Observed(Model):
    """Keeps the tokens and residual streams of the first windows that it computes."""

    def __init__(self, model: Model):
        assert model.tokenizer is not None
        super().__init__(model.graph, model.params, model.tokenizer)
        self.bos_id = model.tokenizer.bos_id
        self.windows: list[np.ndarray] = []
        self.streams: list[tuple[Array, ...]] = []

    def forward(self, tokens: Any, capture: bool = False) -> Any:
        logits, seen = super().forward(tokens, capture=True)
        if sum(map(len, self.windows)) < COMPARED:
            self.windows.append(tokens)
            self.streams.append(seen.hidden)
        return (logits, seen) if capture else logits

    def layer(self, index: int) -> Array:
        """Residual streams [tokens, streams * d] of all tokens but BOS, in one layer."""
        tokens = np.concatenate(self.windows)
        streams = jnp.concatenate([of_window[index] for of_window in self.streams])
        flat = streams.reshape(*tokens.shape, -1).astype(jnp.float32)
        return flat[tokens != self.bos_id]


def errors(model: Observed, reference: Observed) -> list[dict[str, float]]:
    """Of each layer: relative L2 norm of the difference, mean cosine."""
    found = []
    for index in range(model.config.num_hidden_layers):
        difference, cosine = _error(model.layer(index), reference.layer(index))
        found.append({"relative_l2": float(difference), "cosine": float(cosine)})
    return found


@jax.jit
def _error(ours: Array, exact: Array) -> tuple[Array, Array]:
    norms = jnp.linalg.norm(ours, axis=-1) * jnp.linalg.norm(exact, axis=-1)
    cosines = (ours * exact).sum(-1) / norms
    return jnp.linalg.norm(ours - exact) / jnp.linalg.norm(exact), cosines.mean()


def weight_error(model: Model, reference: Model) -> float:
    """Frobenius norm of the difference of all linears' weights over that of the weights."""
    squares = _squares(model.graph, model.params, reference.graph, reference.params)
    difference, norm = map(float, squares)
    return (difference / norm) ** 0.5


@partial(jax.jit, static_argnums=(0, 2))
def _squares(
    graph: nnx.GraphDef, params: nnx.State, reference: nnx.GraphDef, exact_params: nnx.State
) -> tuple[Array, Array]:
    """(sum of squared differences, of squares) of all linears' weights."""
    exact: dict[tuple[Any, ...], Any] = dict(nnx.iter_modules(nnx.merge(reference, exact_params)))
    difference = norm = jnp.zeros(())
    for path, module in nnx.iter_modules(nnx.merge(graph, params)):
        if isinstance(module, Linear):
            theirs = exact[path].decoded(jnp.float32)
            difference += ((module.decoded(jnp.float32) - theirs) ** 2).sum()
            norm += (theirs**2).sum()
    return difference, norm


def texts_of(paths: Sequence[Path], characters: int | None) -> list[str]:
    """The beginnings of files; of directories, of the .py files in them."""
    if not paths:
        documents = [document.text for document in held_out()]
    else:
        documents = []
        for path in paths:
            of_path = [d.text for d in collect(path)] if path.is_dir() else [path.read_text()]
            documents += of_path
    return [text[:characters] for text in documents]


def measured(
    texts: Sequence[str],
    chosen: Sequence[Variant],
    *,
    source: str = "mini",
    dtype: str = "float32",
    kernels: Kernels = Kernels.XLA,
    context: int = CONTEXT,
    batch: int = 1,
) -> tuple[list[harness.Row], list[harness.Row]]:
    """(a row for each variant, a row for each of its layers); the first variant is the reference.

    Args:
        texts: what is predicted.
        chosen: variants of the model.
        source, dtype, kernels: as for `dsv4_jax.load`.
        context, batch: as for `evaluate`.
    """
    begin = time.monotonic()
    shipped = dsv4_jax.load(source, dtype=dtype, kernels=Kernels.XLA)
    stored = {
        formats: rebuilt(shipped, experts=formats[0], linears=formats[1])
        for formats in dict.fromkeys(variant.formats for variant in chosen)
    }
    rows: list[harness.Row] = []
    layers: list[harness.Row] = []
    for variant in chosen:
        weights = stored[variant.formats]
        model = Observed(rebuilt(weights, numerics=variant.numerics, kernels=kernels))
        bits = float(evaluate(model, texts, context, batch).bits_per_byte)
        if not rows:
            reference, exact_weights, reference_bits = model, weights, bits
        of_layers = errors(model, reference)
        rows.append(
            {
                **variant.columns(),
                "weight_error": weight_error(weights, exact_weights),
                "bits_per_byte": bits,
                "above_reference": bits - reference_bits,
                **of_layers[-1],
            }
        )
        layers += [{**variant.columns(), "layer": i, **found} for i, found in enumerate(of_layers)]
        print(f"{time.monotonic() - begin:4.0f} s: {rows[-1]}", flush=True)
    return rows, layers


def measured_by(
    jobs: int, texts: Sequence[str], chosen: Sequence[Variant], **options: Any
) -> tuple[list[harness.Row], list[harness.Row]]:
    """`measured` by processes that share the variants; each computes the reference for itself."""
    reference, *others = chosen
    shares = [others[i * len(others) // jobs : (i + 1) * len(others) // jobs] for i in range(jobs)]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        run = partial(measured, texts, **options)
        found = list(pool.map(run, [[reference, *share] for share in shares]))
    rows, layers = found[0]
    num_layers = len(layers) // len(rows)
    for more, of_layers in found[1:]:
        rows += more[1:]
        layers += of_layers[num_layers:]
    return rows, layers


def main() -> None:
    # Several processes share the device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--model", default="mini", help="checkpoint directory, or mini")
    parser.add_argument("--experts", nargs="+", choices=EXPERT_FORMATS, default=EXPERT_FORMATS)
    parser.add_argument("--linears", nargs="+", choices=LINEAR_FORMATS, default=LINEAR_FORMATS)
    parser.add_argument("--activations", nargs="+", choices=ACTIVATIONS, default=ACTIVATIONS)
    parser.add_argument("--dtype", default="float32", help="compute dtype")
    parser.add_argument("--kernels", choices=("xla", "fastest"), default="xla")
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--characters", type=int, default=CPU_CHARACTERS if on_cpu else None)
    parser.add_argument("--batch", type=int, default=1 if on_cpu else 8)
    parser.add_argument("--jobs", type=int, default=1 if on_cpu else 4)
    options = parser.parse_args()
    rows, layers = measured_by(
        options.jobs,
        texts_of(options.paths, options.characters),
        list(variants(options.experts, options.linears, options.activations)),
        source=options.model,
        dtype=options.dtype,
        kernels=Kernels.FASTEST if options.kernels == "fastest" else Kernels.XLA,
        context=options.context,
        batch=options.batch,
    )
    harness.write_results("quality", rows)
    harness.write_results("quality-layers", layers)


if __name__ == "__main__":
    main()
