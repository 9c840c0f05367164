"""What a training run leaves behind beside the checkpoint."""

import datetime
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax


@dataclass
class Curve:
    """Loss over time; bits per byte where held out, nats per token in training."""

    training: list[dict[str, float]] = field(default_factory=list)
    held_out: list[dict[str, float]] = field(default_factory=list)

    def draw(self, file: Path, bits_per_nat: float) -> None:
        """A picture of both, if matplotlib is installed.

        Args:
            bits_per_nat: turns nats per token of the training text into bits per byte.
        """
        try:
            import matplotlib
        except ImportError:
            return
        matplotlib.use("agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        axes.plot(
            [point["step"] for point in self.training],
            [point["loss"] * bits_per_nat for point in self.training],
            label="train",
            linewidth=1,
        )
        axes.plot(
            [point["step"] for point in self.held_out],
            [point["bits_per_byte"] for point in self.held_out],
            label="held out",
            marker="o",
        )
        axes.set(xlabel="step", ylabel="bits per byte", ylim=(0.5, 3.0))
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(file, dpi=150)
        pyplot.close(figure)


def environment() -> dict[str, str]:
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.device_kind,
        "jax": jax.__version__,
    }


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def samples(generate: Callable[..., str], seed: int) -> dict[str, str]:
    """Prompt to continuation, at temperature 0.7."""
    prompts = ("def main(", "import os\n\n\nclass Cache:\n", '"""Parse a date')
    return {
        prompt: generate(prompt, max_new_tokens=300, temperature=0.7, seed=seed)
        for prompt in prompts
    }
