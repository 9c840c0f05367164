"""`dsv4 bench`: random models, costs, memory plans and what is printed."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from flax import nnx

import dsv4_jax
from dsv4_jax import memory
from dsv4_jax.bench import operations, plan, steps, timing
from dsv4_jax.bench.cost import Cost, Limits, expected_experts, part_of, prompt_cost, step_cost
from dsv4_jax.bench.profile import (
    Event,
    Kernel,
    Profile,
    by_kernel,
    of_module,
    part_of_scope,
    scopes,
)
from dsv4_jax.bench.random_model import (
    first_layers,
    layers_of_each_kind,
    random_model,
    weight_sizes,
)
from dsv4_jax.bench.report import Report
from dsv4_jax.bench.steps import Timing
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
def test_weight_sizes_are_those_of_the_arrays(experts):
    model = random_model(SMALL, experts=experts, linears="bf16", kernels=Kernels.XLA)
    tables = SMALL.vocab_size * SMALL.num_experts_per_tok * 4  # int64 on disk, int32 in memory
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert sum(weight_sizes(SMALL, experts, "bf16")) == held + tables


def test_formats_are_named():
    with pytest.raises(ValueError, match="experts: got 'int4', expected one of mxfp4, nvfp4"):
        weight_sizes(SMALL, "int4", "fp8")
    with pytest.raises(ValueError, match="linears: got 'mxfp4', expected one of fp8, bf16"):
        weight_sizes(SMALL, "mxfp4", "mxfp4")


def test_first_layers():
    assert first_layers(Config.FLASH, 5).layer_ratios == Config.FLASH.layer_ratios[:5]
    with pytest.raises(ValueError, match="num_layers: got 44, expected 1 to 43"):
        first_layers(Config.FLASH, 44)


def test_layers_of_each_kind():
    assert Config.FLASH.layer_ratios[:4] == (0, 0, 4, 128)
    assert layers_of_each_kind(Config.FLASH) == 4
    assert layers_of_each_kind(replace(SMALL, num_hash_layers=3)) == 3


def test_parts_of_parameters():
    assert part_of(("layers", 3, "attn", "wq_b", "blocks")) == "attention projections"
    indexer = ("layers", 3, "attn", "indexer")
    assert part_of((*indexer, "compressor", "wkv", "blocks")) == "attention projections"
    assert part_of(("layers", 3, "ffn", "gate", "weight")) == "router"
    assert part_of(("layers", 3, "attn_norm", "weight")) == "other"


def test_costs_of_a_decode_step():
    model = random_model(SMALL, linears="bf16", experts="bf16", kernels=Kernels.XLA)
    costs = step_cost(model, 2, 1, 4096)
    d, f = SMALL.hidden_size, SMALL.moe_intermediate_size
    assert costs["head"] == Cost(2.0 * 256 * d, 2.0 * 2 * 256 * d)
    # Two tokens of 8 experts each choose num_experts_per_tok.
    missed = (1 - SMALL.num_experts_per_tok / 8) ** 2
    read = 8 * (1 - missed) + 1  # and the shared one
    assert costs["experts"].num_bytes == pytest.approx(3 * read * 3 * d * f * 2)
    assert costs["experts"].flops == 3 * 2 * (SMALL.num_experts_per_tok + 1) * 6 * d * f
    # 128 of the window in each layer, the selected ones or 1,024 / top_k, 32 of 128 tokens.
    entries = 3 * 128 + SMALL.index_topk + 32
    queries = 3 * 2 * SMALL.num_attention_heads * 512 * 4
    assert costs["attention"].num_bytes == 2 * entries * 584 + queries
    assert costs["indexer"].num_bytes == 2 * 1024 * 68


def test_cost_of_a_prompt_is_that_of_its_chunks():
    model = random_model(SMALL, kernels=Kernels.XLA)
    parts = [step_cost(model, 2, 64, begin) for begin in (100, 164)]
    for part, cost in prompt_cost(model, 2, 128, 64, 100).items():
        assert cost == parts[0][part] + parts[1][part]


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


# As XLA writes a program for a GPU.
HLO = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

ENTRY %main.4 (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0), metadata={op_name="x"}
  %copy.7 = f32[8]{0} copy(%x.1), metadata={scheduling_name="copy.7"}
  %ffi_call.3 = f32[8]{0} custom-call(%copy.7), custom_call_target="dsv4_gemm", metadata={SCOPE}
  ROOT %add = f32[8]{0} fusion(%ffi_call.3), kind=kLoop, metadata={op_name="jit(f)/head/add"}
}
""".replace("SCOPE", 'op_name="jit(f)/while/body/eval_jaxpr/attention/indexer/ffi_call" frame=5')


