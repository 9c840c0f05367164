"""From the headers of a checkpoint to the parameters it holds, or to what is wrong with it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from dsv4_jax.checkpoint import names
from dsv4_jax.checkpoint.shards import NUMPY_DTYPES, StoredTensor
from dsv4_jax.config import Config

_WEIGHT_FORMATS: dict[str, names.WeightFormat] = {
    "F8_E4M3": "fp8_block",
    "I8": "mxfp4",
    "U8": "nvfp4",
    "F32": "float",
    "BF16": "float",
}
_SCALES = ("scale", "weight_scale", "weight_scale_2", "input_scale")
# Modules that only the draft stages of DSpark builds have.
_DSPARK_MODULES = {"main_proj", "markov_head", "confidence_head"}


@dataclass(frozen=True)
class Source:
    """The stored values of one official tensor.

    Attributes:
        tensor: name on disk.
        dtype: in safetensors' spelling.
        shape: of the official tensor.
        start: position of its first element in the tensor on disk.
        first_row: row of a fused matrix at which it starts.
    """

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    first_row: int = 0


@dataclass(frozen=True)
class Leaf:
    """One parameter: a tensor, or the tensors of all experts `stacked`."""

    part: names.Stored
    stacked: bool
    sources: list[Source] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.sources), *self.part.shape) if self.stacked else self.part.shape

    @property
    def dtype(self) -> np.dtype:
        """As stored; ids are int32, and a stack of float32 and bfloat16 tensors is float32."""
        if self.is_expert_table:
            return np.dtype(np.int32)
        if self.part.dtype in ("F32", "BF16"):
            stored = {source.dtype for source in self.sources}
            return NUMPY_DTYPES["F32" if "F32" in stored else "BF16"]
        return NUMPY_DTYPES[self.part.dtype]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_scale(self) -> bool:
        """Whether this is a scale of packed weights."""
        return _is_scale(self.part)

    @property
    def is_expert_table(self) -> bool:
        return self.part.dtype == "I64"


@dataclass(frozen=True)
class Plan:
    """What a checkpoint holds.

    Attributes:
        leaves: its parameters, in the order of the official shards.
        weight_formats: of each matrix that may be packed, by its path without "weight".
        has_mtp: whether the MTP blocks are there.
        findings: what is wrong, one line each; the rest is complete only if this is empty.
    """

    leaves: list[Leaf]
    weight_formats: dict[names.Path, names.WeightFormat]
    has_mtp: bool
    findings: list[str]


def _is_scale(part: names.Stored) -> bool:
    return part.name.rpartition(".")[2] in _SCALES


def make_plan(tensors: Mapping[str, StoredTensor], config: Config) -> Plan:
    """Matches the tensors on disk, official or Hugging Face names, with the model's."""
    sources, findings = _official_sources(tensors, config.n_routed_experts)
    has_mtp = _has_mtp(sources, config)
    leaves: dict[names.Path, Leaf] = {}
    formats: dict[names.Path, dict[names.WeightFormat, list[int | None]]] = {}
    known: set[str] = set()
    for spec in names.tensors(config):
        if spec.path[0] == "mtp" and not has_mtp:
            continue
        source = sources.get(spec.name)
        weight_format = _weight_format(spec, source)
        if weight_format is None:
            allowed = names.FORMATS[spec.kind]
            accepted = tuple(dtype for dtype, f in _WEIGHT_FORMATS.items() if f in allowed)
            findings.append(_missing_or_mistyped(spec.name, source, accepted))
            known.update(part.name for f in allowed for part in names.stored(spec, f))
            continue
        if spec.kind in ("linear", "expert"):
            experts = formats.setdefault(spec.path[:-1], {}).setdefault(weight_format, [])
            experts.append(spec.expert)
        if source and source.first_row % 128 and weight_format == "fp8_block":
            findings.append(f"{source.tensor}: FP8 blocks reach across the matrices fused in it")
        for part in names.stored(spec, weight_format):
            known.add(part.name)
            leaf = leaves.setdefault(part.path, Leaf(part, spec.expert is not None))
            source, accepted = sources.get(part.name), _accepted_dtypes(part)
            if source is None or source.dtype not in accepted:
                findings.append(_missing_or_mistyped(part.name, source, accepted))
            elif source.shape != part.shape:
                expected = list(part.shape)
                findings.append(f"{part.name}: shape {list(source.shape)}, expected {expected}")
            else:
                leaf.sources.append(source)
    findings += _disagreements(formats)
    surplus = {
        source.tensor
        for name, source in sources.items()
        if name not in known and not _is_foreign_mtp(name, has_mtp, config)
    }
    findings += [f"{tensor}: not a tensor of this model" for tensor in sorted(surplus)]
    weight_formats = {module: next(iter(found)) for module, found in formats.items()}
    return Plan(list(leaves.values()), weight_formats, has_mtp, findings)


