"""The Python standard library's source, and the part of it that the mini model never saw.

The files are those of the running interpreter (or of a directory of .py files) and are licensed
under the PSF License Agreement. Nothing in them is changed.
"""

import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

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


def _largest_first(documents: Iterable[Document]) -> list[Document]:
    return sorted(documents, key=lambda document: (-document.num_bytes, document.path))


def split(documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """(train, held out), each ordered by path.

    Held out is the source of HELD_OUT_MODULES; their tests are on neither side. A file that is
    nearly a copy of a held-out one, or of a larger one on its side, is left out.
    """
    held_out, train = [], []
    for document in documents:
        if document.module not in HELD_OUT_MODULES:
            train.append(document)
        elif not document.is_test:
            held_out.append(document)
    ordered = [*_largest_first(held_out), *_largest_first(train)]
    kept = sorted(without_near_duplicates(ordered), key=lambda document: document.path)
    return (
        [document for document in kept if document.module not in HELD_OUT_MODULES],
        [document for document in kept if document.module in HELD_OUT_MODULES],
    )


def held_out(stdlib: Path | None = None) -> list[Document]:
    """The held-out side of a library's `split`, see `collect`."""
    documents = [d for d in collect(stdlib) if d.module in HELD_OUT_MODULES]
    return split(documents)[1]
