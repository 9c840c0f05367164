"""A model whose next logits are a table's row, so that a test can say what it must generate.

The row is chosen by a number that depends on every token of the sequence and their order
("history"), or by the sequence's length ("position"). The number is kept in a tail of the cache:
a token lost, repeated, without a block or in a neighbour's slot shows in all that follows.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv4_jax.cache.manager import Cache
from dsv4_jax.cache.schema import CacheSchema, new_arrays
from dsv4_jax.cache.storage import Dense
from dsv4_jax.decoding import loop
from dsv4_jax.model import Model
from tests.checkpoints import random_config

START, MULTIPLIER, MODULUS = 5, 7, 997


def next_state(state, token):
    return (state * MULTIPLIER + token + 1) % MODULUS


class Table(nnx.Module):
    def __init__(self, rows, by_history):
        self.rows = nnx.Param(jnp.asarray(rows, jnp.float32))
        self.by_history = nnx.Param(jnp.asarray(by_history))


def chain_decode_step(graph, params, arrays, tokens):
    table = nnx.merge(graph, params)
    num = tokens.shape[0]
    active = (tokens >= 0) & (arrays.lengths[:num] > 0)
    state = arrays.hca_tail[0, :num, 0, 0].astype(jnp.int32)
    state = jnp.where(active, next_state(state, tokens), state)
    lengths = arrays.lengths.at[:num].add(active)
    held = 128 * (arrays.block_table[:num] >= 0).sum(axis=1)
    state = jnp.where(active & (lengths[:num] > held), 0, state)
    tail = arrays.hca_tail.at[0, :num, 0, 0].set(state.astype(jnp.float32))
    index = jnp.where(table.by_history[...], state, lengths[:num]) % len(table.rows[...])
    return table.rows[...][index], replace(arrays, lengths=lengths, hca_tail=tail)


class ChainModel(Model):
    def __init__(self, rows, by_history=True, tokenizer=None, **config):
        self.rows = np.asarray(rows, np.float32)
        self.by_history = by_history
        self.graph, self.params = nnx.split(Table(rows, by_history))
        from dsv4_jax.config import Config

        settings = {"vocab_size": self.rows.shape[1], "max_position_embeddings": 4096} | config
        self.config = Config.from_dict(random_config(**settings))
        self.tokenizer = tokenizer
        self.mesh = None
        self.prefilled_widths = []

    def new_cache(self, max_sequences=1, max_tokens=8192, cache_format=None):
        entries = Dense(8, jnp.dtype(jnp.float32), "none")
        num_blocks = -(-max_tokens // 128)
        schema = CacheSchema((128,), 5, 8, 8, entries, entries)
        return Cache(new_arrays(schema, max_sequences, num_blocks), num_blocks)

    def prefill(self, cache, tokens, lengths):
        self.prefilled_widths.append((tokens.shape[1], lengths.tolist()))
        cache.prepare_step(lengths)
        state = np.asarray(cache.arrays.hca_tail[0, :, 0, 0]).astype(int)
        for slot, length in enumerate(lengths):
            if length:
                state[slot] = self.state(tokens[slot, :length], state[slot], cache.lengths[slot])
        arrays = cache.arrays
        cache.replace_arrays(
            replace(
                arrays,
                lengths=arrays.lengths + jnp.asarray(lengths),
                hca_tail=arrays.hca_tail.at[0, :, 0, 0].set(jnp.asarray(state, jnp.float32)),
            )
        )
        cache.advance(lengths)
        index = state if self.by_history else cache.lengths
        return jnp.asarray(self.rows[index % len(self.rows)]), cache

    @staticmethod
    def state(tokens, state=START, length=0):
        if length == 0:
            state = START
        for token in tokens:
            state = next_state(state, int(token))
        return int(state)

    def expected_logits(self, tokens):
        """Logits after a sequence."""
        index = self.state(tokens) if self.by_history else len(tokens)
        return self.rows[index % len(self.rows)]

    def expected_greedy(self, prompt, num_tokens):
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(self.expected_logits(tokens).argmax()))
        return tokens[len(prompt) :]


def install(monkeypatch):
    """Makes the decode loop run `ChainModel`s."""
    monkeypatch.setattr(loop, "decode_step", chain_decode_step)
