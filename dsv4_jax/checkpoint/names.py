"""The names, shapes and stored forms of a checkpoint's tensors.

Nothing else in the library knows what a tensor is called on disk. There are three spellings:

- official: "layers.3.ffn.experts.7.w1.weight", as DeepSeek ships it;
- parameter path: ("layers", 3, "ffn", "experts", "w1", "weight") and expert 7, the place in the
  model's state, where the experts of a layer are one array [E, ...];
- Hugging Face: "model.layers.3.mlp.experts.gate_up_proj", as transformers 5 saves it.
"""

import math
import re
from collections.abc import Iterator
from functools import cache
from typing import Literal, NamedTuple

from dsv4_jax.config import Config

Path = tuple[str | int, ...]
Kind = Literal["linear", "expert", "bf16", "f32", "int"]
WeightFormat = Literal["float", "fp8_block", "mxfp4", "nvfp4"]

# The forms a tensor of each kind may be stored in; the first is the one that is shipped.
FORMATS: dict[Kind, tuple[WeightFormat, ...]] = {
    "linear": ("fp8_block", "float"),
    "expert": ("mxfp4", "nvfp4", "fp8_block", "float"),
    "bf16": ("float",),
    "f32": ("float",),
    "int": ("float",),
}
_FLOAT_DTYPE: dict[Kind, str] = {
    "linear": "BF16",
    "expert": "BF16",
    "bf16": "BF16",
    "f32": "F32",
    "int": "I64",
}
ITEM_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "I64": 8}


class TensorSpec(NamedTuple):
    """One tensor of the model, however it is stored.

    Attributes:
        name: official name; of a packed weight, that of its codes.
        shape: logical shape; weights are [out, in].
        kind: "linear", a weight that may be packed; "expert", a routed expert's matrix, which may
            be packed in more ways; "bf16" and "f32", shipped as such, either may be stored;
            "int", a table of expert ids (I64 as shipped).
        path: parameter path, without the expert.
        expert: row of the stacked parameter, or None.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    path: Path
    expert: int | None = None


class Stored(NamedTuple):
    """One tensor on disk: official name, safetensors dtype, shape, and its parameter path."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * ITEM_BYTES[self.dtype]


def tensors(config: Config) -> Iterator[TensorSpec]:
    """Every tensor of the model, in the order in which the official shards hold them."""
    d, v = config.hidden_size, config.vocab_size
    yield _spec("embed.weight", (v, d), "bf16")
    for layer in range(config.num_hidden_layers):
        yield from block_tensors(config, layer)
    yield _spec("norm.weight", (d,), "bf16")
    yield _spec("head.weight", (v, d), "bf16")
    yield from _hyper_connection("hc_head", config, config.hc_mult, 1)
    for i in range(config.num_nextn_predict_layers):
        yield from block_tensors(config, config.num_hidden_layers + i)


def block_tensors(config: Config, layer: int) -> Iterator[TensorSpec]:
    """The tensors of one layer; from num_hidden_layers on, of an MTP block (`mtp.0.`...)."""
    d, n = config.hidden_size, config.hc_mult
    mtp = layer - config.num_hidden_layers
    block = f"layers.{layer}" if mtp < 0 else f"mtp.{mtp}"
    for part in ("attn", "ffn"):
        yield from _hyper_connection(f"{block}.hc_{part}", config, (2 + n) * n, 3)
        yield _spec(f"{block}.{part}_norm.weight", (d,), "bf16")
    yield from _attention(f"{block}.attn", config, config.ratio(layer))
    yield from _moe(f"{block}.ffn", config, config.is_hash_layer(layer))
    if mtp >= 0:
        for projection in ("e_proj", "h_proj"):
            yield _spec(f"{block}.{projection}.weight", (d, d), "linear")
        for norm in ("enorm", "hnorm", "norm"):
            yield _spec(f"{block}.{norm}.weight", (d,), "bf16")
        yield from _hyper_connection(f"{block}.hc_head", config, n, 1)


def _spec(name: str, shape: tuple[int, ...], kind: Kind) -> TensorSpec:
    return TensorSpec(name, shape, kind, *param_path(name))


