"""Text out of a running generation: whole characters, cut at stop strings."""

import codecs
from collections.abc import Iterable
from typing import SupportsIndex

from dsv4_jax.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns token ids, as they come, into text.

    No piece holds part of a character. The pieces of all `push` calls and of one `flush` after
    them concatenate to `tokenizer.decode` of all ids; the total cost is linear in their number.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[SupportsIndex]) -> str:
        """Text that the ids complete, possibly empty.

        Raises:
            ValueError: an id is outside the vocabulary; no id of the call is taken.
        """
        return self._decoder.decode(self._tokenizer.token_bytes(ids))

    def flush(self) -> str:
        """U+FFFD for a character that never got all its bytes, else nothing; starts afresh."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Cuts a stream of text before the stop string that starts first.

    Text that may be the start of a stop string is withheld until that is decided, so the result
    does not depend on how the text was cut into pieces.

    Args:
        stops: non-empty strings; none of them means that nothing is ever cut.

    Raises:
        ValueError: a stop string is empty.

    Attributes:
        stopped: a stop string was found; all later text is dropped.
    """

    def __init__(self, stops: Iterable[str]):
        self._stops = tuple(stops)
        if "" in self._stops:
            raise ValueError("stops: a stop string must not be empty")
        self._longest = max(map(len, self._stops), default=0)
        self._withheld = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Text that is certain to stand before every stop string."""
        if self.stopped:
            return ""
        text = self._withheld + text
        found = self._first_stop(text)
        # Only a stop string that begins before the one found can still move the cut.
        for start in range(max(0, len(text) - self._longest + 1), found):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                self._withheld = text[start:]
                return text[:start]
        return self._cut(text, found)

    def flush(self) -> str:
        """The withheld text, or its part before a stop string: no more text comes."""
        return self._cut(self._withheld, self._first_stop(self._withheld))

    def _first_stop(self, text: str) -> int:
        """Where the first stop string starts, or the length of the text."""
        starts = (text.find(stop) for stop in self._stops)
        return min((start for start in starts if start >= 0), default=len(text))

    def _cut(self, text: str, end: int) -> str:
        self.stopped = self.stopped or end < len(text)
        self._withheld = ""
        return text[:end]
