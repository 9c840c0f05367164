"""The mini model's text, its bundled tokenizer, and how its weights are stored."""

import random
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "mini"))

import data  # noqa: E402
import tokenizer as bpe  # noqa: E402
import weights  # noqa: E402

from dsv4_jax.mini import text as library  # noqa: E402
from dsv4_jax.mini.text import Document  # noqa: E402


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return library.collect()


@pytest.fixture(scope="module")
def sides(documents) -> tuple[list[Document], list[Document]]:
    return library.split(documents)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(bpe.TOKENIZER_FILE))


def line_runs(text: str) -> set[tuple[str, ...]]:
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return {tuple(lines[i : i + 4]) for i in range(len(lines) - 3)}


def test_no_module_is_on_both_sides(sides):
    train, held_out = ({document.module for document in side} for side in sides)
    assert not train & held_out
    # The bundled weights were trained without these.
    held_out_names = (
        "argparse configparser csv fractions heapq json queue sched shutil socketserver "
        "statistics textwrap wsgiref"
    )
    assert held_out == set(held_out_names.split())
    assert "asyncio" in train


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("json/decoder.py", "json"),
        ("argparse.py", "argparse"),
        ("_pydatetime.py", "datetime"),
        ("_strptime.py", "strptime"),
        ("test/test_json/test_dump.py", "json"),
        ("test/test_argparse.py", "argparse"),
        ("test/support/__init__.py", "support"),
    ],
)
def test_module_of_a_file(path, module):
    assert Document(path, "").module == module


def test_tests_of_held_out_modules_are_on_neither_side():
    text = "\n".join(f"line {i}" for i in range(20))
    paths = ("json/tool.py", "test/test_json/test_tool.py", "test/test_os.py", "os.py")
    train, held_out = library.split([Document(p, p + text.replace("line", p)) for p in paths])
    assert [document.path for document in train] == ["os.py", "test/test_os.py"]
    assert [document.path for document in held_out] == ["json/tool.py"]


def test_held_out_is_a_few_percent_of_the_library(documents, sides):
    library = sum(document.num_bytes for document in documents if not document.is_test)
    held_out = sum(document.num_bytes for document in sides[1])
    assert 0.03 < held_out / library < 0.08


def test_no_trained_file_repeats_a_held_out_one(sides):
    train, held_out = sides
    owners: dict[tuple[str, ...], list[str]] = {}
    sizes = {}
    for document in held_out:
        runs = line_runs(document.text)
        sizes[document.path] = len(runs)
        for run in runs:
            owners.setdefault(run, []).append(document.path)
    for document in train:
        runs = line_runs(document.text)
        shared = Counter(path for run in runs for path in owners.get(run, []))
        for path, count in shared.items():
            assert count <= 0.3 * max(min(sizes[path], len(runs)), 10), (document.path, path)


def test_near_duplicates_stay_on_one_side():
    def text(name: str) -> str:
        return "\n".join(f"{name} = {name}({i})" for i in range(40))

    documents = [
        Document("json/scanner.py", text("scan")),
        Document("copied_scanner.py", text("other")[:100] + "\n" + text("scan") + "\nmore"),
        Document("ntpath.py", text("path") + "\nseparator = 1"),
        Document("posixpath.py", text("path")),
        Document("os.py", text("os")),
    ]
    train, held_out = library.split(documents)
    assert [document.path for document in train] == ["ntpath.py", "os.py"]
    assert [document.path for document in held_out] == ["json/scanner.py"]


def test_the_held_out_side_can_be_had_alone(sides):
    assert library.held_out() == sides[1]


def test_split_does_not_depend_on_order(documents, sides):
    shuffled = random.Random(1).sample(documents, len(documents))
    assert library.split(shuffled) == sides


def test_collect_skips_other_encodings_and_installed_packages(tmp_path):
    (tmp_path / "site-packages").mkdir()
    for name, content in {
        "kept.py": "naïve = 1\r\n".encode(),
        "latin.py": b"# \xe9\n",
        "site-packages/extra.py": b"x = 1\n",
        "_sysconfigdata_linux.py": b"x = 1\n",
        "empty.py": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
    assert library.collect(tmp_path) == [Document("kept.py", "naïve = 1\r\n")]
    with pytest.raises(ValueError, match="stdlib"):
        library.collect(tmp_path / "site-packages" / "nothing")


def test_stream_marks_documents(tokenizer):
    documents = [Document("a.py", "x = 1\n"), Document("b.py", "y\n")]
    stream = data.token_stream(documents, tokenizer)
    assert stream.dtype == np.int32
    ends = np.flatnonzero(stream == data.EOS_ID)
    assert stream[0] == data.BOS_ID and stream[ends[0] + 1] == data.BOS_ID
    assert tokenizer.decode(stream[1 : ends[0]].tolist()) == "x = 1\n"
    assert ends[1] == len(stream) - 1


def test_an_epoch_takes_every_place_once():
    starts = data.sequence_starts(num_tokens=1000, length=10, batch=4, seed=0)
    first = np.concatenate([next(starts) for _ in range(24)])
    assert len(set(first)) == len(first)
    assert len(set(first % 10)) == 1
    assert first.min() >= 0 and first.max() + 11 < 1000
    again = data.sequence_starts(num_tokens=1000, length=10, batch=4, seed=0)
    assert (np.concatenate([next(again) for _ in range(24)]) == first).all()


def test_tokenizer_file_is_small(tokenizer):
    assert bpe.TOKENIZER_FILE.stat().st_size < 400_000
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(4096))
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(vocabulary)


