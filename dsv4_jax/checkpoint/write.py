"""Writes a checkpoint in the official format."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.checkpoint import files, names, values
from dsv4_jax.checkpoint.errors import CheckpointError
from dsv4_jax.checkpoint.manifest import MANIFEST_FILE, write_configs
from dsv4_jax.checkpoint.plan import Leaf, make_plan
from dsv4_jax.checkpoint.shards import INDEX_FILE, StoredTensor
from dsv4_jax.config import Config

Params = Mapping[names.Path, jax.Array | np.ndarray]

_STORED_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "int32": "I64"}


@dataclass(frozen=True)
class _Output:
    """One tensor to be written: a row of a stacked parameter, or all of a parameter."""

    tensor: names.Stored
    leaf: Leaf
    row: int | None


def write(
    directory: str | Path,
    config: Config,
    params: Params,
    *,
    tokenizer_file: str | Path | None = None,
    max_shard_bytes: int = files.MAX_SHARD_BYTES,
) -> None:
    """Writes the shards, their index if there are several, the tokenizer and the configs.

    Every value is written as it is, packed weights packed: `read` gives the same arrays back.
    A file has a temporary name until it is complete and synced, and config.json comes last, so
    that what an interruption leaves is no checkpoint. After an error the files are removed.
    Host memory: one tensor, of stacked experts one expert's.

    Args:
        directory: absent or empty; nothing is ever overwritten.
        config: the model's. It is written with no MTP block when `params` hold none.
        params: every parameter by its path, as `read` returns them.
        tokenizer_file: copied to tokenizer.json.
        max_shard_bytes: tensor bytes in a file; a larger tensor has a file of its own.

    Raises:
        ValueError: the directory is not empty, there is no tokenizer_file, max_shard_bytes < 1.
        CheckpointError: listing what in `params` `read` would refuse.
    """
    directory = Path(directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise ValueError(f"directory: got {directory}, expected an absent or empty one")
    if tokenizer_file is not None and not Path(tokenizer_file).is_file():
        raise ValueError(f"tokenizer_file: got {tokenizer_file}, expected a file")
    if not any(path[0] == "mtp" for path in params):
        config = replace(config, num_nextn_predict_layers=0)
    outputs, weight_formats = _outputs(directory, config, params)
    shards = files.split(
        outputs,
        lambda output: output.tensor.num_bytes,
        max_shard_bytes,
    )
    tensors = {file: [output.tensor for output in outputs] for file, outputs in shards.items()}

    directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as on_error:

        def created(name: str) -> Path:
            on_error.callback((directory / name).unlink, missing_ok=True)
            return directory / name

        for file, outputs in shards.items():
            arrays = _arrays(directory, outputs, params, config)
            files.write_shard(created(file), tensors[file], arrays)
        if len(shards) > 1:
            created(INDEX_FILE)
            files.write_index(directory, tensors)
        if tokenizer_file is not None:
            files.copy(tokenizer_file, created("tokenizer.json"))
        created(MANIFEST_FILE)
        write_configs(directory, config, weight_formats)
        on_error.pop_all()


def _outputs(
    directory: Path, config: Config, params: Params
) -> tuple[list[_Output], dict[names.Path, names.WeightFormat]]:
    """What is to be written, checked as if it were being read, and the formats of matrices."""
    tensors: dict[str, StoredTensor] = {}
    findings = []
    for path, array in params.items():
        weight_format: names.WeightFormat = "float"
        if (*path[:-1], "scale_2") in params:
            weight_format = "nvfp4"
        dtype = _STORED_DTYPES.get(array.dtype.name, array.dtype.name)
        if dtype == "uint8":
            pairs = "U8" if weight_format == "nvfp4" else "I8"
            dtype = "F8_E8M0" if path[-1] == "scale" else pairs
        stacked = "experts" in path
        if stacked and array.shape[:1] != (config.n_routed_experts,):
            expected = f"[{config.n_routed_experts}, ...]"
            findings.append(f"{path}: shape {list(array.shape)}, expected {expected}")
            continue
        shape = array.shape[1:] if stacked else array.shape
        for expert in range(config.n_routed_experts) if stacked else [None]:
            name = names.official_name(path, expert, weight_format)
            tensors[name] = StoredTensor(dtype, shape, directory, 0)
    plan = make_plan(tensors, config)
    if findings or plan.findings:
        raise CheckpointError(directory, findings + plan.findings)
    outputs = [
        _Output(
            leaf.part._replace(name=source.tensor, dtype=source.dtype),
            leaf,
            row if leaf.stacked else None,
        )
        for leaf in plan.leaves
        for row, source in enumerate(leaf.sources)
    ]
    return outputs, plan.weight_formats


def _arrays(
    directory: Path, outputs: list[_Output], params: Params, config: Config
) -> Iterator[tuple[str, np.ndarray]]:
    for output in outputs:
        array = _on_host(params[output.leaf.part.path], output.row)
        if found := values.problem(output.leaf, array, config.n_routed_experts):
            raise CheckpointError(directory, [f"{output.tensor.name}: {found}"])
        yield output.tensor.name, array.astype(np.int64) if output.tensor.dtype == "I64" else array


def _on_host(array: jax.Array | np.ndarray, row: int | None) -> np.ndarray:
    if isinstance(array, jax.Array) and row is None:
        # An array keeps the host copy that is made of it; this one is dropped with it.
        array = jnp.copy(array)
    return np.asarray(array if row is None else array[row])
