"""What the mini model's training adds: names exchanged, an indexer that is taught, probes."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "mini"))

import compare  # noqa: E402
import evaluate as table  # noqa: E402
import indexer as teaching  # noqa: E402
import objective  # noqa: E402
import probes  # noqa: E402
import rename  # noqa: E402
from flax import nnx  # noqa: E402
from optimizer import Recipe  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from weights import flatten, initial, unflatten  # noqa: E402

import dsv4_jax  # noqa: E402
from dsv4_jax.config import Config  # noqa: E402
from dsv4_jax.decoding.evaluate import Evaluation  # noqa: E402
from dsv4_jax.mini.text import Document  # noqa: E402
from dsv4_jax.numerics import Numerics  # noqa: E402
from dsv4_jax.ops.norms import rms_normalize  # noqa: E402
from dsv4_jax.transformer import initialize  # noqa: E402
from dsv4_jax.variants import rebuilt  # noqa: E402

forward = jax.jit(dsv4_jax.forward, static_argnames="capture")

SMALL = replace(
    Config.MINI,
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    compress_ratios=(4, 0),
    num_hash_layers=0,
    num_attention_heads=2,
    head_dim=64,
    qk_rope_head_dim=16,
    q_lora_rank=16,
    o_lora_rank=16,
    sliding_window=8,
    index_n_heads=2,
    index_head_dim=32,
    index_topk=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
)
TEXT = '''class Parser:
    limit_bytes = 3

    def parse_line(self, line):
        """parse_line of a Parser"""
        return self.parse_line(line)[: self.limit_bytes]

def test_parser():
    assert Parser().parse_line("") is None
'''


@pytest.fixture(scope="module")
def small():
    graph, params = initialize(SMALL, jax.random.key(0), jnp.float32, Numerics.EXACT)
    counts = np.ones(SMALL.vocab_size, int)
    return graph, initial(SMALL, flatten(params), counts, seed=0)


@pytest.fixture(scope="module")
def rows():
    return jax.random.randint(jax.random.key(1), (2, 66), 0, SMALL.vocab_size)


def test_defined_names():
    assert rename.defined_names(TEXT) == ["Parser", "limit_bytes", "parse_line", "test_parser"]


def test_renaming_is_consistent_and_keeps_kinds():
    pool = {"class": ["Cache"], "other": ["read_all", "max_size"], "test": ["test_cache"]}
    document = Document("parser.py", TEXT)
    texts = {rename.renamed(document, pool, seed).text for seed in range(40)}
    assert TEXT in texts or len(texts) > 3
    for text in texts:
        for name in ("Parser", "parse_line", "limit_bytes"):
            assert text.count(name) in (0, TEXT.count(name)), "renamed in some places only"
        # Every line has its words where it had them: nothing but names changed.
        assert len(text.split()) == len(TEXT.split())
        assert ("class Cache:" in text) == ("assert Cache()" in text)
        compile(text, "renamed", "exec")
    assert any("Cache" in text for text in texts)
    assert rename.renamed(document, pool, 3) == rename.renamed(document, pool, 3)


def test_renaming_takes_no_name_that_the_file_has():
    pool = {"class": ["Parser"], "other": ["line", "parse_line"], "test": ["test_parser"]}
    for seed in range(20):
        assert rename.renamed(Document("p.py", TEXT), pool, seed).text == TEXT


def heads_mass(q, kv, entries, sink, visible):
    """The mass on each entry from the definition of attention, one query and head at a time."""
    b, t, h, c = q.shape
    mass = np.zeros((b, t, entries.shape[1]))
    for row, i, head in np.ndindex(b, t, h):
        near = kv[row, max(0, i - SMALL.sliding_window + 1) : i + 1] @ q[row, i, head]
        far = entries[row, visible[row, i]] @ q[row, i, head]
        exponentials = np.exp(np.concatenate([far, near]) * c**-0.5)
        total = exponentials.sum() + np.exp(sink[head])
        mass[row, i, visible[row, i]] += exponentials[: len(far)] / total
    return mass


@partial(jax.jit, static_argnames="graph")
def taught(graph, arrays, tokens, dense):
    """What the CSA layer's teacher sees and selects in a forward pass."""
    model = nnx.merge(graph, unflatten(arrays))
    attention = model.layers[0].attn
    seen = []

    class Spy(teaching.TaughtIndexer):
        def linears(self):
            linears = self.indexer.linears()
            return [(teaching.Detached(linear, self.see), dtype) for linear, dtype in linears]

        def see(self, x):
            self.x = x

        def __call__(self, prepared, view):
            positions = view.chunk.positions
            visible = jnp.arange(view.num_entries(4)) < (positions[..., None] + 1) // 4
            q = attention.wq_b(self.q_lora).reshape(*tokens.shape, -1, attention.head_dim)
            q = attention.rotary(rms_normalize(q, attention.eps), positions)
            kv = attention.rotary(attention.kv_norm(attention.wkv(self.x)), positions)
            seen.append((q, kv, view.entries("csa", jnp.float32), attention.sink[...], visible))
            seen.append(self.attention_mass(view, visible))
            seen.append(super().__call__(prepared, view))
            return seen[-1]

    attention.indexer = Spy(attention, dense, jnp.zeros(()))
    model.streams(tokens, [model.whole_sequence(*tokens.shape) for _ in model.layers])
    return seen


