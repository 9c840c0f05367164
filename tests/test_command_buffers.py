"""Programs with kernels are replayed as CUDA graphs."""

import jax
import jax.numpy as jnp
import pytest

from dsv4_jax import load
from dsv4_jax.bench.profile import device_events
from dsv4_jax.bench.steps import decode_loop, filled_cache
from dsv4_jax.compilation import compiler_options

# In the names of kernels of operations for which the bundled model is not too small.
OPERATIONS = ("Gemm", "Router", "Attend")


@pytest.mark.gpu
def test_every_kernel_of_decode_steps_is_in_a_graph():
    model = load("mini", dtype=jnp.bfloat16)
    cache = filled_cache(model, 4, 2500, 16)
    tokens = jnp.zeros(4, jnp.int32)
    jitted = jax.jit(decode_loop, static_argnums=4, compiler_options=compiler_options())
    program = jitted.lower(model.graph, model.params, cache.arrays, tokens, 4).compile()

    def run():
        jax.block_until_ready(program(model.graph, model.params, cache.arrays, tokens))

    run()
    kernels = [event for event in device_events(run) if "dsv4::" in event.name]
    assert all("cuda_graph_id" in event.stats for event in kernels)
    names = {event.name for event in kernels}
    missing = [op for op in OPERATIONS if not any(op in name for name in names)]
    assert not missing, names
