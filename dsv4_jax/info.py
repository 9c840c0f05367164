"""What `dsv4 info` prints: layers, parameters, weights, cache and a memory plan."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv4_jax.cache.paged import BLOCK_TOKENS
from dsv4_jax.cache.storage import record_obstacles
from dsv4_jax.checkpoint.names import TensorSpec, WeightFormat, block_tensors, stored, tensors
from dsv4_jax.config import Config

PRESETS = {"flash": Config.FLASH, "pro": Config.PRO, "mini": Config.MINI}
SEQUENCE_LENGTHS = (8192, 65536)
FLOAT32_BYTES = 4
BFLOAT16_BYTES = 2

_ATTENTION = {0: "SWA", 4: "CSA", 128: "HCA"}
OFFICIAL = "MXFP4 experts"
FormatChoice = Callable[[TensorSpec], WeightFormat | None]
# The published NVFP4 checkpoints keep the experts of MTP blocks in MXFP4.
CHECKPOINTS: dict[str, FormatChoice] = {
    OFFICIAL: lambda spec: None,
    "NVFP4 experts": lambda spec: (
        "nvfp4" if spec.kind == "expert" and spec.path[0] == "layers" else None
    ),
    "BF16 weights": lambda spec: "float",
}


def find_config(source: str | Path) -> Config:
    """The preset "flash", "pro" or "mini", or the config.json at a path.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds an inconsistent value.
    """
    preset = PRESETS.get(str(source))
    return Config.from_json(source) if preset is None else preset


@dataclass(frozen=True)
class Census:
    """Tensors and bytes on disk by safetensors dtype."""

    num_tensors: Counter[str]
    num_bytes: Counter[str]
    num_elements: int

    @classmethod
    def of(cls, specs: Iterable[TensorSpec], choose: FormatChoice) -> "Census":
        num_tensors: Counter[str] = Counter()
        num_bytes: Counter[str] = Counter()
        num_elements = 0
        for spec, count in _distinct(specs):
            for tensor in stored(spec, choose(spec)):
                num_tensors[tensor.dtype] += count
                num_bytes[tensor.dtype] += count * tensor.num_bytes
                num_elements += count * tensor.num_elements
        return cls(num_tensors, num_bytes, num_elements)


def _distinct(specs: Iterable[TensorSpec]) -> list[tuple[TensorSpec, int]]:
    """One of each set of tensors that are stored alike, and their number."""
    counts: Counter[tuple[object, ...]] = Counter()
    examples: dict[tuple[object, ...], TensorSpec] = {}
    for spec in specs:
        key = spec.kind, spec.shape, spec.path[0]
        counts[key] += 1
        examples[key] = spec
    return [(examples[key], count) for key, count in counts.items()]


def num_parameters(specs: Iterable[TensorSpec]) -> int:
    """Weights, however packed; the tables of expert ids are none."""
    return sum(n * math.prod(spec.shape) for spec, n in _distinct(specs) if spec.kind != "int")


@dataclass(frozen=True)
class CacheSizes:
    """Bytes of one window or compressed KV entry and of one indexer key."""

    entry_bytes: int
    key_bytes: int

    @classmethod
    def variants(cls, config: Config) -> dict[str, "CacheSizes"]:
        """The ways to store this model's cache; the first is the one a new cache uses."""
        width, rope, index_width = config.head_dim, config.qk_rope_head_dim, config.index_head_dim
        dense = {"BF16": cls(width * BFLOAT16_BYTES, index_width * BFLOAT16_BYTES)}
        if record_obstacles(config):
            return dense
        record_bytes = width - rope + rope * BFLOAT16_BYTES + 8
        return {
            "FP8, MXFP4 keys": cls(record_bytes, index_width // 2 + index_width // 32),
            "FP8, FP8 keys": cls(record_bytes, index_width + FLOAT32_BYTES),
            **dense,
        }

    def ring_bytes(self, config: Config) -> int:
        return config.num_hidden_layers * config.sliding_window * self.entry_bytes

    def compressed_bytes(self, config: Config, num_tokens: int) -> int:
        num_csa, num_hca = config.layer_ratios.count(4), config.layer_ratios.count(128)
        return (
            num_csa * (num_tokens // 4) * (self.entry_bytes + self.key_bytes)
            + num_hca * (num_tokens // 128) * self.entry_bytes
        )


def tail_bytes(config: Config) -> dict[str, tuple[int, int]]:
    """Float32 state of unfinished compression blocks: bytes of a CSA layer and of an HCA layer.

    The last is what a cache of this library keeps.
    """
    width, both_widths = config.head_dim, config.head_dim + config.index_head_dim
    # Values and scores: a ring of 8 rows of two halves, or only what is still needed of it:
    # one half of the last block's 4 rows and two of the next one's first 3.
    csa_ring = 2 * 8 * 2 * both_widths * FLOAT32_BYTES
    csa_rows = 2 * (4 + 3 * 2) * both_widths * FLOAT32_BYTES
    # Values and scores of the block's rows, or running maximum, sum and weighted sum.
    hca_block, hca_rows = (2 * rows * width * FLOAT32_BYTES for rows in (128, 127))
    hca_online = 3 * width * FLOAT32_BYTES
    return {
        "reference buffers": (csa_ring, hca_block),
        "minimal rows": (csa_rows, hca_rows),
        "minimal rows, online HCA": (csa_rows, hca_online),
        "this library": (csa_ring, hca_online),
    }


def _all_tails(config: Config, tails: tuple[int, int]) -> int:
    csa, hca = tails
    return config.layer_ratios.count(4) * csa + config.layer_ratios.count(128) * hca


def state_bytes(config: Config) -> int:
    """What a cache keeps of a sequence whatever its length: window rings and tails."""
    sizes, *_ = CacheSizes.variants(config).values()
    *_, tails = tail_bytes(config).values()
    return sizes.ring_bytes(config) + _all_tails(config, tails)


def block_bytes(config: Config) -> int:
    """What a cache keeps of every 128 tokens of a sequence."""
    sizes, *_ = CacheSizes.variants(config).values()
    return sizes.compressed_bytes(config, BLOCK_TOKENS)


def render(config: Config, source: str, *, num_gpus: int = 1, gpu_memory_gb: float = 141.0) -> str:
    """The text of `dsv4 info`; every size is a whole number of bytes.

    Args:
        config: the model.
        source: what the user called it.
        num_gpus: GPUs of the memory plan.
        gpu_memory_gb: memory of each in 10^9 bytes.

    Raises:
        ValueError: no GPU, or memory of less than a byte or more than 10^18.
    """
    if num_gpus < 1:
        raise ValueError(f"num_gpus: got {num_gpus}, expected at least 1")
    if not 1e-9 <= gpu_memory_gb <= 1e9:
        raise ValueError(f"gpu_memory_gb: got {gpu_memory_gb}, expected 1e-9 to 1e9")
    specs = list(tensors(config))
    censuses = {name: Census.of(specs, choose) for name, choose in CHECKPOINTS.items()}
    sections = (
        [_title(config, source)],
        _layers(config, specs),
        _parameters(config, specs),
        _weights(specs, censuses),
        _cache(config),
        _tails(config),
        _plan(config, censuses, num_gpus, round(gpu_memory_gb * 10**9)),
    )
    return "\n\n".join("\n".join(lines) for lines in sections)


def _table(rows: Sequence[Sequence[object]]) -> list[str]:
    """Aligned lines; whole numbers are comma-grouped, columns that hold one go to the right."""
    cells = [[f"{x:,}" if isinstance(x, int) else str(x) for x in row] for row in rows]
    columns = list(zip(*cells, strict=True))
    pads = [
        (str.rjust if any(isinstance(row[i], int) for row in rows) else str.ljust, max(map(len, c)))
        for i, c in enumerate(columns)
    ]
    return [
        "  " + "  ".join(pad(x, width) for x, (pad, width) in zip(row, pads, strict=True)).rstrip()
        for row in cells
    ]


def _title(config: Config, source: str) -> str:
    return (
        f"{source}: {config.num_hidden_layers} layers, hidden size {config.hidden_size:,}, "
        f"{config.num_attention_heads} heads of {config.head_dim}, "
        f"{config.n_routed_experts} experts ({config.num_experts_per_tok} per token), "
        f"vocabulary {config.vocab_size:,}, context {config.max_position_embeddings:,}"
    )


def _layers(config: Config, specs: list[TensorSpec]) -> list[str]:
    groups: dict[tuple[str, str], list[int]] = {}
    for layer, ratio in enumerate(config.layer_ratios):
        routing = "hash" if config.is_hash_layer(layer) else "scored"
        groups.setdefault((_ATTENTION[ratio], routing), []).append(layer)
    rows: list[tuple[object, ...]] = [
        ("layers", "count", "attention", "routing", "parameters each", "tensors", "bytes")
    ]

    def add(name: str, count: int, kind: tuple[str, str], group: list[TensorSpec]) -> None:
        census = Census.of(group, CHECKPOINTS[OFFICIAL])
        sizes = num_parameters(group), census.num_tensors.total(), census.num_bytes.total()
        rows.append((name, count, *kind, *sizes))

    for kind, layers in groups.items():
        add(layer_ranges(layers), len(layers), kind, list(block_tensors(config, layers[0])))
    for i in range(config.num_nextn_predict_layers):
        block = list(block_tensors(config, config.num_hidden_layers + i))
        add(f"mtp.{i}", 1, ("SWA", "scored"), block)
    outside = [spec for spec in specs if spec.path[0] not in ("layers", "mtp")]
    add("embed, norm, head, hc_head", 1, ("", ""), outside)
    return ["Layers, each as DeepSeek ships it (MXFP4 experts, FP8 linears)", *_table(rows)]


def layer_ranges(layers: Sequence[int]) -> str:
    """[0, 1, 2, 5, 7, 9] as "0-2, 5-9 step 2"; two layers that do not touch stay apart."""
    parts = []
    start = 0
    while start < len(layers):
        end = start + 1
        step = layers[end] - layers[start] if end < len(layers) else 1
        while end < len(layers) and layers[end] - layers[end - 1] == step:
            end += 1
        if step > 1 and end - start == 2:
            end -= 1
        first, last = layers[start], layers[end - 1]
        span = f"{first}-{last}" if last > first else f"{first}"
        parts.append(f"{span} step {step}" if last > first and step > 1 else span)
        start = end
    return ", ".join(parts)


def _parameters(config: Config, specs: list[TensorSpec]) -> list[str]:
    backbone = [spec for spec in specs if spec.path[0] != "mtp"]
    experts = num_parameters(spec for spec in backbone if spec.kind == "expert")
    embedding = num_parameters(spec for spec in backbone if spec.path[0] == "embed")
    total = num_parameters(backbone)
    used = experts // config.n_routed_experts * config.num_experts_per_tok
    rows = [
        ("backbone", total),
        ("MTP blocks", num_parameters(specs) - total),
        ("total", num_parameters(specs)),
        (
            "active per token (backbone with head, without embedding)",
            total - embedding - experts + used,
        ),
    ]
    return ["Parameters", *_table(rows)]


def _weights(specs: list[TensorSpec], censuses: dict[str, Census]) -> list[str]:
    rows: list[tuple[object, ...]] = [("checkpoint", "dtype", "tensors", "bytes")]
    for name, census in censuses.items():
        for dtype in sorted(census.num_bytes):
            rows.append((name, dtype, census.num_tensors[dtype], census.num_bytes[dtype]))
            name = ""
        rows.append(("", "total", census.num_tensors.total(), census.num_bytes.total()))
    shipped = censuses[OFFICIAL]
    experts = [spec for spec in specs if spec.kind == "expert"]
    expert_bytes = Census.of(experts, CHECKPOINTS[OFFICIAL]).num_bytes.total()
    num_experts = len(experts) // 3
    details = [
        ("stored elements", shipped.num_elements),
        ("one routed expert (w1, w2, w3 and scales)", expert_bytes // num_experts),
        ("everything except routed experts", shipped.num_bytes.total() - expert_bytes),
    ]
    return ["Weights on disk", *_table(rows), f"Of these, with {OFFICIAL}", *_table(details)]


def _cache(config: Config) -> list[str]:
    variants = CacheSizes.variants(config)
    sizes = list(variants.values())
    num_tokens = config.max_position_embeddings
    num_csa, num_hca = config.layer_ratios.count(4), config.layer_ratios.count(128)
    window = config.sliding_window

    def row(name: str, layers: int, entries: int, each: Sequence[int]) -> tuple[object, ...]:
        return (name, layers, entries, *(layers * entries * size for size in each))

    entry, key = [s.entry_bytes for s in sizes], [s.key_bytes for s in sizes]
    rows = [
        ("", "layers", "entries each", *variants),
        ("bytes of an entry", "", "", *entry),
        ("bytes of an indexer key", "", "", *key),
        row("window rings", config.num_hidden_layers, window, entry),
        row("CSA entries", num_csa, num_tokens // 4, entry),
        row("indexer keys", num_csa, num_tokens // 4, key),
        row("HCA entries", num_hca, num_tokens // 128, entry),
        (
            "total",
            "",
            "",
            *(s.ring_bytes(config) + s.compressed_bytes(config, num_tokens) for s in sizes),
        ),
        ("growth per 128 tokens", "", "", *(s.compressed_bytes(config, 128) for s in sizes)),
        ("growth per token", "", "", *(_per_token(s.compressed_bytes(config, 128)) for s in sizes)),
    ]
    if config.num_nextn_predict_layers:
        rows.append(row("MTP window rings", config.num_nextn_predict_layers, window, entry))
    notes = [f"  no FP8 records: {obstacle}" for obstacle in record_obstacles(config)]
    return [f"Cache of a sequence of {num_tokens:,} tokens, bytes", *_table(rows), *notes]


def _per_token(bytes_of_128_tokens: int) -> str:
    """Exact: a 128th has at most 7 decimal places."""
    whole, part = divmod(bytes_of_128_tokens, 128)
    return f"{whole:,}" + f"{part / 128:.7f}".rstrip("0").rstrip(".").removeprefix("0")


def _tails(config: Config) -> list[str]:
    rows: list[tuple[object, ...]] = [("", "CSA layer", "HCA layer", "all layers")]
    rows += [
        (name, *tails, _all_tails(config, tails)) for name, tails in tail_bytes(config).items()
    ]
    return ["Compressor tails of a sequence, bytes", *_table(rows)]


def _plan(config: Config, censuses: dict[str, Census], num_gpus: int, gpu_bytes: int) -> list[str]:
    context = config.max_position_embeddings
    lengths = [*(n for n in SEQUENCE_LENGTHS if n < context), context]
    block, state = block_bytes(config), state_bytes(config)
    facts = [
        ("memory of all GPUs", num_gpus * gpu_bytes),
        ("cache per token", _per_token(block)),
        ("fixed state per sequence (window rings, tails)", state),
    ]
    rows: list[tuple[object, ...]] = [
        (
            "weights",
            "bytes",
            "GPUs needed",
            "bytes left",
            "cache tokens",
            f"sequences of {lengths[0]:,}",
            *(f"of {n:,}" for n in lengths[1:]),
        )
    ]
    misfits = []
    for name, census in censuses.items():
        weight_bytes = census.num_bytes.total()
        needed = -(-weight_bytes // gpu_bytes)
        left = num_gpus * gpu_bytes - weight_bytes
        if left < 0:
            misfits.append(
                f"  {name}: the weights do not fit, {-left:,} bytes are missing; "
                f"they need {needed:,} GPUs."
            )
            left = 0
        # A model of window-only layers keeps no more of a longer sequence.
        num_tokens = left // block * BLOCK_TOKENS if block else "unlimited"
        fits = (left // (state + -(-n // BLOCK_TOKENS) * block) for n in lengths)
        rows.append((name, weight_bytes, needed, left, num_tokens, *fits))
    gpus = f"{num_gpus:,} GPU{'s' * (num_gpus > 1)} of {gpu_bytes / 10**9:g} GB"
    return [
        f"Memory plan for {gpus}, bytes; all spread evenly, activations not counted",
        *_table(facts),
        *_table(rows),
        *misfits,
    ]
