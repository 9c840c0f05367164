"""More text from the same library: copies of files in which names are exchanged.

A model of this size learns the library's own names by heart. In a copy every file's own names are
replaced by names of other files, consistently from definition to last use, so that what a name
refers to has to be read from the context.
"""

import builtins
import keyword
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from data import Document

_DEFINED = re.compile(
    r"^[ \t]*(?:async )?(?:def|class)[ ]+(\w+)|^[ \t]*(?:self\.)?(\w+)[ ]*=[^=]", re.MULTILINE
)
_WORD = re.compile(r"[A-Za-z_]\w*")
_SHORTEST = 4
_RENAMED_SHARE = 0.7
_FIXED = frozenset({*keyword.kwlist, *dir(builtins), "self", "unittest", "setUp", "tearDown"})


def _kind(name: str) -> str:
    bare = name.lstrip("_")
    if bare.isupper():
        return "constant"
    if bare.startswith("test"):
        return "test"
    return "class" if bare[:1].isupper() else "other"


def defined_names(text: str) -> list[str]:
    """Names that a file defines, in order of appearance."""
    found = (name for pair in _DEFINED.findall(text) for name in pair if name)
    return [
        name
        for name in dict.fromkeys(found)
        if len(name) >= _SHORTEST and not name.startswith("__") and name not in _FIXED
    ]


def name_pool(documents: Sequence[Document]) -> dict[str, list[str]]:
    """All defined names by kind: constants, tests, classes, others."""
    pool = defaultdict(dict)
    for document in documents:
        for name in defined_names(document.text):
            pool[_kind(name)][name] = None
    return {kind: list(names) for kind, names in pool.items()}


def renamed(document: Document, pool: dict[str, list[str]], seed: int) -> Document:
    """The file with most of its own names replaced by names from `pool` of the same kind."""
    rng = np.random.default_rng([seed, *document.path.encode()])
    taken = set(_WORD.findall(document.text))
    exchange = {}
    for name in defined_names(document.text):
        names = pool[_kind(name)]
        new = names[rng.integers(len(names))]
        if rng.random() < _RENAMED_SHARE and new not in taken:
            exchange[name] = new
            taken.add(new)
    text = _WORD.sub(lambda match: exchange.get(match[0], match[0]), document.text)
    return replace(document, text=text)


def renamed_copies(documents: Sequence[Document], copies: int) -> list[list[Document]]:
    """`copies` versions of all documents, each with other names."""
    pool = name_pool(documents)
    return [[renamed(document, pool, seed) for document in documents] for seed in range(copies)]
