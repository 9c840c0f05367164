"""A measurement as text, JSON and picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4_jax.bench.cost import Cost, Limits


@dataclass(frozen=True)
class Report:
    """One measured step.

    Attributes:
        title: what ran, on what.
        num_layers, num_tokens: layers, and tokens that a step appends over all sequences.
        step_us: microseconds of each run.
        costs: bytes and operations by part.
        limits: of the device, or None where none are known.
        part_us: device time by part under the profiler, or None where there is no GPU.
        launches: (kernels, CUDA graphs) of a step, likewise.
        compile_s: seconds to compile, cold and from the persistent cache.
        weight_bytes, cache_bytes, peak_bytes: memory; the last 0 where the backend does not count.
    """

    title: str
    num_layers: int
    num_tokens: int
    step_us: tuple[float, ...]
    costs: dict[str, Cost]
    limits: Limits | None
    part_us: dict[str, float] | None
    launches: tuple[float, float] | None
    compile_s: tuple[float, float]
    weight_bytes: int
    cache_bytes: int
    peak_bytes: int

    @property
    def median_us(self) -> float:
        return sorted(self.step_us)[len(self.step_us) // 2]

    @property
    def layers_us(self) -> float:
        """Without the head's share, as far as it is known: measured, else its floor, else none."""
        if self.part_us is not None:
            return self.median_us - self.part_us["head"]
        return self.median_us - (self.costs["head"].floor_us(self.limits) if self.limits else 0)

    def rows(self) -> list[dict[str, Any]]:
        """By part, and the whole."""
        total = sum(self.costs.values(), Cost())
        floors = {part: self._floor_us(cost) for part, cost in self.costs.items()}
        rows = [
            self._row(part, cost, floors[part], self.part_us[part] if self.part_us else None)
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
        return {
            "title": self.title,
            "step_us": self.median_us,
            "all_step_us": list(self.step_us),
            "layer_us": self.layers_us / self.num_layers,
            "tokens_per_s": self.num_tokens / self.median_us * 1e6,
            "kernels_per_step": self.launches and self.launches[0],
            "graphs_per_step": self.launches and self.launches[1],
            "compile_s": {"cold": self.compile_s[0], "warm": self.compile_s[1]},
            "weight_bytes": self.weight_bytes,
            "cache_bytes": self.cache_bytes,
            "peak_bytes": self.peak_bytes,
            "parts": self.rows(),
        }

    def render(self) -> str:
        """Text of several lines."""
        spread = f"{min(self.step_us):,.0f} to {max(self.step_us):,.0f}"
        lines = [
            self.title,
            *_table(self.rows()),
            f"step {self.median_us:,.1f} us (median of {len(self.step_us)}, {spread}), "
            f"{self.layers_us / self.num_layers:,.1f} us per layer beside the head, "
            f"{self.num_tokens / self.median_us * 1e6:,.0f} tokens/s",
            f"compiled in {self.compile_s[0]:.1f} s, from the persistent cache in "
            f"{self.compile_s[1]:.1f} s; weights {self.weight_bytes / 1e9:.2f} GB, "
            f"cache {self.cache_bytes / 1e9:.2f} GB",
        ]
        if self.peak_bytes:
            lines[-1] += f", at most {self.peak_bytes / 1e9:.2f} GB in use"
        if self.launches is not None:
            kernels, graphs = self.launches
            lines.append(
                f"{kernels:,.0f} kernels in {graphs:.3g} CUDA graphs per step; "
                "parts were timed under the profiler and without graphs"
            )
        return "\n".join(lines)

    def draw(self, path: Path) -> None:
        """Time by part beside its floor.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: nothing was measured by part.
        """
        import matplotlib.pyplot as plt

        if self.part_us is None:
            raise ValueError("picture: parts are timed on an NVIDIA GPU only")
        parts = [part for part, us in self.part_us.items() if us > 0][::-1]
        fig, ax = plt.subplots(figsize=(8, 0.4 * len(parts) + 1.2), layout="constrained")
        ax.barh(parts, [self.part_us[part] for part in parts], color="#4878a8", label="measured")
        if self.limits:
            floors = [self.costs[part].floor_us(self.limits) for part in parts]
            ax.barh(parts, floors, height=0.35, color="#f0a040", label="floor")
        ax.set_xlabel("microseconds per step")
        ax.set_title(self.title, fontsize=9)
        ax.legend()
        fig.savefig(path, dpi=150)
        plt.close(fig)


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
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
