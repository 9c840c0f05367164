"""benchmarks.quality: which variants are measured, and what is said of them."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import quality
from benchmarks.quality import REFERENCE, Variant, measured, texts_of, variants
from dsv4_jax.checkpoint.convert import EXPERT_FORMATS, LINEAR_FORMATS
from dsv4_jax.model import MINI_DIRECTORY
from dsv4_jax.numerics import ACTIVATIONS, Numerics
from tests.checkpoints import random_config
from tests.weight_formats import checkpoint

# Every linear is 160 x 160: few programs.
SIZES = {
    "hidden_size": 160,
    "moe_intermediate_size": 160,
    "n_routed_experts": 2,
    "num_experts_per_tok": 2,
    "q_lora_rank": 160,
    "num_attention_heads": 1,
    "head_dim": 160,
    "o_groups": 1,
    "o_lora_rank": 160,
    "index_n_heads": 5,
}
EXACT_W4A4 = replace(Numerics.EXACT, activations="nvfp4")


def test_each_combination_that_differs_is_measured_once():
    found = list(variants(EXPERT_FORMATS, LINEAR_FORMATS, ACTIVATIONS))
    assert found[0] == REFERENCE
    assert len(set(found)) == len(found)
    no_cache = [v for v in found if not v.numerics.quantize_kv]
    # FP4 experts: 3 policies; FP8 ones or linears: 2; nothing packed: 1.
    assert sum(v.linears == "fp8" for v in no_cache) == 3 + 3 + 2 + 2
    assert sum(v.linears == "bf16" for v in no_cache) == 3 + 3 + 2 + 1
    assert [v.numerics for v in found[len(no_cache) :]] == [
        Numerics.CHECKPOINT,
        replace(Numerics.CHECKPOINT, gate="bfloat16"),
        replace(Numerics.CHECKPOINT, gate="nvfp4"),
    ]


def test_what_activations_become():
    assert Variant("mxfp4", "fp8", EXACT_W4A4).inputs == ("nvfp4", "e4m3")
    assert Variant("fp8", "bf16", EXACT_W4A4).inputs == ("e4m3", "bf16")
    assert REFERENCE.inputs == ("bf16", "bf16")


def test_texts(tmp_path):
    (tmp_path / "a.py").write_text("first")
    (tmp_path / "b.py").write_text("second")
    (tmp_path / "c.txt").write_text("third")
    assert texts_of([tmp_path, tmp_path / "c.txt"], 3) == ["fir", "sec", "thi"]
    assert texts_of([tmp_path / "c.txt"], None) == ["third"]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Of two layers whose experts are MXFP4, in windows of 16 tokens."""
    tokens = MINI_DIRECTORY / "tokenizer.json"
    config = random_config(
        **SIZES, vocab_size=4096, num_hidden_layers=2, num_hash_layers=1, compress_ratios=[0, 4]
    )
    directory = checkpoint(tmp_path_factory.mktemp("quality"), "mxfp4", config=config)
    (directory / "tokenizer.json").write_bytes(tokens.read_bytes())
    chosen = [
        REFERENCE,
        Variant("nvfp4", "fp8", Numerics.EXACT),
        Variant("mxfp4", "fp8", EXACT_W4A4),
    ]
    texts = ["def parse(line):\n    return line.split()\n", "import os\n"]
    return measured(texts, chosen, source=str(directory), context=16)


def test_formats_of_the_same_values_change_nothing(tables):
    rows, _ = tables
    for row in rows[:2]:
        assert row["weight_error"] == 0
        assert abs(row["above_reference"]) < 1e-6
        assert row["relative_l2"] < 1e-5


def test_errors_of_rounded_activations(tables):
    rows, layers = tables
    of_policy = [row for row in layers if row["activations"] == "nvfp4"]
    assert [row["layer"] for row in of_policy] == [0, 1]
    assert all(1e-3 < row["relative_l2"] < 1 for row in of_policy)
    assert of_policy[-1]["relative_l2"] == rows[2]["relative_l2"]
    for row in of_policy:
        # Of an error that is orthogonal to the streams.
        assert 1 - row["cosine"] < 4 * row["relative_l2"] ** 2
    assert rows[2]["bits_per_byte"] > 0


@pytest.mark.parametrize("jobs", [1, 3, 9])
def test_processes_share_the_variants(jobs, monkeypatch):
    def fake(texts, chosen, *, batch):
        assert (texts, batch, chosen[0]) == (["text"], 2, "a")
        return [v.upper() for v in chosen], [v + layer for v in chosen for layer in "01"]

    monkeypatch.setattr(quality, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(quality, "measured", fake)
    rows, layers = quality.measured_by(jobs, ["text"], list("abcdef"), batch=2)
    assert rows == list("ABCDEF")
    assert layers == [v + layer for v in "abcdef" for layer in "01"]


def test_errors_by_their_definition():
    class Fixed:
        def __init__(self, streams):
            self.streams = streams
            self.config = type("Config", (), {"num_hidden_layers": 1})

        def layer(self, index):
            return self.streams

    ours, exact = np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[4.0, 3.0], [1.0, 0.0]])
    (found,) = quality.errors(Fixed(ours), Fixed(exact))
    assert found["relative_l2"] == pytest.approx(np.sqrt(2 / 26))
    assert found["cosine"] == pytest.approx((24 / 25 + 1) / 2)
