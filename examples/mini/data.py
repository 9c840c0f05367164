"""The mini model's text: the Python standard library's source, split by module.

The files come from the running interpreter (or from a directory of .py files) and are licensed
under the PSF License Agreement. Nothing in them is changed.
"""

import argparse
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from tokenizers import Tokenizer

BOS_ID, EOS_ID = 0, 1

# Large and small, old and new, whose tests bear their name. No file of theirs, and no test of
# them, is ever trained on.
HELD_OUT_MODULES = frozenset(
    {
        "argparse",
        "configparser",
        "csv",
        "fractions",
        "heapq",
        "json",
        "queue",
        "sched",
        "shutil",
        "socketserver",
        "statistics",
        "textwrap",
        "wsgiref",
    }
)

# Installed packages, build configuration of one machine, and generated prose.
_EXCLUDED_DIRECTORIES = ("site-packages", "dist-packages", "config-", "pydoc_data")
_EXCLUDED_FILES = "_sysconfigdata"

# Files of which this share of runs of 4 lines stands in one earlier file are near-duplicates.
_DUPLICATE_SHARE = 0.3
_SHINGLE_LINES = 4


@dataclass(frozen=True)
class Document:
    """One source file; `path` is relative to the library's directory, with slashes."""

    path: str
    text: str

    @property
    def is_test(self) -> bool:
        return self.path.startswith("test/")

    @property
    def module(self) -> str:
        """The top-level module that the file belongs to or tests."""
        parts = PurePosixPath(self.path).with_suffix("").parts
        if self.is_test:
            return parts[1].removeprefix("test_")
        return parts[0].removeprefix("_py").removeprefix("_")

    @property
    def num_bytes(self) -> int:
        return len(self.text.encode())


def collect(stdlib: Path | None = None) -> list[Document]:
    """All UTF-8 .py files of a standard library, ordered by path.

    Args:
        stdlib: the library's directory; the running interpreter's by default.

    Raises:
        ValueError: there is no such file in the directory.
    """
    root = Path(stdlib or sysconfig.get_path("stdlib"))
    documents = []
    for file in root.rglob("*.py"):
        path = file.relative_to(root)
        if path.name.startswith(_EXCLUDED_FILES) or any(
            part.startswith(_EXCLUDED_DIRECTORIES) for part in path.parts[:-1]
        ):
            continue
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            documents.append(Document(path.as_posix(), text))
    if not documents:
        raise ValueError(f"stdlib: got {root}, expected a directory with .py files")
    return sorted(documents, key=lambda document: document.path)


def _shingles(text: str) -> set[int]:
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    starts = range(max(len(lines) - _SHINGLE_LINES + 1, 1))
    return {zlib.crc32("\n".join(lines[i : i + _SHINGLE_LINES]).encode()) for i in starts}


def without_near_duplicates(documents: Iterable[Document]) -> Iterator[Document]:
    """Keeps the first of files of which one shares much of its text with another."""
    owner: dict[int, str] = {}
    size: dict[str, int] = {}
    for document in documents:
        shingles = _shingles(document.text)
        shared = Counter(owner[shingle] for shingle in shingles if shingle in owner)
        if any(
            count > _DUPLICATE_SHARE * min(size[path], len(shingles))
            for path, count in shared.items()
        ):
            continue
        size[document.path] = len(shingles)
        for shingle in shingles:
            owner.setdefault(shingle, document.path)
        yield document


def split(documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """(train, held out).

    Held out is the source of HELD_OUT_MODULES; their tests are on neither side. A file that is
    nearly a copy of a held-out one, or of a larger one, is left out.
    """
    held_out, train = [], []
    for document in documents:
        if document.module not in HELD_OUT_MODULES:
            train.append(document)
        elif not document.is_test:
            held_out.append(document)
    # Of two near-duplicates on one side the larger one stays.
    for side in (held_out, train):
        side.sort(key=lambda document: (-document.num_bytes, document.path))
    kept = sorted(without_near_duplicates([*held_out, *train]), key=lambda d: d.path)
    return (
        [document for document in kept if document.module not in HELD_OUT_MODULES],
        [document for document in kept if document.module in HELD_OUT_MODULES],
    )


def token_stream(documents: Iterable[Document], tokenizer: Tokenizer) -> np.ndarray:
    """BOS, a document's ids, EOS, and so on, int32 [num_tokens]."""
    encodings = tokenizer.encode_batch_fast([d.text for d in documents], add_special_tokens=False)
    pieces = [np.asarray([BOS_ID, *encoding.ids, EOS_ID], np.int32) for encoding in encodings]
    return np.concatenate(pieces)


def sequence_starts(num_tokens: int, length: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Where the sequences of each step begin, int32 [batch].

    An epoch cuts the stream into consecutive sequences at a random offset and shuffles them.
    """
    rng = np.random.default_rng(seed)
    waiting = np.empty(0, np.int32)
    while True:
        while len(waiting) < batch:
            cuts = np.arange(rng.integers(length), num_tokens - length, length, dtype=np.int32)
            waiting = np.concatenate([waiting, rng.permutation(cuts)])
        yield waiting[:batch]
        waiting = waiting[batch:]


def evaluation_batches(stream: np.ndarray, length: int, batch: int) -> np.ndarray:
    """Consecutive sequences, int32 [n, batch, length + 1], padded with BOS.

    Each overlaps the one before by a token, so that every token but the first is predicted once.
    """
    num_rows = -(-(len(stream) - 1) // length)
    num_batches = -(-num_rows // batch)
    padded = np.full(num_batches * batch * length + 1, BOS_ID, np.int32)
    padded[: len(stream)] = stream
    rows = np.arange(num_batches * batch)[:, None] * length + np.arange(length + 1)
    return padded[rows].reshape(num_batches, batch, length + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Sizes of the two sides of the split.")
    parser.add_argument("--stdlib", type=Path, help="directory of .py files")
    documents = collect(parser.parse_args().stdlib)
    for name, side in zip(("train", "held out"), split(documents), strict=True):
        num_bytes = sum(document.num_bytes for document in side)
        tests = sum(document.num_bytes for document in side if document.is_test)
        print(f"{name}: {len(side)} files, {num_bytes:,} bytes, of which tests {tests:,}")


if __name__ == "__main__":
    main()