def _official_sources(
    tensors: Mapping[str, StoredTensor], num_experts: int
) -> tuple[dict[str, Source], list[str]]:
    """The official tensors, fused ones taken apart, and what cannot be understood."""
    sources: dict[str, Source] = {}
    findings = []
    for tensor_name, tensor in tensors.items():
        official = names.from_huggingface(tensor_name)
        fused = "*" in official[0]
        if fused and (
            len(tensor.shape) != 3
            or tensor.shape[0] != num_experts
            or tensor.shape[1] % len(official)
        ):
            expected = f"[{num_experts}, {len(official)} x rows, columns]"
            findings.append(f"{tensor_name}: shape {list(tensor.shape)}, expected {expected}")
            continue
        whole = Source(tensor_name, tensor.dtype, tensor.shape)
        for name, source in _unfused(whole, official) if fused else [(official[0], whole)]:
            if name in sources:
                findings.append(f"{name}: stored as both {sources[name].tensor} and {tensor_name}")
            sources[name] = source
    return sources, findings


def _unfused(fused: Source, matrices: tuple[str, ...]) -> Iterator[tuple[str, Source]]:
    """The experts' tensors in [experts, rows of all matrices, columns], "*" for the expert."""
    num_experts, fused_rows, columns = fused.shape
    rows = fused_rows // len(matrices)
    for expert in range(num_experts):
        for i, name in enumerate(matrices):
            start = (expert * fused_rows + i * rows) * columns
            source = Source(fused.tensor, fused.dtype, (rows, columns), start, i * rows)
            yield name.replace("*", str(expert)), source


def _weight_format(spec: names.TensorSpec, source: Source | None) -> names.WeightFormat | None:
    """The format that a tensor is stored in; None if it is missing or in none that it may have."""
    if spec.kind not in ("linear", "expert"):
        return "float"
    weight_format = _WEIGHT_FORMATS.get(source.dtype) if source else None
    return weight_format if weight_format in names.FORMATS[spec.kind] else None


def _has_mtp(sources: Mapping[str, Source], config: Config) -> bool:
    """False where none is expected, for DSpark builds, and for Hugging Face's, which drop it."""
    modules = [name.split(".")[2:3] for name in sources if name.startswith("mtp.")]
    if config.num_nextn_predict_layers == 0 or any(_DSPARK_MODULES & {*m} for m in modules):
        return False
    renamed = any(name != source.tensor for name, source in sources.items())
    return bool(modules) or not renamed


def _is_foreign_mtp(name: str, has_mtp: bool, config: Config) -> bool:
    """Whether a tensor belongs to draft stages that this model does not have."""
    stage = name.split(".")[1] if name.startswith("mtp.") else ""
    return stage.isdecimal() and (not has_mtp or int(stage) >= config.num_nextn_predict_layers)


def _accepted_dtypes(part: names.Stored) -> tuple[str, ...]:
    """The official dtype first, then what else holds the same values."""
    match part.dtype:
        case "BF16" | "F32" if not _is_scale(part):
            return ("F32", "BF16")
        case "F8_E8M0":
            # Some writers store powers of two as float32 numbers.
            return ("F8_E8M0", "F32")
        case "I64":
            return ("I64", "I32")
        case dtype:
            return (dtype,)


def _missing_or_mistyped(name: str, source: Source | None, accepted: tuple[str, ...]) -> str:
    if source is None:
        return f"{name}: missing"
    return f"{source.tensor}: stored as {source.dtype}, expected {' or '.join(accepted)}"


def _disagreements(
    formats: Mapping[names.Path, Mapping[names.WeightFormat, list[int | None]]],
) -> Iterator[str]:
    """Stacks whose experts are in several formats; every expert is named but those of most."""
    for module, experts_of in formats.items():
        if len(experts_of) > 1:
            most = max(experts_of, key=lambda f: len(experts_of[f]))
            others = ", ".join(
                f"{weight_format} ({', '.join(map(str, experts))})"
                for weight_format, experts in experts_of.items()
                if weight_format != most
            )
            yield f"{'.'.join(map(str, module))}: experts in {most}, but some in {others}"
