"""Trains the bundled mini model.

    python examples/mini/train.py --minutes 8.5 --out DIR

writes a checkpoint that `dsv4_jax.load(DIR)` takes, its curve and its result. The text is the
standard library of the running interpreter, or of --stdlib.
"""

import argparse
import math
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import report
from data import is_text, sequence_starts, token_stream
from objective import Metrics, TrainState, run_steps
from optimizer import Recipe
from rename import renamed_copies
from tokenizer import TOKENIZER_FILE
from tokenizers import Tokenizer
from weights import (
    Flat,
    by_path,
    flatten,
    initial,
    packed,
    stored_bytes,
    straight_through,
    unflatten,
)

import dsv4_jax
from dsv4_jax.checkpoint.write import write
from dsv4_jax.config import Config
from dsv4_jax.decoding.evaluate import evaluate
from dsv4_jax.mini.text import HELD_OUT_MODULES, Document, collect, split
from dsv4_jax.model import Model
from dsv4_jax.numerics import Numerics
from dsv4_jax.text.tokenizer import Tokenizer as ModelTokenizer
from dsv4_jax.transformer import initialize
from dsv4_jax.variants import ABLATIONS, without

CHECKPOINT_LIMIT_BYTES = 23_500_000
# After the last step: storing, loading, evaluations.
CLOSING_SECONDS = 120.0
EVALUATIONS = 6
LONG_CONTEXT = 8192
MAX_SKIPPED_STEPS = 50


@dataclass
class Clock:
    """Ends training in time: after `deadline`, or once asked to stop by a signal."""

    minutes: float
    begin: float = field(default_factory=time.monotonic)
    stopped: bool = False

    def __post_init__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def _stop(self, *_: object) -> None:
        self.stopped = True

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begin

    @property
    def seconds_left(self) -> float:
        return self.minutes * 60 - self.seconds

    def say(self, text: str) -> None:
        print(f"[{self.seconds:6.1f} s] {text}", flush=True)


def smoke_config(config: Config) -> Config:
    """A model of the same kind that a CPU trains in a minute."""
    return replace(
        config,
        hidden_size=128,
        num_hidden_layers=3,
        compress_ratios=(0, 4, 128),
        num_hash_layers=1,
        num_attention_heads=2,
        head_dim=128,
        q_lora_rank=64,
        o_groups=2,
        o_lora_rank=64,
        sliding_window=32,
        index_n_heads=2,
        index_head_dim=128,
        index_topk=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--minutes", type=float, default=8.5, help="for everything")
    parser.add_argument("--steps", type=int, help="number of steps, instead of what time allows")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and 40 steps")
    parser.add_argument("--config", type=Path, help="config.json of another model to train")
    parser.add_argument("--all-sliding", action="store_true", help="window-only layers instead")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens a sequence")
    parser.add_argument("--copies", type=int, default=1, help="of the text with names exchanged")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default=Recipe.optimizer)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--weight-decay", type=float, default=Recipe.weight_decay)
    parser.add_argument("--quantized-from", type=float, default=Recipe.quantized_from)
    parser.add_argument("--dense-until", type=float, default=Recipe.dense_until)
    parser.add_argument("--draft-weight", type=float, default=Recipe.draft_weight)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stdlib", type=Path, help="directory of .py files to train on")
    options = parser.parse_args()
    if (options.out / "checkpoint").exists():
        parser.error(f"--out: {options.out} already holds a checkpoint")
    if options.smoke:
        options.batch, options.length, options.steps, options.copies = 4, 256, 40, 1
    return options


def chosen_config(options: argparse.Namespace) -> Config:
    config = Config.from_json(options.config) if options.config else Config.MINI
    if options.smoke:
        config = smoke_config(config)
    if options.all_sliding:
        config = replace(config, compress_ratios=(0,) * config.num_hidden_layers)
    return config


def num_bytes(documents: list[Document]) -> int:
    return sum(document.num_bytes for document in documents)


