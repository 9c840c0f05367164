"""Names, shapes and stored forms of tensors, against the published checkpoints' totals."""

import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from dsv4_jax.checkpoint.names import (
    FORMATS,
    block_tensors,
    from_huggingface,
    official_name,
    param_path,
    stored,
    tensors,
    to_huggingface,
)
from dsv4_jax.config import Config
from tests.checkpoints import random_config, random_tensors

# What the published indexes add up to.
CENSUS = {
    "flash": {
        "tensors": 69_187,
        "bytes": 159_609_485_896,
        "elements": 158_069_433_298,
        "dtypes": {
            "BF16": 433,
            "F32": 417,
            "F8_E4M3": 375,
            "F8_E8M0": 34_167,
            "I8": 33_792,
            "I64": 3,
        },
        # layer: bytes, tensors
        "layers": {
            0: (3_566_148_952, 1_565),
            1: (3_566_148_952, 1_565),
            2: (3_596_055_640, 1_576),
            3: (3_568_596_312, 1_569),
            4: (3_589_851_224, 1_576),
            41: (3_568_596_312, 1_569),
            42: (3_589_851_224, 1_576),
            43: (3_593_787_756, 1_575),
        },
        "expert": 13_369_344,
        "rest": 9_017_195_080,
    },
    "pro": {
        "tensors": 145_116,
        "bytes": 864_704_792_696,
        "elements": 861_608_274_846,
        "dtypes": {
            "BF16": 619,
            "F32": 590,
            "F8_E4M3": 528,
            "F8_E8M0": 71_952,
            "I8": 71_424,
            "I64": 3,
        },
        "layers": {
            0: (13_874_466_328, 2_337),
            1: (13_874_466_328, 2_337),
            2: (13_909_746_200, 2_344),
            3: (13_868_262_424, 2_337),
            4: (13_903_542_296, 2_344),
            59: (13_868_262_424, 2_337),
            60: (13_903_542_296, 2_344),
            61: (13_956_587_692, 2_343),
        },
        "expert": 35_094_528,
        "rest": 29_174_270_072,
    },
}
PRESETS = {"flash": Config.FLASH, "pro": Config.PRO}
# A header entry of every kind: dtype and shape.
STORED = {
    "flash": {
        "embed.weight": ("BF16", 129280, 4096),
        "hc_head_fn": ("F32", 4, 16384),
        "hc_head_scale": ("F32", 1),
        "layers.0.hc_ffn_fn": ("F32", 24, 16384),
        "layers.0.hc_ffn_scale": ("F32", 3),
        "layers.0.attn.attn_sink": ("F32", 64),
        "layers.0.attn.wq_a.weight": ("F8_E4M3", 1024, 4096),
        "layers.0.attn.wq_a.scale": ("F8_E8M0", 8, 32),
        "layers.0.attn.wq_b.scale": ("F8_E8M0", 256, 8),
        "layers.0.attn.wo_a.weight": ("F8_E4M3", 8192, 4096),
        "layers.0.attn.wo_b.weight": ("F8_E4M3", 4096, 8192),
        "layers.0.ffn.gate.tid2eid": ("I64", 129280, 6),
        "layers.3.ffn.gate.bias": ("F32", 256),
        "layers.3.ffn.experts.255.w1.weight": ("I8", 2048, 2048),
        "layers.3.ffn.experts.255.w1.scale": ("F8_E8M0", 2048, 128),
        "layers.3.ffn.experts.255.w2.weight": ("I8", 4096, 1024),
        "layers.3.ffn.experts.255.w2.scale": ("F8_E8M0", 4096, 64),
        "layers.3.attn.compressor.ape": ("F32", 128, 512),
        "layers.4.attn.compressor.ape": ("F32", 4, 1024),
        "layers.4.attn.compressor.wgate.weight": ("BF16", 1024, 4096),
        "layers.4.attn.indexer.compressor.wkv.weight": ("BF16", 256, 4096),
        "layers.4.attn.indexer.compressor.norm.weight": ("BF16", 128),
        "layers.4.attn.indexer.weights_proj.weight": ("BF16", 64, 4096),
        "mtp.0.e_proj.weight": ("F8_E4M3", 4096, 4096),
        "mtp.0.hc_head_base": ("F32", 4),
    },
    "pro": {
        "layers.0.attn.wo_a.weight": ("F8_E4M3", 16384, 4096),
        "layers.0.attn.wo_b.scale": ("F8_E8M0", 56, 128),
        "layers.2.attn.indexer.wq_b.scale": ("F8_E8M0", 64, 12),
        "layers.2.ffn.shared_experts.w2.scale": ("F8_E8M0", 56, 24),
        "layers.2.ffn.experts.383.w3.weight": ("I8", 3072, 3584),
        "layers.2.ffn.experts.383.w2.scale": ("F8_E8M0", 7168, 96),
    },
}


