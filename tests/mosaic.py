"""Mosaic GPU kernels without a GPU: run by the interpreter, lowered, and compiled for a chip.

python -m tests.mosaic interpret | lower | compile sm_90 | compile sm_100, with jax 0.11 or later.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.activation_topk import activation_topk
from tests.oracles.router import normalized, scored_ids, sqrt_softplus

SCALE = 2.5
SHAPES = [(0, 256, 6), (1, 256, 6), (3, 384, 6), (2, 20, 4), (2, 8, 8), (1, 128, 16)]
CHIPS = {"sm_90": ("NVIDIA H200", "9.0", 132), "sm_100": ("NVIDIA B200", "10.0", 148)}


def rows(num_tokens, num_experts):
    """Normal rows and, for the order among equals, rows of few values with a NaN."""
    rng = np.random.default_rng(num_experts)
    logits = rng.standard_normal((num_tokens, num_experts)).astype(np.float32)
    few = rng.integers(-1, 2, (num_tokens, num_experts)).astype(np.float32)
    few[:, 0] = np.nan
    return [(logits, rng.normal(0, 0.3, num_experts)), (few, rng.integers(0, 2, num_experts))]


def interpret() -> None:
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
    from jax.experimental.pallas import mosaic_gpu as plgpu

    for num_tokens, num_experts, k in SHAPES:
        for logits, bias in rows(num_tokens, num_experts):
            bias = bias.astype(np.float32)
            weights, ids = activation_topk(
                jnp.asarray(logits),
                jnp.asarray(bias),
                k,
                SCALE,
                plgpu.InterpretGPUParams(detect_races=True),
            )
            assert weights.shape == ids.shape == (num_tokens, k)
            if num_tokens == 0:
                continue
            assert not interpret_pallas_call.get_races().races_found
            scores = sqrt_softplus(logits.astype(np.float64))
            numbers = np.where(np.isnan(scores), np.inf, scores + bias)
            expected = scored_ids(numbers, 0.0, k)
            np.testing.assert_array_equal(ids, expected)
            known = ~np.isnan(np.take_along_axis(scores, expected, axis=1)).any(axis=1)
            np.testing.assert_allclose(
                weights[known], normalized(scores, expected, SCALE)[known], rtol=2e-5
            )


def _target(chip: str) -> str:
    kind, capability, cores = CHIPS[chip]
    major, minor = capability.split(".")
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: {cores}
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560
  clock_rate_ghz: 1.98 device_memory_size: 150754820096 shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 20 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{kind}"
"""


def compile_for(chip: str, only_lower: bool = False) -> None:
    kind, capability, cores = CHIPS[chip]

    class Device(jax.sharding.AbstractDevice):
        compute_capability = property(lambda self: capability)
        core_count = property(lambda self: cores)

    device = Device(device_kind=kind, platform="gpu", num_cores=cores)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    for num_tokens, num_experts, k in SHAPES[1:]:
        args = [
            jax.ShapeDtypeStruct((num_tokens, num_experts), jnp.float32),
            jax.ShapeDtypeStruct((num_experts,), jnp.float32),
        ]

        def route(logits, bias, k=k):
            return activation_topk(logits, bias, k, SCALE)

        with jax.sharding.use_abstract_mesh(mesh):
            lowered = jax.jit(route).trace(*args).lower(lowering_platforms=("cuda",))
            assert "mosaic_gpu_v2" in lowered.as_text()
            if only_lower:
                continue
            from jax.experimental import topologies

            topology = topologies.get_topology_desc(
                "", "cuda", topology="1x1x1", target_config=_target(chip)
            )
            one = jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))
            sharding = jax.sharding.NamedSharding(one, jax.sharding.PartitionSpec())
            placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in args]
            jax.jit(route, out_shardings=sharding).lower(*placed).compile()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["interpret"]:
            with np.errstate(invalid="ignore"):
                interpret()
        case ["lower"]:
            compile_for("sm_90", only_lower=True)
        case ["compile", chip]:
            compile_for(chip)
    print("done")
