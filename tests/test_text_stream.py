"""Streaming text: whole characters only, stop strings over any borders of pieces."""

import itertools
import random

import pytest

from dsv4_jax.text.stream import Detokenizer, StopStrings
from dsv4_jax.text.tokenizer import Tokenizer
from tests.test_text_tokenizer import trained


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(trained().to_str())


def chunks(rng: random.Random, items):
    start = 0
    while start < len(items):
        end = start + rng.randint(0, 4)
        yield items[start:end]
        start = end


@pytest.mark.parametrize(
    "text", ["🙂", "é", "語", "a語b🙂c", "hello 漢字 👩‍👩‍👧\n", "\U0010ffff\0"]
)
def test_characters_come_whole_and_at_once(tokenizer, text):
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode(text)
    shown = b""
    for i, token in enumerate(ids):
        shown += detokenizer.push([token]).encode()
        complete = tokenizer.token_bytes(ids[: i + 1]).decode("utf-8", errors="ignore")
        assert shown.decode() == complete
    assert detokenizer.flush() == ""
    assert shown.decode() == text


def test_pieces_concatenate_to_decode_of_any_ids(tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        ids = rng.choices(range(tokenizer.vocab_size), k=rng.randint(0, 30))
        detokenizer = Detokenizer(tokenizer)
        pieces = [detokenizer.push(part) for part in chunks(rng, ids)]
        assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)


def test_flush_shows_a_cut_character_and_starts_afresh(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode("🙂")
    assert detokenizer.push(ids[:-1]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.push(ids) == "🙂"


def test_bad_id_changes_nothing(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode("🙂")
    detokenizer.push(ids[:1])
    with pytest.raises(ValueError, match="ids: 100000 "):
        detokenizer.push([ids[1], 100_000])
    assert detokenizer.push(ids[1:]) == "🙂"


def test_each_id_is_decoded_once(tokenizer, monkeypatch):
    decoded = []
    token_bytes = Tokenizer.token_bytes

    def counting(self, ids):
        decoded.extend(ids)
        return token_bytes(self, ids)

    monkeypatch.setattr(Tokenizer, "token_bytes", counting)
    ids = tokenizer.encode("hello 漢字 🙂 " * 50)
    detokenizer = Detokenizer(tokenizer)
    for token in ids:
        detokenizer.push([token])
    assert decoded == ids


def cut_at_first(text: str, stops) -> str:
    starts = [i for i in range(len(text)) if any(text.startswith(stop, i) for stop in stops)]
    return text[: starts[0]] if starts else text


def streamed(pieces, stops) -> tuple[str, bool]:
    stream = StopStrings(stops)
    text = "".join(map(stream.push, pieces))
    return text + stream.flush(), stream.stopped


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("hello END tail", ["END"]),
        ("hello EN", ["END"]),
        ("aaaaab", ["aab"]),
        ("xababcy", ["ababc"]),
        ("xabcdy", ["bc", "abcd"]),
        ("xabcey", ["bc", "abcd"]),
        ("xabc", ["abcd", "c"]),
        ("\n\nx", ["\n\n", "\n"]),
        ("漢字🙂終", ["🙂終"]),
        ("whole", ["whole"]),
        ("nothing", []),
        ("", ["a"]),
    ],
)
def test_cut_does_not_depend_on_the_pieces(text, stops):
    expected = cut_at_first(text, stops)
    for borders in itertools.product([False, True], repeat=max(0, len(text) - 1)):
        cuts = [0, *(i + 1 for i, border in enumerate(borders) if border), len(text)]
        pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
        assert streamed(pieces, stops) == (expected, expected != text)


def test_random_streams():
    rng = random.Random(1)
    for _ in range(2000):
        text = "".join(rng.choices("ab", k=rng.randint(0, 12)))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(0, 3))]
        expected = cut_at_first(text, stops)
        assert streamed(chunks(rng, text), stops) == (expected, expected != text)


def test_only_the_start_of_a_stop_string_is_withheld():
    stream = StopStrings(["END", "</s>"])
    assert stream.push("one E") == "one "
    assert stream.push("N") == ""
    assert stream.push("T <") == "ENT "
    assert stream.push("/") == ""
    assert stream.push("p>") == "</p>"
    assert stream.push("x</s>dropped") == "x"
    assert stream.stopped
    assert stream.push("END more") == ""
    assert stream.flush() == ""
    assert stream.stopped


def test_empty_stop_string():
    with pytest.raises(ValueError, match="stops: a stop string must not be empty"):
        StopStrings(["a", ""])
