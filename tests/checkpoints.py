"""Random tiny checkpoints in the official format, made without the library."""

import json
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import save_file

from tests.oracles.weights import Tensors

_FIRST_RATIOS = {"flash": [0, 0], "pro": [128, 128]}


def random_config(
    schedule: Literal["flash", "pro"] = "flash", mtp: bool = False, **overrides
) -> dict:
    """A config.json of a few layers: two of the schedule's kind, then CSA, HCA, CSA.

    With `mtp` an MTP block follows. `overrides` replace any key.
    """
    ratios = _FIRST_RATIOS[schedule] + [4, 128, 4]
    config = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "vocab_size": 192,
        "hidden_size": 64,
        "num_hidden_layers": len(ratios),
        "num_nextn_predict_layers": int(mtp),
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 40,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 48,
        "o_groups": 2,
        "o_lora_rank": 24,
        "sliding_window": 24,
        "compress_ratios": ratios + [0] * mtp,
        "index_n_heads": 16,
        "index_head_dim": 32,
        "index_topk": 12,
        "rope_theta": 10000.0,
        "compress_rope_theta": 160000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 64,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "max_position_embeddings": 1024,
        "n_routed_experts": 10,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "num_hash_layers": 3,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": {"flash": 1.5, "pro": 2.5}[schedule],
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
        "torch_dtype": "float32",
    }
    return config | overrides


def random_tensors(config: dict, seed: int) -> dict[str, np.ndarray]:
    """Every tensor of the model under its official name: float32, and int64 hash tables.

    Nothing is degenerate: norms differ from 1, biases, bases, sinks and ape from 0. Products keep
    the scale of their inputs, logits spread over several units.
    """
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int, std: float = 1.0, mean: float = 0.0) -> None:
        tensors[name] = (mean + std * rng.standard_normal(shape)).astype(np.float32)

    def matrix(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        add(name, rows, columns, std=gain / np.sqrt(columns))

    def norm(name: str, width: int) -> None:
        add(f"{name}.weight", width, mean=1.0, std=0.2)

    d, n = config["hidden_size"], config["hc_mult"]
    c, h, rank = config["head_dim"], config["num_attention_heads"], config["q_lora_rank"]
    f, num_experts = config["moe_intermediate_size"], config["n_routed_experts"]

    def hyper_connection(name: str, rows: int, scales: int) -> None:
        matrix(f"{name}_fn", rows, n * d)
        add(f"{name}_base", rows)
        add(f"{name}_scale", scales, mean=1.0, std=0.2)

    def compressor(name: str, ratio: int, width: int) -> None:
        channels = 2 * width if ratio == 4 else width
        matrix(f"{name}.wkv.weight", channels, d)
        matrix(f"{name}.wgate.weight", channels, d)
        add(f"{name}.ape", ratio, channels)
        norm(f"{name}.norm", width)

    def attention(name: str, ratio: int) -> None:
        groups, low = config["o_groups"], config["o_lora_rank"]
        matrix(f"{name}.wq_a.weight", rank, d)
        norm(f"{name}.q_norm", rank)
        matrix(f"{name}.wq_b.weight", h * c, rank)
        matrix(f"{name}.wkv.weight", c, d)
        norm(f"{name}.kv_norm", c)
        add(f"{name}.attn_sink", h)
        matrix(f"{name}.wo_a.weight", groups * low, h * c // groups)
        matrix(f"{name}.wo_b.weight", d, groups * low)
        if ratio:
            compressor(f"{name}.compressor", ratio, c)
        if ratio == 4:
            heads, width = config["index_n_heads"], config["index_head_dim"]
            matrix(f"{name}.indexer.wq_b.weight", heads * width, rank)
            matrix(f"{name}.indexer.weights_proj.weight", heads, d)
            compressor(f"{name}.indexer.compressor", ratio, width)

    def moe(name: str, hash_routing: bool) -> None:
        matrix(f"{name}.gate.weight", num_experts, d)
        if hash_routing:
            ids = rng.permuted(np.tile(np.arange(num_experts), (config["vocab_size"], 1)), axis=1)[
                :, : config["num_experts_per_tok"]
            ]
            tensors[f"{name}.gate.tid2eid"] = np.ascontiguousarray(ids)
        else:
            add(f"{name}.gate.bias", num_experts, std=0.2)
        experts = [f"{name}.experts.{e}" for e in range(num_experts)]
        for expert in [*experts, f"{name}.shared_experts"]:
            matrix(f"{expert}.w1.weight", f, d, gain=2.0)
            matrix(f"{expert}.w2.weight", d, f)
            matrix(f"{expert}.w3.weight", f, d)

    def block(name: str, ratio: int, hash_routing: bool) -> None:
        hyper_connection(f"{name}.hc_attn", (2 + n) * n, 3)
        norm(f"{name}.attn_norm", d)
        attention(f"{name}.attn", ratio)
        hyper_connection(f"{name}.hc_ffn", (2 + n) * n, 3)
        norm(f"{name}.ffn_norm", d)
        moe(f"{name}.ffn", hash_routing)

    add("embed.weight", config["vocab_size"], d)
    matrix("head.weight", config["vocab_size"], d, gain=2.0)
    norm("norm", d)
    hyper_connection("hc_head", n, 1)
    num_layers = config["num_hidden_layers"]
    for layer, ratio in enumerate(config["compress_ratios"][:num_layers]):
        block(f"layers.{layer}", ratio, layer < config["num_hash_layers"])
    for i in range(config["num_nextn_predict_layers"]):
        block(f"mtp.{i}", 0, hash_routing=False)
        for projection in ("e_proj", "h_proj"):
            matrix(f"mtp.{i}.{projection}.weight", d, d)
        for name in ("enorm", "hnorm", "norm"):
            norm(f"mtp.{i}.{name}", d)
        hyper_connection(f"mtp.{i}.hc_head", n, 1)
    return tensors


def write_tensors(path: Path, config: dict, tensors: Tensors) -> None:
    """Writes config.json and one model.safetensors into the directory `path`."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), path / "model.safetensors")


def write_checkpoint(path: Path, config: dict, seed: int) -> dict[str, np.ndarray]:
    """Writes a random checkpoint and returns its tensors."""
    tensors = random_tensors(config, seed)
    write_tensors(path, config, tensors)
    return tensors