@pytest.fixture(scope="module", params=["flash", "pro"])
def model(request):
    return request.param


@pytest.fixture(scope="module")
def specs(model):
    return list(tensors(PRESETS[model]))


def shipped_parts(specs):
    """(tensor on disk, how many there are): one of those that differ in the expert only."""
    counts = Counter((spec.kind, spec.shape, spec.path) for spec in specs)
    first = {(spec.kind, spec.shape, spec.path): spec for spec in reversed(specs)}
    return [(part, n) for key, n in counts.items() for part in stored(first[key])]


def test_totals(model, specs):
    census = CENSUS[model]
    parts = shipped_parts(specs)
    assert sum(n for _, n in parts) == census["tensors"]
    assert sum(n * part.num_bytes for part, n in parts) == census["bytes"]
    assert sum(n * part.num_elements for part, n in parts) == census["elements"]
    dtypes = Counter()
    for part, n in parts:
        dtypes[part.dtype] += n
    assert dtypes == census["dtypes"]


def test_layers(model):
    for layer, expected in CENSUS[model]["layers"].items():
        parts = shipped_parts(list(block_tensors(PRESETS[model], layer)))
        assert (sum(n * p.num_bytes for p, n in parts), sum(n for _, n in parts)) == expected, layer


def test_routed_experts(model, specs):
    experts = [spec for spec in specs if ".experts." in spec.name]
    one = [spec for spec in experts if spec.name.startswith("layers.5.ffn.experts.7.")]
    assert sum(part.num_bytes for spec in one for part in stored(spec)) == CENSUS[model]["expert"]
    rest = [spec for spec in specs if ".experts." not in spec.name]
    assert sum(n * part.num_bytes for part, n in shipped_parts(rest)) == CENSUS[model]["rest"]


def test_headers(model, specs):
    by_name = {spec.name: spec for spec in specs}
    for name, (dtype, *shape) in STORED[model].items():
        codes = f"{name.removesuffix('.scale')}.weight" if name.endswith(".scale") else name
        parts = {part.name: part for part in stored(by_name[codes])}
        assert (parts[name].dtype, parts[name].shape) == (dtype, tuple(shape)), name


def test_no_two_tensors_share_a_name_or_a_place(model, specs):
    assert len({spec.name for spec in specs}) == len(specs)
    assert len({(spec.path, spec.expert) for spec in specs}) == len(specs)
    parts = [part for spec in block_tensors(PRESETS[model], 4) for part in stored(spec)]
    assert len({part.name for part in parts}) == len(parts) == CENSUS[model]["layers"][4][1]


def test_order_is_that_of_the_shards(model, specs):
    """embed, layers, norm, head, hc_head, mtp."""
    num_layers = PRESETS[model].num_hidden_layers
    shards = []
    for spec in specs:
        first, second, *_ = [*spec.name.split("."), ""]
        if first == "layers":
            shard = 2 + int(second)
        else:
            shard = {"embed": 1, "mtp": num_layers + 3}.get(first, num_layers + 2)
        shards.append(shard)
    assert shards == sorted(shards)
    assert set(shards) == set(range(1, num_layers + 4))


@pytest.mark.parametrize("schedule", ["flash", "pro"])
@pytest.mark.parametrize("mtp", [False, True])
def test_logical_shapes(schedule, mtp):
    """Those of checkpoints made without the library, for sizes that divide nothing."""
    config = random_config(schedule, mtp)
    expected = {name: x.shape for name, x in random_tensors(config, seed=0).items()}
    assert {s.name: s.shape for s in tensors(Config.from_dict(config))} == expected


