"""Device time by part of the model and by kernel, and what a step launches, from XLA's profiler."""

import re
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dsv4_jax.bench.cost import PARTS

_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*metadata=\{[^}]*op_name="([^"]*)"', re.M)
_MODULE = re.compile(r"HloModule ([\w.-]+)")


class Kernel(NamedTuple):
    """All launches of one kernel in one part, in a step on average."""

    part: str
    name: str
    launches: float
    us: float


@dataclass(frozen=True)
class Profile:
    """Of a step on average.

    Attributes:
        kernels: kernels, copies and fills, the longest first.
        num_kernels: how many ran.
        num_graphs: CUDA graphs that were launched.
    """

    kernels: tuple[Kernel, ...]
    num_kernels: float
    num_graphs: float

    @property
    def part_us(self) -> dict[str, float]:
        """Microseconds of device time by part, in the order of PARTS."""
        part_us = dict.fromkeys(PARTS, 0.0)
        for kernel in self.kernels:
            part_us[kernel.part] += kernel.us
        return part_us


class Event(NamedTuple):
    """Something that ran on a GPU, as the profiler describes it."""

    name: str
    us: float
    stats: dict[str, Any]


def profile(
    run: Callable[[jax.stages.Compiled], object],
    compiled: jax.stages.Compiled,
    without_graphs: jax.stages.Compiled,
    num_steps: int,
) -> Profile:
    """Runs `run`, which calls the program it is given once and waits for it, under the profiler.

    The program is one of `num_steps` steps.

    Of a kernel in a CUDA graph the profiler does not know the instruction: all but the number of
    graphs is of the same program compiled without them.
    """
    launched = of_module(device_events(partial(run, compiled)), compiled.as_text() or "")
    hlo = without_graphs.as_text() or ""
    timed = of_module(device_events(partial(run, without_graphs)), hlo)
    graphs = {event.stats["correlation_id"] for event in launched if "cuda_graph_id" in event.stats}
    kernels = by_kernel(timed, hlo, num_steps)
    return Profile(kernels, len(timed) / num_steps, len(graphs) / num_steps)


def of_module(events: Sequence[Event], hlo: str) -> list[Event]:
    """The events of one program, without those of other programs that ran before or after it."""
    if (found := _MODULE.match(hlo)) is None:
        return list(events)
    return [event for event in events if event.stats.get("hlo_module", found[1]) == found[1]]


def by_kernel(events: Sequence[Event], hlo: str, num_steps: int = 1) -> tuple[Kernel, ...]:
    """By part and kernel, the longest first; events name instructions of the program."""
    scope_of = scopes(hlo)
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        part = part_of_scope(scope_of.get(event.stats.get("hlo_op", ""), ""))
        groups[part, event.name].append(event.us)
    kernels = (
        Kernel(*key, len(times) / num_steps, sum(times) / num_steps)
        for key, times in groups.items()
    )
    return tuple(sorted(kernels, key=lambda kernel: -kernel.us))


def scopes(hlo: str) -> dict[str, str]:
    """The scope path of each instruction of a compiled program."""
    return dict(_INSTRUCTION.findall(hlo))


def part_of_scope(scope: str) -> str:
    """The innermost part named in a path such as "jit(f)/attention/indexer/dot_general"."""
    parts = [name for name in scope.split("/") if name in PARTS]
    return parts[-1] if parts else "other"


def device_events(run: Callable[[], object]) -> list[Event]:
    """All that ran on GPUs."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        # An event's statistics are of a type whose making warns; where that raises, JAX aborts.
        warnings.simplefilter("ignore", DeprecationWarning)
        with jax.profiler.trace(directory, profiler_options=options):
            run()
        (trace,) = Path(directory).glob("**/*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(trace))
        return [
            Event(event.name, event.duration_ns / 1e3, dict(event.stats))
            for plane in data.planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
