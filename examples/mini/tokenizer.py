"""The mini model's tokenizer: byte-level BPE trained on the training side of the split.

    python examples/mini/tokenizer.py

writes dsv4_jax/mini/tokenizer.json. The same text gives the same file.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

from data import BOS_ID, EOS_ID, Document, collect, split
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

TOKENIZER_FILE = Path(__file__).resolve().parents[2] / "dsv4_jax" / "mini" / "tokenizer.json"
VOCAB_SIZE = 4096

# Literal strings of DeepSeek-V4, in the order of their ids here.
SPECIAL_TOKENS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "｜DSML｜",
    "<｜latest_reminder｜>",
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜title｜>",
    "<｜read_url｜>",
)

_DIGITS = r"\p{N}{1,3}"
# Line breaks with the indentation after them; letters with one character before them, as in
# ".append" or " if"; punctuation; other whitespace.
_TEXT = (
    r"(?:\r?\n)+[ \t]*"
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
    r"| ?[^\s\p{L}\p{N}]+"
    r"|[ \t]+(?=\S)"
    r"|\s+"
)


def train(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A byte-level BPE tokenizer of `vocab_size` ids, special tokens and 256 bytes included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_DIGITS), "isolated"),
            pre_tokenizers.Split(Regex(_TEXT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def bytes_per_token(documents: list[Document], tokenizer: Tokenizer) -> float:
    encodings = tokenizer.encode_batch_fast([document.text for document in documents])
    num_bytes = sum(document.num_bytes for document in documents)
    return num_bytes / sum(len(encoding.ids) for encoding in encodings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stdlib", type=Path, help="directory of .py files")
    parser.add_argument("--out", type=Path, default=TOKENIZER_FILE)
    options = parser.parse_args()
    train_side, held_out = split(collect(options.stdlib))
    tokenizer = train(document.text for document in train_side)
    assert tokenizer.token_to_id(SPECIAL_TOKENS[0]) == BOS_ID
    assert tokenizer.token_to_id(SPECIAL_TOKENS[1]) == EOS_ID
    tokenizer.save(str(options.out), pretty=False)
    print(f"{options.out}: {tokenizer.get_vocab_size()} ids")
    print(f"bytes per token: train {bytes_per_token(train_side, tokenizer):.3f}, ", end="")
    print(f"held out {bytes_per_token(held_out, tokenizer):.3f}")


if __name__ == "__main__":
    main()
