"""Cache writes of one layer in a step: the window's ring, both flushes, and entries read back.

python -m benchmarks.cache_writes [--quick]
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import device_time_us, empty_kernel_us, memory_floor_us, write_results
from dsv4_jax.cache.storage import EntryRecord, KeyRecord, Planes, Storage
from dsv4_jax.config import Config
from dsv4_jax.layers.rotary import Rotary
from dsv4_jax.ops.append_swa import append_swa
from dsv4_jax.ops.flush import Flushed, Stream, flush_csa, flush_hca
from dsv4_jax.ops.gather_kv import gather_kv
from dsv4_jax.ops.layer_writes import layer_writes

HEADS, WIDTH, ROPE, KEY, WINDOW, EPS = 64, 512, 64, 128, 128, 1e-6
ENTRY, KEYS = EntryRecord(WIDTH, ROPE), KeyRecord(KEY)
ENTRY_BYTES, KEY_BYTES = 584, 68
# The tails of so many layers with 64 sequences fill the L2 cache.
CSA_LAYERS = 21
FREQUENCIES = Rotary.of_layer(Config.FLASH, 4).frequencies()
# (sequences, tokens of each): vLLM's fused query norm, rotation and insertion on an H200, query
# and entries from memory (2026-11-21).
PEER_APPEND = {(1, 1): 2.80, (64, 1): 8.36, (64, 16): 48.6, (64, 128): 306}

Row = dict[str, Any]


def numbers(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def zeros(storage: Storage, *shape: int) -> Planes:
    return tuple(jnp.zeros((*shape, width), dtype) for width, dtype in storage.planes)


def append_row(sequences: int, tokens: int, implementation: str = "ffi") -> Row:
    """The window's ring written in place, query and entries from memory."""
    ring = zeros(ENTRY, 1, sequences, WINDOW)
    q = numbers(0, sequences, tokens, HEADS, WIDTH, dtype=jnp.bfloat16)
    kv = numbers(1, sequences, tokens, WIDTH, dtype=jnp.bfloat16)
    weight = jnp.ones(WIDTH, jnp.bfloat16)
    start = jnp.arange(1000, 1000 + sequences)
    length = jnp.full(sequences, tokens)

    def append(ring: Planes, q: jax.Array, kv: jax.Array, *rest: jax.Array) -> Any:
        weight, start, length = rest
        done = append_swa(
            *(q, kv, weight, ring, 0, start, length, FREQUENCIES),
            storage=ENTRY,
            eps=EPS,
            with_chunk=tokens > 1,
            implementation=implementation,
        )
        return done.window, done.q, done.before, done.new

    elapsed = device_time_us(append, ring, q, kv, weight, start, length, cold=(1, 2), carried=1)
    # The ring read and kept, the chunk's entries once more.
    kept = sequences * (2 * WINDOW + tokens) * ENTRY_BYTES if tokens > 1 else 0
    return {
        "op": f"append_swa {implementation}",
        "sequences": sequences,
        "tokens": tokens,
        "us": elapsed,
        "best_peer_us": PEER_APPEND.get((sequences, tokens)),
        "floor_us": memory_floor_us(
            2 * q.nbytes + kv.nbytes + sequences * tokens * ENTRY_BYTES + kept
        ),
    }


