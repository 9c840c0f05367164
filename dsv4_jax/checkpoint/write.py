"""Writes a checkpoint in the official format."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from io import BufferedWriter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.checkpoint import names, values
from dsv4_jax.checkpoint.errors import CheckpointError
from dsv4_jax.checkpoint.plan import Leaf, make_plan
from dsv4_jax.checkpoint.shards import INDEX_FILE, StoredTensor
from dsv4_jax.config import Config

Params = Mapping[names.Path, jax.Array | np.ndarray]

_STORED_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "int32": "I64"}


@dataclass(frozen=True)
class _Output:
    """One tensor to be written: a row of a stacked parameter, or all of a parameter."""

    name: str
    dtype: str
    leaf: Leaf
    row: int | None

    @property
    def num_bytes(self) -> int:
        return self.leaf.part.num_elements * names.ITEM_BYTES[self.dtype]


def write(
    directory: str | Path,
    config: Config,
    params: Params,
    *,
    tokenizer_file: str | Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes the shards, their index if there are several, the tokenizer and config.json.

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
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: got {max_shard_bytes}, expected at least 1")
    if not any(path[0] == "mtp" for path in params):
        config = replace(config, num_nextn_predict_layers=0)
    shards = _split(_outputs(directory, config, params), max_shard_bytes)
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]

    directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as on_error:
        for file, outputs in zip(files, shards, strict=True):
            on_error.callback((directory / file).unlink, missing_ok=True)
            _write_shard(directory / file, outputs, params, config)
        if len(shards) > 1:
            on_error.callback((directory / INDEX_FILE).unlink, missing_ok=True)
            _write_json(directory / INDEX_FILE, _index(files, shards))
        if tokenizer_file is not None:
            on_error.callback((directory / "tokenizer.json").unlink, missing_ok=True)
            with open(tokenizer_file, "rb") as source, _new(directory / "tokenizer.json") as copy:
                shutil.copyfileobj(source, copy)
        _write_json(directory / "config.json", config.to_dict())
        on_error.pop_all()


def _outputs(directory: Path, config: Config, params: Params) -> list[_Output]:
    """What is to be written, checked as if it were being read."""
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
    return [
        _Output(source.tensor, source.dtype, leaf, row if leaf.stacked else None)
        for leaf in plan.leaves
        for row, source in enumerate(leaf.sources)
    ]


def _split(outputs: list[_Output], max_shard_bytes: int) -> list[list[_Output]]:
    shards: list[list[_Output]] = [[]]
    num_bytes = 0
    for output in outputs:
        if shards[-1] and num_bytes + output.num_bytes > max_shard_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(output)
        num_bytes += output.num_bytes
    return shards


def _index(files: list[str], shards: list[list[_Output]]) -> dict:
    return {
        "metadata": {"total_size": sum(output.num_bytes for shard in shards for output in shard)},
        "weight_map": {
            output.name: file for file, shard in zip(files, shards, strict=True) for output in shard
        },
    }


def _write_shard(path: Path, outputs: list[_Output], params: Params, config: Config) -> None:
    # Wide items first: every tensor then starts at a multiple of its item size.
    outputs = sorted(outputs, key=lambda output: -names.ITEM_BYTES[output.dtype])
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for output in outputs:
        begin, end = end, end + output.num_bytes
        shape = list(output.leaf.part.shape)
        header[output.name] = {"dtype": output.dtype, "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with _new(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for output in outputs:
            array = _on_host(params[output.leaf.part.path], output.row)
            if found := values.problem(output.leaf, array, config.n_routed_experts):
                raise CheckpointError(path.parent, [f"{output.name}: {found}"])
            stored = array.astype(np.int64) if output.dtype == "I64" else array
            file.write(np.ascontiguousarray(stored).reshape(-1).view(np.uint8).data)


def _on_host(array: jax.Array | np.ndarray, row: int | None) -> np.ndarray:
    if isinstance(array, jax.Array) and row is None:
        # An array keeps the host copy that is made of it; this one is dropped with it.
        array = jnp.copy(array)
    return np.asarray(array if row is None else array[row])


def _write_json(path: Path, content: dict) -> None:
    with _new(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


@contextmanager
def _new(path: Path) -> Iterator[BufferedWriter]:
    """A file that gets its name once it is complete and on disk."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