def test_kinds():
    specs = {spec.name: spec for spec in tensors(Config.from_dict(random_config(mtp=True)))}
    kinds = Counter(spec.kind for spec in specs.values())
    # 5 linears of attention, 3 of the shared expert, an indexer's in 2 layers, 2 of the MTP block.
    assert kinds["linear"] == 6 * (5 + 3) + 2 + 2
    assert kinds["expert"] == 6 * 10 * 3
    assert kinds["int"] == 3
    for name, kind in {
        "head.weight": "bf16",
        "layers.3.ffn.gate.weight": "bf16",
        "layers.3.ffn.gate.bias": "f32",
        "layers.3.ffn.shared_experts.w1.weight": "linear",
        "layers.2.attn.indexer.weights_proj.weight": "bf16",
        "layers.2.attn.indexer.wq_b.weight": "linear",
        "layers.2.attn.compressor.ape": "f32",
        "mtp.0.hc_head_scale": "f32",
        "mtp.0.ffn.experts.9.w2.weight": "expert",
    }.items():
        assert specs[name].kind == kind, name


class TestStored:
    SPEC = next(s for s in block_tensors(Config.FLASH, 0) if s.kind == "expert")

    def parts(self, weight_format):
        return [(p.name, p.dtype, p.shape, p.path) for p in stored(self.SPEC, weight_format)]

    def test_every_format(self):
        name, path = "layers.0.ffn.experts.0.w1", ("layers", 0, "ffn", "experts", "w1")
        assert self.parts("float") == [
            (f"{name}.weight", "BF16", (2048, 4096), (*path, "weight")),
        ]
        assert self.parts("fp8_block") == [
            (f"{name}.weight", "F8_E4M3", (2048, 4096), (*path, "weight")),
            (f"{name}.scale", "F8_E8M0", (16, 32), (*path, "scale")),
        ]
        assert self.parts("mxfp4") == self.parts(None)
        assert self.parts("mxfp4") == [
            (f"{name}.weight", "I8", (2048, 2048), (*path, "weight")),
            (f"{name}.scale", "F8_E8M0", (2048, 128), (*path, "scale")),
        ]
        assert self.parts("nvfp4") == [
            (f"{name}.weight", "U8", (2048, 2048), (*path, "weight")),
            (f"{name}.weight_scale", "F8_E4M3", (2048, 256), (*path, "scale")),
            (f"{name}.weight_scale_2", "F32", (), (*path, "scale_2")),
            (f"{name}.input_scale", "F32", (), (*path, "input_scale")),
        ]

    def test_groups_that_do_not_fill_up(self):
        spec = self.SPEC._replace(shape=(130, 33))
        shapes = {
            weight_format: [part.shape for part in stored(spec, weight_format)]
            for weight_format in FORMATS["expert"]
        }
        assert shapes["fp8_block"] == [(130, 33), (2, 1)]
        assert shapes["mxfp4"] == [(130, 17), (130, 2)]
        assert shapes["nvfp4"] == [(130, 17), (130, 3), (), ()]

    def test_only_experts_are_fp4(self):
        for spec in block_tensors(Config.MINI, 4):
            if spec.kind != "expert":
                for weight_format in ("mxfp4", "nvfp4"):
                    with pytest.raises(ValueError, match=f"weight_format: got '{weight_format}'"):
                        stored(spec, weight_format)


def test_paths():
    for name, path, expert in (
        ("embed.weight", ("embed", "weight"), None),
        ("hc_head_fn", ("hc_head", "fn"), None),
        ("layers.3.hc_attn_base", ("layers", 3, "hc_attn", "base"), None),
        ("mtp.0.hc_head_scale", ("mtp", 0, "hc_head", "scale"), None),
        ("mtp.0.e_proj.scale", ("mtp", 0, "e_proj", "scale"), None),
        ("layers.12.attn.attn_sink", ("layers", 12, "attn", "sink"), None),
        (
            "layers.3.attn.indexer.compressor.wkv.weight",
            ("layers", 3, "attn", "indexer", "compressor", "wkv", "weight"),
            None,
        ),
        ("layers.0.ffn.gate.tid2eid", ("layers", 0, "ffn", "gate", "tid2eid"), None),
        ("layers.3.ffn.experts.17.w2.scale", ("layers", 3, "ffn", "experts", "w2", "scale"), 17),
        (
            "layers.3.ffn.experts.0.w1.input_scale",
            ("layers", 3, "ffn", "experts", "w1", "input_scale"),
            0,
        ),
    ):
        assert param_path(name) == (path, expert)
        assert official_name(path, expert) == name


