"""`dsv4 bench`: random models, costs, memory plans and what is printed."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from flax import nnx

import dsv4_jax
from dsv4_jax.bench import plan
from dsv4_jax.bench.cost import Cost, Limits, expected_experts, part_of, step_cost
from dsv4_jax.bench.profile import part_of_scope, scopes
from dsv4_jax.bench.random_model import first_layers, random_model, weight_bytes
from dsv4_jax.bench.report import Report
from dsv4_jax.cache.schema import CacheSchema
from dsv4_jax.cli import cli
from dsv4_jax.config import Config
from dsv4_jax.kernels import Kernels

# One layer of each kind, small enough to compile in seconds.
SMALL = replace(
    Config.MINI,
    num_hidden_layers=3,
    compress_ratios=(0, 4, 128),
    num_nextn_predict_layers=0,
    vocab_size=256,
    n_routed_experts=8,
    num_hash_layers=1,
)


def layout(model):
    return {path: (v.shape, v.dtype) for path, v in nnx.to_flat_state(model.params)}


def test_random_weights_lie_as_those_of_a_checkpoint(tmp_path):
    made = random_model(SMALL, dtype="float32", kernels=Kernels.XLA)
    made.save(tmp_path)
    loaded = dsv4_jax.load(tmp_path, dtype="float32")
    assert layout(loaded) == layout(made)
    for path, variable in nnx.to_flat_state(loaded.params):
        assert np.isfinite(np.asarray(variable[...], np.float32)).all(), path


@pytest.mark.parametrize("experts", ["mxfp4", "nvfp4", "fp8", "bf16"])
def test_weight_bytes_are_those_of_the_arrays(experts):
    model = random_model(SMALL, experts=experts, linears="bf16", kernels=Kernels.XLA)
    tables = SMALL.vocab_size * SMALL.num_experts_per_tok * 4  # int64 on disk, int32 in memory
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert weight_bytes(SMALL, experts, "bf16") == held + tables


def test_formats_are_named():
    with pytest.raises(ValueError, match="experts: got 'int4', expected one of mxfp4, nvfp4"):
        weight_bytes(SMALL, "int4", "fp8")
    with pytest.raises(ValueError, match="linears: got 'mxfp4', expected one of fp8, bf16"):
        weight_bytes(SMALL, "mxfp4", "mxfp4")


def test_first_layers():
    assert first_layers(Config.FLASH, 5).layer_ratios == Config.FLASH.layer_ratios[:5]
    with pytest.raises(ValueError, match="num_layers: got 44, expected 1 to 43"):
        first_layers(Config.FLASH, 44)


def test_parts_of_parameters():
    assert part_of(("layers", 3, "attn", "wq_b", "blocks")) == "attention projections"
    assert part_of(("layers", 3, "attn", "indexer", "wq_b", "blocks")) == "indexer"
    assert part_of(("layers", 3, "attn", "indexer", "compressor", "wkv", "blocks")) == "compressors"
    assert part_of(("layers", 3, "ffn", "gate", "weight")) == "router"
    assert part_of(("layers", 3, "attn_norm", "weight")) == "other"


def test_costs_of_a_decode_step():
    model = random_model(SMALL, linears="bf16", experts="bf16", kernels=Kernels.XLA)
    schema = CacheSchema.of(SMALL, model.numerics, model.dtype, "records")
    costs = step_cost(model, 2, 1, 4096, schema.entries, schema.keys)
    d, f = SMALL.hidden_size, SMALL.moe_intermediate_size
    assert costs["head"] == Cost(2.0 * 256 * d, 2.0 * 2 * 256 * d)
    # Two tokens of 8 experts each choose num_experts_per_tok.
    missed = (1 - SMALL.num_experts_per_tok / 8) ** 2
    assert costs["routed experts"].num_bytes == pytest.approx(3 * 8 * (1 - missed) * 3 * d * f * 2)
    assert costs["routed experts"].flops == 3 * 2 * SMALL.num_experts_per_tok * 6 * d * f
    assert costs["shared expert"] == Cost(3.0 * 3 * d * f * 2, 3.0 * 2 * 6 * d * f)
    # 128 of the window in each layer, the selected ones or 1,024 / top_k, 32 of 128 tokens.
    entries = 3 * 128 + SMALL.index_topk + 32
    queries = 3 * 2 * SMALL.num_attention_heads * 512 * 4
    assert costs["attention"].num_bytes == 2 * entries * 584 + queries
    keys = 2 * 1024 * 68
    weights = costs["indexer"].num_bytes - keys
    assert weights == 2 * SMALL.index_n_heads * (128 * SMALL.q_lora_rank + d)


def test_expected_experts():
    assert expected_experts(Config.FLASH, 1) == pytest.approx(6)
    assert expected_experts(Config.FLASH, 10**5) == pytest.approx(256)


def test_floor_is_the_longer_time():
    limits = Limits(bytes_per_s=1e12, flops_per_s=1e14)
    assert Cost(1e6, 0.0).floor_us(limits) == 1.0
    assert Cost(1e6, 1e9).floor_us(limits) == 10.0


def test_parts_of_scopes():
    assert part_of_scope("jit(f)/while/body/attention/indexer/dot_general") == "indexer"
    assert part_of_scope("jit(f)/add") == "other"

    @jax.jit
    def program(x):
        with jax.named_scope("attention projections"):
            return jnp.sort(x)

    found = scopes(program.lower(jnp.ones(8)).compile().as_text())
    assert "attention projections" in map(part_of_scope, found.values())


def test_memory_plan(monkeypatch):
    planned = plan.Plan(Config.FLASH, "mxfp4", "fp8", 1, 8192)
    monkeypatch.setattr(plan, "free_bytes", lambda: planned.needed_bytes(24))
    assert planned.config(None).num_hidden_layers == 24
    assert planned.config(3).num_hidden_layers == 3
    with pytest.raises(ValueError, match=r"memory: 25 layers .* need .* 24 layers would fit"):
        planned.config(25)
    monkeypatch.setattr(plan, "free_bytes", lambda: 10**9)
    with pytest.raises(ValueError, match="no layers would fit"):
        planned.config(None)


def report(**changes):
    parts = {"routed experts": Cost(4e6, 1e6), "head": Cost(2e6, 0.0)}
    values = dict(
        title="decode",
        num_layers=2,
        num_tokens=4,
        step_us=(12.0, 10.0, 11.0),
        costs=parts,
        limits=Limits(1e12, 1e15),
        part_us={"routed experts": 8.0, "head": 3.0},
        launches=(7.0, 1.0),
        compile_s=(2.0, 1.0),
        weight_bytes=10**9,
        cache_bytes=10**8,
        peak_bytes=2 * 10**9,
    )
    return Report(**(values | changes))


def test_report():
    found = report().to_dict()
    assert found["step_us"] == 11.0
    assert found["layer_us"] == 4.0
    assert found["tokens_per_s"] == pytest.approx(4 / 11e-6)
    assert [row["us/floor"] for row in found["parts"]] == [2.0, 1.5, pytest.approx(11 / 6)]
    assert "7 kernels in 1 CUDA graphs per step" in report().render()
    unknown = report(limits=None, part_us=None, launches=None, peak_bytes=0)
    assert unknown.rows()[-1]["floor_us"] is None and unknown.layers_us == 11.0
    assert "kernels" not in unknown.render()


def test_command(tmp_path):
    file = tmp_path / "bench.json"
    options = ["--preset", "mini", "--layers", "1", "--repeats", "2", "--context", "100"]
    arguments = ["bench", "decode", *options, "--steps", "2", "--json", str(file)]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert found["step_us"] > 0 and len(found["all_step_us"]) == 2
    assert "decode: mini, 1 layers, batch 1, 1 new tokens at 100" in result.output
    result = CliRunner().invoke(cli, ["bench", "prefill", *options, "--chunk", "16"])
    assert result.exit_code == 0 and "prefill: mini" in result.output
