"""Device time by part of the model, and what a step launches, from XLA's profiler."""

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from dsv4_jax.bench.cost import PARTS

_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*metadata=\{[^}]*op_name="([^"]*)"', re.M)


@dataclass(frozen=True)
class Profile:
    """Of one run.

    Attributes:
        part_us: microseconds of device time by part, in the order of PARTS.
        num_kernels: kernels, copies and fills that ran.
        num_graphs: CUDA graphs that were launched.
    """

    part_us: dict[str, float]
    num_kernels: int
    num_graphs: int


Event = tuple[float, dict[str, Any]]


def profile(
    run: Callable[[jax.stages.Compiled], object],
    compiled: jax.stages.Compiled,
    without_graphs: jax.stages.Compiled,
) -> Profile:
    """Runs `run`, which calls the program it is given once and waits for it, under the profiler.

    Of a kernel in a CUDA graph the profiler does not know the instruction: times by part are
    those of the same program compiled without graphs.
    """
    launched, timed = (_events(partial(run, program)) for program in (compiled, without_graphs))
    scope_of = scopes(without_graphs.as_text() or "")
    part_us: dict[str, float] = defaultdict(float)
    for duration_us, stats in timed:
        part_us[part_of_scope(scope_of.get(stats.get("hlo_op", ""), ""))] += duration_us
    graphs = {stats["correlation_id"] for _, stats in launched if "cuda_graph_id" in stats}
    return Profile({part: part_us[part] for part in PARTS}, len(launched), len(graphs))


def scopes(hlo: str) -> dict[str, str]:
    """The scope path of each instruction of a compiled program."""
    return dict(_INSTRUCTION.findall(hlo))


def part_of_scope(scope: str) -> str:
    """The innermost part named in a path such as "jit(f)/attention/indexer/dot_general"."""
    names = [name for name in scope.split("/") if name in PARTS]
    return names[-1] if names else "other"


def _events(run: Callable[[], object]) -> list[Event]:
    """Microseconds and attributes of all that ran on GPUs."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        (trace,) = Path(directory).glob("**/*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(trace))
        return [
            (event.duration_ns / 1e3, dict(event.stats))
            for plane in data.planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
