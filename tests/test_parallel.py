"""A model on a mesh computes what it computes on one device."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

from dsv4_jax.parallel.sharding import check_mesh, param_sharding
from tests.checkpoints import random_config, write_checkpoint

SCRIPT = """
import jax, numpy as np, jax.numpy as jnp, dsv4_jax
from jax.sharding import AxisType
mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
exact = dict(dtype=jnp.float32, numerics=dsv4_jax.Numerics.EXACT)
one = dsv4_jax.load("{directory}", **exact)
two = dsv4_jax.load("{directory}", mesh=mesh, **exact)
tokens = np.random.default_rng(0).integers(0, one.config.vocab_size, (2, 14))
split = [x for x in jax.tree.leaves(two.params) if not x.sharding.is_fully_replicated]
assert len(split) > 15, len(split)
whole = one.forward(tokens)
assert np.abs(whole - two.forward(tokens)).max() <= 1e-5
cache = two.new_cache(max_sequences=2, max_tokens=256)
logits, _ = two.prefill(cache, tokens[:, :13], np.array([13, 13]))
logits, _ = two.decode_step(cache, tokens[:, 13])
assert np.abs(whole[:, -1] - logits).max() <= 1e-5
"""


def test_two_devices_agree_with_one(tmp_path):
    ratios = [0, 4]
    config = random_config(num_hidden_layers=2, compress_ratios=ratios, num_hash_layers=1)
    write_checkpoint(tmp_path, config, seed=0)
    root = Path(__file__).parents[1]
    subprocess.run(
        [sys.executable, "-c", SCRIPT.format(directory=tmp_path)],
        check=True,
        env={
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "PYTHONPATH": f"{root}{os.pathsep}{root / 'ffi'}",
        },
    )


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        (("embed", "weight"), (384, 96), PartitionSpec("model")),
        (("layers", 2, "attn", "wo_b", "weight"), (96, 96), PartitionSpec(None, "model")),
        (("layers", 2, "attn", "indexer", "wq_b", "scale"), (8, 1), PartitionSpec("model")),
        (("layers", 2, "ffn", "experts", "w1", "weight"), (12, 48, 96), PartitionSpec("model")),
        (("layers", 2, "ffn", "shared_experts", "w1", "weight"), (48, 96), PartitionSpec()),
        (("layers", 2, "attn", "compressor", "wkv", "weight"), (96, 96), PartitionSpec()),
        (("norm", "weight"), (96,), PartitionSpec()),
    ],
)
def test_rules(mesh, path, shape, spec):
    assert param_sharding(mesh, path, shape).spec == spec


def test_axes_are_checked(mesh):
    with pytest.raises(ValueError, match="expected one named 'model'"):
        check_mesh(jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,)))
    with pytest.raises(ValueError, match=r"expected AxisType\.Auto"):
        check_mesh(jax.make_mesh((1,), ("model",), axis_types=(AxisType.Explicit,)))
    check_mesh(mesh)
