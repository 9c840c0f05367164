"""Writes a checkpoint with its matrices in other formats, a matrix at a time."""

import io
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np

from dsv4_jax.checkpoint import files, journal, names
from dsv4_jax.checkpoint.convert import (
    EXPERT_GROUPS,
    convert_matrices,
    converted_config,
    wanted_formats,
    width_problem,
)
from dsv4_jax.checkpoint.errors import CheckpointError
from dsv4_jax.checkpoint.manifest import write_configs
from dsv4_jax.checkpoint.plan import Leaf, Plan, make_plan
from dsv4_jax.checkpoint.read import read_leaf
from dsv4_jax.checkpoint.shards import Shards
from dsv4_jax.config import Config
from dsv4_jax.text.constants import ENCODING_FILE

REPORT_FILE = "conversion.json"

_FLOAT_DTYPES = {"float32": "F32", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Report:
    """What a conversion did to the matrices that changed their format.

    Attributes:
        num_exact: how many kept every value.
        relative_errors: of the others, by name: Frobenius norm of the change over the matrix's.
    """

    num_exact: int
    relative_errors: dict[str, float]


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the model: what it is read from and what it becomes.

    Attributes:
        inputs: its parts as stored, each with one source.
        target_format: None for a tensor that stays as it is.
    """

    spec: names.TensorSpec
    inputs: tuple[Leaf, ...]
    source_format: names.WeightFormat
    target_format: names.WeightFormat | None
    outputs: tuple[names.Stored, ...]


# Tensors that are converted together, and stand in one shard.
_Unit = list[_Tensor]


def convert(
    source: str | Path,
    target: str | Path,
    *,
    experts: str | None = None,
    linears: str | None = None,
    max_shard_bytes: int = files.MAX_SHARD_BYTES,
    progress: bool = False,
) -> Report:
    """Writes the checkpoint in `source` to `target` with its matrices in other formats.

    Conversions are those of `convert_weight`; w1 and w3 of an expert share scale_2 as NVFP4.
    Tensors of other kinds, and of kinds without a format, keep their values and get their official
    names. Every shard is read back and compared with what was to be written. An interrupted
    conversion that is run again keeps its finished shards; the result is the same to the byte.
    Host memory: two matrices of an expert, or one other tensor, and their float32 values.

    `target` gets the shards and their index, config.json, with NVFP4 experts hf_quant_config.json,
    tokenizer.json, the encoding file, and conversion.json: the report.

    Args:
        source: directory of the checkpoint.
        target: absent, empty, or with an interrupted conversion of the same input and options.
        experts: "nvfp4", "mxfp4", "fp8" or "bf16" for routed experts, also those of MTP blocks.
        linears: "fp8" or "bf16" for the linears of attention, shared experts and MTP blocks.
        max_shard_bytes: tensor bytes in a file; what is converted together is never split.
        progress: draw a progress bar on stderr.

    Raises:
        ValueError: no format, an unknown one, `target` is `source` or not as above.
        CheckpointError: what is wrong with `source`, or a shard that was not written correctly.
    """
    source, target = Path(source), Path(target)
    wanted = wanted_formats(experts, linears)
    if not any(wanted.values()):
        raise ValueError("experts, linears: got None, expected a format for at least one")
    if not source.is_dir():
        raise ValueError(f"source: got {str(source)!r}, expected an existing directory")
    if source.resolve() == target.resolve():
        raise ValueError(f"target: got {target}, the source itself, expected another directory")
    config = Config.from_json(source)
    job = {
        "experts": experts,
        "linears": linears,
        "max_shard_bytes": max_shard_bytes,
        "input": journal.fingerprint(source),
    }
    with Shards(source) as shards:
        plan = make_plan(shards.tensors, config)
        if plan.findings:
            raise CheckpointError(source, plan.findings)
        if not plan.has_mtp:
            config = replace(config, num_nextn_predict_layers=0)
        units = _units(config, plan, wanted)
        if findings := [found for unit in units for t in unit if (found := _refusal(t))]:
            raise CheckpointError(source, findings)
        parts = files.split(units, _num_bytes, max_shard_bytes)
        records = journal.Journal(target, job)
        with click.progressbar(
            length=sum(map(_num_bytes, units)),
            label="Converting",
            file=sys.stderr if progress else io.StringIO(),
        ) as bar:
            for file, part in parts.items():
                known = records.records.get(file)
                if known is not None and not journal.problems(target / file, known.digests):
                    bar.update(sum(map(_num_bytes, part)))
                    continue
                record = journal.Record()
                arrays = _arrays(part, shards, config, record, bar.update)
                _write_shard(target / file, part, arrays, record)
                records.add(file, record)
    if len(parts) > 1:
        files.write_index(target, {file: _outputs(part) for file, part in parts.items()})
    formats = {
        t.spec.path[:-1]: t.target_format or t.source_format
        for unit in units
        for t in unit
        if t.spec.kind in wanted
    }
    new_config = converted_config(config, formats, experts)
    with Shards(target) as written:
        if findings := make_plan(written.tensors, new_config).findings:
            raise CheckpointError(target, findings)
    report = _report([records.records[file] for file in parts])
    _write_rest(source, target, job, report)
    write_configs(target, new_config, formats)
    records.remove()
    return report


def _units(
    config: Config, plan: Plan, wanted: Mapping[names.Kind, names.WeightFormat | None]
) -> list[_Unit]:
    leaves = {leaf.part.path: leaf for leaf in plan.leaves}
    units: dict[str, _Unit] = {}
    first_of = {matrix: group[0] for group in EXPERT_GROUPS for matrix in group}
    for spec in names.tensors(config):
        *parents, module, _ = spec.path
        source_format = plan.weight_formats.get(spec.path[:-1], "float")
        inputs = tuple(
            Leaf(part, False, [leaves[part.path].sources[spec.expert or 0]])
            for part in names.stored(spec, source_format)
        )
        target_format = wanted.get(spec.kind)
        is_float32 = inputs[0].dtype == np.float32
        if target_format is None or (target_format == source_format and not is_float32):
            outputs = tuple(leaf.part._replace(dtype=_stored_dtype(leaf)) for leaf in inputs)
            target_format = None
        else:
            outputs = names.stored(spec, target_format)
        tensor = _Tensor(spec, inputs, source_format, target_format, outputs)
        unit = spec.name
        if spec.kind == "expert":
            unit = f"{parents} {spec.expert} {first_of[str(module)]}"
        units.setdefault(unit, []).append(tensor)
    return list(units.values())


def _stored_dtype(leaf: Leaf) -> str:
    """That of a tensor that stays as it is; other spellings of scales and ids become official."""
    plain = leaf.part.dtype in _FLOAT_DTYPES.values()
    return _FLOAT_DTYPES[leaf.dtype.name] if plain else leaf.part.dtype


def _refusal(tensor: _Tensor) -> str | None:
    if tensor.target_format is None:
        return None
    found = width_problem(tensor.spec.shape[-1], tensor.target_format)
    return found and f"{tensor.spec.name}: {found}"


def _outputs(units: Iterable[_Unit]) -> list[names.Stored]:
    return [output for unit in units for tensor in unit for output in tensor.outputs]


def _num_bytes(unit: _Unit) -> int:
    return sum(output.num_bytes for output in _outputs([unit]))


def _arrays(
    units: list[_Unit],
    shards: Shards,
    config: Config,
    record: journal.Record,
    advance: Callable[[int], None],
) -> Iterator[tuple[str, np.ndarray]]:
    for unit in units:
        for output, array in _convert_unit(unit, shards, config, record.relative_errors):
            record.digests[output.name] = journal.digest(output.dtype, output.shape, array)
            yield output.name, array
        advance(_num_bytes(unit))


def _write_shard(
    path: Path,
    units: list[_Unit],
    arrays: Iterable[tuple[str, np.ndarray]],
    record: journal.Record,
) -> None:
    """Writes a shard and reads it back; `record` is complete when `arrays` ends."""
    files.write_shard(path, _outputs(units), arrays)
    if findings := journal.problems(path, record.digests):
        path.unlink(missing_ok=True)
        raise CheckpointError(path.parent, findings)


def _convert_unit(
    unit: _Unit, shards: Shards, config: Config, relative_errors: dict[str, float | None]
) -> Iterator[tuple[names.Stored, np.ndarray]]:
    stored = [_read(tensor, shards, config) for tensor in unit]
    changing = [i for i, tensor in enumerate(unit) if tensor.target_format is not None]
    if changing:
        target_format = unit[changing[0]].target_format
        assert target_format is not None
        try:
            converted = convert_matrices(
                [stored[i] for i in changing],
                [unit[i].source_format for i in changing],
                target_format,
            )
        except ValueError as error:
            matrices = " and ".join(unit[i].spec.name for i in changing)
            raise CheckpointError(shards.directory, [f"{matrices}: {error}"]) from error
        for i, result in zip(changing, converted, strict=True):
            relative_errors[unit[i].spec.name] = None if result.exact else result.relative_error
            stored[i] = {leaf: np.asarray(array) for leaf, array in result.arrays.items()}
    for tensor, arrays in zip(unit, stored, strict=True):
        for output in tensor.outputs:
            array = arrays[str(output.path[-1])]
            yield output, array.astype(np.int64) if output.dtype == "I64" else array


def _read(tensor: _Tensor, shards: Shards, config: Config) -> dict[str, np.ndarray]:
    arrays = {}
    for leaf in tensor.inputs:
        array, findings = read_leaf(shards, leaf, config.n_routed_experts)
        if findings:
            raise CheckpointError(shards.directory, findings)
        arrays[str(leaf.part.path[-1])] = array
    return arrays


def _report(records: list[journal.Record]) -> Report:
    errors = {n: error for record in records for n, error in record.relative_errors.items()}
    inexact = {name: error for name, error in errors.items() if error is not None}
    return Report(len(errors) - len(inexact), inexact)


def _write_rest(source: Path, target: Path, job: dict, report: Report) -> None:
    """All but weights and configs; config.json comes last: before it this is no checkpoint."""
    for name in ("tokenizer.json", ENCODING_FILE):
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            files.copy(source / name, target / name)
    content = {
        "experts": job["experts"],
        "linears": job["linears"],
        "num_exact": report.num_exact,
        "num_requantized": len(report.relative_errors),
        "relative_errors": report.relative_errors,
    }
    files.write_json(target / REPORT_FILE, content)
