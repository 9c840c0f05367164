"""What the compiler makes of a step: nothing large is copied, and one program serves all steps."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_jax
from dsv4_jax import model as model_module

SLOTS = 2


@pytest.fixture
def cache(tiny):
    return tiny.new_cache(max_sequences=SLOTS, max_tokens=4096)


def compiled(model, cache, step, *args):
    return (
        jax.jit(step, donate_argnums=2)
        .lower(model.graph, model.params, cache.arrays, *args)
        .compile()
    )


def shape_of(array) -> str:
    names = {"float32": "f32", "bfloat16": "bf16", "uint8": "u8", "int32": "s32"}
    return f"{names[str(array.dtype)]}[{','.join(map(str, array.shape))}]"


def copies(hlo: str, shapes: set[str]) -> list[str]:
    """Instructions that make another array of one of the shapes."""
    pattern = re.compile(r"= (\w+\[[\d,]*\])\S* (copy|copy-start|transpose|convert|reshape)\(")
    return [
        line.strip()
        for line in hlo.splitlines()
        if (found := pattern.search(line)) and found[1] in shapes
    ]


def large_arrays(cache, names) -> set[str]:
    arrays = [getattr(cache.arrays, name) for name in names]
    return {shape_of(leaf) for leaf in jax.tree.leaves(arrays)}


POOLS = ("csa", "csa_keys", "hca")
STATE = ("window", "csa_tail", "key_tail", "hca_tail")


def test_decode_step_copies_no_pool_no_state_and_no_weight(tiny, cache):
    program = compiled(tiny, cache, dsv4_jax.decode_step, jnp.zeros(SLOTS, jnp.int32))
    weights = {
        shape_of(leaf)
        for leaf in jax.tree.leaves(tiny.params)
        if leaf.ndim > 1 and leaf.size > 10_000
    }
    assert weights
    assert copies(program.as_text(), large_arrays(cache, POOLS + STATE) | weights) == []


def test_prefill_step_copies_no_pool(tiny, cache):
    tokens = jnp.zeros((SLOTS, 16), jnp.int32)
    lengths = jnp.full(SLOTS, 16, jnp.int32)
    program = compiled(tiny, cache, dsv4_jax.prefill_step, tokens, lengths)
    assert copies(program.as_text(), large_arrays(cache, POOLS)) == []


def test_the_copy_detector_detects():
    """A pool that is read after it was overwritten has to be copied."""

    def bad(pool):
        return pool.at[0].set(1.0), pool.sum()

    # Compiled for the CPU everywhere: a GPU's schedule may find an order without a copy.
    with jax.default_device(jax.devices("cpu")[0]):
        program = jax.jit(bad, donate_argnums=0).lower(jnp.zeros((64, 32))).compile()
    assert copies(program.as_text(), {"f32[64,32]"})


def test_every_cache_array_is_updated_in_place(tiny, cache):
    program = compiled(tiny, cache, dsv4_jax.decode_step, jnp.zeros(SLOTS, jnp.int32))
    assert program.memory_analysis().alias_size_in_bytes >= cache.memory_bytes()


def test_a_thousand_steps_compile_once(tiny, cache):
    tiny.prefill(cache, np.zeros((SLOTS, 3), np.int32), np.array([3, 1]))
    before = model_module._decode_step._cache_size()
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **kwargs: compilations.append(name) if "backend_compile" in name else None
    )
    try:
        for i in range(1000):
            tiny.decode_step(cache, np.array([i % 300, -1 if i % 7 == 0 else 5]))
            if i == 500:
                cache.release(1)
                tiny.prefill(cache, np.ones((SLOTS, 2), np.int32), np.array([0, 2]))
            if i == 0:
                compilations.clear()
                first = model_module._decode_step._cache_size()
    finally:
        jax.monitoring.clear_event_listeners()
    assert first == before + 1
    assert model_module._decode_step._cache_size() == first
    assert cache.lengths[0] == 1003