def _hyper_connection(name: str, config: Config, rows: int, scales: int) -> Iterator[TensorSpec]:
    yield _spec(f"{name}_fn", (rows, config.hc_mult * config.hidden_size), "f32")
    yield _spec(f"{name}_base", (rows,), "f32")
    yield _spec(f"{name}_scale", (scales,), "f32")


def _attention(name: str, config: Config, ratio: int) -> Iterator[TensorSpec]:
    d, c, rank = config.hidden_size, config.head_dim, config.q_lora_rank
    q_dim = config.num_attention_heads * c
    o_dim = config.o_groups * config.o_lora_rank
    yield _spec(f"{name}.attn_sink", (config.num_attention_heads,), "f32")
    yield _spec(f"{name}.wq_a.weight", (rank, d), "linear")
    yield _spec(f"{name}.q_norm.weight", (rank,), "bf16")
    yield _spec(f"{name}.wq_b.weight", (q_dim, rank), "linear")
    yield _spec(f"{name}.wkv.weight", (c, d), "linear")
    yield _spec(f"{name}.kv_norm.weight", (c,), "bf16")
    yield _spec(f"{name}.wo_a.weight", (o_dim, q_dim // config.o_groups), "linear")
    yield _spec(f"{name}.wo_b.weight", (d, o_dim), "linear")
    if ratio:
        yield from _compressor(f"{name}.compressor", config, ratio, c)
    if ratio == 4:
        heads, width = config.index_n_heads, config.index_head_dim
        yield _spec(f"{name}.indexer.wq_b.weight", (heads * width, rank), "linear")
        yield _spec(f"{name}.indexer.weights_proj.weight", (heads, d), "bf16")
        yield from _compressor(f"{name}.indexer.compressor", config, ratio, width)


def _compressor(name: str, config: Config, ratio: int, width: int) -> Iterator[TensorSpec]:
    # Blocks of ratio 4 overlap: a token has one role in its own entry, one in the next.
    channels = 2 * width if ratio == 4 else width
    yield _spec(f"{name}.wkv.weight", (channels, config.hidden_size), "bf16")
    yield _spec(f"{name}.wgate.weight", (channels, config.hidden_size), "bf16")
    yield _spec(f"{name}.ape", (ratio, channels), "f32")
    yield _spec(f"{name}.norm.weight", (width,), "bf16")


def _moe(name: str, config: Config, hash_routing: bool) -> Iterator[TensorSpec]:
    d, f, e = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    yield _spec(f"{name}.gate.weight", (e, d), "bf16")
    if hash_routing:
        shape = (config.vocab_size, config.num_experts_per_tok)
        yield _spec(f"{name}.gate.tid2eid", shape, "int")
    else:
        yield _spec(f"{name}.gate.bias", (e,), "f32")
    shapes = {"w1": (f, d), "w2": (d, f), "w3": (f, d)}
    for w, shape in shapes.items():
        yield _spec(f"{name}.shared_experts.{w}.weight", shape, "linear")
    experts = f"{name}.experts"
    first = {w: _spec(f"{experts}.0.{w}.weight", shape, "expert") for w, shape in shapes.items()}
    for expert in range(e):
        for w, spec in first.items():
            yield spec._replace(name=f"{experts}.{expert}.{w}.weight", expert=expert)


def stored(spec: TensorSpec, weight_format: WeightFormat | None = None) -> tuple[Stored, ...]:
    """The tensors on disk that hold one tensor of the model; groups that do not fill up count.

    Args:
        spec: one of `tensors(config)`; its expert is that of every tensor returned.
        weight_format: by default the one that is shipped.
            "fp8_block": F8_E4M3 [out, in]; scale F8_E8M0 [out/128, in/128].
            "mxfp4": I8 [out, in/2], even input in the low nibble; scale F8_E8M0 [out, in/32].
            "nvfp4": U8 [out, in/2]; weight_scale F8_E4M3 [out, in/16]; weight_scale_2 and
            input_scale, F32 scalars.
            "float": the shipped dtype of the kind, BF16 for weights. A checkpoint may hold F32
            for BF16 and BF16 for F32.

    Raises:
        ValueError: the format does not exist for this kind of tensor.
    """
    formats = FORMATS[spec.kind]
    weight_format = weight_format or formats[0]
    if weight_format not in formats:
        raise ValueError(
            f"weight_format: got {weight_format!r} for {spec.name}, expected one of {formats}"
        )
    if weight_format == "float":
        return (Stored(spec.name, _FLOAT_DTYPE[spec.kind], spec.shape, spec.path),)
    module = spec.name.removesuffix(".weight")
    return tuple(
        Stored(f"{module}.{leaf}", dtype, shape, (*spec.path[:-1], _LEAF.get(leaf, leaf)))
        for leaf, (dtype, shape) in _packed(weight_format, *spec.shape).items()
    )


@cache
def _packed(
    weight_format: WeightFormat, rows: int, columns: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of every tensor of a packed matrix, the codes first."""

    def groups(size: int, group: int) -> int:
        return -(-size // group)

    match weight_format:
        case "fp8_block":
            return {
                "weight": ("F8_E4M3", (rows, columns)),
                "scale": ("F8_E8M0", (groups(rows, 128), groups(columns, 128))),
            }
        case "mxfp4":
            return {
                "weight": ("I8", (rows, groups(columns, 2))),
                "scale": ("F8_E8M0", (rows, groups(columns, 32))),
            }
        case _:
            return {
                "weight": ("U8", (rows, groups(columns, 2))),
                "weight_scale": ("F8_E4M3", (rows, groups(columns, 16))),
                "weight_scale_2": ("F32", ()),
                "input_scale": ("F32", ()),
            }


_LEAF = {"attn_sink": "sink", "weight_scale": "scale", "weight_scale_2": "scale_2"}
_HYPER_CONNECTION = re.compile(r"(hc_(?:attn|ffn|head))_(fn|base|scale)")


def param_path(name: str) -> tuple[Path, int | None]:
    """Parameter path and expert of a tensor.

    "layers.3.ffn.experts.7.w1.scale" gives (("layers", 3, "ffn", "experts", "w1", "scale"), 7);
    "hc_head_fn" gives (("hc_head", "fn"), None). With "*" for the expert, all of them: None.
    """
    *modules, leaf = name.split(".")
    path: list[str | int] = [int(part) if part.isdecimal() else part for part in modules]
    expert = None
    if "experts" in path[:-1]:
        index = path.pop(path.index("experts") + 1)
        expert = index if isinstance(index, int) else None
    if match := _HYPER_CONNECTION.fullmatch(leaf):
        return (*path, *match.groups()), expert
    return (*path, _LEAF.get(leaf, leaf)), expert


def official_name(
    path: Path, expert: int | None = None, weight_format: WeightFormat = "float"
) -> str:
    """The official name of a parameter: `param_path` backwards.

    `weight_format` is that of the parameter's module; with "nvfp4" scales are called otherwise.
    """
    *modules, leaf = map(str, path)
    if modules and modules[-1] in ("hc_attn", "hc_ffn", "hc_head"):
        return ".".join([*modules[:-1], f"{modules[-1]}_{leaf}"])
    if leaf == "sink":
        leaf = "attn_sink"
    elif weight_format == "nvfp4" and leaf in ("scale", "scale_2"):
        leaf = f"weight_{leaf}"
    if expert is not None:
        modules.insert(modules.index("experts") + 1, str(expert))
    return ".".join([*modules, leaf])


# Hugging Face's names of modules and parameters where they differ, inside a block and outside.
_HUGGING_FACE = {
    "embed": "embed_tokens",
    "head": "lm_head",
    **{f"hc_head_{part}": f"hc_head.hc_{part}" for part in ("fn", "base", "scale")},
    **{
        f"hc_{block}_{part}": f"{block}_hc.{part}"
        for block in ("attn", "ffn")
        for part in ("fn", "base", "scale")
    },
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn.attn_sink": "attn.sinks",
    "attn.wq_a": "attn.q_a_proj",
    "attn.q_norm": "attn.q_a_norm",
    "attn.wq_b": "attn.q_b_proj",
    "attn.wkv": "attn.kv_proj",
    "attn.wo_a": "attn.o_a_proj",
    "attn.wo_b": "attn.o_b_proj",
    "attn.indexer.wq_b": "attn.compressor.indexer.q_b_proj",
    "attn.indexer.weights_proj": "attn.compressor.indexer.scorer.weights_proj",
    **{
        f"attn.{ours}.{part}": f"attn.{theirs}.{name}"
        for ours, theirs in (
            ("compressor", "compressor"),
            ("indexer.compressor", "compressor.indexer"),
        )
        for part, name in (
            ("wkv", "kv_proj"),
            ("wgate", "gate_proj"),
            ("ape", "position_bias"),
            ("norm", "kv_norm"),
        )
    },
    "ffn.gate.bias": "ffn.gate.e_score_correction_bias",
    "ffn.shared_experts.w1": "ffn.shared_experts.gate_proj",
    "ffn.shared_experts.w2": "ffn.shared_experts.down_proj",
    "ffn.shared_experts.w3": "ffn.shared_experts.up_proj",
}
_OFFICIAL = {theirs: ours for ours, theirs in _HUGGING_FACE.items()}
_OFFICIAL_EXPERT = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
# Rows of a fused matrix, first to last.
_OFFICIAL_FUSED = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}


def from_huggingface(name: str) -> tuple[str, ...]:
    """The official names of a tensor in Hugging Face's or official spelling.

    Also takes the aliases that DeepSeek's own conversion takes: a "model." prefix, self_attn, mlp,
    weight_scale_inv, e_score_correction_bias. Fused experts give names with "*" for the expert:
    axis 0 of the tensor is the expert, and its rows are those of the named matrices one after
    the other: "model.layers.3.mlp.experts.gate_up_proj" [E, 2f, d] gives
    ("layers.3.ffn.experts.*.w1.weight", "layers.3.ffn.experts.*.w3.weight"). An unknown name comes
    back as it is, but for prefix and aliases.
    """
    block, rest = _split_block(name.removeprefix("model."))
    head, dot, tail = rest.partition(".")
    rest = {"self_attn": "attn", "mlp": "ffn"}.get(head, head) + dot + tail
    if rest.startswith("ffn.experts."):
        expert, _, tail = rest.removeprefix("ffn.experts.").partition(".")
        if not tail:
            fused = expert.removesuffix("_scale_inv")
            leaf = "weight" if fused == expert else "scale"
            matrices = _OFFICIAL_FUSED.get(fused, ())
            return tuple(f"{block}ffn.experts.*.{w}.{leaf}" for w in matrices) or (name,)
        matrix, dot, leaf = tail.partition(".")
        rest = f"ffn.experts.{expert}.{_OFFICIAL_EXPERT.get(matrix, matrix)}{dot}{leaf}"
    if rest.endswith(".weight_scale_inv"):
        rest = rest.removesuffix("weight_scale_inv") + "scale"
    return (block + _rename(rest, _OFFICIAL),)


def to_huggingface(name: str) -> str:
    """Hugging Face's name of an official one; of a routed expert's matrix, that of the fused one.

    Raises:
        ValueError: a tensor of an MTP block or of an NVFP4 expert, which Hugging Face has not.
    """
    block, rest = _split_block(name)
    if block.startswith("mtp."):
        raise ValueError(f"name: got {name!r}, expected no tensor of an MTP block")
    if rest.startswith("ffn.experts."):
        matrix, leaf = rest.split(".")[-2:]
        fused = {w: fused for fused, parts in _OFFICIAL_FUSED.items() for w in parts}.get(matrix)
        if fused is None or leaf not in ("weight", "scale"):
            raise ValueError(f"name: got {name!r}, expected weight or scale of w1, w2 or w3")
        return f"model.{block}mlp.experts.{fused}{'_scale_inv' * (leaf == 'scale')}"
    if rest.endswith(".scale"):
        rest = rest.removesuffix("scale") + "weight_scale_inv"
    rest = _rename(rest, _HUGGING_FACE)
    head, dot, tail = rest.partition(".")
    rest = {"attn": "self_attn", "ffn": "mlp"}.get(head, head) + dot + tail
    return rest if head == "lm_head" else f"model.{block}{rest}"


def _split_block(name: str) -> tuple[str, str]:
    """The prefix "layers.3." and what follows it; outside of blocks nothing and the name."""
    match = re.match(r"(?:layers|mtp)\.\d+\.", name)
    end = match.end() if match else 0
    return name[:end], name[end:]


def _rename(name: str, names: dict[str, str]) -> str:
    """Replaces the whole name, or all but its last part."""
    if name in names:
        return names[name]
    module, dot, leaf = name.rpartition(".")
    return names.get(module, module) + dot + leaf
