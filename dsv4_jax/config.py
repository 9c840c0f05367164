"""Every size and constant of a DeepSeek-V4 model, checked."""

import json
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn, no_type_check

_RATIO_OF_LAYER_TYPE = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
}
_COMPRESS_RATES = {kind: ratio for kind, ratio in _RATIO_OF_LAYER_TYPE.items() if ratio}
_MAY_BE_ZERO = (
    "num_nextn_predict_layers",
    "num_hash_layers",
    "bos_token_id",
    "eos_token_id",
    "attention_dropout",
)
# Fields of which the family has one value; another would be another model.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("deepseek_v4",),
    "num_key_value_heads": (1,),
    "n_shared_experts": (1,),
    "scoring_func": ("sqrtsoftplus",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "tie_word_embeddings": (False,),
    "torch_dtype": ("bfloat16", "float32"),
    "expert_dtype": (None, "fp4", "fp8", "nvfp4", "bf16"),
}


def _refuse(field: str, got: Any, expected: str) -> NoReturn:
    raise ValueError(f"{field}: got {got!r}, expected {expected}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_int(owner: Any, field: str, at_least: int) -> None:
    value = getattr(owner, field)
    if not _is_int(value) or value < at_least:
        _refuse(field, value, f"an integer, at least {at_least}")


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max


def _check_positive_number(owner: Any, field: str) -> None:
    """Leaves a float behind, so that 10000 and 10000.0 are one value."""
    value = getattr(owner, field)
    if not _is_number(value) or value <= 0:
        _refuse(field, value, "a finite number above 0")
    object.__setattr__(owner, field, float(value))


def _check_supported(owner: Any, field: str, supported: tuple[Any, ...]) -> None:
    value = getattr(owner, field)
    # 1 == True == 1.0, and a number in place of a flag is a mistake.
    if not any(type(value) is type(v) and value == v for v in supported):
        _refuse(field, value, " or ".join(map(repr, supported)))


# These classes refuse a wrong type with a ValueError that names the field; `no_type_check` keeps
# run-time type checkers from raising their own error first.
@no_type_check
@dataclass(frozen=True)
class RopeScaling:
    """YaRN interpolation of the rotary frequencies of layers with compressed entries.

    Attributes:
        factor: the slow pairs turn this many times slower.
        original_max_position_embeddings: context in tokens before the extension.
        beta_fast, beta_slow: turns over the original context; a pair that turns more than
            `beta_fast` times is not interpolated, one that turns less than `beta_slow` is fully.

    Raises:
        ValueError: a wrong type, a value that is not positive, factor < 1, beta_fast <= beta_slow.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        _check_int(self, "original_max_position_embeddings", 1)
        for field in ("factor", "beta_fast", "beta_slow"):
            _check_positive_number(self, field)
        if self.factor < 1:
            _refuse("factor", self.factor, "at least 1")
        if self.beta_fast <= self.beta_slow:
            _refuse("beta_fast", self.beta_fast, f"more than beta_slow ({self.beta_slow})")


@no_type_check
@dataclass(frozen=True)
class QuantizationConfig:
    """What config.json says about packed weights. The loader decides by each tensor's dtype.

    Attributes:
        weight_block_size: weights that share a scale in FP8 linears, (out, in).
        scale_fmt: "ue8m0", powers of two, or None where the file does not say.
        moe_quant_algo: "NVFP4" when the routed experts of the backbone are NVFP4, else None.
    """

    quant_method: str = "fp8"
    fmt: str = "e4m3"
    scale_fmt: str | None = None
    activation_scheme: str = "dynamic"
    weight_block_size: tuple[int, int] = (128, 128)
    moe_quant_algo: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.weight_block_size, list):
            object.__setattr__(self, "weight_block_size", tuple(self.weight_block_size))
        _check_supported(self, "quant_method", ("fp8",))
        _check_supported(self, "fmt", ("e4m3",))
        _check_supported(self, "scale_fmt", ("ue8m0", None))
        _check_supported(self, "activation_scheme", ("dynamic",))
        _check_supported(self, "weight_block_size", ((128, 128),))
        _check_supported(self, "moe_quant_algo", (None, "NVFP4"))


_NESTED = {"rope_scaling": RopeScaling, "quantization_config": QuantizationConfig}


@no_type_check
@dataclass(frozen=True)
class Config:
    """A model's sizes and constants, under the names of the official config.json.

    Every value is checked when a Config is made, however it is made. Sizes that a storage format
    cannot hold are not refused here but where that format is chosen.

    Attributes:
        compress_ratios: compression of each layer: 0 window only (SWA), 4 (CSA), 128 (HCA); then a
            0 for each MTP block. Missing entries of MTP blocks are 0, further zeros are dropped.
        num_hash_layers: the first layers, which route by token id through a table.
        o_groups: groups of heads that share a block of the output projection.
        rope_scaling: YaRN of the CSA and HCA layers (base compress_rope_theta); None for none.
            SWA layers and MTP blocks use rope_theta without it.
        index_topk: compressed entries that a query of a CSA layer attends to.
        hc_mult: residual streams.
        torch_dtype: dtype of the weights that are not packed.
        expert_dtype: "fp4", "fp8", "nvfp4", "bf16" or None, which leaves it to the tensors.

    Raises:
        ValueError: naming the field, what came and what was expected.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compress_ratios: tuple[int, ...]
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    num_hash_layers: int = 3
    num_nextn_predict_layers: int = 0
    max_position_embeddings: int = 1048576
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: RopeScaling | None = None
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    bos_token_id: int = 0
    eos_token_id: int = 1
    num_key_value_heads: int = 1
    n_shared_experts: int = 1
    scoring_func: str = "sqrtsoftplus"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    hidden_act: str = "silu"
    attention_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    torch_dtype: str = "bfloat16"
    expert_dtype: str | None = None
    quantization_config: QuantizationConfig | None = None
    model_type: str = "deepseek_v4"

    FLASH: ClassVar["Config"]
    PRO: ClassVar["Config"]
    MINI: ClassVar["Config"]

    def __post_init__(self) -> None:
        for name, supported in _SUPPORTED.items():
            _check_supported(self, name, supported)
        for field in fields(self):
            if field.type is int:
                _check_int(self, field.name, int(field.name not in _MAY_BE_ZERO))
            elif field.type is float and field.name not in _MAY_BE_ZERO:
                _check_positive_number(self, field.name)
        for name, kind in _NESTED.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                _refuse(name, value, f"{kind.__name__} or None")
        if not _is_number(self.attention_dropout) or not 0 <= self.attention_dropout < 1:
            _refuse("attention_dropout", self.attention_dropout, "a number in [0, 1)")
        self._check_relations()
        self._check_ratios()

    def _check_ratios(self) -> None:
        ratios, num_layers = self.compress_ratios, self.num_hidden_layers
        if not isinstance(ratios, list | tuple) or not all(map(_is_int, ratios)):
            _refuse("compress_ratios", ratios, "a list of integers")
        if len(ratios) < num_layers:
            _refuse("compress_ratios", ratios, f"{num_layers} entries (num_hidden_layers)")
        if set(ratios[:num_layers]) - {0, 4, 128}:
            _refuse("compress_ratios", ratios, "entries 0, 4 and 128")
        if any(ratios[num_layers:]):
            _refuse("compress_ratios", ratios, f"0 behind the first {num_layers} entries")
        complete = (*ratios[:num_layers], *[0] * self.num_nextn_predict_layers)
        object.__setattr__(self, "compress_ratios", complete)

    def _check_relations(self) -> None:
        if self.num_attention_heads % self.o_groups:
            heads = f"num_attention_heads ({self.num_attention_heads})"
            _refuse("o_groups", self.o_groups, f"a divisor of {heads}")
        if self.qk_rope_head_dim % 2:
            _refuse("qk_rope_head_dim", self.qk_rope_head_dim, "an even number")
        if self.index_head_dim & (self.index_head_dim - 1):
            _refuse("index_head_dim", self.index_head_dim, "a power of two (Hadamard matrix)")
        for theta in ("rope_theta", "compress_rope_theta"):
            if getattr(self, theta) <= 1:
                _refuse(theta, getattr(self, theta), "more than 1")
        for field, relation, bound in (
            ("qk_rope_head_dim", "less than", "head_dim"),
            ("qk_rope_head_dim", "at most", "index_head_dim"),
            ("num_experts_per_tok", "at most", "n_routed_experts"),
            ("num_hash_layers", "at most", "num_hidden_layers"),
            ("num_nextn_predict_layers", "at most", "num_hidden_layers"),
            ("bos_token_id", "less than", "vocab_size"),
            ("eos_token_id", "less than", "vocab_size"),
        ):
            value, limit = getattr(self, field), getattr(self, bound)
            if value > limit or (value == limit and relation == "less than"):
                _refuse(field, value, f"{relation} {bound} ({limit})")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """From the official form or the Hugging Face form of config.json; other keys are ignored.

        Hugging Face: layer_types, mlp_layer_types, rope_parameters (or rope_scaling) with tables
        "main" and "compress", partial_rotary_factor, dtype, quantization_config.expert_dtype.
        The draft stages of DSpark builds (dspark_* keys) are no MTP blocks: none are left.

        Raises:
            ValueError: naming the field, what came and what was expected.
        """
        official = _official_form(values)
        for name, kind in _NESTED.items():
            if isinstance(official.get(name), Mapping):
                official[name] = _make(kind, official[name], f"{name}.")
        return _make(cls, official)

    @classmethod
    def from_json(cls, path: str | Path) -> "Config":
        """From a file, or from config.json in a directory.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a JSON object or holds an inconsistent value.
        """
        file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file")
        try:
            values = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: not JSON ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"{file}: got {type(values).__name__}, expected a JSON object")
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The official form: ready for json.dump, and `from_dict` gives back an equal Config."""
        values = {"architectures": ["DeepseekV4ForCausalLM"], **_official_values(self)}
        values |= {name: _official_values(values[name]) for name in _NESTED if name in values}
        if self.rope_scaling is not None:
            values["rope_scaling"]["type"] = "yarn"
        return values

    @property
    def layer_ratios(self) -> tuple[int, ...]:
        """Compression ratio of each backbone layer."""
        return self.compress_ratios[: self.num_hidden_layers]

    def ratio(self, layer: int) -> int:
        """Compression ratio of a layer; MTP blocks follow the backbone."""
        return self.compress_ratios[layer]

    def is_hash_layer(self, layer: int) -> bool:
        return layer < self.num_hash_layers


def _make(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """The dataclass from its own keys; others are ignored."""
    required = [field.name for field in fields(cls) if field.default is MISSING]
    missing = [prefix + name for name in required if name not in values]
    if missing:
        raise ValueError(f"{', '.join(missing)}: missing, expected a value")
    try:
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def _official_values(owner: Any) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(owner).items()
        if value is not None
    }


def _official_form(values: Mapping[str, Any]) -> dict[str, Any]:
    """Hugging Face's keys translated to the official ones; the rest as it came."""
    official = dict(values)
    if "dspark_block_size" in values:
        official["num_nextn_predict_layers"] = 0
    if values.get("dtype") is not None:
        official.setdefault("torch_dtype", values["dtype"])
    quantization = values.get("quantization_config")
    if isinstance(quantization, Mapping) and "expert_dtype" in quantization:
        official.setdefault("expert_dtype", quantization["expert_dtype"])
    _fold_schedules(official)
    _fold_rope(official)
    return official


