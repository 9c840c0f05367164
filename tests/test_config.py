"""Config: both forms of config.json, the presets, and everything it refuses."""

import json
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest

from dsv4_jax.config import Config, QuantizationConfig, RopeScaling
from tests.checkpoints import random_config

GOLDEN = Path(__file__).parent / "golden" / "tiny-flash"

# The released config.json, key by key.
OFFICIAL_FLASH = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "vocab_size": 129280,
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "sliding_window": 128,
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0],
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "max_position_embeddings": 1048576,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 2048,
    "num_hash_layers": 3,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hidden_act": "silu",
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
    "expert_dtype": "fp4",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}
OFFICIAL_PRO = OFFICIAL_FLASH | {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "compress_ratios": [128, 128] + [4, 128] * 29 + [4, 0],
    "index_topk": 1024,
    "n_routed_experts": 384,
    "moe_intermediate_size": 3072,
    "routed_scaling_factor": 2.5,
}
IGNORED = {"use_cache": True, "transformers_version": "4.57.1", "pad_token_id": None}
LAYER_TYPES = {
    0: "sliding_attention",
    4: "compressed_sparse_attention",
    128: "heavily_compressed_attention",
}


def huggingface_form(official: dict) -> dict:
    """The same model as transformers 5 saves it."""
    num_layers, num_hash = official["num_hidden_layers"], official["num_hash_layers"]
    partial = official["qk_rope_head_dim"] / official["head_dim"]
    yarn = {k: v for k, v in official["rope_scaling"].items() if k != "type"}
    replaced = {
        "compress_ratios",
        "num_hash_layers",
        "rope_scaling",
        "expert_dtype",
        "torch_dtype",
        "topk_method",
    }
    return {key: value for key, value in official.items() if key not in replaced} | {
        "layer_types": [LAYER_TYPES[ratio] for ratio in official["compress_ratios"][:num_layers]],
        "mlp_layer_types": ["hash_moe"] * num_hash + ["moe"] * (num_layers - num_hash),
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
        "rope_parameters": {
            "main": {
                "rope_type": "default",
                "rope_theta": official["rope_theta"],
                "partial_rotary_factor": partial,
            },
            "compress": {
                "rope_type": "yarn",
                "rope_theta": official["compress_rope_theta"],
                "partial_rotary_factor": partial,
                "attention_factor": 1.0,
                **yarn,
            },
        },
        "partial_rotary_factor": partial,
        "dtype": official["torch_dtype"],
        "quantization_config": official["quantization_config"]
        | {"expert_dtype": official["expert_dtype"]},
        "mlp_bias": False,
        "router_jitter_noise": 0.0,
    }


@pytest.mark.parametrize(
    ("preset", "official"),
    [(Config.FLASH, OFFICIAL_FLASH), (Config.PRO, OFFICIAL_PRO)],
    ids=["flash", "pro"],
)
class TestReleasedModels:
    def test_preset_is_the_official_config(self, preset, official):
        assert Config.from_dict(official | IGNORED) == preset

    def test_written_as_it_was_read(self, preset, official):
        assert preset.to_dict() == official

    def test_huggingface_form(self, preset, official):
        assert Config.from_dict(huggingface_form(official)) == preset

    def test_layers(self, preset, official):
        assert preset.layer_ratios == tuple(official["compress_ratios"][:-1])
        last = official["num_hidden_layers"] - 1
        assert [preset.ratio(layer) for layer in (2, 3, last, last + 1)] == [4, 128, 4, 0]
        assert [preset.is_hash_layer(i) for i in (0, 2, 3, last + 1)] == [True, True, False, False]


@pytest.mark.parametrize("config", [Config.FLASH, Config.PRO, Config.MINI])
def test_presets_survive_the_official_form(config):
    written = json.loads(json.dumps(config.to_dict()))
    assert Config.from_dict(written) == config
    assert hash(Config.from_dict(written)) == hash(config)


def test_every_field_survives_the_official_form():
    """A value other than the default in every field that has a choice."""
    changed = replace(
        Config.MINI,
        num_nextn_predict_layers=2,
        rope_theta=5000,
        compress_rope_theta=70000,
        rope_scaling=RopeScaling(8, 1024, 16, 2),
        swiglu_limit=7,
        hc_mult=2,
        hc_sinkhorn_iters=3,
        hc_eps=1e-5,
        rms_norm_eps=1e-7,
        initializer_range=0.1,
        bos_token_id=5,
        eos_token_id=6,
        attention_dropout=0.5,
        torch_dtype="float32",
        expert_dtype="fp8",
        quantization_config=QuantizationConfig(moe_quant_algo="NVFP4"),
    )
    assert Config.from_dict(changed.to_dict()) == changed
    plain = replace(changed, rope_scaling=None, expert_dtype=None, quantization_config=None)
    assert Config.from_dict(plain.to_dict()) == plain