def test_the_target_is_the_heads_attention(small, rows):
    parts, mass, _ = taught(*small, rows[:, :64], jnp.float32(1))
    expected = heads_mass(*map(np.asarray, parts))
    np.testing.assert_allclose(mass, expected, atol=1e-5)
    assert expected.sum() > 0.1


def test_dense_selects_what_is_visible_and_sparse_what_the_indexer_does(small, rows):
    graph, arrays = small
    tokens = rows[:, :64]
    (*_, visible), _, selected = taught(graph, arrays, tokens, jnp.float32(1))
    np.testing.assert_array_equal(selected >= 0, visible)
    _, _, selected = taught(graph, arrays, tokens, jnp.float32(0))
    _, seen = forward(graph, unflatten(arrays), tokens, capture=True)
    # Scores of zero are common (relu), and entries that tie with the last one selected all count.
    extra = 0
    for ours, theirs in zip(
        np.asarray(selected).reshape(-1, selected.shape[-1]),
        np.asarray(seen.selected[0]).reshape(-1, SMALL.index_topk),
        strict=True,
    ):
        ours, theirs = set(ours[ours >= 0]), set(theirs[theirs >= 0])
        assert theirs <= ours
        extra += len(ours) - len(theirs)
    assert extra < 0.2 * visible.sum() and (selected >= 0).sum() < 0.8 * visible.sum()


