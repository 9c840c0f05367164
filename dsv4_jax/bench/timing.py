"""Device time of a function inside one compiled program.

Two programs with different numbers of calls run after the same long writes to memory. These empty
the L2 cache and last while the host submits the program. The device's clock is read just before
and after it; the difference between the programs is the time of the calls that one has more.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dsv4_ffi

L2_BYTES = 60 << 20
FEW_CALLS, MANY_CALLS = 20, 60
REPEATS = 25
SLOW_US = 100.0
# An idle GPU's clocks take so long to rise.
WARM_UP_S = 0.2
FLUSH_BYTES, FLUSHES = 2 << 30, 3


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
        # Kept until here, `results` are written to the same memory in each run; a call that failed
        # raises here.
        jax.block_until_ready((state, results))
        return (_nanoseconds(end) - _nanoseconds(begin)) / 1e3

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
