"""`Model` and `load`: what they refuse, and that nothing is lost on the way to disk."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_jax
from dsv4_jax import CacheUnusableError, Config, Kernels, Numerics, OutOfBlocksError, memory
from dsv4_jax import model as model_module
from dsv4_jax.bench.random_model import random_model
from tests.conftest import GOLDEN


@pytest.fixture(scope="module")
def mini():
    return dsv4_jax.load("mini")


def test_saved_mini_is_bit_identical(mini, tmp_path):
    mini.save(tmp_path / "copy")
    copy = dsv4_jax.load(tmp_path / "copy")
    assert copy.config == mini.config
    assert copy.tokenizer.encode("import os\n") == mini.tokenizer.encode("import os\n")
    saved, loaded = jax.tree.leaves(mini.params), jax.tree.leaves(copy.params)
    for old, new in zip(saved, loaded, strict=True):
        assert old.dtype == new.dtype
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
    with pytest.raises(ValueError, match="absent or empty"):
        mini.save(tmp_path / "copy")


def test_mini_is_the_preset_stored_as_the_big_ones_are(mini):
    assert mini.config == dsv4_jax.Config.MINI
    layer = mini.params["layers"][2]
    assert layer["ffn"]["experts"]["w1"]["weight"][...].dtype == jnp.uint8
    assert layer["attn"]["wq_a"]["weight"][...].dtype == jnp.float8_e4m3fn
    assert mini.params["embed"]["weight"][...].dtype == jnp.bfloat16
    assert mini.numerics == Numerics.CHECKPOINT
    assert mini.dtype == (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def test_mini_predicts_python(mini):
    """Far better than chance (12 bits a token) on text that it was not trained on."""
    ids = mini.tokenizer.encode("def area(width, height):\n    return width * height\n")
    logits = mini.forward(np.array([[mini.tokenizer.bos_id, *ids]]))
    nll = -jax.nn.log_softmax(logits[0, :-1])[np.arange(len(ids)), np.array(ids)]
    assert float(nll.mean()) / np.log(2) < 6


def test_without_tokenizer_text_calls_raise(tiny):
    assert tiny.tokenizer is None
    with pytest.raises(ValueError, match="no tokenizer"):
        tiny.generate("x")


def test_an_empty_prompt_is_refused(mini):
    with pytest.raises(ValueError, match="prompt: got an empty string"):
        mini.generate("")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"source": "no/such/place"}, "no/such/place"),
        ({"source": GOLDEN, "dtype": "float16"}, "dtype: got float16"),
    ],
)
def test_load_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        dsv4_jax.load(**kwargs)


@pytest.fixture
def cache(tiny):
    cache = tiny.new_cache(max_sequences=2, max_tokens=256)
    tiny.prefill(cache, np.array([[3, 4, 5], [6, 0, 0]]), np.array([3, 0]))
    return cache


def unchanged(cache, call, error, message):
    before = jax.tree.map(np.asarray, cache.arrays)
    with pytest.raises(error, match=message):
        call()
    after = jax.tree.map(np.asarray, cache.arrays)
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        ([1, 2], [1], r"tokens: got shape \(2,\), expected \[batch, length\]"),
        ([[384]], [1], r"tokens: got id 384, expected ids in \[0, 384\)"),
        ([[-1]], [1], "tokens: got id -1"),
        ([[1.5]], [1], "tokens: got dtype float64"),
        ([[1]], [2], r"lengths: got \[2\], expected values in \[0, 1\]"),
        ([[1]], [-1], r"lengths: got \[-1\]"),
        ([[1]], [1, 1], r"lengths: got int64\[2\]"),
        ([[1], [1], [1]], [1, 1, 1], "tokens: got 3 rows, expected 1 to 2"),
    ],
)
def test_prefill_refuses(tiny, cache, tokens, lengths, message):
    tokens, lengths = np.array(tokens), np.array(lengths)
    unchanged(cache, lambda: tiny.prefill(cache, tokens, lengths), ValueError, message)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2]], "tokens: got shape"),
        ([1, 2, 3], "tokens: got shape"),
        ([384, -1], "tokens: got id 384"),
        ([-2, 1], "tokens: got id -2"),
        ([1, 1], "slot 1 is empty"),
    ],
)
def test_decode_refuses(tiny, cache, tokens, message):
    unchanged(cache, lambda: tiny.decode_step(cache, np.array(tokens)), ValueError, message)


def test_a_prompt_longer_than_the_cache_leaves_it_as_it_was(tiny, cache):
    prompt = np.ones((2, 300), np.int32)
    lengths = np.array([0, 300])
    unchanged(cache, lambda: tiny.prefill(cache, prompt, lengths), OutOfBlocksError, "blocks")


def test_forward_refuses(tiny):
    with pytest.raises(ValueError, match="expected \\[batch, length >= 1\\]"):
        tiny.forward(np.zeros((2, 0), np.int32))
    with pytest.raises(ValueError, match="got id 384"):
        tiny.forward(np.array([[384]]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_sequences": 0}, "max_sequences: got 0"),
        ({"max_tokens": 0}, "max_tokens: got 0"),
        ({"cache_format": "fp8"}, "cache_format: got 'fp8'"),
        ({"cache_format": "records"}, "head_dim - qk_rope_head_dim is 32"),
    ],
)
def test_new_cache_refuses(tiny, kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny.new_cache(**kwargs)


def test_a_cache_without_room_says_what_would_fit(tiny, monkeypatch):
    held = tiny.new_cache(max_sequences=3, max_tokens=1280).memory_bytes()
    monkeypatch.setattr(memory, "free_bytes", lambda devices: held)
    assert tiny.new_cache(max_sequences=3, max_tokens=1280).memory_bytes() == held
    with pytest.raises(
        ValueError, match=r"3 sequences with 2,560 tokens need .* free are"
    ) as error:
        tiny.new_cache(max_sequences=3, max_tokens=2560)
    assert "; 1,280 tokens for as many sequences, or 1 sequences" in str(error.value)
    assert tiny.new_cache(max_sequences=1, max_tokens=2560 // 3).memory_bytes() <= held


def test_weights_without_room_are_not_read(monkeypatch):
    checked = []
    devices = jax.devices()[:1]
    mesh = jax.sharding.Mesh(devices, ("model",))
    monkeypatch.setattr(memory, "free_bytes", lambda devices: checked.append(devices) or 10**5)
    monkeypatch.setattr(jax, "device_put", None)
    for given in (None, mesh):
        with pytest.raises(ValueError, match=r"memory: weights on .* need .* in a mesh"):
            dsv4_jax.load(GOLDEN, mesh=given)
    assert checked == [None, devices]


def test_the_weights_that_are_checked_are_those_that_are_loaded(tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(model_module, "check_room", lambda what, size, *rest: seen.append(size))
    dsv4_jax.load(GOLDEN)
    held = [leaf.nbytes for leaf in jax.tree.leaves(tiny.params)]
    assert seen == [sum(held) + max(held)]


def test_wrappers_name_the_pure_function_under_a_trace(tiny, cache):
    with pytest.raises(ValueError, match=r"dsv4_jax\.decode_step"):
        jax.jit(lambda tokens: tiny.decode_step(cache, tokens)[0])(jnp.zeros(2, jnp.int32))


def test_a_failed_step_makes_the_cache_unusable(tiny, cache, monkeypatch):
    def fail(*_):
        raise RuntimeError("device lost")

    monkeypatch.setattr(model_module, "_decode_step", fail)
    with pytest.raises(RuntimeError, match="device lost"):
        tiny.decode_step(cache, np.array([1, -1]))
    with pytest.raises(CacheUnusableError, match="device lost"):
        tiny.decode_step(cache, np.array([1, -1]))


@pytest.fixture(scope="module")
def three_layers():
    """Random weights, one layer of each kind, entries as wide as released ones."""
    config = dataclasses.replace(
        Config.MINI,
        num_hidden_layers=3,
        compress_ratios=(0, 4, 128),
        num_nextn_predict_layers=0,
        n_routed_experts=8,
        num_hash_layers=1,
    )
    return random_model(config, dtype="float32", kernels=Kernels.XLA)


@pytest.mark.parametrize("cache_format", ["dense", "records"])
def test_cache_formats_agree(three_layers, cache_format):
    """Both hold what the quantisation points left; memory is told to the byte."""
    model = three_layers
    cache = model.new_cache(max_sequences=1, max_tokens=256, cache_format=cache_format)
    assert cache.memory_bytes() == sum(x.nbytes for x in jax.tree.leaves(cache.arrays))
    entry_bytes = {"dense": 512 * model.dtype.itemsize, "records": 584}[cache_format]
    assert sum(x.nbytes for x in cache.arrays.window) == 3 * 128 * entry_bytes
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 200))
    logits, _ = model.prefill(cache, ids, np.array([200]))
    whole = np.asarray(model.forward(ids))[:, -1]
    assert np.abs(np.asarray(logits) - whole).max() < 0.05 * np.abs(whole).max()
