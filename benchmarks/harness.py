"""Device time of a function inside one compiled program, and tables of such times.

Two programs with different numbers of calls run after the same long writes to memory. These empty
the L2 cache and last while the host submits the program. The device's clock is read just before
and after it; the difference between the programs is the time of the calls that one has more.
"""

import datetime
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dsv4_ffi
from dsv4_jax.bench.cost import LIMITS

L2_BYTES = 60 << 20
FEW_CALLS, MANY_CALLS = 20, 60
REPEATS = 25
SLOW_US = 100.0
# An idle GPU's clocks take so long to rise.
WARM_UP_S = 0.2
FLUSH_BYTES, FLUSHES = 2 << 30, 3
RESULTS = Path(os.environ.get("DSV4_RESULTS_DIR", Path(__file__).parent / "results"))

Row = Mapping[str, Any]


def device_time_us(
    function: Callable[..., Any], *args: Any, cold: Sequence[int] = (), carried: int = 0
) -> float:
    """Microseconds of device time of one call of `function(*args)`, the median of several runs.

    Args:
        function: jittable; each of its results is computed, none is kept from call to call.
        args: pytrees of arrays.
        cold: positions of arguments that in real use come from device memory, such as weights;
            copies of them take turns, more than twice the L2 cache in all. The other arguments
            are the same in each call, and in L2 if they fit.
        carried: so many first results (of a tuple) replace as many first arguments in the next
            call, in place.
    """
    variants = _variants(args, cold)
    few_us = _timed(function, variants, FEW_CALLS, carried)
    many_calls = FEW_CALLS * 2 if few_us() / FEW_CALLS > SLOW_US else MANY_CALLS
    many_us = _timed(function, variants, many_calls, carried)
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_UP_S:
        many_us()
    return slope([(few_us(), many_us()) for _ in range(REPEATS)], many_calls - FEW_CALLS)


def slope(pairs: Sequence[tuple[float, float]], extra_calls: int) -> float:
    """Median of (more - fewer) / extra_calls."""
    return statistics.median(more - fewer for fewer, more in pairs) / extra_calls


def empty_kernel_us() -> float:
    """What a kernel with nothing to do costs in this harness."""
    return device_time_us(lambda earlier: (_clock(earlier),), jnp.zeros(2, jnp.uint32), carried=1)


def num_copies(num_bytes: int) -> int:
    """How many copies of so many bytes fill the L2 cache more than twice."""
    return min(MANY_CALLS, 2 * L2_BYTES // max(num_bytes, 1) + 1)


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


def _variants(args: tuple[Any, ...], cold: Sequence[int]) -> list[tuple[Any, ...]]:
    num_bytes = sum(leaf.nbytes for i in cold for leaf in jax.tree.leaves(args[i]))
    copies = num_copies(num_bytes) if cold else 1
    return [
        tuple(jax.tree.map(jnp.copy, arg) if i in cold else arg for i, arg in enumerate(args))
        for _ in range(copies)
    ]


def _timed(
    function: Callable[..., Any], variants: list[tuple[Any, ...]], num_calls: int, carried: int
) -> Callable[[], float]:
    """Compiles a program of `num_calls` calls; what is returned runs it and gives microseconds."""
    # As parameters of their own even equal arguments are different to the compiler: no call is
    # taken for a repetition of another.
    rest = [variants[i % len(variants)][carried:] for i in range(num_calls)]
    state = tuple(jax.tree.map(jnp.copy, variants[0][:carried]))
    program = _program(function, state, rest)
    flush = jax.jit(lambda x: x + 1, donate_argnums=0)
    buffer = jnp.zeros(FLUSH_BYTES, jnp.uint8)
    start = jnp.zeros(2, jnp.uint32)

    def run() -> float:
        nonlocal state, buffer
        for _ in range(FLUSHES):
            buffer = flush(buffer)
        begin = _clock(start)
        state, results = program(state, rest)
        end = _clock(start)
        # `results` are kept until here: each run writes to the same memory.
        elapsed = _nanoseconds(end) - _nanoseconds(begin)
        del results
        return elapsed / 1e3

    for _ in range(3):
        run()
    return run


def _program(
    function: Callable[..., Any], state: tuple[Any, ...], args_of_calls: list[tuple[Any, ...]]
) -> jax.stages.Compiled:
    once = jax.jit(function)

    def calls(state: tuple[Any, ...], args_of_calls: list[tuple[Any, ...]]) -> tuple[Any, Any]:
        results = []
        for args in args_of_calls:
            out = once(*state, *args)
            if state:
                state, out = tuple(out[: len(state)]), out[len(state) :]
            results.append(out)
        return state, results

    lowered = jax.jit(calls, donate_argnums=0).lower(state, args_of_calls)
    return lowered.compile({"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"})


@jax.jit
def _clock(earlier: jax.Array) -> jax.Array:
    return dsv4_ffi.call("timestamp", jax.ShapeDtypeStruct((2,), jnp.uint32), earlier)


def _nanoseconds(clock: jax.Array) -> int:
    low, high = np.asarray(clock).tolist()
    return high << 32 | low
