"""The mini model's text as token streams; `dsv4_jax.mini.text` says what is held out."""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from dsv4_jax.mini.text import Document, collect, split

BOS_ID, EOS_ID = 0, 1


def token_stream(documents: Iterable[Document], tokenizer: Tokenizer) -> np.ndarray:
    """BOS, a document's ids, EOS, and so on, int32 [num_tokens]."""
    encodings = tokenizer.encode_batch_fast([d.text for d in documents], add_special_tokens=False)
    pieces = [np.asarray([BOS_ID, *encoding.ids, EOS_ID], np.int32) for encoding in encodings]
    return np.concatenate(pieces)


def is_text(ids: np.ndarray) -> np.ndarray:
    """Document boundaries carry no bytes."""
    return (ids != BOS_ID) & (ids != EOS_ID)


def sequence_starts(num_tokens: int, length: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Where the sequences of each step begin, int32 [batch].

    An epoch cuts the stream into consecutive sequences at a random offset and shuffles them. Two
    more tokens than `length` follow every start.
    """
    rng = np.random.default_rng(seed)
    waiting = np.empty(0, np.int32)
    while True:
        while len(waiting) < batch:
            last = num_tokens - length - 1
            cuts = np.arange(rng.integers(length), last, length, dtype=np.int32)
            waiting = np.concatenate([waiting, rng.permutation(cuts)])
        yield waiting[:batch]
        waiting = waiting[batch:]


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