def test_divergence():
    mass = jnp.array([[1.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    selected = jnp.array([[True, True, False, True], [False] * 4])
    exact = jnp.log(jnp.array([[1.0, 2.0, 9.0, 1.0], [1.0] * 4]))
    assert teaching.divergence(mass, exact, selected) == pytest.approx(0.0, abs=1e-6)
    even = jnp.zeros((2, 4))
    p = np.array([0.25, 0.5, 0.25])
    expected = (p * np.log(p / (1 / 3))).sum()
    assert teaching.divergence(mass, even, selected) == pytest.approx(expected, rel=1e-5)


def test_the_divergence_moves_nothing_but_the_indexer(small, rows):
    graph, arrays = small

    def divergence(some):
        one = jnp.ones(())
        return objective.losses(graph, {**arrays, **some}, rows, one, one).divergence

    trained = {name: array for name, array in arrays.items() if array.dtype == jnp.float32}
    gradient = jax.jit(jax.grad(divergence))(trained)
    moved = {name for name, array in gradient.items() if np.abs(array).max() > 0}
    assert moved and all(".indexer." in name for name in moved)
    parts = {name.split(".indexer.")[1].split(".")[0] for name in moved}
    assert parts == {"wq_b", "weights_proj", "compressor"}


def test_losses_are_those_of_the_library(small, rows):
    _, arrays = small
    # Of 16 entries all are selected, whatever ties.
    config = replace(SMALL, index_topk=16)
    graph, _ = initialize(config, jax.random.key(0), jnp.float32, Numerics.EXACT)
    each = jax.jit(objective.losses)(graph, arrays, rows, jnp.zeros(()), jnp.zeros(()))
    params = unflatten(arrays)
    logits = forward(graph, params, rows[:, :-2])
    drafts = jax.jit(dsv4_jax.draft_logits)(graph, params, rows[:, :-1])
    assert each.text == pytest.approx(float(objective.mean_nats(logits, rows[:, 1:-1])), rel=1e-4)
    assert each.draft == pytest.approx(float(objective.mean_nats(drafts, rows[:, 2:])), rel=1e-4)
    num_routed = 2 * 64 * SMALL.num_experts_per_tok
    assert set(each.loads) == {f"{b}.ffn.gate.bias" for b in ("layers.0", "layers.1", "mtp.0")}
    assert all(load.sum() == num_routed for load in each.loads.values())


def test_steps_learn_and_balance(small, rows):
    graph, arrays = small
    recipe = Recipe(warmup_steps=1)
    state = objective.TrainState.start({n: jnp.copy(a) for n, a in arrays.items()}, recipe)
    state, metrics = objective.run_steps(
        graph, recipe, state, rows[0], jnp.zeros((8, 2), jnp.int32), jnp.int32(16), length=64
    )
    assert metrics.loss[-1] < 0.9 * metrics.loss[0]
    assert metrics.draft_loss[-1] < metrics.draft_loss[0]
    assert int(state.step) == 8 and int(state.skipped) == 0
    before, after = (s["layers.1.ffn.gate.bias"] for s in (arrays, state.biases))
    assert np.abs(after - before).max() > 0


def test_occurrences_and_recall():
    tokenizer = Tokenizer.from_file(str(ROOT / "dsv4_jax" / "mini" / "tokenizer.json"))
    name = "frobnicator_quux_handler"
    text = f"{name} = 1\n" + "pass\n" * 200 + f"print({name})\n"
    (first, second) = probes.occurrences([Document("a.py", text)], {"something"}, tokenizer, 2048)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    for place in (first, second):
        span = tokenizer.decode(ids[place.first - 1 : place.last])
        assert span.strip("( )\n=1").startswith(name)
    assert first.distance is None and 200 <= second.distance < 513
    assert probes.occurrences([Document("a.py", text)], {name}, tokenizer, 2048) == []
    hits = np.zeros(len(ids), bool)
    hits[second.first : second.last] = True
    evaluation = Evaluation((np.zeros(len(ids)),), (hits,), (len(text),), 2048)
    counts = probes.recall(evaluation, [first, second])
    assert counts["new"] == [0, 1] and counts["129-512"] == [1, 1]
    assert sum(of for _, of in counts.values()) == 2


def test_long_contexts_cost_nothing_for_texts_that_fit_short_ones(monkeypatch):
    def evaluate(model, texts, context):
        evaluated.append((len(texts), context))
        nats = tuple(np.full(len(text), float(context)) for text in texts)
        hits = tuple(np.ones(len(text), bool) for text in texts)
        return Evaluation(nats, hits, tuple(map(len, texts)), context)

    evaluated: list[tuple[int, int]] = []
    monkeypatch.setattr(table, "evaluate", evaluate)
    texts = ["a" * 10, "b" * 3000, "c" * 2048]
    found = table.longer(None, texts, evaluate(None, texts, 2048))
    assert evaluated == [(3, 2048), (1, 8192)]
    assert [set(nats) for nats in found.nats] == [{2048.0}, {8192.0}, {2048.0}]
    assert found.context == 8192 and found.num_bytes == (10, 3000, 2048)


def test_same_values():
    mini = dsv4_jax.load("mini", dtype="float32")
    assert table.same_values(mini, rebuilt(mini, experts="nvfp4"))
    path = ("layers", 2, "ffn", "experts", "w1", "scale")
    changed = {
        key: variable.replace(variable[...] + np.uint8(1)) if key == path else variable
        for key, variable in nnx.to_flat_state(mini.params)
    }
    params = nnx.from_flat_state(list(changed.items()))
    assert not table.same_values(mini, dsv4_jax.Model(mini.graph, params, mini.tokenizer))


def measured(*late_nats):
    modules = ("argparse.py", "json/decoder.py", "json/encoder.py", "csv.py")
    return {
        "documents": {m: [0.0, 1, nats, 10] for m, nats in zip(modules, late_nats, strict=True)}
    }


def test_difference_has_an_interval_over_modules():
    base = measured(5.0, 6.0, 7.0, 8.0)
    found = compare.difference(measured(6.0, 7.0, 8.0, 9.0), base)
    expected = 0.1 / np.log(2)
    assert found == pytest.approx({"bits_per_token": expected, "low": expected, "high": expected})
    found = compare.difference(measured(9.0, 2.0, 7.0, 8.0), base)
    assert found["low"] < 0 < found["high"]
    other = measured(5.0, 6.0, 7.0, 8.0)
    other["documents"]["csv.py"][3] = 11
    with pytest.raises(ValueError, match="another text"):
        compare.difference(base, other)