def test_special_tokens(tokenizer):
    specials = tokenizer.get_added_tokens_decoder()
    assert [specials[i].content for i in sorted(specials)] == list(bpe.SPECIAL_TOKENS)
    assert all(token.special and not token.normalized for token in specials.values())
    assert tokenizer.token_to_id("<｜begin▁of▁sentence｜>") == data.BOS_ID == 0
    assert tokenizer.token_to_id("<｜end▁of▁sentence｜>") == data.EOS_ID == 1
    assert tokenizer.token_to_id("<｜▁pad▁｜>") == 2
    for token in bpe.SPECIAL_TOKENS:
        assert tokenizer.encode(f"a{token}b").tokens == ["a", token, "b"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n",
        "def f(x):\n    return x\n",
        "\tif x:\r\n\t\tpass\r\n\r\n",
        "  leading and trailing  \n\n\n",
        "12345678 0x1f 3.14e-10",
        "Grüße, мир, 世界, 🙂👩‍👩‍👧, e\u0301, \x00\x0b\x0c\x7f\x85\u2028\ufeff",
        "".join(map(chr, range(0x300))),
    ],
)
def test_tokenizer_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizer_round_trips_random_text(tokenizer):
    rng = random.Random(0)
    for _ in range(200):
        points = [rng.choice((rng.randrange(128), rng.randrange(0xD800))) for _ in range(50)]
        text = "".join(map(chr, points))
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizer_suits_python(tokenizer, sides):
    assert tokenizer.encode("\n        ").tokens == ["ĊĠĠĠĠĠĠĠĠ"]
    assert tokenizer.encode("\n\n    ").tokens == ["ĊĊĠĠĠĠ"]
    numbers = tokenizer.encode("1234567").tokens
    assert "".join(numbers) == "1234567" and max(map(len, numbers)) <= 3
    assert bpe.bytes_per_token(sides[1], tokenizer) > 3.3


def test_training_a_tokenizer_is_deterministic(sides):
    texts = [document.text for document in sides[0][:40]]
    first, second = (bpe.train(texts, vocab_size=600) for _ in range(2))
    assert first.to_str() == second.to_str()
    assert first.get_vocab_size() == 600


@pytest.mark.parametrize(
    ("name", "stored_as"),
    [
        ("embed.weight", "bfloat16"),
        ("layers.0.hc_attn.fn", "float32"),
        ("layers.0.attn.sink", "float32"),
        ("layers.0.attn.wkv.weight", "fp8_block"),
        ("layers.2.attn.compressor.wkv.weight", "bfloat16"),
        ("layers.2.attn.compressor.ape", "float32"),
        ("layers.2.attn.indexer.wq_b.weight", "fp8_block"),
        ("layers.2.attn.indexer.compressor.wkv.weight", "bfloat16"),
        ("layers.2.ffn.experts.w1.weight", "mxfp4"),
        ("layers.2.ffn.shared_experts.w1.weight", "fp8_block"),
        ("layers.2.ffn.gate.weight", "bfloat16"),
        ("layers.2.ffn.gate.bias", "float32"),
        ("layers.0.ffn.gate.tid2eid", "int64"),
        ("mtp.0.e_proj.weight", "fp8_block"),
    ],
)
def test_stored_formats(name, stored_as):
    assert weights.stored_format(name) == stored_as


def test_stored_bytes_count_what_packing_gives():
    arrays = {
        "layers.0.ffn.experts.w1.weight": jnp.ones((3, 32, 64)),
        "layers.0.attn.wq_a.weight": jnp.ones((130, 256)),
        "layers.0.attn.kv_norm.weight": jnp.ones(7),
        "layers.0.hc_attn.fn": jnp.ones((24, 8)),
    }
    packed = weights.packed(arrays)
    assert packed["layers.0.ffn.experts.w1.scale"].shape == (3, 32, 2)
    assert packed["layers.0.attn.wq_a.scale"].shape == (2, 2)
    for name, array in arrays.items():
        parts = [name, name.removesuffix("weight") + "scale"]
        num_bytes = sum(packed[part].nbytes for part in dict.fromkeys(parts) if part in packed)
        assert weights.stored_bytes(name, array.shape) == num_bytes, name


def test_rounding_is_straight_through():
    name = "layers.0.ffn.experts.w1.weight"
    arrays = {name: jnp.linspace(-1.0, 1.0, 64).reshape(1, 2, 32)}

    def total(arrays, amount):
        return (weights.straight_through(arrays, amount)[name] * jnp.arange(32.0)).sum()

    rounded = weights.straight_through(arrays, 1.0)[name]
    assert len(np.unique(rounded)) <= 15 < len(np.unique(arrays[name]))
    np.testing.assert_array_equal(weights.straight_through(arrays, 0.0)[name], arrays[name])
    gradient = jax.grad(total)(arrays, 1.0)[name]
    np.testing.assert_array_equal(gradient, np.broadcast_to(np.arange(32.0), (1, 2, 32)))


def test_hash_table_gives_experts_equal_load():
    rng = np.random.default_rng(0)
    counts = rng.permutation(100_000 // np.arange(1, 2001))
    table = weights.hash_table(counts, num_experts=8, top_k=3, rng=rng)
    assert table.shape == (2000, 3) and table.min() == 0 and table.max() == 7
    assert all(len(set(row)) == 3 for row in table.tolist())
    load = np.bincount(table.reshape(-1), weights=np.repeat(counts, 3), minlength=8)
    assert load.max() < 1.05 * load.mean()