def test_kernels_of_events():
    def event(name, us, op, module="jit_f"):
        return Event(name, us, {"hlo_op": op, "hlo_module": module, "correlation_id": 1})

    events = [
        event("fill", 9.0, "broadcast", "jit_broadcast"),
        event("MemcpyD2D", 1.0, "copy.7"),
        event("gemm", 3.0, "ffi_call.3"),
        event("gemm", 4.0, "ffi_call.3"),
        event("add", 2.0, "add"),
    ]
    kept = of_module(events, HLO)
    assert kept == events[1:]
    assert by_kernel(kept, HLO, 2) == (
        Kernel("indexer", "gemm", 1.0, 3.5),
        Kernel("head", "add", 0.5, 1.0),
        Kernel("other", "MemcpyD2D", 0.5, 0.5),
    )


def test_memory_plan(monkeypatch):
    planned = plan.Plan(Config.FLASH, "mxfp4", "fp8", 1, 8192, 1)
    room = [planned.needed_bytes(24)]
    for module in (plan, memory):
        monkeypatch.setattr(module, "free_bytes", lambda devices=None: room[0])
    assert planned.config(None).num_hidden_layers == 24
    assert planned.config(3).num_hidden_layers == 3
    with pytest.raises(ValueError, match=r"memory: 25 layers .* need .* 24 layers would fit"):
        planned.config(25)
    room[0] = 10**9
    with pytest.raises(ValueError, match="no layers would fit"):
        planned.config(None)
    room[0] = None
    assert planned.config(None).num_hidden_layers == 43


KERNELS = Kernel("experts", "moe", 2.0, 8.0), Kernel("head", "gemm", 1.0, 3.0)
PROFILE = Profile(KERNELS, 7.0, 1.0)


def report(**changes):
    parts = {"experts": Cost(4e6, 1e6), "head": Cost(2e6, 0.0)}
    values = dict(
        title="decode",
        num_layers=2,
        whole_layers=6,
        num_tokens=4,
        timing=Timing((12.0, 10.0, 11.0), (2.0, 1.0), 10**8, 2 * 10**9, PROFILE),
        costs=parts,
        limits=Limits(1e12, 1e15),
        weight_bytes=10**9,
    )
    return Report(**(values | changes))


def test_report():
    found = report().to_dict()
    assert found["step_us"] == 11.0
    assert found["layer_us"] == 4.0
    assert found["tokens_per_s"] == pytest.approx(4 / 11e-6)
    assert [row["us/floor"] for row in found["parts"]] == [2.0, 1.5, pytest.approx(11 / 6)]
    assert "7 kernels in 1 CUDA graphs per step" in report().render()
    assert found["kernels"][0] == {
        "part": "experts",
        "name": "moe",
        "launches": 2.0,
        "us": 8.0,
    }
    assert found["whole_step_us"] == 27.0
    assert "6 layers, if all were like these on average, and the head: 27 us" in report().render()
    unknown = report(limits=None, timing=Timing((11.0,), (2.0, 1.0), 0, 0, None))
    assert unknown.rows()[-1]["floor_us"] is None and unknown.layers_us == 11.0
    assert "kernels" not in unknown.render()


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    report().draw(tmp_path / "parts.png")
    rows = [{"operation": "gemm", "us": 3.0, "floor_us": None}]
    operations.Table("title", rows).draw(tmp_path / "operations.png")
    for name in ("parts", "operations"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="parts are timed on an NVIDIA GPU only"):
        report(timing=Timing((11.0,), (2.0, 1.0), 0, 0, None)).draw(tmp_path / "none.png")


@pytest.fixture(scope="module")
def two_layers():
    config = replace(SMALL, num_hidden_layers=2, compress_ratios=(0, 0), num_hash_layers=0)
    return random_model(config, dtype="float32", kernels=Kernels.XLA)


def test_operations_of_a_step(monkeypatch, two_layers):
    """Calls of one kind are timed once, with the step's weights and cache as arguments."""
    timed = []
    monkeypatch.setattr(operations, "time_us", lambda operation: timed.append(operation) or 5.0)
    model = two_layers
    limits = Limits(bytes_per_s=1e12, flops_per_s=1e18)
    found = operations.Table.measured("title", model, 2, 300, limits)
    rows = {row["operation"]: row for row in found.rows}
    assert rows["dense_router ffn.gate"]["calls"] == 2
    assert rows["append_swa attn.kv_norm"]["all us"] == 10.0
    assert "append_swa attn.kv_norm" in found.render() and found.to_dict()["operations"]

    router = next(call for call in timed if call.name == "dense_router ffn.gate")
    assert [leaf.shape for leaf in router.weights.values()] == [(8, 256), (8,)]
    results = 2 * SMALL.num_experts_per_tok * (4 + 4)
    num_bytes = sum(leaf.nbytes for leaf in router.weights.values()) + 2 * 256 * 4 + results
    assert rows[router.name]["floor_us"] == pytest.approx(num_bytes / 1e6)

    append = next(call for call in timed if call.name == "append_swa attn.kv_norm")
    in_place, rest = append.updates()
    assert {append.kept[i].shape[:2] for i in in_place} == {(2, 2)} and len(in_place) == 2
    assert rest == 2 * SMALL.num_attention_heads * 512 * 4
    ours = append(append.weights | append.kept | append.others)
    assert ours.q.shape == (2, 1, SMALL.num_attention_heads, 512)
    with pytest.raises(ValueError, match="got 'nonsense', expected one of this step's: append_swa"):
        operations.Table.measured("title", model, 2, 300, limits, ["dense_router", "nonsense"])


def test_the_time_of_an_operation(monkeypatch):
    """Of one that changes the cache: each call goes on with what the one before has left."""
    small = dict(FLUSH_BYTES=1 << 10, FEW_CALLS=1, MANY_CALLS=3, REPEATS=1, WARM_UP_S=0)
    for name, value in small.items():
        monkeypatch.setattr(timing, name, value)

    def add(pool, rows, weight):
        return pool.at[0].add(rows @ weight), rows.sum()

    pool, rows, weight = jnp.zeros((4, 8, 8)), jnp.ones((8, 8)), jnp.ones((8, 8))
    structure = jax.tree.structure((pool, rows, weight))
    paths = (("layers", 0, "attn", "wkv", "weight"),)
    call = operations.Operation(
        {"xla": add}, {}, structure, {2: weight}, {0: pool}, {1: rows}, paths
    )
    assert call.name == "test_bench attn.wkv"
    assert call.updates() == ({0: 0}, 4)
    assert isinstance(operations.time_us(call), float)


@pytest.mark.parametrize(("visible", "asked"), [(None, []), ("1", ["-i", "1"])])
def test_a_busy_gpu_is_not_measured(monkeypatch, visible, asked):
    utilization, commands = "0\n73\n", []

    def nvidia_smi(command, **options):
        commands.append(command)
        return SimpleNamespace(stdout=utilization)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(steps.subprocess, "run", nvidia_smi)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(steps.BusyError, match="the GPU is busy: utilisation 0, 73 %"):
        steps.check_idle()
    assert commands[0][3:] == asked
    utilization = "0\n"
    steps.check_idle()


@pytest.fixture
def run(monkeypatch, two_layers):
    """Runs `dsv4 bench` with a model that is there already."""
    from dsv4_jax.bench import random_model as module

    monkeypatch.setattr(module, "random_model", lambda config, **options: two_layers)

    def run(command, *options):
        shared = ["--preset", "mini", "--layers", "2", "--context", "100"]
        arguments = ["bench", command, *shared, *map(str, options)]
        return CliRunner().invoke(cli, arguments, catch_exceptions=False)

    return run


def test_decode_command(run, tmp_path):
    file = tmp_path / "bench.json"
    result = run("decode", "--steps", 2, "--repeats", 2, "--json", file)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert found["step_us"] > 0 and len(found["all_step_us"]) == 2
    assert found["whole_layers"] == 6
    assert "mini, 2 layers: decode, batch 1, 1 new token at 100;" in result.output


def test_prefill_command(run):
    options = ["--prompt", 32, "--repeats", 2, "--chunk"]
    assert "32 new tokens at 100 in chunks of 16;" in run("prefill", *options, 16).output
    result = run("prefill", *options, 15)
    assert result.exit_code == 2 and "--prompt 32 is no multiple of --chunk 15" in result.output


def test_kernels_command(run, monkeypatch, tmp_path):
    monkeypatch.setattr(operations, "time_us", lambda operation: 5.0)
    file = tmp_path / "kernels.json"
    result = run("kernels", "--operation", "append_swa", "--json", file)
    assert "append_swa attn.kv_norm" in result.output and "10.0 us" in result.output
    assert [row["calls"] for row in json.loads(file.read_text())["operations"]] == [2]