def test_mini_has_every_kind_of_layer():
    assert set(Config.MINI.layer_ratios) == {0, 4, 128}
    assert 0 < Config.MINI.num_hash_layers < Config.MINI.num_hidden_layers
    kernel_widths = ("head_dim", "qk_rope_head_dim", "index_head_dim", "sliding_window", "hc_mult")
    assert [getattr(Config.MINI, name) for name in kernel_widths] == [512, 64, 128, 128, 4]


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        Config.FLASH.hidden_size = 1


class TestFiles:
    def test_directory_and_file(self):
        config = Config.from_json(GOLDEN)
        assert config == Config.from_json(str(GOLDEN / "config.json"))
        assert (config.head_dim, config.sliding_window, config.n_routed_experts) == (48, 32, 12)
        assert config.compress_ratios == (0, 0, 4, 128, 4, 128, 4)
        assert config.rope_scaling == RopeScaling(16, 64, 32, 1)
        assert config.quantization_config is None

    def test_nothing_there(self, tmp_path):
        for path in (tmp_path, tmp_path / "absent.json"):
            with pytest.raises(FileNotFoundError, match=str(tmp_path)):
                Config.from_json(path)

    @pytest.mark.parametrize("text", [b"", b"{", b"\xff{}", b"[" * 100_000, b"[1]", b"null"])
    def test_not_an_object(self, tmp_path, text):
        (tmp_path / "config.json").write_bytes(text)
        with pytest.raises(ValueError, match=r"config\.json: (not JSON|got \w+, expected)"):
            Config.from_json(tmp_path)

    def test_errors_name_file_and_field(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(random_config(hidden_size=-1)))
        with pytest.raises(ValueError, match=r"config\.json: hidden_size: got -1, expected"):
            Config.from_json(tmp_path)


REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "qk_rope_head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "sliding_window",
    "compress_ratios",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "routed_scaling_factor",
)


@pytest.mark.parametrize("field", REQUIRED)
def test_missing(field):
    config = random_config()
    del config[field]
    with pytest.raises(ValueError, match=rf"^{field}: missing"):
        Config.from_dict(config)


def test_all_that_is_missing_is_named():
    with pytest.raises(ValueError) as error:
        Config.from_dict({})
    assert all(field in str(error.value) for field in REQUIRED)


def test_only_sizes_are_required():
    """All else has the family's value; no rope_scaling and no MTP key mean none."""
    sizes = {key: OFFICIAL_FLASH[key] for key in REQUIRED}
    expected = replace(
        Config.FLASH,
        num_nextn_predict_layers=0,
        rope_scaling=None,
        expert_dtype=None,
        quantization_config=None,
    )
    assert Config.from_dict(sizes) == expected


INTEGERS = [f.name for f in fields(Config) if f.type is int]
MAY_BE_ZERO = ["num_nextn_predict_layers", "num_hash_layers", "bos_token_id", "eos_token_id"]
NUMBERS = [f.name for f in fields(Config) if f.type is float and f.name != "attention_dropout"]


