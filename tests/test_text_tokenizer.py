"""Tokenizer: round trips, special tokens inside text, unusable files and arguments."""

import inspect
import json
import random

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from dsv4_jax.text import special_tokens
from dsv4_jax.text.tokenizer import Tokenizer

SPECIAL = [
    special_tokens.BOS,
    special_tokens.EOS,
    special_tokens.USER,
    special_tokens.ASSISTANT,
    special_tokens.LATEST_REMINDER,
    special_tokens.THINK_START,
    special_tokens.THINK_END,
    special_tokens.DSML,
    *special_tokens.TASKS.values(),
]
# Holds control tokens often enough for the BPE to learn "<think>" by itself.
CORPUS = ["<think>yes</think> hello world, hello there 漢字 <think>no</think>\n"] * 40


def trained(
    special=tuple(SPECIAL), *, splits=True, alphabet=True, corpus=CORPUS
) -> tokenizers.Tokenizer:
    """A byte-level BPE of about 300 ids, of which the first are `special`."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits)
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special) + 40,
        special_tokens=[AddedToken(token, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def edited(tokenizer: tokenizers.Tokenizer, edit) -> Tokenizer:
    data = json.loads(tokenizer.to_str())
    edit(data)
    return Tokenizer(json.dumps(data))


@pytest.fixture(scope="module", params=[True, False], ids=["splits", "no_splits"])
def tokenizer(request):
    return Tokenizer(trained(splits=request.param).to_str())


def random_text(rng: random.Random) -> str:
    pool = ["a", " ", "\n", "hello", "<", "think>", "漢字", "é", "🙂", "👩‍👩‍👧", "\0", "\U0010ffff"]
    return "".join(rng.choices(pool + SPECIAL, k=rng.randint(0, 30)))


@pytest.mark.parametrize("allow_special", [False, True])
def test_round_trip(tokenizer, allow_special):
    rng = random.Random(0)
    for _ in range(200):
        text = random_text(rng)
        ids = tokenizer.encode(text, allow_special=allow_special)
        assert tokenizer.decode(ids) == text


def test_plain_text_never_yields_a_special_id(tokenizer):
    rng = random.Random(1)
    special_ids = set(tokenizer.special_tokens.values())
    for text in [*SPECIAL, "".join(SPECIAL)]:
        assert special_ids.isdisjoint(tokenizer.encode(text))
    for _ in range(200):
        assert special_ids.isdisjoint(tokenizer.encode(random_text(rng)))


def test_bpe_that_learned_a_special_string_spells_it_differently():
    trained_without_splits = trained(splits=False)
    data = json.loads(trained_without_splits.to_str())
    data["added_tokens"] = []
    special_id = trained_without_splits.token_to_id("<think>")
    assert special_id in tokenizers.Tokenizer.from_str(json.dumps(data)).encode("<think>").ids

    tokenizer = Tokenizer(trained_without_splits.to_str())
    ids = tokenizer.encode("<think>yes")
    assert special_id not in ids
    assert tokenizer.decode(ids) == "<think>yes"


def test_lookup_of_whole_words_does_not_find_a_special_token():
    def look_up_words(data):
        data["model"]["ignore_merges"] = True

    tokenizer = edited(trained(splits=False), look_up_words)
    assert tokenizer.token_id("<think>") not in tokenizer.encode("<think>")


def test_merges_written_as_text_are_understood():
    def write_as_text(data):
        data["model"]["merges"] = [" ".join(merge) for merge in data["model"]["merges"]]

    tokenizer = edited(trained(splits=False), write_as_text)
    assert tokenizer.token_id("<think>") not in tokenizer.encode("<think>yes")
    assert tokenizer.encode("hello") == Tokenizer(trained(splits=False).to_str()).encode("hello")


def test_allowed_special_strings_become_their_tokens(tokenizer):
    for token in SPECIAL:
        ids = tokenizer.encode(f"a{token}b", allow_special=True)
        assert ids == [*tokenizer.encode("a"), tokenizer.token_id(token), *tokenizer.encode("b")]


def test_added_tokens_without_the_special_flag_are_special():
    def unflag(data):
        for token in data["added_tokens"]:
            token["special"] = False

    tokenizer = edited(trained(), unflag)
    assert list(tokenizer.special_tokens) == SPECIAL
    assert tokenizer.token_id("<think>") not in tokenizer.encode("<think>")


def test_ids_by_name(tokenizer):
    assert tokenizer.bos_id == tokenizer.token_id("<｜begin▁of▁sentence｜>") == 0
    assert tokenizer.eos_id == tokenizer.token_id("<｜end▁of▁sentence｜>") == 1
    assert tokenizer.special_tokens == {token: i for i, token in enumerate(SPECIAL)}
    assert tokenizer.vocab_size > 256 + len(SPECIAL)
    assert tokenizer.decode([tokenizer.vocab_size - 1])
    with pytest.raises(ValueError, match="'<｜nothing｜>' is not in the vocabulary"):
        tokenizer.token_id("<｜nothing｜>")


def test_encode_adds_nothing_and_cuts_nothing():
    library = trained()
    library.post_processor = processors.TemplateProcessing(
        single=f"{special_tokens.BOS} $A", special_tokens=[(special_tokens.BOS, 0)]
    )
    library.enable_truncation(max_length=2)
    library.enable_padding(length=20)
    tokenizer = Tokenizer(library.to_str())
    text = "hello world, hello"
    for allow_special in (False, True):
        ids = tokenizer.encode(text, allow_special=allow_special)
        assert ids == Tokenizer(trained().to_str()).encode(text)


def test_decode_agrees_with_the_library_on_any_bytes(tokenizer):
    library = trained()
    own = Tokenizer(library.to_str())
    rng = random.Random(2)
    ordinary = range(len(SPECIAL), own.vocab_size)
    for _ in range(200):
        ids = rng.choices(ordinary, k=rng.randint(0, 12))
        assert own.decode(ids) == library.decode(ids)


def test_special_token_in_the_byte_alphabet_decodes_as_it_is_written():
    tokenizer = Tokenizer(trained(special=("<é>",)).to_str())
    assert tokenizer.decode(tokenizer.encode("a<é>", allow_special=True)) == "a<é>"


def test_token_bytes_may_cut_a_character(tokenizer):
    ids = tokenizer.encode("🙂")
    assert len(ids) > 1
    assert b"".join(tokenizer.token_bytes([i]) for i in ids) == "🙂".encode()
    assert tokenizer.decode(ids[:-1]) == "\ufffd"


def test_ids_of_numpy_arrays(tokenizer):
    assert tokenizer.decode(np.asarray(tokenizer.encode("hello"), np.int32)) == "hello"


@pytest.mark.parametrize("beyond", [-1, 0, 2**40])
def test_ids_outside_the_vocabulary(tokenizer, beyond):
    token_id = beyond if beyond else tokenizer.vocab_size
    with pytest.raises(ValueError, match=f"ids: {token_id} is not in the vocabulary"):
        tokenizer.decode([5, token_id])


def test_id_in_a_gap_of_the_vocabulary():
    def leave_gap(data):
        data["added_tokens"].append({**data["added_tokens"][0], "content": "<｜far｜>", "id": 400})
        data["model"]["vocab"]["<｜far｜>"] = 400

    tokenizer = edited(trained(), leave_gap)
    assert tokenizer.vocab_size == 401
    assert tokenizer.decode([400]) == "<｜far｜>"
    with pytest.raises(ValueError, match="ids: 399 is not in the vocabulary"):
        tokenizer.decode([399])


def test_lone_surrogate(tokenizer):
    for allow_special in (False, True):
        with pytest.raises(ValueError, match=r"text: lone surrogate U\+D83D at index 2"):
            tokenizer.encode("ab\ud83d", allow_special=allow_special)


def test_text_of_another_type(tokenizer):
    encode = inspect.unwrap(Tokenizer.encode)
    with pytest.raises(ValueError, match="text: expected str, got bytes"):
        encode(tokenizer, b"ab")


def test_byte_without_a_token():
    tokenizer = Tokenizer(trained(alphabet=False, corpus=["hello"] * 3).to_str())
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    with pytest.raises(ValueError, match="no token for byte 0x7A"):
        tokenizer.encode("hez")


def test_from_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    trained().save(str(path))
    ids = Tokenizer(trained().to_str()).encode("hello 漢字")
    assert Tokenizer.from_file(path).encode("hello 漢字") == ids
    assert Tokenizer.from_file(str(path)).encode("hello 漢字") == ids


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent.*tokenizer\.json"):
        Tokenizer.from_file(tmp_path / "absent" / "tokenizer.json")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"model": {"type": "BPE"}}', b"\xff\xfe", b"[" * 100_000, b"null"],
)
def test_corrupt_file(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a usable tokenizer\.json: "):
        Tokenizer.from_file(path)


def test_truncated_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(trained().to_str()[:-100])
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a usable"):
        Tokenizer.from_file(path)


def test_other_models_are_refused():
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ValueError, match="expected BPE with a ByteLevel decoder, got WordLevel"):
        Tokenizer(words.to_str())
    characters = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    with pytest.raises(ValueError, match="got BPE with None"):
        Tokenizer(characters.to_str())
