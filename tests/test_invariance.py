"""However a sequence is cut, batched and placed, its logits are those of the whole sequence.

The reference is `forward`, which has no cache. Float32 without quantisation points, on inputs
whose smallest top-k margin is above the tolerance, since a closer decision may flip: 2.4e-5 on
the golden tokens (`test_oracles` prints it), printed here for the others.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_jax
from dsv4_jax import Numerics
from dsv4_jax.compilation import Program
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


def test_window_of_128(tmp_path):
    """The released window; chunks that end on both sides of its edges and of a block's."""
    kinds = [0, 128, 4]
    config = random_config(
        sliding_window=128, num_hidden_layers=3, compress_ratios=kinds, num_hash_layers=1
    )
    tensors = write_checkpoint(tmp_path, config, seed=18)
    model = dsv4_jax.load(tmp_path, dtype=jnp.float32, numerics=Numerics.EXACT)
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


@dataclass
class Sequence:
    """Tokens, of which the first ones are the prompt, and the logits after each of the others."""

    tokens: np.ndarray
    prompt: int
    logits: list[np.ndarray] = field(default_factory=list)

    @property
    def ended(self):
        return self.prompt + len(self.logits) > len(self.tokens)


def begin(model, cache, running, sequence):
    slot = cache.admit()
    found = feed(model, cache, {slot: sequence.tokens[: sequence.prompt]})
    sequence.logits.append(found[slot].copy())
    running[slot] = sequence


def one_step(model, cache, tokens):
    return np.asarray(model.decode_step(cache, tokens[0])[0])[None]


def _steps(graph, params, arrays, tokens):
    def body(arrays, ids):
        packed, ids = jax.lax.optimization_barrier((params, ids))
        logits, arrays = dsv4_jax.decode_step(graph, packed, arrays, ids)
        return arrays, logits

    return jax.lax.scan(body, arrays, tokens)


_program = Program(_steps, donate_argnums=2)


def eight_steps(model, cache, tokens):
    """In one program; `tokens` [8, slots], -1 where a sequence has ended."""
    counts = (tokens >= 0).sum(axis=0)
    cache.prepare_step(counts)
    arrays, logits = _program(model.graph, model.params, cache.arrays, tokens)
    cache.replace_arrays(arrays)
    cache.advance(counts)
    return np.asarray(logits)


STEPS = {one_step: 1, eight_steps: 8}


def go_on(model, cache, running, take):
    """Some tokens for each sequence; those that end leave."""
    tokens = np.full((STEPS[take], SLOTS), -1, np.int32)
    for slot, s in running.items():
        rest = s.tokens[s.prompt + len(s.logits) - 1 :][: len(tokens)]
        tokens[: len(rest), slot] = rest
    logits = take(model, cache, tokens)
    for slot, s in list(running.items()):
        s.logits += list(logits[tokens[:, slot] >= 0, slot].copy())
        if s.ended:
            cache.release(slot)
            del running[slot]


def alone(model, sequence, take):
    """The logits of a sequence with nothing beside it."""
    again, running = Sequence(sequence.tokens, sequence.prompt), {}
    cache = new_cache(model)
    begin(model, cache, running, again)
    while running:
        go_on(model, cache, running, take)
    return np.stack(again.logits)


@contextmanager
def compilations():
    """Programs that are compiled inside."""
    found = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **kwargs: found.append(name) if "backend_compile" in name else None
    )
    try:
        yield found
    finally:
        jax.monitoring.clear_event_listeners()


def bytes_in_use():
    stats = jax.devices()[0].memory_stats()
    return stats["bytes_in_use"] if stats else sum(x.nbytes for x in jax.live_arrays())


def come_and_go(model, num_steps, longest, take):
    """Steps with sequences that come at random, most slots in use; those that ended.

    Nothing is compiled after a first sequence, and no memory is lost.
    """
    rounds = num_steps // STEPS[take]
    rng = np.random.default_rng(0)

    def arriving():
        tokens = rng.integers(0, model.config.vocab_size, rng.integers(20, longest))
        return Sequence(tokens, int(rng.integers(1, 17)))

    cache, running, every, memory = new_cache(model), {}, [], []
    alone(model, arriving(), take)
    with compilations() as compiled:
        for i in range(rounds):
            if len(running) < SLOTS and (not running or rng.random() < 0.3):
                every.append(arriving())
                begin(model, cache, running, every[-1])
            go_on(model, cache, running, take)
            if i % (rounds // 4) == 0:
                memory.append(bytes_in_use())
    assert not compiled
    assert len(set(memory)) == 1, memory
    return [sequence for sequence in every if sequence.ended]


def test_two_hundred_steps_with_sequences_coming_and_going(tiny):
    ended = come_and_go(tiny, 200, 60, one_step)
    assert len(ended) > 5
    for sequence in ended:
        assert_close(np.stack(sequence.logits), alone(tiny, sequence, one_step))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("batch_invariant", [True, False])
def test_ten_thousand_steps_with_sequences_coming_and_going(batch_invariant):
    """With `batch_invariant` to the last bit: a step has as many rows for one as for all."""
    numerics = Numerics(batch_invariant=batch_invariant)
    model = dsv4_jax.load("mini", dtype=jnp.bfloat16, numerics=numerics)
    ended = come_and_go(model, 10_000, 300, eight_steps)
    assert len(ended) > 100
    for sequence in [s for s in ended if len(s.tokens) > 200][:5]:
        together, separate = np.stack(sequence.logits), alone(model, sequence, eight_steps)
        if batch_invariant:
            assert together.tobytes() == separate.tobytes()
        else:
            np.testing.assert_allclose(together, separate, atol=0.02 * np.abs(separate).max())
