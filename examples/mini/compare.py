"""What compressed attention is worth: differences with intervals, and the pictures of README.md.

    python examples/mini/compare.py examples/mini/results

reads result.json (the trained model) and all-sliding/result.json (the control), and evaluation.json
if it is there; writes comparison.json and pictures beside them.
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import report

from dsv4_jax.mini.text import Document

RESAMPLES = 10_000
LOADED = "loaded, context {}"
MASKED = "loaded, without compressed, context {}"
RANDOM = "loaded, without selection, context {}"


def late_by_module(measured: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(bits, tokens) of the late positions of each module that has some, in a fixed order."""
    modules: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for path, (_, _, nats, tokens) in measured["documents"].items():
        modules[Document(path, "").module][0] += nats / math.log(2)
        modules[Document(path, "").module][1] += tokens
    pairs = np.array([modules[name] for name in sorted(modules)])
    return pairs[:, 0], pairs[:, 1]


def difference(measured: dict[str, Any], against: dict[str, Any]) -> dict[str, float]:
    """Bits per late token more than `against`, with a 95 % bootstrap interval over modules."""
    bits, tokens = late_by_module(measured)
    others, same_tokens = late_by_module(against)
    if (tokens != same_tokens).any():
        raise ValueError("measured: got another text than against")
    chosen = np.random.default_rng(0).integers(len(bits), size=(RESAMPLES, len(bits)))
    resampled = (bits - others)[chosen].sum(1) / np.maximum(tokens[chosen].sum(1), 1)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return {
        "bits_per_token": float((bits - others).sum() / tokens.sum()),
        "low": float(low),
        "high": float(high),
    }


def position_curve(measured: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(middle of each run of positions, bits per token there)."""
    nats, tokens = np.array(measured["positions"]).T
    middles = (np.arange(len(nats)) + 0.5) * report.POSITION_STEP
    return middles, nats / np.maximum(tokens, 1) / math.log(2)


def draw_positions(curves: dict[str, dict[str, Any]], file: Path) -> None:
    with report.picture(file) as axes:
        for name, measured in curves.items():
            axes.plot(*position_curve(measured), label=name, marker=".")
        axes.set(xlabel="tokens to look back at", ylabel="bits per token")


def draw_recall(recall: dict[str, dict[str, list[int]]], file: Path) -> None:
    names = ["shipped", "entries selected at random", "without compressed entries"]
    distances = list(recall["shipped"])
    with report.picture(file) as axes:
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            shares = [hits / max(of, 1) for hits, of in recall[name].values()]
            axes.bar(np.arange(len(shares)) + (i - 1) * width, shares, width, label=name)
        axes.set_xticks(range(len(distances)), distances)
        axes.set(xlabel="tokens since the name stood there", ylabel="share reproduced")


def draw_load(load: list[list[int]], file: Path) -> None:
    with report.picture(file) as axes:
        for layer, counts in enumerate(load):
            shares = np.sort(counts)[::-1] / np.mean(counts)
            axes.plot(range(1, len(shares) + 1), shares, marker=".", label=f"layer {layer}")
        axes.axhline(1.0, color="black", linewidth=0.5)
        axes.set(xlabel="expert, busiest first", ylabel="tokens / equal share", ylim=(0, None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    directory = parser.parse_args().results
    trained = json.loads((directory / "result.json").read_text())["held_out"]
    control = json.loads((directory / "all-sliding" / "result.json").read_text())["held_out"]
    comparison = {}
    for context in (2048, 8192):
        full = trained[LOADED.format(context)]
        curves = {
            "shipped": full,
            "random selection": trained[RANDOM.format(context)],
            "all-sliding control": control[LOADED.format(context)],
            "compressed masked": trained[MASKED.format(context)],
        }
        draw_positions(curves, directory / f"positions-{context}.png")
        for name, measured in list(curves.items())[1:]:
            found = difference(measured, full)
            comparison[f"{name}, context {context}"] = found
            print(
                f"{name}, context {context}: +{found['bits_per_token']:.3f} bits per token beyond "
                f"position {report.LATE}, 95 % within [{found['low']:.3f}, {found['high']:.3f}]"
            )
    report.write_json(directory / "comparison.json", comparison)
    if (directory / "evaluation.json").exists():
        evaluation = json.loads((directory / "evaluation.json").read_text())
        draw_recall(evaluation["recall"], directory / "recall.png")
        draw_load(evaluation["expert_load"], directory / "expert-load.png")


if __name__ == "__main__":
    main()
