"""Byte-level BPE over a tokenizer.json, with control over literal special tokens."""

import json
import operator
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, SupportsIndex

import tokenizers

from dsv4_jax.text.special_tokens import BOS, EOS


class Tokenizer:
    """Text to token ids and back.

    Every added token of the file counts as special, whatever its own `special` flag says: the
    official file does not set the flag on all of its control tokens.

    Args:
        serialized: the text of a tokenizer.json that holds a byte-level BPE.

    Raises:
        ValueError: the model or the decoder is of another kind.
    """

    def __init__(self, serialized: str):
        data = json.loads(serialized)
        model, decoder = data["model"]["type"], (data.get("decoder") or {}).get("type")
        if (model, decoder) != ("BPE", "ByteLevel"):
            raise ValueError(f"expected BPE with a ByteLevel decoder, got {model} with {decoder}")
        # Either would change what the caller gets back for long or short texts.
        data["truncation"] = data["padding"] = None
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_tokens = {token.content: token_id for token_id, token in added.items()}
        plain = _without_special(data, self._special_tokens)
        self._plain_tokenizer = tokenizers.Tokenizer.from_str(json.dumps(plain))

        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self._bytes: list[bytes | None] = [None] * (max(vocab.values(), default=-1) + 1)
        byte_of = _byte_of_symbol()
        for token, token_id in vocab.items():
            if token in self._special_tokens or not byte_of.keys() >= set(token):
                self._bytes[token_id] = token.encode()
            else:
                self._bytes[token_id] = bytes(byte_of[symbol] for symbol in token)
        self._absent_bytes = {byte for symbol, byte in byte_of.items() if symbol not in vocab}

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read a tokenizer.json.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a tokenizer.json with a byte-level BPE.
        """
        try:
            return cls(Path(path).read_text(encoding="utf-8"))
        except OSError:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{os.fspath(path)}: not a usable tokenizer.json: {error}") from error

    @property
    def special_tokens(self) -> dict[str, int]:
        """Id of each special token, by its string."""
        return dict(self._special_tokens)

    @property
    def vocab_size(self) -> int:
        """One more than the greatest id."""
        return len(self._bytes)

    @property
    def bos_id(self) -> int:
        """Id of the token that starts every sequence; `encode` does not insert it."""
        return self.token_id(BOS)

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a completion."""
        return self.token_id(EOS)

    def token_id(self, token: str) -> int:
        """Id of a token given by its string.

        Raises:
            ValueError: the vocabulary has no such token.
        """
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise ValueError(f"token: {token!r} is not in the vocabulary")
        return token_id

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of a text; no BOS is added.

        Args:
            text: any text without lone surrogates.
            allow_special: strings of special tokens in `text` become those tokens. By default they
                are spelled with ordinary tokens, so no text can produce a special id.

        Raises:
            ValueError: `text` is not a str, holds a lone surrogate, or holds a byte for which the
                vocabulary has no token.
        """
        if not isinstance(text, str):
            raise ValueError(f"text: expected str, got {type(text).__name__}")
        try:
            encoded = text.encode()
        except UnicodeEncodeError as error:
            surrogate = f"U+{ord(text[error.start]):04X}"
            raise ValueError(f"text: lone surrogate {surrogate} at index {error.start}") from None
        if allow_special:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        if absent := self._absent_bytes.intersection(encoded):
            raise ValueError(f"text: the vocabulary has no token for byte 0x{min(absent):02X}")
        return self._plain_tokenizer.encode(text, add_special_tokens=False).ids

    def token_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        """UTF-8 bytes that the ids stand for; a cut may fall inside a character.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        pieces = []
        for token in ids:
            token_id = operator.index(token)
            piece = self._bytes[token_id] if 0 <= token_id < self.vocab_size else None
            if piece is None:
                raise ValueError(
                    f"ids: {token_id} is not in the vocabulary of {self.vocab_size} ids"
                )
            pieces.append(piece)
        return b"".join(pieces)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of the ids, special tokens included; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        return self.token_bytes(ids).decode("utf-8", errors="replace")


def _without_special(data: dict[str, Any], special_tokens: Iterable[str]) -> dict[str, Any]:
    """The tokenizer.json without its added tokens, also where the BPE itself could form them."""
    # A single symbol stands for a byte and must stay.
    removed = {token for token in special_tokens if len(token) > 1}
    model = data["model"]

    def forms_special(merge: str | list[str]) -> bool:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        return not removed.isdisjoint((left, right, left + right))

    model = model | {
        "vocab": {token: i for token, i in model["vocab"].items() if token not in removed},
        "merges": [merge for merge in model["merges"] if not forms_special(merge)],
    }
    return data | {"added_tokens": [], "post_processor": None, "model": model}


def _byte_of_symbol() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 stands for itself, the rest follows U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [*map(chr, printable), *(chr(0x100 + i) for i in range(len(others)))]
    return dict(zip(symbols, printable + others, strict=True))