def _schedule(config: dict[str, Any], field: str, kinds: tuple[str, ...]) -> list[str] | None:
    """The kind of each layer, or None where the field is absent."""
    types = config.get(field)
    if types is None:
        return None
    if not isinstance(types, list | tuple) or any(kind not in kinds for kind in types):
        _refuse(field, types, f"a list of {', '.join(kinds)}")
    if len(types) != config.get("num_hidden_layers"):
        layers = f"num_hidden_layers ({config.get('num_hidden_layers')})"
        _refuse(field, types, f"{layers} entries, not {len(types)}")
    return list(types)


def _fold_schedules(config: dict[str, Any]) -> None:
    """layer_types to compress_ratios, mlp_layer_types to num_hash_layers."""
    types = _schedule(config, "layer_types", tuple(_RATIO_OF_LAYER_TYPE))
    if types is not None:
        ratios = [_RATIO_OF_LAYER_TYPE[kind] for kind in types]
        given = config.setdefault("compress_ratios", ratios)
        if isinstance(given, list | tuple) and list(given[: len(ratios)]) != ratios:
            _refuse("layer_types", types, f"the layers of compress_ratios ({given})")
    types = _schedule(config, "mlp_layer_types", ("hash_moe", "moe"))
    if types is not None:
        num_hash = types.count("hash_moe")
        if "hash_moe" in types[num_hash:]:
            _refuse("mlp_layer_types", types, "hash_moe in the first layers only")
        given = config.setdefault("num_hash_layers", num_hash)
        if given != num_hash:
            _refuse("mlp_layer_types", types, f"num_hash_layers ({given}) times hash_moe")
    rates = config.get("compress_rates")
    if rates is not None and rates != _COMPRESS_RATES:
        _refuse("compress_rates", rates, f"{_COMPRESS_RATES}")


