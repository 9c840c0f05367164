"""Times of decode and prefill steps."""

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from dsv4_jax.bench.profile import Profile, profile
from dsv4_jax.cache.manager import Cache
from dsv4_jax.cache.paged import BLOCK_TOKENS
from dsv4_jax.cache.schema import CacheArrays
from dsv4_jax.compilation import compiler_options, without_graphs
from dsv4_jax.model import Model
from dsv4_jax.transformer import decode_step, prefill_step

Options = dict[str, str | int]

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
        profile: device time by kernel, None where there is no GPU.
    """

    step_us: tuple[float, ...]
    compile_s: tuple[float, float]
    cache_bytes: int
    peak_bytes: int
    profile: Profile | None


def check_idle() -> None:
    """Raises BusyError if an NVIDIA GPU that this process sees does something already."""
    if jax.default_backend() != "gpu":
        return
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query += ["-i", visible]
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
    planes: dict[str, Any] = {
        name: tuple(map(_refilled, getattr(cache.arrays, name)))
        for name in ("window", "csa", "csa_keys", "hca")
    }
    lengths = jnp.full_like(cache.arrays.lengths, context)
    cache.arrays = replace(cache.arrays, lengths=lengths, **planes)
    return cache


def _refilled(plane: Array) -> Array:
    """Noise in the place of a plane of a cache, which is deleted before."""
    shape, dtype = plane.shape, plane.dtype
    plane.delete()
    return _noise(shape, dtype)


@partial(jax.jit, static_argnums=(0, 1))
def _noise(shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    key = jax.random.key(0, impl="rbg")
    if dtype != jnp.uint8:
        return jax.random.normal(key, shape, dtype)
    # Scale planes are narrow: powers of two about 1. Elsewhere no code may be NaN.
    if shape[-1] <= 8:
        return jnp.full(shape, 125, jnp.uint8)
    return jax.random.bits(key, shape, jnp.uint8) & 0xBF


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
    tokens = jnp.zeros(batch, jnp.int32)

    def compiled(options: Options) -> jax.stages.Compiled:
        loop = jax.jit(decode_loop, static_argnums=4, donate_argnums=2, compiler_options=options)
        lowered = loop.lower(model.graph, model.params, cache.arrays, tokens, num_steps)
        return lowered.compile()

    def run(program: jax.stages.Compiled, arrays: CacheArrays) -> CacheArrays:
        _, arrays = program(model.graph, model.params, arrays, tokens)
        return arrays

    return _timed(cache, compiled, run, num_steps, repeats)


def time_prefill(
    model: Model, *, batch: int, prompt: int, chunk: int, context: int, repeats: int
) -> Timing:
    """Times `prompt` new tokens of each of `batch` sequences that hold `context` tokens.

    A step is the whole prompt; each program of it appends `chunk` tokens.
    """
    cache = filled_cache(model, batch, context, prompt)
    ids = jax.random.randint(jax.random.key(1), (batch, chunk), 0, model.config.vocab_size)
    args = ids.astype(jnp.int32), jnp.full(batch, chunk, jnp.int32)

    def compiled(options: Options) -> jax.stages.Compiled:
        step = jax.jit(prefill_step, donate_argnums=2, compiler_options=options)
        return step.lower(model.graph, model.params, cache.arrays, *args).compile()

    def run(program: jax.stages.Compiled, arrays: CacheArrays) -> CacheArrays:
        for _ in range(prompt // chunk):
            _, arrays = program(model.graph, model.params, arrays, *args)
        return arrays

    return _timed(cache, compiled, run, 1, repeats)


def _timed(
    cache: Cache,
    compiled_with: Callable[[Options], jax.stages.Compiled],
    run: Callable[[jax.stages.Compiled, CacheArrays], CacheArrays],
    num_steps: int,
    repeats: int,
) -> Timing:
    """Compiles and times `run`, which does `num_steps` steps from the cache's lengths on."""
    lengths = cache.lengths.astype(np.int32)
    compile_s = []
    for _ in range(2):
        jax.clear_caches()
        begin = time.perf_counter()
        compiled = compiled_with(compiler_options())
        compile_s.append(time.perf_counter() - begin)
    arrays = cache.arrays

    def step_us(program: jax.stages.Compiled) -> float:
        nonlocal arrays
        arrays = replace(arrays, lengths=jnp.asarray(lengths))
        jax.block_until_ready(arrays)
        begin = time.perf_counter()
        arrays = jax.block_until_ready(run(program, arrays))
        return (time.perf_counter() - begin) * 1e6 / num_steps

    for _ in range(WARM_UP_RUNS):
        step_us(compiled)
    times = tuple(step_us(compiled) for _ in range(repeats))
    peak_bytes = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    found = None
    if jax.default_backend() == "gpu":
        found = profile(step_us, compiled, compiled_with(without_graphs()), num_steps)
    first_s, second_s = compile_s
    return Timing(times, (first_s, second_s), cache.memory_bytes(), peak_bytes, found)
