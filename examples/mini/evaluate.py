"""Measures the bundled model on the text that it never saw: the table of README.md.

    python examples/mini/evaluate.py --out results

prints the table, and with --out keeps it with everything behind it, and samples. Each row can be
had alone by the `dsv4 eval` command that stands beside it.
"""

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import report
from flax import nnx
from jax import Array
from probes import (
    draft_acceptance,
    expert_load,
    first_windows,
    names_of,
    occurrences,
    recall,
)
from tokenizer import TOKENIZER_FILE
from tokenizers import Tokenizer

import dsv4_jax
from dsv4_jax.decoding.evaluate import Evaluation, evaluate
from dsv4_jax.layers.linear import Linear
from dsv4_jax.mini.text import collect, split
from dsv4_jax.model import Model
from dsv4_jax.numerics import Numerics
from dsv4_jax.variants import rebuilt, without

CONTEXT, LONG_CONTEXT = 2048, 8192
SAMPLING = {"max_new_tokens": 300, "temperature": 0.8, "top_p": 0.9}
PROMPTS = (
    'class Queue:\n    """A first-in, first-out queue."""\n\n    def __init__(self',
    '"""Read and write configuration files."""\n\nimport os\n\ndef read_lines(path',
    "import unittest\n\nclass StackTest(unittest.TestCase):\n\n    def setUp(self",
)
NVFP4 = "NVFP4 experts"
BF16_CACHE = replace(Numerics.CHECKPOINT, quantize_kv=False, quantize_indexer=False)


def variants(source: str) -> dict[str, tuple[str, Model]]:
    """Row name to the options of `dsv4 eval` and the model."""
    shipped = dsv4_jax.load(source, dtype="float32")

    def load(dtype: str, numerics: Numerics) -> Model:
        return dsv4_jax.load(source, dtype=dtype, numerics=numerics)

    rows = {
        "shipped": ("", shipped),
        "no rounding but the weights'": ("--numerics exact", load("float32", Numerics.EXACT)),
        "BF16 compute": ("--dtype bfloat16", load("bfloat16", Numerics.CHECKPOINT)),
        "BF16 cache": ("--cache dense", load("float32", BF16_CACHE)),
        NVFP4: ("--experts nvfp4", rebuilt(shipped, experts="nvfp4")),
    }
    if any(shipped.config.layer_ratios):
        rows |= {
            "without compressed entries": ("--without compressed", without(shipped, "compressed")),
            "entries selected at random": ("--without selection", without(shipped, "selection")),
        }
    return rows


def same_values(model: Model, other: Model) -> bool:
    """Whether all packed weights stand for the same numbers; then so do all results."""

    def weights(model: Model) -> list[Array]:
        modules = nnx.iter_modules(nnx.merge(model.graph, model.params))
        packed = [m for _, m in modules if isinstance(m, Linear) and m.weight_format != "float"]
        return [linear.decoded(jnp.float32) for linear in packed]

    pairs = zip(weights(model), weights(other), strict=True)
    return all(bool((ours == theirs).all()) for ours, theirs in pairs)


def longer(model: Model, texts: list[str], short: Evaluation) -> Evaluation:
    """At LONG_CONTEXT; texts that fit the windows of `short` cost what they cost there."""
    long = [i for i, nats in enumerate(short.nats) if len(nats) > short.context]
    found = evaluate(model, [texts[i] for i in long], LONG_CONTEXT)
    nats, hits = list(short.nats), list(short.hits)
    for i, of_text, right in zip(long, found.nats, found.hits, strict=True):
        nats[i], hits[i] = of_text, right
    return Evaluation(tuple(nats), tuple(hits), short.num_bytes, LONG_CONTEXT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini", help="checkpoint directory, or mini")
    parser.add_argument("--stdlib", type=Path, help="directory of .py files")
    parser.add_argument("--out", type=Path, help="directory for evaluation.json and samples.json")
    options = parser.parse_args()
    begin = time.monotonic()
    train, held_out = split(collect(options.stdlib))
    texts = [document.text for document in held_out]
    places = occurrences(
        held_out, names_of(train), Tokenizer.from_file(str(TOKENIZER_FILE)), CONTEXT
    )
    result: dict[str, Any] = {
        **report.environment(),
        "python_library": report.library_version(options.stdlib),
        "model": options.model,
        "held_out": {},
        "recall": {},
    }

    def row(name: str, arguments: str, evaluation: Evaluation) -> None:
        late = evaluation.bits_per_token(report.LATE, evaluation.context)
        print(
            f"{name:28} {evaluation.bits_per_byte:.4f} bits per byte, "
            f"{late:.4f} bits per token from position {report.LATE}    dsv4 eval {arguments}",
            flush=True,
        )
        measured = report.Measured.of(held_out, evaluation)
        result["held_out"][f"{name}, context {evaluation.context}"] = asdict(measured)

    rows = variants(options.model)
    shipped = rows["shipped"][1]
    evaluations: dict[str, Evaluation] = {}
    for name, (arguments, model) in rows.items():
        if name == NVFP4 and same_values(shipped, model):
            evaluations[name] = evaluations["shipped"]
        else:
            evaluations[name] = evaluate(model, texts, CONTEXT)
        row(name, arguments, evaluations[name])
        result["recall"][name] = recall(evaluations[name], places)
    row("shipped", f"--context {LONG_CONTEXT}", longer(shipped, texts, evaluations["shipped"]))

    windows = first_windows(shipped, held_out, CONTEXT)
    result["expert_load"] = expert_load(shipped, windows)
    for layer, load in enumerate(result["expert_load"]):
        mean = sum(load) / len(load)
        print(f"layer {layer}: experts get {min(load) / mean:.2f} to {max(load) / mean:.2f} shares")
    if shipped.config.num_nextn_predict_layers:
        result["draft_acceptance"] = draft_acceptance(shipped, windows)
        print(f"drafts accepted: {result['draft_acceptance']}")
    for name, counts in result["recall"].items():
        shares = ", ".join(f"{key}: {hits}/{of}" for key, (hits, of) in counts.items())
        print(f"names reproduced, {name}: {shares}")
    result["seconds"] = round(time.monotonic() - begin, 1)
    print(f"{result['seconds']:.0f} s")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        report.write_json(options.out / "evaluation.json", result)
        samples = {
            prompt: [shipped.generate(prompt, **SAMPLING, seed=seed) for seed in range(3)]
            for prompt in PROMPTS
        }
        report.write_json(options.out / "samples.json", {"sampling": SAMPLING, "texts": samples})


if __name__ == "__main__":
    main()
