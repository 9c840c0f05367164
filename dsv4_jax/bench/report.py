"""A measurement as text, JSON and picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4_jax.bench.cost import Cost, Limits
from dsv4_jax.bench.steps import Timing


@dataclass(frozen=True)
class Report:
    """One measured step.

    Attributes:
        title: what ran, on what.
        num_layers, whole_layers: layers that ran, and those of the whole model.
        num_tokens: that a step appends over all sequences.
        timing: of the step.
        costs: bytes and operations by part.
        limits: of the device, or None where none are known.
        weight_bytes: memory.
    """

    title: str
    num_layers: int
    whole_layers: int
    num_tokens: int
    timing: Timing
    costs: dict[str, Cost]
    limits: Limits | None
    weight_bytes: int

    @property
    def median_us(self) -> float:
        times = self.timing.step_us
        return sorted(times)[len(times) // 2]

    @property
    def layers_us(self) -> float:
        """Without the head's share, as far as it is known: measured, else its floor, else none."""
        if self.timing.profile is not None:
            return self.median_us - self.timing.profile.part_us["head"]
        return self.median_us - (self.costs["head"].floor_us(self.limits) if self.limits else 0)

    @property
    def whole_us(self) -> float:
        """Of the whole model, if its other layers take as long as these on average."""
        return self.median_us + self.layers_us * (self.whole_layers / self.num_layers - 1)

    def rows(self) -> list[dict[str, Any]]:
        """By part, and the whole."""
        total = sum(self.costs.values(), Cost())
        floors = {part: self._floor_us(cost) for part, cost in self.costs.items()}
        measured: Mapping[str, float] = self.timing.profile.part_us if self.timing.profile else {}
        rows = [
            self._row(part, cost, floors[part], measured.get(part))
            for part, cost in self.costs.items()
        ]
        # Parts follow each other: the floor of the step is the sum of theirs.
        whole = sum(floors.values()) if self.limits else None  # type: ignore[arg-type]
        return [*rows, self._row("step", total, whole, self.median_us)]

    def _floor_us(self, cost: Cost) -> float | None:
        return cost.floor_us(self.limits) if self.limits else None

    @staticmethod
    def _row(part: str, cost: Cost, floor: float | None, us: float | None) -> dict[str, Any]:
        ratio = us / floor if us is not None and floor else None
        return {
            "part": part,
            "MB": cost.num_bytes / 1e6,
            "GFLOP": cost.flops / 1e9,
            "floor_us": floor,
            "us": us,
            "us/floor": ratio,
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        timing, profile = self.timing, self.timing.profile
        return {
            "title": self.title,
            "step_us": self.median_us,
            "all_step_us": list(timing.step_us),
            "layer_us": self.layers_us / self.num_layers,
            "tokens_per_s": self.num_tokens / self.median_us * 1e6,
            "whole_layers": self.whole_layers,
            "whole_step_us": self.whole_us,
            "whole_tokens_per_s": self.num_tokens / self.whole_us * 1e6,
            "kernels_per_step": profile and profile.num_kernels,
            "graphs_per_step": profile and profile.num_graphs,
            "compile_s": {"cold": timing.compile_s[0], "warm": timing.compile_s[1]},
            "weight_bytes": self.weight_bytes,
            "cache_bytes": timing.cache_bytes,
            "peak_bytes": timing.peak_bytes,
            "parts": self.rows(),
            "kernels": profile and [kernel._asdict() for kernel in profile.kernels],
        }

    def render(self) -> str:
        """Text of several lines."""
        timing = self.timing
        spread = f"{min(timing.step_us):,.0f} to {max(timing.step_us):,.0f}"
        lines = [
            self.title,
            *table(self.rows()),
            f"step {self.median_us:,.1f} us (median of {len(timing.step_us)}, {spread}), "
            f"{self.layers_us / self.num_layers:,.1f} us per layer beside the head, "
            f"{self.num_tokens / self.median_us * 1e6:,.0f} tokens/s",
            f"{self.whole_layers} layers, if all were like these on average, and the head: "
            f"{self.whole_us:,.0f} us, {self.num_tokens / self.whole_us * 1e6:,.0f} tokens/s",
            f"compiled in {timing.compile_s[0]:.1f} s, from the persistent cache in "
            f"{timing.compile_s[1]:.1f} s; weights {self.weight_bytes / 1e9:.2f} GB, "
            f"cache {timing.cache_bytes / 1e9:.2f} GB",
        ]
        if timing.peak_bytes:
            lines[-1] += f", at most {timing.peak_bytes / 1e9:.2f} GB in use"
        if timing.profile is not None:
            lines.append(
                f"{timing.profile.num_kernels:,.0f} kernels in {timing.profile.num_graphs:.3g} "
                "CUDA graphs per step; parts were timed under the profiler and without graphs"
            )
        return "\n".join(lines)

    def draw(self, path: Path) -> None:
        """Time by part beside its floor.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: nothing was measured by part.
        """
        if self.timing.profile is None:
            raise ValueError("picture: parts are timed on an NVIDIA GPU only")
        *parts, _ = self.rows()
        draw_bars(
            path,
            self.title,
            [(row["part"], row["us"], row["floor_us"]) for row in parts if row["us"]],
        )


def draw_bars(path: Path, title: str, bars: Sequence[tuple[str, float, float | None]]) -> None:
    """A PNG of (name, microseconds, floor) from top to bottom.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(8, 0.4 * len(bars) + 1.2), layout="constrained")
    positions = range(len(bars), 0, -1)
    names, times, floors = zip(*bars, strict=True)
    ax.barh(positions, times, color="#4878a8", label="measured")
    if all(floor is not None for floor in floors):
        ax.barh(positions, floors, height=0.35, color="#f0a040", label="floor")
    ax.set_yticks(positions, names)
    ax.set_xlabel("microseconds")
    ax.set_title(title.replace("; ", "\n", 1), fontsize=9)
    ax.legend()
    fig.savefig(path, dpi=150)
    plt.close(fig)


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of a heading and rows, which have the same keys, the first one to the left."""
    cells = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in cells
    ]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
