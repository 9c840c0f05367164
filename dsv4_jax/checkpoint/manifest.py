"""What a checkpoint says about its own formats: config.json and hf_quant_config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv4_jax.checkpoint import files, names
from dsv4_jax.config import Config
from dsv4_jax.formats import nvfp4

MANIFEST_FILE = "hf_quant_config.json"

_NEVER_NVFP4 = ("*.attn.*", "*.ffn.shared_experts.*", "head")
_MTP_PROJECTIONS = ("mtp.*.e_proj", "mtp.*.h_proj")


def write_configs(
    directory: Path, config: Config, weight_formats: Mapping[names.Path, str]
) -> None:
    """Writes config.json, last, and of NVFP4 checkpoints hf_quant_config.json.

    As in official NVFP4 checkpoints quant_method stays that of the other linears and both files
    list the modules that are NVFP4 and the patterns of those that are not. `read` needs none of
    it: each tensor's dtype decides.

    Args:
        directory: of the checkpoint.
        config: the model's.
        weight_formats: of each matrix that may be packed, by its path without "weight".
    """
    values = config.to_dict()
    if manifest := _manifest(config, weight_formats):
        values["quantization_config"] |= manifest
        content = dict(manifest)
        content["exclude_modules"] = content.pop("ignore")
        content = {"producer": {"name": "dsv4-jax"}, "quantization": content}
        files.write_json(directory / MANIFEST_FILE, content)
    files.write_json(directory / "config.json", values)


def _manifest(config: Config, weight_formats: Mapping[names.Path, str]) -> dict[str, Any]:
    """Empty when no module is NVFP4."""
    quantized = {
        ".".join(map(str, path[:-1])): None
        for path, weight_format in weight_formats.items()
        if weight_format == "nvfp4"
    }
    if not quantized or config.quantization_config is None:
        return {}
    scheme = {"quant_algo": "NVFP4", "group_size": nvfp4.GROUP}
    in_mtp = any(name.startswith("mtp.") for name in quantized)
    return {
        "quant_algo": "MIXED_PRECISION",
        "moe_quant_algo": config.quantization_config.moe_quant_algo,
        "group_size": nvfp4.GROUP,
        "kv_cache_quant_algo": None,
        "quantized_layers": dict.fromkeys(quantized, scheme),
        "ignore": [*_NEVER_NVFP4, *(_MTP_PROJECTIONS if in_mtp else ("mtp.*",))],
    }