class Run:
    """One training run: what is trained on what, and how far it is."""

    def __init__(self, options: argparse.Namespace):
        self.clock = Clock(options.minutes)
        self.options = options
        self.config = chosen_config(options)
        self.steps_per_call = 5 if options.smoke else 20
        self.recipe = Recipe(
            optimizer=options.optimizer,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            quantized_from=options.quantized_from,
            dense_until=options.dense_until,
            draft_weight=options.draft_weight,
            warmup_steps=2 * self.steps_per_call if options.smoke else 100,
        )
        self.clock.say(f"{report.environment()} {self.recipe}")
        self.tokenizer = ModelTokenizer.from_file(TOKENIZER_FILE)
        self.train, self.held_out = split(collect(options.stdlib))
        if options.smoke:
            self.train, self.held_out = self.train[:100], self.held_out[-7:]
        bpe = Tokenizer.from_file(str(TOKENIZER_FILE))
        texts = [self.train, *renamed_copies(self.train, options.copies)]
        streams = [token_stream(text, bpe) for text in texts]
        self.stream = np.concatenate(streams)
        num_tokens = int(is_text(streams[0]).sum())
        self.bits_per_nat = num_tokens / math.log(2) / num_bytes(self.train)
        self.clock.say(
            f"{len(self.train)} files, {num_bytes(self.train):,} bytes, tokens with "
            f"{options.copies} copies {len(self.stream):,}"
        )

        key = jax.random.key(options.seed)
        self.graph, params = initialize(self.config, key, jnp.bfloat16, Numerics.EXACT)
        counts = np.bincount(streams[0], minlength=self.config.vocab_size)
        arrays = initial(self.config, flatten(params), counts, options.seed)
        self.num_params = sum(
            array.size for array in arrays.values() if jnp.issubdtype(array.dtype, jnp.floating)
        )
        checkpoint_bytes = sum(stored_bytes(name, array.shape) for name, array in arrays.items())
        self.clock.say(f"{self.num_params:,} parameters, {checkpoint_bytes:,} bytes as stored")
        if checkpoint_bytes > CHECKPOINT_LIMIT_BYTES:
            raise ValueError(
                f"config: got {checkpoint_bytes:,} bytes as stored, "
                f"expected at most {CHECKPOINT_LIMIT_BYTES:,}"
            )
        self.state = TrainState.start(arrays, self.recipe)
        self.curve = report.Curve()
        self.step = 0

    def evaluate(self, model: Model, context: int | None = None) -> report.Measured:
        """On the held-out text."""
        context = context or self.options.length
        batch = max(self.options.batch * self.options.length // context, 1)
        texts = [document.text for document in self.held_out]
        return report.Measured.of(self.held_out, evaluate(model, texts, context, batch))

    def checkpoint(self) -> report.Measured:
        """Adds a point to the curve."""
        measured = self.evaluate(self.model(self.state.arrays))
        bits = measured.bits_per_byte
        self.curve.held_out.append(
            {"step": self.step, "seconds": self.clock.seconds, "bits_per_byte": bits}
        )
        self.clock.say(f"step {self.step}: held out {bits:.4f} bits per byte")
        return measured

    def model(self, arrays: Flat) -> Model:
        return Model(self.graph, unflatten(arrays), self.tokenizer)

    def fit(self) -> None:
        """Trains until the steps are done, the time is up or a signal comes."""
        options, timed = self.options, self.options.steps is None
        stream = jnp.asarray(self.stream)
        starts = sequence_starts(len(stream), options.length, options.batch, options.seed)
        total_steps = options.steps
        steady_step, steady_seconds, evaluations = 0, 0.0, 0
        while not self.clock.stopped and (total_steps is None or self.step < total_steps):
            begin = self.clock.seconds
            self.state, metrics = run_steps(
                self.graph,
                self.recipe,
                self.state,
                stream,
                jnp.asarray(np.stack(list(islice(starts, self.steps_per_call)))),
                # Until the pace is known the schedule rises, whatever its end.
                jnp.int32(total_steps or 1_000_000),
                options.length,
            )
            skipped = int(self.state.skipped)
            self.step += self.steps_per_call
            seconds_per_step = (self.clock.seconds - begin) / self.steps_per_call
            self.record(metrics, f"{self.step}/{total_steps or '?'}", seconds_per_step)
            if skipped > MAX_SKIPPED_STEPS:
                self.clock.say(f"stopping: {skipped} steps had a gradient that is not finite")
                break
            seconds_left = self.clock.seconds_left - CLOSING_SECONDS
            if timed and seconds_left < 0:
                break
            if self.step == self.steps_per_call:
                # Everything is compiled after this: steps and evaluations keep their pace.
                self.checkpoint()
                steady_step, steady_seconds = self.step, self.clock.seconds
                continue
            if timed:
                pace = (self.clock.seconds - steady_seconds) / (self.step - steady_step)
                total_steps = self.step + max(round(seconds_left / pace), 1)
            if evaluations + 1 <= EVALUATIONS * self.step / total_steps < EVALUATIONS:
                self.checkpoint()
                evaluations += 1

    def record(self, metrics: Metrics, step: str, seconds_per_step: float) -> None:
        means = {name: float(values.mean()) for name, values in vars(metrics).items()}
        self.curve.training.append({"step": self.step, "seconds": self.clock.seconds, **means})
        self.clock.say(
            f"step {step}: loss {means['loss']:.4f}, "
            f"{means['loss'] * self.bits_per_nat:.4f} bits per byte, "
            f"draft {means['draft_loss']:.3f}, divergence {means['divergence']:.3f}, "
            f"gradient {means['gradient_norm']:.3f}, busiest expert {means['peak_load']:.2f}, "
            f"{self.options.batch * self.options.length / seconds_per_step:,.0f} tokens/s"
        )

    def finish(self) -> None:
        """Writes the checkpoint first, then what is known about it, then what loading it gives."""
        options, out = self.options, self.options.out
        directory = out / "checkpoint"
        stored = jax.jit(packed)(self.state.arrays)
        write(directory, self.config, by_path(stored), tokenizer_file=TOKENIZER_FILE)
        checkpoint_bytes = sum(file.stat().st_size for file in directory.iterdir())
        self.clock.say(f"wrote {directory}, {checkpoint_bytes:,} bytes")

        trained = self.checkpoint()
        report.write_json(out / "curve.json", asdict(self.curve))
        self.curve.draw(out / "loss.png", self.bits_per_nat)

        loaded = dsv4_jax.load(directory)
        variants = {
            "stored weights": self.model(jax.jit(straight_through)(self.state.arrays, 1.0)),
            "loaded": loaded,
        }
        if any(self.config.layer_ratios):
            variants |= {f"loaded, without {part}": without(loaded, part) for part in ABLATIONS}
        result = {
            **report.environment(),
            "python_library": report.library_version(options.stdlib),
            "command": shlex.join(["python", *sys.argv]),
            "seed": options.seed,
            "steps": self.step,
            "skipped_steps": int(self.state.skipped),
            "tokens": self.step * options.batch * options.length,
            "batch": options.batch,
            "length": options.length,
            "copies": options.copies,
            "recipe": asdict(self.recipe),
            "parameters": self.num_params,
            "checkpoint_bytes": checkpoint_bytes,
            "train_files": len(self.train),
            "train_bytes": num_bytes(self.train),
            "held_out_bytes": num_bytes(self.held_out),
            "held_out_modules": sorted(HELD_OUT_MODULES),
            "config": self.config.to_dict(),
            "held_out": {f"float32 weights, context {options.length}": asdict(trained)},
        }
        for context in (options.length, LONG_CONTEXT):
            for name, model in variants.items():
                if context == LONG_CONTEXT and not name.startswith("loaded"):
                    continue
                measured = self.evaluate(model, context)
                result["held_out"][f"{name}, context {context}"] = asdict(measured)
                result["seconds"] = round(self.clock.seconds, 1)
                report.write_json(out / "result.json", result)
                self.clock.say(f"{name}, context {context}: {measured.bits_per_byte:.4f}")
        self.clock.say("done")


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(options)
    run.fit()
    run.finish()


if __name__ == "__main__":
    main()
