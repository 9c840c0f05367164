"""What a training run leaves behind beside the checkpoint."""

import datetime
import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv4_jax.decoding.evaluate import Evaluation
from dsv4_jax.mini.text import Document

POSITION_STEP = 256
LATE = 512  # Positions from here on are far beyond the sliding window.


@dataclass(frozen=True)
class Measured:
    """An evaluation in the detail that is kept.

    Attributes:
        bits_per_byte: over all documents.
        documents: for each [nats, bytes, nats at late positions, tokens there].
        positions: for each run of POSITION_STEP positions [nats, tokens].
    """

    bits_per_byte: float
    documents: dict[str, list[float]]
    positions: list[list[float]]

    @classmethod
    def of(cls, documents: Sequence[Document], evaluation: Evaluation) -> "Measured":
        each = {}
        for document, nats in zip(documents, evaluation.nats, strict=True):
            late = np.arange(len(nats)) % evaluation.context >= LATE
            each[document.path] = [
                float(nats.sum()),
                document.num_bytes,
                float(nats[late].sum()),
                int(late.sum()),
            ]
        bins = evaluation.positions() // POSITION_STEP
        nats = np.bincount(bins, weights=np.concatenate(evaluation.nats))
        return cls(
            float(evaluation.bits_per_byte),
            each,
            [[float(n), int(count)] for n, count in zip(nats, np.bincount(bins), strict=True)],
        )


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
        if find_spec("matplotlib") is None:
            return
        with picture(file) as axes:
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
            axes.set(xlabel="step", ylabel="bits per byte", ylim=(0.4, 3.0))


@contextmanager
def picture(file: Path) -> Iterator[Any]:
    """Axes of a figure that is written to `file` in the end, its legend above."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    yield axes
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def environment() -> dict[str, str]:
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.device_kind,
        "jax": jax.__version__,
    }


def library_version(stdlib: Path | None) -> str:
    """Of the directory's Python, as far as its name says, or of the running one."""
    return stdlib.name if stdlib else platform.python_version()


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