def stream(
    ratio: int, width: int, storage: Storage, layers: int, sequences: int, tokens: int
) -> Stream:
    channels = 2 * width if ratio == 4 else width
    shape = (8, 2, channels) if ratio == 4 else (3, width)
    return Stream(
        numbers(2, sequences, tokens, channels),
        numbers(3, sequences, tokens, channels),
        numbers(4, ratio, channels),
        jnp.ones(width, jnp.bfloat16),
        jnp.ones((layers, sequences, *shape), jnp.float32),
        zeros(storage, layers, 2 * sequences, 128 // ratio),
    )


def flush_row(ratio: int, sequences: int, tokens: int, start: int, layers: int = 1) -> Row:
    """The flush of one of several layers, which take turns."""
    kinds: tuple[tuple[int, Storage], ...] = ((WIDTH, ENTRY), (KEY, KEYS))[: 2 if ratio == 4 else 1]
    streams = [stream(ratio, *kind, layers, sequences, tokens) for kind in kinds]
    table = jnp.arange(2 * sequences, dtype=jnp.int32).reshape(sequences, 2)
    place = (table, jnp.full(sequences, start), jnp.full(sequences, tokens))

    def flush(state: list[Flushed], inputs: list[Any], place: tuple[jax.Array, ...]) -> Any:
        static: Any = {"dtype": jnp.bfloat16, "eps": EPS, "implementation": "ffi"}
        static |= {"storage": ENTRY, "frequencies": FREQUENCIES}
        for layer in range(layers):
            own = [
                Stream(value, gate, ape, weight, tail, pool)
                for (value, gate, ape, weight), (tail, pool) in zip(inputs, state, strict=True)
            ]
            if ratio == 4:
                both = flush_csa(own[0], own[1], layer, *place, key_storage=KEYS, **static)
                state = list(both)
            else:
                state = [flush_hca(own[0], layer, *place, **static)]
        return (state,)

    inputs = [(s.value, s.gate, s.ape, s.weight) for s in streams]
    state = [Flushed(s.tail, s.pool) for s in streams]
    elapsed = device_time_us(flush, state, inputs, place, carried=1) / layers
    completed = sequences * ((start + tokens) // ratio - start // ratio)
    num_bytes: float = sum(s.value.nbytes + s.gate.nbytes for s in streams)
    if tokens == 1:
        tails = sum(s.tail.nbytes for s in streams) / layers
        num_bytes += tails if completed or ratio == 128 else tails / 8
    num_bytes += completed * (ENTRY_BYTES + (KEY_BYTES if ratio == 4 else 0))
    return {
        "op": f"flush_{'csa' if ratio == 4 else 'hca'}",
        "sequences": sequences,
        "tokens": tokens,
        "layers": layers,
        "entries": completed,
        "us": elapsed,
        "floor_us": memory_floor_us(num_bytes),
    }


def writes_row(sequences: int, ratio: int) -> Row:
    """All that a layer writes for one token of each sequence, which completes an entry."""
    kinds: tuple[tuple[int, Storage], ...] = ((WIDTH, ENTRY), (KEY, KEYS))[: 2 if ratio == 4 else 1]
    streams = tuple(stream(ratio, *kind, 1, sequences, 1) for kind in kinds)
    ring = zeros(ENTRY, 1, sequences, WINDOW)
    table = jnp.arange(2 * sequences, dtype=jnp.int32).reshape(sequences, 2)
    place = jnp.full(sequences, 127), jnp.ones(sequences, jnp.int32)
    q = numbers(0, sequences, 1, HEADS, WIDTH).astype(jnp.bfloat16)
    kv = numbers(1, sequences, 1, WIDTH).astype(jnp.bfloat16)
    index_q = numbers(5, sequences, 1, HEADS, KEY).astype(jnp.bfloat16)
    queries = (index_q, numbers(6, sequences, 1, HEADS)) if ratio == 4 else None

    def write(state: Any, q: Any, kv: Any, streams: Any, queries: Any) -> Any:
        ring, flushed = state
        own = tuple(
            Stream(s.value, s.gate, s.ape, s.weight, *f)
            for s, f in zip(streams, flushed, strict=True)
        )
        written = layer_writes(
            *(q, kv, jnp.ones(WIDTH, jnp.bfloat16), ring, 0, *place, FREQUENCIES),
            *(own, 0, table, queries),
            storage=ENTRY,
            key_storage=KEYS,
            eps=EPS,
            implementation="ffi",
        )
        return (written.appended.window, written.flushed), written.appended.q, written.queries

    state = ring, tuple(Flushed(s.tail, s.pool) for s in streams)
    num_bytes = 2 * q.nbytes + kv.nbytes + sequences * 2 * ENTRY_BYTES
    num_bytes += sum(s.value.nbytes + s.gate.nbytes + s.tail.nbytes for s in streams)
    num_bytes += int(1.5 * index_q.nbytes) if queries else 0
    return {
        "op": f"layer_writes, ratio {ratio}",
        "sequences": sequences,
        "tokens": 1,
        "us": device_time_us(write, state, q, kv, streams, queries, carried=1),
        "floor_us": memory_floor_us(num_bytes),
    }


def gather_row(queries: int, entries: int) -> Row:
    """Entries that each of so many queries selects, of a context of 65,536 tokens."""
    num_blocks = 512
    rng = np.random.default_rng(0)
    pool = zeros(ENTRY, 1, num_blocks, 32)
    table = jnp.asarray(rng.permutation(num_blocks)[None], jnp.int32)
    ids = jnp.asarray(rng.integers(0, num_blocks * 32, (1, queries, entries)), jnp.int32)

    def gather(pool: Planes, table: jax.Array, ids: jax.Array) -> jax.Array:
        return gather_kv(pool, 0, table, ids, storage=ENTRY, implementation="ffi")

    return {
        "op": "gather_kv",
        "sequences": 1,
        "tokens": queries,
        "entries": queries * entries,
        "us": device_time_us(gather, pool, table, ids),
        # What several queries select is read from L2.
        "floor_us": memory_floor_us(queries * entries * 2 * WIDTH),
    }


def main(quick: bool) -> None:
    rows = [append_row(*shape) for shape in PEER_APPEND]
    rows += [flush_row(ratio, 64, 1, 127) for ratio in (4, 128)]
    rows += [writes_row(sequences, ratio) for sequences in (1, 64) for ratio in (4, 128)]
    if not quick:
        rows.append(append_row(64, 1, "xla"))
        rows.append(flush_row(4, 64, 1, 127, CSA_LAYERS))
        rows.append(flush_row(4, 64, 1, 128))
        rows += [flush_row(ratio, 1, tokens, 0) for ratio in (4, 128) for tokens in (128, 2048)]
        rows += [gather_row(1, 512), gather_row(512, 512)]
    rows.append({"op": "empty kernel", "us": empty_kernel_us()})
    write_results("cache_writes", rows)


if __name__ == "__main__":
    main("--quick" in sys.argv)