def refused(field: str, value: object, **others: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: got .*, expected .+"):
        Config.from_dict(random_config() | others | {field: value})


@pytest.mark.parametrize("field", INTEGERS)
def test_integers(field):
    assert len(INTEGERS) == 25
    for value in (True, "4", 4.0, None, [4], {}, -1, float("nan"), -(10**30)):
        refused(field, value)
    if field not in MAY_BE_ZERO:
        refused(field, 0)


@pytest.mark.parametrize("field", NUMBERS)
def test_positive_numbers(field):
    assert len(NUMBERS) == 7
    for value in (True, "1.5", None, [1.5], 0, -0.0, -1e-6, float("nan"), float("inf"), 10**400):
        refused(field, value)


@pytest.mark.parametrize(
    ("field", "value", "others"),
    [
        ("o_groups", 3, {}),
        ("o_groups", 8, {}),
        ("qk_rope_head_dim", 7, {}),
        ("qk_rope_head_dim", 40, {"index_head_dim": 64}),
        ("qk_rope_head_dim", 36, {}),
        ("index_head_dim", 48, {}),
        ("index_head_dim", 33, {}),
        ("num_experts_per_tok", 11, {}),
        ("num_hash_layers", 6, {}),
        ("num_nextn_predict_layers", 6, {}),
        ("num_nextn_predict_layers", 10**12, {}),
        ("bos_token_id", 192, {}),
        ("eos_token_id", 10**30, {}),
        ("rope_theta", 1.0, {}),
        ("compress_rope_theta", 0.5, {}),
        ("attention_dropout", 1.0, {}),
        ("attention_dropout", -0.1, {}),
        ("attention_dropout", "0", {}),
        ("attention_dropout", False, {}),
        ("num_key_value_heads", 4, {}),
        ("n_shared_experts", 2, {}),
        ("model_type", "deepseek_v41", {}),
        ("model_type", None, {}),
        ("scoring_func", "softmax", {}),
        ("scoring_func", 1, {}),
        ("topk_method", "greedy", {}),
        ("norm_topk_prob", False, {}),
        ("norm_topk_prob", 1, {}),
        ("hidden_act", "gelu", {}),
        ("attention_bias", True, {}),
        ("attention_bias", 0, {}),
        ("tie_word_embeddings", True, {}),
        ("tie_word_embeddings", 0, {}),
        ("torch_dtype", "float16", {}),
        ("torch_dtype", None, {}),
        ("expert_dtype", "int3", {}),
        ("expert_dtype", 4, {}),
    ],
)
def test_inconsistent(field, value, others):
    refused(field, value, **others)


@pytest.mark.parametrize(
    "ratios",
    [
        None,
        "00414",
        {},
        [],
        [0, 0, 4, 128],
        [0, 0, 4, 128, 8],
        [0, 0, 4, 128, -4],
        [0, 0, 4, 128, 4.0],
        [0, 0, 4, 128, True],
        [0, 0, 4, 128, "4"],
        [0, 0, 4, 128, None],
        [0, 0, 4, 128, [4]],
        [0, 0, 4, 128, 4, 4],
        [0, 0, 4, 128, 4, 0, 128],
    ],
)
def test_compress_ratios(ratios):
    refused("compress_ratios", ratios)


def test_ratios_of_mtp_blocks():
    """They may be left out, and there may be more of them than blocks."""
    layers = random_config()["compress_ratios"]
    for extra in ([], [0], [0, 0], [0, 0, 0]):
        config = Config.from_dict(
            random_config() | {"num_nextn_predict_layers": 1, "compress_ratios": layers + extra}
        )
        assert config.compress_ratios == (*layers, 0)
        assert config.layer_ratios == tuple(layers)
        assert config.ratio(len(layers)) == 0


def test_dspark_build():
    """Its draft stages are no MTP blocks."""
    official = OFFICIAL_FLASH | {
        "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0, 0, 0],
        "dspark_block_size": 5,
        "dspark_noise_token_id": 128799,
        "dspark_target_layer_ids": [40, 41, 42],
        "dspark_markov_rank": 256,
    }
    assert Config.from_dict(official) == replace(Config.FLASH, num_nextn_predict_layers=0)


YARN = random_config()["rope_scaling"]


@pytest.mark.parametrize(
    ("field", "scaling"),
    [
        ("rope_scaling", "yarn"),
        ("rope_scaling", [16]),
        ("rope_scaling.type", YARN | {"type": "linear"}),
        ("rope_scaling.type", {"factor": 16, "original_max_position_embeddings": 64}),
        ("rope_scaling.attention_factor", YARN | {"attention_factor": 1.277}),
        ("rope_scaling.factor", YARN | {"factor": "16"}),
        ("rope_scaling.factor", YARN | {"factor": 0.5}),
        ("rope_scaling.factor", YARN | {"factor": float("nan")}),
        (
            "rope_scaling.original_max_position_embeddings",
            YARN | {"original_max_position_embeddings": 64.0},
        ),
        (
            "rope_scaling.original_max_position_embeddings",
            YARN | {"original_max_position_embeddings": 0},
        ),
        ("rope_scaling.beta_fast", YARN | {"beta_fast": 1}),
        ("rope_scaling.beta_slow", YARN | {"beta_slow": -1}),
        ("rope_scaling.beta_slow", YARN | {"beta_slow": True}),
    ],
)
def test_rope_scaling(field, scaling):
    with pytest.raises(ValueError, match=rf"^{field}: got .*, expected .+"):
        Config.from_dict(random_config(rope_scaling=scaling))


def test_rope_scaling_without_factor():
    scaling = {"type": "yarn", "original_max_position_embeddings": 64}
    with pytest.raises(ValueError, match=r"^rope_scaling\.factor: missing"):
        Config.from_dict(random_config(rope_scaling=scaling))


@pytest.mark.parametrize(
    ("field", "quantization"),
    [
        ("quantization_config", "fp8"),
        ("quantization_config", True),
        ("quantization_config.quant_method", {"quant_method": "awq"}),
        ("quantization_config.fmt", {"fmt": "e5m2"}),
        ("quantization_config.scale_fmt", {"scale_fmt": 8}),
        ("quantization_config.activation_scheme", {"activation_scheme": "static"}),
        ("quantization_config.weight_block_size", {"weight_block_size": [32, 32]}),
        ("quantization_config.weight_block_size", {"weight_block_size": 128}),
        ("quantization_config.moe_quant_algo", {"moe_quant_algo": "INT4"}),
    ],
)
def test_quantization_config(field, quantization):
    with pytest.raises(ValueError, match=rf"^{field}: got .*, expected .+"):
        Config.from_dict(random_config(quantization_config=quantization))


def test_quantization_of_nvfp4_checkpoints():
    quantization = OFFICIAL_FLASH["quantization_config"] | {
        "moe_quant_algo": "NVFP4",
        "group_size": 16,
        "ignore": ["head"],
    }
    config = Config.from_dict(OFFICIAL_FLASH | {"quantization_config": quantization})
    assert config.quantization_config == QuantizationConfig(
        scale_fmt="ue8m0", moe_quant_algo="NVFP4"
    )


TYPES = [LAYER_TYPES[ratio] for ratio in random_config()["compress_ratios"]]
MLP_TYPES = ["hash_moe", "hash_moe", "hash_moe", "moe", "moe"]
TABLES = {
    "main": {"rope_type": "default", "rope_theta": 20000.0},
    "compress": {"rope_theta": 30000.0, "rope_type": "yarn", **YARN},
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_types", "sliding_attention"),
        ("layer_types", TYPES[:-1]),
        ("layer_types", [*TYPES, TYPES[-1]]),
        ("layer_types", [*TYPES[:-1], "full_attention"]),
        ("layer_types", [*TYPES[:-1], 4]),
        ("layer_types", [*TYPES[:-1], "sliding_attention"]),
        ("mlp_layer_types", MLP_TYPES[:-1]),
        ("mlp_layer_types", ["moe", *MLP_TYPES[:-1]]),
        ("mlp_layer_types", [*MLP_TYPES[:-1], "dense"]),
        ("mlp_layer_types", ["moe"] * 5),
        ("compress_rates", {"compressed_sparse_attention": 8, "heavily_compressed_attention": 128}),
        ("compress_rates", 4),
        ("partial_rotary_factor", "0.125"),
        ("partial_rotary_factor", 0.5),
        ("partial_rotary_factor", float("nan")),
        ("rope_parameters", []),
        ("rope_parameters.compress", {"main": TABLES["main"]}),
        ("rope_parameters.main", {"main": None, "compress": TABLES["compress"]}),
        ("rope_parameters.main.rope_type", TABLES | {"main": TABLES["compress"]}),
        (
            "rope_parameters.compress.type",
            TABLES | {"compress": TABLES["compress"] | {"rope_type": "llama3"}},
        ),
        (
            "rope_parameters.compress.attention_factor",
            TABLES | {"compress": TABLES["compress"] | {"attention_factor": 1.2}},
        ),
        ("rope_theta", TABLES | {"main": {"rope_theta": "10000"}}),
    ],
)
def test_inconsistent_huggingface_form(field, value):
    key = "rope_parameters" if field.startswith("rope_") else field
    with pytest.raises(ValueError, match=rf"^{field}: got .*, expected .+"):
        Config.from_dict(random_config() | {key: value})


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_nested_rope_tables(key):
    config = random_config()
    del config["rope_scaling"], config["rope_theta"], config["compress_rope_theta"]
    config = Config.from_dict(config | {key: TABLES})
    assert (config.rope_theta, config.compress_rope_theta) == (20000.0, 30000.0)
    assert config.rope_scaling == RopeScaling(16, 64, 32, 1)


def test_rope_tables_without_scaling():
    tables = TABLES | {"compress": {"rope_type": "default", "rope_theta": 30000.0}}
    config = Config.from_dict(random_config() | {"rope_parameters": tables})
    assert config.rope_scaling is None


def test_partial_rotary_factor_gives_the_rotary_width():
    config = random_config()
    del config["qk_rope_head_dim"]
    assert Config.from_dict(config | {"partial_rotary_factor": 0.2}).qk_rope_head_dim == 8


def test_constructor_checks_too():
    with pytest.raises(ValueError, match="hidden_size: got '256', expected an integer"):
        replace(Config.MINI, hidden_size="256")
    with pytest.raises(ValueError, match=r"rope_scaling: got .*, expected RopeScaling or None"):
        replace(Config.MINI, rope_scaling={})
