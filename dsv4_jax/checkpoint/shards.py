"""The safetensors files of one directory, read one tensor at a time."""

import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dsv4_jax.checkpoint.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"

# E8M0 scales are kept as exponent bytes, FP4 pairs as unsigned bytes.
NUMPY_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(np.uint8),
    "I8": np.dtype(np.uint8),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor on disk; `dtype` is safetensors' spelling, `offset` counts bytes of `file`."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int


class Shards:
    """The tensors of a checkpoint directory, their headers read and checked.

    The files are those that model.safetensors.index.json names, or every *.safetensors file when
    there is no index. A context manager: files that were read stay open until it ends.

    Raises:
        CheckpointError: listing truncated or unreadable files, headers that do not describe every
            byte of their file exactly once, files outside the directory, tensors stored twice,
            and every difference between index and files.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(self.directory, ["not a directory"])
        self.tensors: dict[str, StoredTensor] = {}
        self._open_files: dict[Path, BufferedReader] = {}
        self._exit_stack = ExitStack()
        index = self._read_index()
        files = sorted(self.directory.glob("*.safetensors") if index is None else {*index.values()})
        if not files:
            raise CheckpointError(self.directory, ["no safetensors file"])
        findings = []
        for file in files:
            try:
                header = read_header(file)
            except (OSError, ValueError, SafetensorError) as error:
                findings.append(f"{file.name}: {error}")
                header = {}
            else:
                absent = (n for n, f in (index or {}).items() if f == file and n not in header)
                findings += [f"{name}: in the index, not in {file.name}" for name in absent]
            for name, tensor in header.items():
                if name in self.tensors:
                    first = self.tensors[name].file.name
                    findings.append(f"{name}: stored in both {first} and {file.name}")
                elif index is not None and name not in index:
                    findings.append(f"{name}: in {file.name}, not in the index")
                self.tensors[name] = tensor
        if findings:
            raise CheckpointError(self.directory, findings)

    def _read_index(self) -> dict[str, Path] | None:
        """File of each tensor, or None when the directory has no index."""
        path = self.directory / INDEX_FILE
        if not path.exists():
            return None
        try:
            index = json.loads(path.read_bytes(), object_pairs_hook=_without_duplicates)
            files = {str(name): Path(file) for name, file in index["weight_map"].items()}
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            finding = f"{INDEX_FILE}: not a safetensors index ({error!r})"
            raise CheckpointError(self.directory, [finding]) from error
        outside = {file for file in files.values() if file.is_absolute() or ".." in file.parts}
        if outside:
            findings = [f"{INDEX_FILE}: {str(file)!r} leaves the directory" for file in outside]
            raise CheckpointError(self.directory, sorted(findings))
        return {name: self.directory / file for name, file in files.items()}

    def read_into(self, out: np.ndarray, name: str, start: int = 0) -> None:
        """Fills `out` with the elements of a tensor from flat position `start`, bytes unchanged.

        `out` is C-contiguous and has the tensor's dtype in NUMPY_DTYPES.
        """
        tensor = self.tensors[name]
        if tensor.file not in self._open_files:
            self._open_files[tensor.file] = self._exit_stack.enter_context(tensor.file.open("rb"))
        file = self._open_files[tensor.file]
        file.seek(tensor.offset + start * out.itemsize)
        buffer = out.reshape(-1).view(np.uint8)
        if file.readinto(buffer.data) != buffer.size:
            raise CheckpointError(self.directory, [f"{tensor.file.name}: truncated while reading"])

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit_stack.close()


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"keys that occur twice: {', '.join(repeated)}")
    return dict(pairs)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The header of one file; `safe_open` checks that its tensors cover the file exactly."""
    if not file.is_file():
        raise ValueError("no such file")
    with safe_open(file, framework="numpy"), file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size), object_pairs_hook=_without_duplicates)
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            file=file,
            offset=8 + size + entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }
