"""Tables of device times: what a benchmark prints and stores."""

import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from dsv4_jax.bench.cost import LIMITS
from dsv4_jax.bench.timing import device_time_us, empty_kernel_us

__all__ = ["device_time_us", "empty_kernel_us", "memory_floor_us", "table", "write_results"]

RESULTS = Path(os.environ.get("DSV4_RESULTS_DIR", Path(__file__).parent / "results"))

Row = Mapping[str, Any]


def memory_floor_us(num_bytes: float) -> float:
    """The time in which an H200 reads so many bytes."""
    return 1e6 * num_bytes / LIMITS["NVIDIA H200"].bytes_per_s


def write_results(name: str, rows: Sequence[Row], directory: Path = RESULTS) -> Path:
    """Prints `rows` as a table and stores them as <date>-<gpu>-<name>.json."""
    device = jax.devices()[0]
    today = datetime.date.today().isoformat()
    result = {
        "date": today,
        "device": device.device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "rows": [dict(row) for row in rows],
    }
    gpu = device.device_kind.removeprefix("NVIDIA ").lower().replace(" ", "-")
    path = directory / f"{today}-{gpu}-{name}.json"
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))
    return path


def table(rows: Sequence[Row]) -> str:
    """Columns in the order in which keys first appear; floats with three significant digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_text(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.rjust, line, widths)) for line in cells)
    return "\n".join(lines)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
