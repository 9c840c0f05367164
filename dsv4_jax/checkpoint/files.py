"""The files of a checkpoint; none has its name before it is complete and on disk."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedWriter
from pathlib import Path
from typing import TypeVar

import numpy as np

from dsv4_jax.checkpoint import names
from dsv4_jax.checkpoint.shards import INDEX_FILE

MAX_SHARD_BYTES = 5 * 10**9

Item = TypeVar("Item")


def split(
    items: Iterable[Item], num_bytes: Callable[[Item], int], max_shard_bytes: int
) -> dict[str, list[Item]]:
    """The items of each shard by its file name; an item that is too large has its own.

    Raises:
        ValueError: max_shard_bytes < 1.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: got {max_shard_bytes}, expected at least 1")
    shards: list[list[Item]] = [[]]
    shard_bytes = 0
    for item in items:
        if shards[-1] and shard_bytes + num_bytes(item) > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(item)
        shard_bytes += num_bytes(item)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {
        f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)
    }


def write_shard(
    path: Path, tensors: Iterable[names.Stored], arrays: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes a safetensors file; `arrays` gives each tensor once, in any order."""
    # Wide items first: every tensor then starts at a multiple of its item size.
    ordered = sorted(tensors, key=lambda tensor: -names.ITEM_BYTES[tensor.dtype])
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offsets = {}
    end = 0
    for tensor in ordered:
        offsets[tensor.name], end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offsets[tensor.name], end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with new_file(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, array in arrays:
            file.seek(8 + len(encoded) + offsets[name])
            file.write(as_bytes(array).data)


def as_bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def write_index(directory: Path, shards: Mapping[str, Sequence[names.Stored]]) -> None:
    total_size = sum(tensor.num_bytes for tensors in shards.values() for tensor in tensors)
    weight_map = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_json(directory / INDEX_FILE, index)


def write_json(path: Path, content: dict) -> None:
    with new_file(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def copy(source: str | Path, path: Path) -> None:
    with open(source, "rb") as original, new_file(path) as file:
        shutil.copyfileobj(original, file)


@contextmanager
def new_file(path: Path) -> Iterator[BufferedWriter]:
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
