"""However a sequence is cut, batched and placed, its logits are those of the whole sequence.

The reference is `forward`, which has no cache. Float32 without quantisation points, on inputs
whose smallest top-k margin is above the tolerance, since a closer decision may flip: 2.4e-5 on
the golden tokens (`test_oracles` prints it), printed here for the others.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_jax
from tests.checkpoints import random_config, write_checkpoint
from tests.oracles import model as oracle

TOLERANCE = 1e-5
SLOTS = 3
MAX_TOKENS = 2048


@pytest.fixture(scope="module")
def tokens(golden):
    return np.asarray(golden["input_ids"])


@pytest.fixture(scope="module")
def whole(tiny, tokens):
    return np.asarray(tiny.forward(tokens))


def new_cache(model):
    return model.new_cache(max_sequences=SLOTS, max_tokens=MAX_TOKENS)


def feed(model, cache, rows: dict[int, np.ndarray]):
    """Prefills the given slots with the given tokens; returns {slot: logits}."""
    lengths = np.zeros(SLOTS, np.int32)
    batch = np.zeros((SLOTS, max(len(r) for r in rows.values())), np.int32)
    for slot, row in rows.items():
        lengths[slot] = len(row)
        batch[slot, : len(row)] = row
    logits, _ = model.prefill(cache, batch, lengths)
    return {slot: np.asarray(logits[slot]) for slot in rows}


def step(model, cache, ids: dict[int, int]):
    """Decodes one token in the given slots; returns {slot: logits}."""
    row = np.full(SLOTS, -1, np.int32)
    for slot, token in ids.items():
        row[slot] = token
    logits, _ = model.decode_step(cache, row)
    return {slot: np.asarray(logits[slot]) for slot in ids}


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


# Edges of the window (32 here, 128 below), of CSA entries (4), of HCA entries and blocks (128).
EDGES = [1, 2, 3, 4, 5, 31, 32, 33, 127, 128, 129, 255, 256, 257, 330]


@pytest.mark.parametrize("length", EDGES)
def test_prompt_of_length(tiny, tokens, whole, length):
    cache = new_cache(tiny)
    assert_close(feed(tiny, cache, {0: tokens[0, :length]})[0], whole[0, length - 1])


@pytest.mark.parametrize("split", [1, 3, 4, 31, 32, 127, 128, 255, 256])
def test_prefill_continues_where_it_stopped(tiny, tokens, whole, split):
    cache = new_cache(tiny)
    assert_close(feed(tiny, cache, {0: tokens[0, :split]})[0], whole[0, split - 1])
    assert_close(feed(tiny, cache, {0: tokens[0, split:]})[0], whole[0, -1])


def test_token_by_token(tiny, tokens, whole):
    cache = new_cache(tiny)
    assert_close(feed(tiny, cache, {0: tokens[0, :1], 2: tokens[1, :1]})[0], whole[0, 0])
    for position in range(1, tokens.shape[1]):
        logits = step(tiny, cache, {0: tokens[0, position], 2: tokens[1, position]})
        assert_close(logits[0], whole[0, position])
        assert_close(logits[2], whole[1, position])


def test_random_chunks(tiny, tokens, whole):
    rng = np.random.default_rng(0)
    for _ in range(3):
        cache = new_cache(tiny)
        begin = 0
        while begin < tokens.shape[1]:
            end = min(begin + int(rng.integers(1, 90)), tokens.shape[1])
            assert_close(feed(tiny, cache, {1: tokens[1, begin:end]})[1], whole[1, end - 1])
            begin = end


def test_ragged_batch_with_sequences_coming_and_going(tiny, tokens, whole):
    """Rows of different lengths share steps; one leaves and another takes its slot."""
    cache = new_cache(tiny)
    logits = feed(tiny, cache, {0: tokens[0, :200], 1: tokens[1, :3], 2: tokens[0, :128]})
    for slot, (row, end) in {0: (0, 200), 1: (1, 3), 2: (0, 128)}.items():
        assert_close(logits[slot], whole[row, end - 1])
    for i in range(5):
        logits = step(tiny, cache, {0: tokens[0, 200 + i], 1: tokens[1, 3 + i]})
        assert_close(logits[0], whole[0, 200 + i])
        assert_close(logits[1], whole[1, 3 + i])
    cache.release(0)
    logits = feed(tiny, cache, {0: tokens[1, :5], 2: tokens[0, 128:131]})
    assert_close(logits[0], whole[1, 4])
    assert_close(logits[2], whole[0, 130])
    for i in range(5):
        ids = {0: tokens[1, 5 + i], 1: tokens[1, 8 + i], 2: tokens[0, 131 + i]}
        logits = step(tiny, cache, ids)
        assert_close(logits[0], whole[1, 5 + i])
        assert_close(logits[1], whole[1, 8 + i])
        assert_close(logits[2], whole[0, 131 + i])


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 130])
def test_slot_reused_after_a_longer_sequence(tiny, tokens, whole, length):
    cache = new_cache(tiny)
    feed(tiny, cache, {0: tokens[0]})
    cache.release(0)
    assert_close(feed(tiny, cache, {0: tokens[1, :length]})[0], whole[1, length - 1])
    assert_close(step(tiny, cache, {0: tokens[1, length]})[0], whole[1, length])


def test_block_order(tiny, tokens, whole):
    """A sequence whose blocks lie scattered and out of order reads the same."""
    cache = new_cache(tiny)
    feed(tiny, cache, {0: tokens[0, :100], 1: tokens[1, :100], 2: tokens[0, :300]})
    cache.release(2)
    cache.release(0)
    logits = feed(tiny, cache, {1: tokens[1, 100:], 2: tokens[0, :290]})
    table = np.asarray(cache.arrays.block_table)
    used = table[1][table[1] >= 0]
    assert (np.diff(used) != 1).any(), "the blocks must not be consecutive for this to be a test"
    assert_close(logits[1], whole[1, -1])
    assert_close(logits[2], whole[0, 289])


def test_masked_slot_is_byte_identical(tiny, tokens):
    cache = new_cache(tiny)
    feed(tiny, cache, {0: tokens[0, :37], 1: tokens[1, :130], 2: tokens[0, :3]})
    cache.reserve(8)
    before = jax.tree.map(np.asarray, cache.arrays)
    blocks = set(before.block_table[[0, 2]].ravel()) - {-1}

    feed(tiny, cache, {1: tokens[1, 130:140]})
    step(tiny, cache, {1: tokens[1, 140]})
    after = jax.tree.map(np.asarray, cache.arrays)

    assert after.lengths.tolist() == [37, 141, 3]
    for name in ("window", "csa_tail", "key_tail", "hca_tail"):
        for old, new in zip(
            jax.tree.leaves(getattr(before, name)),
            jax.tree.leaves(getattr(after, name)),
            strict=True,
        ):
            assert old[:, [0, 2]].tobytes() == new[:, [0, 2]].tobytes(), name
            assert old[:, 1].tobytes() != new[:, 1].tobytes(), name
    for name in ("csa", "csa_keys", "hca"):
        for old, new in zip(getattr(before, name), getattr(after, name), strict=True):
            kept = sorted(blocks)
            assert old[:, kept].tobytes() == new[:, kept].tobytes(), name


def test_users_scan_over_pure_steps(tiny, tokens, whole):
    """`reserve`, then a scan of pure steps without the host, equals single steps."""
    cache = new_cache(tiny)
    feed(tiny, cache, {0: tokens[0, :120], 1: tokens[1, :60]})
    cache.reserve(20)
    rows = jnp.asarray(np.stack([tokens[0, 120:140], tokens[1, 60:80], np.full(20, -1)], axis=1))

    @jax.jit
    def run(graph, params, arrays, rows):
        def body(arrays, ids):
            logits, arrays = dsv4_jax.decode_step(graph, params, arrays, ids)
            return arrays, logits

        return jax.lax.scan(body, arrays, rows)

    cache.arrays, logits = run(tiny.graph, tiny.params, cache.arrays, rows)
    assert_close(logits[:, 0], whole[0, 120:140])
    assert_close(logits[:, 1], whole[1, 60:80])
    assert cache.lengths.tolist() == [140, 80, 0]
    assert_close(step(tiny, cache, {0: tokens[0, 140]})[0], whole[0, 140])


@pytest.mark.parametrize("schedule", ["flash", "pro"])
def test_window_of_128(tmp_path, schedule):
    """The released window; chunks that end on both sides of its edges and of a block's."""
    config = random_config(schedule, sliding_window=128)
    tensors = write_checkpoint(tmp_path, config, seed=18)
    model = dsv4_jax.load(tmp_path, dtype=jnp.float32, numerics=dsv4_jax.Numerics.EXACT)
    ids = np.random.default_rng(18).integers(0, config["vocab_size"], (1, 300))
    _, exact = oracle.forward(config, tensors, ids[0], capture=True)
    print(f"smallest top-k margin: {exact.margin:.1e}")
    assert exact.margin > TOLERANCE
    whole = np.asarray(model.forward(ids))
    cache = new_cache(model)
    begin = 0
    for end in (1, 3, 126, 127, 128, 129, 130, 254, 255, 256, 257, 300):
        assert_close(feed(model, cache, {0: ids[0, begin:end]})[0], whole[0, end - 1])
        begin = end