def test_paths_of_nvfp4():
    module = ("layers", 3, "ffn", "experts", "w1")
    for leaf in ("weight", "scale", "scale_2", "input_scale"):
        name = official_name((*module, leaf), 5, "nvfp4")
        assert name.startswith("layers.3.ffn.experts.5.w1.")
        assert param_path(name) == ((*module, leaf), 5)
    assert official_name((*module, "scale_2"), 5, "nvfp4").endswith("w1.weight_scale_2")


def test_every_path_leads_back(model):
    config = PRESETS[model]
    outside = [s for s in tensors(replace(config, n_routed_experts=6)) if s.path[0] != "layers"]
    for layer in (0, 2, 3):
        for spec in (*outside, *block_tensors(replace(config, n_routed_experts=6), layer)):
            for part in stored(spec):
                assert param_path(part.name) == (part.path, spec.expert)
                assert official_name(part.path, spec.expert) == part.name


HUGGING_FACE = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
    "layers.4.attn_norm.weight": "model.layers.4.input_layernorm.weight",
    "layers.4.ffn_norm.weight": "model.layers.4.post_attention_layernorm.weight",
    "layers.4.hc_attn_fn": "model.layers.4.attn_hc.fn",
    "layers.4.hc_attn_scale": "model.layers.4.attn_hc.scale",
    "layers.4.hc_ffn_base": "model.layers.4.ffn_hc.base",
    "layers.4.attn.attn_sink": "model.layers.4.self_attn.sinks",
    "layers.4.attn.wq_a.weight": "model.layers.4.self_attn.q_a_proj.weight",
    "layers.4.attn.wq_a.scale": "model.layers.4.self_attn.q_a_proj.weight_scale_inv",
    "layers.4.attn.q_norm.weight": "model.layers.4.self_attn.q_a_norm.weight",
    "layers.4.attn.wq_b.weight": "model.layers.4.self_attn.q_b_proj.weight",
    "layers.4.attn.wkv.weight": "model.layers.4.self_attn.kv_proj.weight",
    "layers.4.attn.kv_norm.weight": "model.layers.4.self_attn.kv_norm.weight",
    "layers.4.attn.wo_a.weight": "model.layers.4.self_attn.o_a_proj.weight",
    "layers.4.attn.wo_b.scale": "model.layers.4.self_attn.o_b_proj.weight_scale_inv",
    "layers.4.attn.compressor.wkv.weight": "model.layers.4.self_attn.compressor.kv_proj.weight",
    "layers.4.attn.compressor.wgate.weight": "model.layers.4.self_attn.compressor.gate_proj.weight",
    "layers.4.attn.compressor.ape": "model.layers.4.self_attn.compressor.position_bias",
    "layers.4.attn.compressor.norm.weight": "model.layers.4.self_attn.compressor.kv_norm.weight",
    "layers.4.attn.indexer.compressor.wkv.weight": (
        "model.layers.4.self_attn.compressor.indexer.kv_proj.weight"
    ),
    "layers.4.attn.indexer.compressor.wgate.weight": (
        "model.layers.4.self_attn.compressor.indexer.gate_proj.weight"
    ),
    "layers.4.attn.indexer.compressor.ape": (
        "model.layers.4.self_attn.compressor.indexer.position_bias"
    ),
    "layers.4.attn.indexer.compressor.norm.weight": (
        "model.layers.4.self_attn.compressor.indexer.kv_norm.weight"
    ),
    "layers.4.attn.indexer.wq_b.weight": (
        "model.layers.4.self_attn.compressor.indexer.q_b_proj.weight"
    ),
    "layers.4.attn.indexer.wq_b.scale": (
        "model.layers.4.self_attn.compressor.indexer.q_b_proj.weight_scale_inv"
    ),
    "layers.4.attn.indexer.weights_proj.weight": (
        "model.layers.4.self_attn.compressor.indexer.scorer.weights_proj.weight"
    ),
    "layers.4.ffn.gate.weight": "model.layers.4.mlp.gate.weight",
    "layers.4.ffn.gate.bias": "model.layers.4.mlp.gate.e_score_correction_bias",
    "layers.0.ffn.gate.tid2eid": "model.layers.0.mlp.gate.tid2eid",
    "layers.4.ffn.shared_experts.w1.weight": "model.layers.4.mlp.shared_experts.gate_proj.weight",
    "layers.4.ffn.shared_experts.w2.weight": "model.layers.4.mlp.shared_experts.down_proj.weight",
    "layers.4.ffn.shared_experts.w3.scale": (
        "model.layers.4.mlp.shared_experts.up_proj.weight_scale_inv"
    ),
}


