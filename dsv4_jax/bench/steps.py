"""Times of decode and prefill steps."""

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from dsv4_jax.bench.profile import Profile, profile
from dsv4_jax.cache.manager import Cache
from dsv4_jax.cache.paged import BLOCK_TOKENS
from dsv4_jax.cache.schema import CacheArrays
from dsv4_jax.compilation import compiler_options, without_graphs
from dsv4_jax.model import Model
from dsv4_jax.transformer import decode_step, prefill_step

WARM_UP_RUNS = 2
# A GPU that does anything else is busier than this.
IDLE_UTILIZATION_PERCENT = 5


class BusyError(RuntimeError):
    """Something else runs on the GPU, so times would mean nothing."""


@dataclass(frozen=True)
class Timing:
    """What running a program several times showed.

    Attributes:
        step_us: microseconds of each run, divided by its steps.
        compile_s: seconds that tracing and compiling took, cold and with the program in JAX's
            persistent cache.
        cache_bytes: of the sequences.
        peak_bytes: most device memory in use until then, 0 where the backend does not count.
        profile: device time by part, None where there is no GPU.
    """

    step_us: tuple[float, ...]
    compile_s: tuple[float, float]
    cache_bytes: int
    peak_bytes: int
    profile: Profile | None


def check_idle() -> None:
    """Raises BusyError if an NVIDIA GPU of this machine does something already."""
    if jax.default_backend() != "gpu":
        return
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    if any(int(percent) > IDLE_UTILIZATION_PERCENT for percent in found):
        raise BusyError(
            f"the GPU is busy: utilisation {', '.join(found)} %, expected at most "
            f"{IDLE_UTILIZATION_PERCENT} % before a measurement"
        )


def filled_cache(model: Model, batch: int, context: int, new_tokens: int) -> Cache:
    """A cache of sequences of `context` tokens with random entries, and room for more."""
    blocks = -(-(context + new_tokens) // BLOCK_TOKENS)
    cache = model.new_cache(batch, batch * blocks * BLOCK_TOKENS)
    cache.prepare_step([context + new_tokens] * batch)
    cache.arrays = _filled(cache.arrays, jnp.int32(context))
    return cache


@jax.jit
def _filled(arrays: CacheArrays, context: Int[Array, ""]) -> CacheArrays:
    keys = iter(jax.random.split(jax.random.key(0, impl="rbg"), 8))

    def noise(x: Array) -> Array:
        if x.dtype == jnp.uint8:
            # Scale planes are narrow: powers of two about 1. Elsewhere no code may be NaN.
            if x.shape[-1] <= 8:
                return jnp.full(x.shape, 125, jnp.uint8)
            return jax.random.bits(next(keys), x.shape, jnp.uint8) & 0xBF
        return jax.random.normal(next(keys), x.shape, x.dtype)

    planes: dict[str, Any] = {
        name: tuple(map(noise, getattr(arrays, name)))
        for name in ("window", "csa", "csa_keys", "hca")
    }
    return replace(arrays, lengths=jnp.full_like(arrays.lengths, context), **planes)


def decode_loop(
    graph: nnx.GraphDef,
    params: nnx.State,
    arrays: CacheArrays,
    tokens: Int[Array, "b"],
    num_steps: int,
) -> tuple[Int[Array, "b"], CacheArrays]:
    """Greedy steps, each from the token of the one before."""

    def step(carry: tuple[CacheArrays, Array], _: None) -> tuple[tuple[CacheArrays, Array], None]:
        arrays, tokens = carry
        packed, tokens = jax.lax.optimization_barrier((params, tokens))
        logits, arrays = decode_step(graph, packed, arrays, tokens)
        return (arrays, logits.argmax(-1).astype(jnp.int32)), None

    (arrays, tokens), _ = jax.lax.scan(step, (arrays, tokens), length=num_steps)
    return tokens, arrays


def time_decode(model: Model, *, batch: int, context: int, num_steps: int, repeats: int) -> Timing:
    """Times `num_steps` decode steps of `batch` sequences that begin at `context` tokens."""
    cache = filled_cache(model, batch, context, num_steps)
    program = partial(jax.jit, decode_loop, static_argnums=4, donate_argnums=2)
    tokens = jnp.zeros(batch, jnp.int32)
    return _timed(program, model, cache, (tokens, num_steps), num_steps, repeats, context)


def time_prefill(model: Model, *, batch: int, chunk: int, context: int, repeats: int) -> Timing:
    """Times a chunk of new tokens of each of `batch` sequences that hold `context` tokens."""
    cache = filled_cache(model, batch, context, chunk)
    program = partial(jax.jit, prefill_step, donate_argnums=2)
    ids = jax.random.randint(jax.random.key(1), (batch, chunk), 0, model.config.vocab_size)
    args = ids.astype(jnp.int32), jnp.full(batch, chunk, jnp.int32)
    return _timed(program, model, cache, args, 1, repeats, context)


def _timed(
    program: Callable[..., Any],
    model: Model,
    cache: Cache,
    args: tuple[Any, ...],
    num_steps: int,
    repeats: int,
    context: int,
) -> Timing:
    dynamic = [arg for arg in args if not isinstance(arg, int)]
    arrays = cache.arrays

    def compiled_with(options: dict[str, str | int]) -> jax.stages.Compiled:
        jax.clear_caches()
        jitted = program(compiler_options=options)
        return jitted.lower(model.graph, model.params, arrays, *args).compile()

    compile_s = []
    for _ in range(2):
        begin = time.perf_counter()
        compiled = compiled_with(compiler_options())
        compile_s.append(time.perf_counter() - begin)

    def run(compiled: jax.stages.Compiled) -> float:
        nonlocal arrays
        full = replace(arrays, lengths=jnp.full_like(arrays.lengths, context))
        jax.block_until_ready(full)
        begin = time.perf_counter()
        result, arrays = compiled(model.graph, model.params, full, *dynamic)
        jax.block_until_ready((result, arrays))
        return (time.perf_counter() - begin) * 1e6 / num_steps

    for _ in range(WARM_UP_RUNS):
        run(compiled)
    times = tuple(run(compiled) for _ in range(repeats))
    peak_bytes = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    found = None
    if jax.default_backend() == "gpu":
        found = profile(run, compiled, compiled_with(without_graphs()))
    first_s, second_s = compile_s
    return Timing(times, (first_s, second_s), cache.memory_bytes(), peak_bytes, found)
