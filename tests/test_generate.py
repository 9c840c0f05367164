"""Slots, chunks and what ends a sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dsv4_jax
from dsv4_jax.config import Config
from dsv4_jax.decoding import generate as generation
from dsv4_jax.decoding import loop
from dsv4_jax.decoding.generate import encode_prompt, generate, generate_text, stream_text
from dsv4_jax.decoding.loop import decode_chunk
from dsv4_jax.decoding.sampling import SamplingArrays, SamplingParams
from dsv4_jax.model import Model
from dsv4_jax.numerics import Numerics
from dsv4_jax.text.tokenizer import Tokenizer
from dsv4_jax.transformer import Transformer
from tests import chain_model
from tests.chain_model import ChainModel
from tests.checkpoints import random_config
from tests.test_text_tokenizer import trained

VOCAB = 61


@pytest.fixture(scope="module")
def rows():
    # The tokens 0 (BOS) and 1 (EOS) come only where a test puts them.
    rows = np.random.default_rng(0).standard_normal((101, VOCAB))
    rows[:, :2] = -100
    return rows


@pytest.fixture(autouse=True)
def four_slots(monkeypatch):
    monkeypatch.setattr(generation, "_max_slots", lambda: 4)


@pytest.fixture
def chain(rows, monkeypatch):
    chain_model.install(monkeypatch)
    return ChainModel(rows)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(trained().to_str())


@pytest.fixture
def reciter(monkeypatch, tokenizer):
    """Makes models that continue any prompt of one token with given token ids, then EOS."""
    chain_model.install(monkeypatch)

    def recite(ids, **config):
        # Of one size, so that all of them share a program.
        rows = np.full((96, tokenizer.vocab_size + 5), -10.0)
        rows[:, tokenizer.eos_id] = 0.0
        rows[1 + np.arange(len(ids)), ids] = 10.0
        return ChainModel(rows, False, tokenizer, **config)

    return recite


def new_tokens(model, prompts, params):
    """Generated ids and what ended them, by prompt."""
    ids, finish = [[] for _ in prompts], [None] * len(prompts)
    for piece in generate(model, prompts, params):
        assert finish[piece.row] is None, "a piece after the end"
        ids[piece.row] += piece.token_ids
        finish[piece.row] = piece.finish
    return ids, finish


def random_prompts(num, seed=1, longest=300):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCAB, rng.integers(1, longest)).tolist() for _ in range(num)]


@pytest.mark.parametrize("chunk_steps", [1, 3, 8])
def test_greedy_follows_the_chain(chain, monkeypatch, chunk_steps):
    monkeypatch.setattr(generation, "CHUNK_STEPS", chunk_steps)
    prompts = random_prompts(11)
    limits = [1, 2, 3, 8, 9, 10, 17, 30, 4, 4, 300]
    params = [SamplingParams(max_new_tokens=n) for n in limits]
    ids, finish = new_tokens(chain, prompts, params)
    expected = [chain.expected_greedy(*pair) for pair in zip(prompts, limits, strict=True)]
    assert ids == expected
    assert finish == ["length"] * len(prompts)


def test_samples_as_a_loop_of_single_steps(chain):
    prompt, options = [3, 4, 5], SamplingParams(temperature=0.8, top_k=9, seed=11)
    tokens = list(prompt)
    for step in range(20):
        logits = jnp.asarray(chain.expected_logits(tokens))[None]
        steps = jnp.array([step], jnp.int32)
        tokens.append(int(generation._sample(logits, SamplingArrays.of([options]), steps)[0]))
    params = SamplingParams(temperature=0.8, top_k=9, seed=11, max_new_tokens=20)
    assert new_tokens(chain, [prompt], params)[0] == [tokens[3:]]


def test_results_do_not_depend_on_the_other_prompts(chain):
    prompts = random_prompts(9, longest=600)
    params = [
        SamplingParams(
            max_new_tokens=5 + 9 * (i % 4), temperature=[0.0, 1.0, 0.7][i % 3], seed=i, top_p=0.9
        )
        for i in range(9)
    ]
    together, _ = new_tokens(chain, prompts, params)
    for prompt, options, expected in zip(prompts, params, together, strict=True):
        assert new_tokens(chain, [prompt], options)[0] == [expected]
    backwards, _ = new_tokens(chain, prompts[::-1], params[::-1])
    assert backwards[::-1] == together


def test_the_cut_of_a_prompt_depends_on_its_length_only(chain):
    def cut(prompts):
        chain.prefilled_widths.clear()
        new_tokens(chain, prompts, SamplingParams(max_new_tokens=1))
        return chain.prefilled_widths

    assert cut([[2] * 5]) == [(16, [5, 0, 0, 0])]
    assert cut([[2] * 300, [2] * 5]) == [
        (16, [5, 0, 0, 0]),
        (256, [256, 0, 0, 0]),
        (256, [44, 0, 0, 0]),
    ]
    assert cut([[2] * 300, [2] * 260, [2] * 257]) == [
        (256, [256, 256, 256, 0]),
        (256, [44, 0, 0, 0]),
        (16, [0, 4, 1, 0]),
    ]


def test_one_program_for_any_number_of_prompts(chain):
    new_tokens(chain, random_prompts(1, longest=9), SamplingParams(max_new_tokens=20))
    compiled = generation._decode_chunk.num_compiled(), generation._sample.num_compiled()
    for num in (2, 4, 7):
        params = SamplingParams(max_new_tokens=30, temperature=0.1 * num, stop_token_ids=[5] * num)
        new_tokens(chain, random_prompts(num, longest=200), params)
    assert (generation._decode_chunk.num_compiled(), generation._sample.num_compiled()) == compiled


def test_long_prompts_share_a_cache_with_fewer(chain, monkeypatch):
    monkeypatch.setattr(generation, "SHARED_TOKENS", 512)
    prompts = [[2] * 300, [3] * 250, [4] * 200, [5] * 3]
    ids, _ = new_tokens(chain, prompts, SamplingParams(max_new_tokens=12))
    assert ids == [chain.expected_greedy(prompt, 12) for prompt in prompts]
    slots = {len(lengths) for _, lengths in chain.prefilled_widths}
    assert slots == {1, 2}


@pytest.mark.parametrize("where", [0, 1, 7, 8, 9])
def test_a_stop_token_ends_the_text_and_is_not_part_of_it(chain, where):
    prompt = [4, 8]
    expected = chain.expected_greedy(prompt, 12)
    assert len(set(expected[:10])) == 10, "the chain repeats itself"
    params = SamplingParams(max_new_tokens=12, stop_token_ids=[60, expected[where]])
    ids, finish = new_tokens(chain, [prompt], params)
    assert (ids, finish) == ([expected[:where]], ["stop"])


def test_end_of_sequence_stops(reciter, tokenizer):
    model = reciter(tokenizer.encode("hello"))
    assert generate_text(model, "", max_new_tokens=99) == "hello"


def test_slots_are_reused_after_stops(chain):
    prompts = random_prompts(12, longest=20)
    stops = [chain.expected_greedy(prompt, 6)[5] for prompt in prompts]
    params = [SamplingParams(max_new_tokens=40, stop_token_ids=[stop]) for stop in stops]
    ids, _ = new_tokens(chain, prompts, params)
    for prompt, stop, got in zip(prompts, stops, ids, strict=True):
        expected = chain.expected_greedy(prompt, 40)
        end = expected.index(stop)
        assert got == expected[:end]


TEXT = "hello 漢字 🙂 there"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ((), TEXT),
        ("there", "hello 漢字 🙂 "),
        ("字", "hello 漢"),
        (("zzz", "🙂 t", "there"), "hello 漢字 "),
        ("hello", ""),
        ("there!", TEXT),
    ],
)
def test_stop_strings(reciter, tokenizer, stop, expected):
    model = reciter(tokenizer.encode(TEXT))
    assert generate_text(model, "", max_new_tokens=99, stop=stop) == expected
    (finish,) = new_tokens(model, [[0]], SamplingParams(max_new_tokens=99, stop=stop))[1]
    assert finish == "stop"


def test_tokens_after_a_stop_string_are_dropped(reciter, tokenizer):
    script = tokenizer.encode(TEXT)
    model = reciter(script)
    ids, _ = new_tokens(model, [[0]], SamplingParams(max_new_tokens=99, stop="字"))
    assert script[: len(ids[0])] == ids[0]
    assert tokenizer.decode(ids[0]).rstrip("\ufffd").endswith("字")
    assert "字" not in tokenizer.decode(ids[0][:-1])


def test_a_withheld_start_of_a_stop_string_comes_at_the_limit(reciter, tokenizer):
    script = tokenizer.encode("hello there")
    model = reciter(script)
    for limit in range(1, len(script) + 1):
        text = generate_text(model, "", max_new_tokens=limit, stop="hello there!")
        assert text == tokenizer.decode(script[:limit])


def test_pieces_hold_whole_characters(reciter, tokenizer):
    model = reciter(tokenizer.encode(TEXT))
    pieces = list(stream_text(model, "", max_new_tokens=99))
    assert "".join(pieces) == TEXT
    assert len(pieces) > 5
    assert all(pieces) and "\ufffd" not in TEXT.join(pieces)
    cut = len(tokenizer.encode("hello 漢字 ")) + 1
    assert generate_text(model, "", max_new_tokens=cut) == "hello 漢字 \ufffd"


def test_ids_beyond_the_tokenizer_show_as_replacement_characters(reciter, tokenizer):
    model = reciter([*tokenizer.encode("a"), tokenizer.vocab_size + 2, *tokenizer.encode("b")])
    assert generate_text(model, "", max_new_tokens=99) == "a\ufffdb"


def test_a_prompt_is_bos_and_plain_text(reciter, tokenizer):
    model = reciter([])
    assert encode_prompt(model, "") == [tokenizer.bos_id]
    ids = encode_prompt(model, "hello<think>")
    assert ids == [tokenizer.bos_id, *tokenizer.encode("hello<think>")]
    assert tokenizer.token_id("<think>") not in ids


def test_timed_pieces_come_after_the_first_chunk(chain):
    pieces = list(generate(chain, [[2]], SamplingParams(max_new_tokens=20)))
    assert [piece.timed for piece in pieces] == [False] * 9 + [True] * 11


def test_ctrl_c_leaves_what_was_emitted(chain, monkeypatch):
    run, calls = generation._decode_chunk, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(*args, **options)

    monkeypatch.setattr(generation, "_decode_chunk", interrupted)
    seen = []
    with pytest.raises(KeyboardInterrupt):
        for piece in generate(chain, [[2, 3]], SamplingParams(max_new_tokens=99)):
            seen += piece.token_ids
    assert seen == chain.expected_greedy([2, 3], 17)


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[2], []], SamplingParams(), r"prompts\[1\]: got \[\], expected at least one token"),
        ([[VOCAB]], SamplingParams(), rf"prompts\[0\]: got token id {VOCAB}, .* \[0, {VOCAB}\)"),
        ([[2, -1]], SamplingParams(), r"prompts\[0\]: got token id -1"),
        ([np.array([2.5])], SamplingParams(), r"prompts\[0\]: got array"),
        ([[2]], SamplingParams(stop_token_ids=[VOCAB]), "stop_token_ids: got token id 61"),
        ([[2]], [SamplingParams()] * 2, "params: got 2, expected one for each of 1"),
        ([[2]], SamplingParams(stop="x"), "stop: got .* has no tokenizer"),
        (
            [[2] * 4000],
            SamplingParams(max_new_tokens=97),
            "4000 tokens .* max_new_tokens 97, expected at most max_position_embeddings 4096",
        ),
    ],
)
def test_what_cannot_be_generated_is_refused_at_once(chain, prompts, params, message):
    chain.new_cache = None
    with pytest.raises(ValueError, match=message):
        generate(chain, prompts, params)


def test_the_longest_prompt(chain):
    ids, _ = new_tokens(chain, [[2] * 4000], SamplingParams(max_new_tokens=96))
    assert ids == [chain.expected_greedy([2] * 4000, 96)]


def test_text_needs_a_tokenizer(chain):
    with pytest.raises(ValueError, match="no tokenizer"):
        stream_text(chain, "hello")


def test_unknown_option(reciter):
    with pytest.raises(TypeError, match="temprature"):
        stream_text(reciter([]), "hello", temprature=1.0)


def test_no_prompts(chain):
    assert list(generate(chain, [], [])) == []


def test_a_chunk_leaves_what_is_over_byte_identical(chain):
    """Slots: runs on; masked; empty; ended by a stop token; ended by its limit."""
    cache = chain.new_cache(5, 5 * 256)
    chain.prefill(cache, np.full((5, 4), 9), np.array([4, 2, 0, 4, 4]))
    cache.reserve(8)
    before = cache.arrays
    nobody = jax.tree.map(jnp.asarray, SamplingArrays.of([SamplingParams()] * 5))
    expected = chain.expected_greedy([9] * 4 + [5], 6)
    assert expected.index(expected[2]) == 2
    emitted, after = decode_chunk(
        chain.graph,
        chain.params,
        before,
        jnp.array([5, -1, 5, 5, 5], jnp.int32),
        nobody,
        jnp.full(5, 7, jnp.int32),
        jnp.array([99, 99, 99, 99, 9], jnp.int32),
        jnp.full((5, 2), -1, jnp.int32).at[3, 1].set(expected[2]),
        num_steps=6,
    )
    over = [-1] * 6
    rows = [expected, over, None, expected[:3] + over[3:], expected[:2] + over[2:]]
    for slot in (0, 1, 3, 4):
        assert emitted[slot].tolist() == rows[slot]
    assert after.lengths.tolist() == [4 + 6, 2, 0, 4 + 3, 4 + 2]
    assert np.array_equal(after.hca_tail[:, 1:3], before.hca_tail[:, 1:3])
    states = [chain.state([9] * 4 + [5, *expected[:n]]) for n in (5, 2, 1)]
    assert after.hca_tail[0, [0, 3, 4], 0, 0].tolist() == states


def test_a_chunk_does_not_hold_decoded_weights(chain, monkeypatch):
    table = chain_model.Table(chain.rows, True)
    table.codes = nnx.Param(jnp.ones((384, VOCAB), jnp.int8))

    def packed_step(graph, params, arrays, tokens):
        logits, arrays = chain_model.chain_decode_step(graph, params, arrays, tokens)
        hidden = jnp.ones((len(tokens), 384)) * tokens[:, None]
        weight = nnx.merge(graph, params).codes[...].astype(jnp.float32)
        return logits + hidden @ weight, arrays

    monkeypatch.setattr(loop, "decode_step", packed_step)
    zero = jnp.zeros(2, jnp.int32)
    options = jax.tree.map(jnp.asarray, SamplingArrays.of([SamplingParams()] * 2))
    program = jax.jit(lambda *args: decode_chunk(*args, num_steps=4)).lower(
        *(*nnx.split(table), chain.new_cache(2, 256).arrays),
        *(zero, options, zero, zero, zero[:, None]),
    )
    hlo = program.compile().as_text()
    around_the_loop = hlo[hlo.index("ENTRY") :]
    assert f"s8[384,{VOCAB}]" in around_the_loop
    assert f"f32[384,{VOCAB}]" not in around_the_loop


# The real model.


@pytest.fixture(scope="module")
def model():
    layers = {"num_hidden_layers": 2, "compress_ratios": [4, 128], "num_hash_layers": 1}
    config = Config.from_dict(random_config(**layers))
    graph, shapes = nnx.split(Transformer(config, jnp.float32, Numerics.EXACT))
    rng = np.random.default_rng(2)

    def value(spec):
        if jnp.issubdtype(spec.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, config.n_routed_experts, spec.shape), spec.dtype)
        return jnp.asarray(rng.standard_normal(spec.shape) * 0.3, spec.dtype)

    return Model(graph, jax.tree.map(value, shapes))


def test_greedy_is_the_argmax_of_forward(model):
    prompt = np.random.default_rng(3).integers(2, model.config.vocab_size, 12).tolist()
    ((new,), _) = new_tokens(model, [prompt], SamplingParams(max_new_tokens=20))
    tokens = np.array([prompt + new])
    logits = np.asarray(model.forward(tokens))[0, len(prompt) - 1 : -1]
    ranked = np.sort(logits, axis=-1)
    assert (ranked[:, -1] - ranked[:, -2]).min() > 1e-4, "a tie that rounding may decide"
    assert len(new) > 10
    assert logits.argmax(axis=-1).tolist() == new


def test_the_real_model_gives_the_same_alone_and_among_others(model):
    rng = np.random.default_rng(4)
    prompts = [rng.integers(2, model.config.vocab_size, n).tolist() for n in (3, 16, 9, 1, 12, 5)]
    params = [
        SamplingParams(max_new_tokens=20 + i, temperature=float(i % 2), seed=i) for i in range(6)
    ]
    together, _ = new_tokens(model, prompts, params)
    for prompt, options, expected in zip(prompts, params, together, strict=True):
        assert new_tokens(model, [prompt], options)[0] == [expected]


def test_nothing_is_compiled_after_warm_up(model):
    def num_programs():
        return (
            generation._decode_chunk.num_compiled(),
            dsv4_jax.model._prefill_step.num_compiled(),
        )

    assert generation.warm_up(model, 200) == 3
    before = num_programs()
    rng = np.random.default_rng(5)
    prompts = [rng.integers(2, model.config.vocab_size, n).tolist() for n in (1, 17, 200)]
    params = SamplingParams(max_new_tokens=30)
    new_tokens(model, prompts, params)
    assert num_programs() == before