def _fold_rope(config: dict[str, Any]) -> None:
    """Tables "main" and "compress", or one flat table, to the thetas and rope_scaling."""
    field = "rope_scaling" if config.get("rope_parameters") is None else "rope_parameters"
    tables = config.get(field)
    if tables is None:
        return
    if not isinstance(tables, Mapping):
        _refuse(field, tables, "an object")
    if tables.keys() & {"main", "compress"}:
        for name in ("main", "compress"):
            if not isinstance(tables.get(name), Mapping):
                _refuse(f"{field}.{name}", tables.get(name), "an object")
        main, compress = tables["main"], tables["compress"]
        if _yarn(main, f"{field}.main") is not None:
            _refuse(f"{field}.main.rope_type", "yarn", "'default'")
        if "rope_theta" in compress:
            config["compress_rope_theta"] = compress["rope_theta"]
        field = f"{field}.compress"
    else:
        main = compress = tables
    if "rope_theta" in main:
        config["rope_theta"] = main["rope_theta"]
    config["rope_scaling"] = _yarn(compress, field)
    partial = main.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial is not None:
        _fold_partial_rotary_factor(config, partial)


def _yarn(table: Mapping[str, Any], field: str) -> Mapping[str, Any] | None:
    """The table if it asks for YaRN, None if it asks for nothing."""
    rope_type = table.get("rope_type", table.get("type", "default"))
    if rope_type == "default" and "factor" not in table:
        return None
    if rope_type != "yarn":
        _refuse(f"{field}.type", rope_type, "'yarn', or 'default' without a factor")
    if table.get("attention_factor") not in (None, 1.0):
        _refuse(f"{field}.attention_factor", table["attention_factor"], "1.0")
    return table


