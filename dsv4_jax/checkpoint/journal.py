"""What an unfinished conversion has done: a line for the job, then one for each checked shard."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from dsv4_jax.checkpoint import files, names
from dsv4_jax.checkpoint.shards import read_header

JOURNAL_FILE = "conversion.journal"


@dataclass(frozen=True)
class Record:
    """One shard.

    Attributes:
        digests: SHA-256 of each tensor's dtype, shape and bytes.
        relative_errors: of each matrix that changed its format; None where all values are the
            same.
    """

    digests: dict[str, str] = field(default_factory=dict)
    relative_errors: dict[str, float | None] = field(default_factory=dict)


class Journal:
    """The journal of a directory, begun if that is absent or empty.

    Args:
        directory: where the conversion writes.
        job: what determines every byte that it writes.

    Raises:
        ValueError: the directory holds something else, or was begun with another job.
    """

    def __init__(self, directory: Path, job: Mapping[str, Any]):
        self.records: dict[str, Record] = {}
        self._path = directory / JOURNAL_FILE
        begun = self._path.is_file()
        if directory.exists() and not (
            directory.is_dir() and (begun or not any(directory.iterdir()))
        ):
            raise ValueError(
                f"target: got {directory}, expected an absent or empty directory, or one with an "
                "interrupted conversion"
            )
        directory.mkdir(parents=True, exist_ok=True)
        text = self._path.read_bytes() if begun else b""
        # An interruption may have cut the last line short.
        complete = text[: text.rfind(b"\n") + 1]
        if complete != text:
            os.truncate(self._path, len(complete))
        lines = [json.loads(line) for line in complete.splitlines()]
        if not lines:
            self._append(job)
            return
        was, now = lines[0], json.loads(json.dumps(job))
        for key in now:
            if was.get(key) != now[key]:
                change = "another input" if key == "input" else f"{key} {was.get(key)}"
                raise ValueError(f"target: got {directory}, begun with {change}, expected the same")
        self.records = {line.pop("file"): Record(**line) for line in lines[1:]}

    def add(self, file: str, record: Record) -> None:
        self.records[file] = record
        self._append({"file": file, **asdict(record)})

    def remove(self) -> None:
        self._path.unlink()

    def _append(self, line: Mapping[str, Any]) -> None:
        with self._path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def fingerprint(directory: Path) -> dict[str, list[int]]:
    """Size and time of last change of each file that a checkpoint is read from."""
    found = sorted([*directory.glob("*.safetensors"), *directory.glob("*.json")])
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in found}


def digest(dtype: str, shape: tuple[int, ...], data: np.ndarray) -> str:
    sha = hashlib.sha256(f"{dtype} {list(shape)}\n".encode())
    sha.update(files.as_bytes(data).data)
    return sha.hexdigest()


def problems(path: Path, digests: Mapping[str, str]) -> list[str]:
    """What is not in a shard as it was meant, read from its file."""
    try:
        header = read_header(path)
    except (OSError, ValueError, SafetensorError) as error:
        return [f"{path.name}: {error}"]
    if header.keys() != digests.keys():
        return [f"{path.name}: other tensors than were written"]
    found = []
    with path.open("rb") as file:
        for name, tensor in header.items():
            file.seek(tensor.offset)
            data = file.read(math.prod(tensor.shape) * names.ITEM_BYTES[tensor.dtype])
            if digest(tensor.dtype, tensor.shape, np.frombuffer(data, np.uint8)) != digests[name]:
                found.append(f"{name}: {path.name} holds other bytes than were written")
    return found