@pytest.mark.parametrize(("official", "huggingface"), HUGGING_FACE.items())
def test_huggingface(official, huggingface):
    assert to_huggingface(official) == huggingface
    assert from_huggingface(huggingface) == (official,)
    assert from_huggingface(huggingface.removeprefix("model.")) == (official,)
    assert from_huggingface(official) == (official,)
    assert from_huggingface(f"model.{official}") == (official,)


def test_huggingface_names_of_a_whole_model():
    """Every tensor has one; two have the same only where they are fused."""
    config = replace(Config.MINI, num_nextn_predict_layers=0)
    parts = [(s.kind, part.name) for s in tensors(config) for part in stored(s)]
    plain = [name for kind, name in parts if kind != "expert"]
    renamed = [to_huggingface(name) for name in plain]
    assert [from_huggingface(name) for name in renamed] == [(name,) for name in plain]
    fused = {to_huggingface(name) for kind, name in parts if kind == "expert"}
    assert len(fused) == 4 * config.num_hidden_layers
    assert len({*renamed, *fused}) == len(plain) + len(fused)


@pytest.mark.parametrize(("suffix", "leaf"), [("", "weight"), ("_scale_inv", "scale")])
@pytest.mark.parametrize("prefix", ["model.layers.3.mlp.", "layers.3.mlp.", "layers.3.ffn."])
def test_fused_experts(suffix, leaf, prefix):
    experts = "layers.3.ffn.experts"
    up = from_huggingface(f"{prefix}experts.gate_up_proj{suffix}")
    assert up == (f"{experts}.*.w1.{leaf}", f"{experts}.*.w3.{leaf}")
    down = from_huggingface(f"{prefix}experts.down_proj{suffix}")
    assert down == (f"{experts}.*.w2.{leaf}",)
    assert param_path(down[0]) == (("layers", 3, "ffn", "experts", "w2", leaf), None)
    for name in (*up, *down):
        one = name.replace("*", "11")
        fused = f"model.layers.3.mlp.experts.{'down' if 'w2' in name else 'gate_up'}_proj{suffix}"
        assert to_huggingface(one) == fused


def test_aliases():
    """Names that DeepSeek's own conversion takes."""
    for name, official in {
        "model.layers.3.self_attn.wq_a.weight_scale_inv": "layers.3.attn.wq_a.scale",
        "layers.3.self_attn.attn_sink": "layers.3.attn.attn_sink",
        "layers.3.mlp.gate.e_score_correction_bias": "layers.3.ffn.gate.bias",
        "layers.3.mlp.experts.7.w2.weight_scale_inv": "layers.3.ffn.experts.7.w2.scale",
        "model.layers.3.mlp.experts.7.up_proj.weight": "layers.3.ffn.experts.7.w3.weight",
        "mtp.0.self_attn.wkv.weight": "mtp.0.attn.wkv.weight",
        "mtp.0.mlp.gate.e_score_correction_bias": "mtp.0.ffn.gate.bias",
        "layers.3.ffn.experts.7.w2.weight_scale_2": "layers.3.ffn.experts.7.w2.weight_scale_2",
    }.items():
        assert from_huggingface(name) == (official,)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "a..b",
        "model",
        "layers",
        "layers.",
        "layers.3",
        "layers.x.attn.wq_a.weight",
        "experts",
        "layers.3.ffn.experts",
        "layers.3.ffn.experts.",
        "layers.3.ffn.experts.shape",
    ],
)
def test_unknown_names_stay_unknown(name):
    known = {spec.name for spec in tensors(Config.MINI)}
    assert from_huggingface(name) == (name,)
    assert name not in known


@pytest.mark.parametrize(
    "name",
    [
        "mtp.0.e_proj.weight",
        "layers.3.ffn.experts.7.w1.weight_scale",
        "layers.3.ffn.experts.7.w4.weight",
    ],
)
def test_no_huggingface_name(name):
    with pytest.raises(ValueError, match=re.escape(f"name: got '{name}', expected")):
        to_huggingface(name)


def test_bytes_are_those_of_numpy():
    for spec in block_tensors(Config.MINI, 4):
        for part in stored(spec):
            itemsize = {"BF16": 2, "F32": 4, "I64": 8}.get(part.dtype, 1)
            assert part.num_bytes == np.prod(part.shape, dtype=int) * itemsize
            assert part.num_elements == math.prod(part.shape)