def _fold_partial_rotary_factor(config: dict[str, Any], partial: Any) -> None:
    if not _is_number(partial) or not 0 < partial < 1:
        _refuse("partial_rotary_factor", partial, "a number between 0 and 1")
    if _is_int(config.get("head_dim")):
        rope_dim = round(config["head_dim"] * partial)
        given = config.setdefault("qk_rope_head_dim", rope_dim)
        if given != rope_dim:
            _refuse("partial_rotary_factor", partial, f"qk_rope_head_dim ({given}) / head_dim")


Config.FLASH = Config(
    vocab_size=129280,
    hidden_size=4096,
    num_hidden_layers=43,
    num_nextn_predict_layers=1,
    num_attention_heads=64,
    head_dim=512,
    qk_rope_head_dim=64,
    q_lora_rank=1024,
    o_groups=8,
    o_lora_rank=1024,
    sliding_window=128,
    compress_ratios=(0, 0, *(4, 128) * 20, 4, 0),
    index_n_heads=64,
    index_head_dim=128,
    index_topk=512,
    rope_scaling=RopeScaling(factor=16.0, original_max_position_embeddings=65536),
    n_routed_experts=256,
    num_experts_per_tok=6,
    moe_intermediate_size=2048,
    routed_scaling_factor=1.5,
    expert_dtype="fp4",
    quantization_config=QuantizationConfig(scale_fmt="ue8m0"),
)
Config.PRO = replace(
    Config.FLASH,
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    q_lora_rank=1536,
    o_groups=16,
    compress_ratios=(128, 128, *(4, 128) * 29, 4, 0),
    index_topk=1024,
    n_routed_experts=384,
    moe_intermediate_size=3072,
    routed_scaling_factor=2.5,
)
Config.MINI = replace(
    Config.FLASH,
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=6,
    num_nextn_predict_layers=1,
    num_attention_heads=4,
    q_lora_rank=128,
    o_groups=2,
    o_lora_rank=128,
    compress_ratios=(0, 0, 4, 128, 4, 128),
    index_n_heads=4,
    index_topk=64,
    n_routed_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=128,
    num_hash_layers=2,
    max_position_embeddings=65536,
)
