"""What the compiler makes of a step: nothing large is copied, and one program serves all steps."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_ffi
import dsv4_jax
from dsv4_jax import model as model_module
from dsv4_jax.bench.random_model import random_model
from dsv4_jax.cache.schema import CacheSchema, new_arrays
from dsv4_jax.config import Config
from dsv4_jax.kernels import Kernels
from tests.checkpoints import random_config

SLOTS = 2
MISSING = dsv4_ffi.missing(jax.default_backend().replace("gpu", "cuda"))
NEEDS_KERNELS = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")


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
    names = {"float32": "f32", "bfloat16": "bf16", "uint8": "u8", "int32": "s32", "uint32": "u32"}
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


# Sizes that every kernel holds, a layer of each kind.
CONFIG = Config.from_dict(
    random_config(
        hidden_size=256,
        head_dim=512,
        qk_rope_head_dim=64,
        index_head_dim=128,
        index_topk=16,
        o_lora_rank=128,
        moe_intermediate_size=256,
        n_routed_experts=4,
        num_hidden_layers=3,
        num_hash_layers=1,
        num_nextn_predict_layers=0,
        compress_ratios=[0, 4, 128],
    )
)


@pytest.fixture(scope="module")
def step_of_kernels():
    """A compiled decode step in which kernels do all that they can, and its arguments' shapes."""
    made = []

    def make():
        made.append(random_model(CONFIG, kernels=Kernels("ffi")))
        return made[0].params

    params = jax.eval_shape(make)
    (model,) = made
    schema = CacheSchema.of(CONFIG, model.numerics, model.dtype)
    arrays = jax.eval_shape(lambda: new_arrays(schema, SLOTS, 32))
    tokens = jax.ShapeDtypeStruct((SLOTS,), jnp.int32)
    step = jax.jit(dsv4_jax.decode_step, static_argnums=0, donate_argnums=2)
    return step.lower(model.graph, params, arrays, tokens).compile(), params, arrays


@NEEDS_KERNELS
def test_kernels_copy_no_pool_no_state_and_no_weight(step_of_kernels):
    program, params, arrays = step_of_kernels
    large = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1 and leaf.size > 10_000]
    state = [leaf for name in POOLS + STATE for leaf in jax.tree.leaves(getattr(arrays, name))]
    assert copies(program.as_text(), {shape_of(leaf) for leaf in large + state}) == []
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
    assert program.memory_analysis().alias_size_in_bytes >= cache_bytes


@NEEDS_KERNELS
def test_kernels_do_nearly_all_of_a_step(step_of_kernels):
    """Each further fusion would be a launch; a layer of a kind has so many calls of kernels."""
    program, _, _ = step_of_kernels
    calls = Counter(re.findall(r'custom_call_target="dsv4_(\w+)"', program.as_text()))
    assert calls == {
        # x, the low-rank query, heads to groups, groups to d; the head.
        "gemm": 3 * 4 + 1,
        "rms_norm": 3 + 1,
        "append_swa": 1,
        "layer_writes": 2,
        "indexer_scores": 1,
        "topk_select": 1,
        "sparse_attention": 3,
        "hash_router": 1,
        "dense_router": 2,
        "moe_ffn": 3,
        "hc_pre": 1,
        "hc_post_pre": 5,
        "hc_post": 1,
    }


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
    before = model_module._decode_step.num_compiled()
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
                first = model_module._decode_step.num_compiled()
    finally:
        jax.monitoring.clear_event_listeners()
    assert first == before + 1
    assert model_module._decode_step.num_compiled() == first
    assert cache.lengths[0] == 1003
