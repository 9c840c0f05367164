"""Sequences, the caches that hold their records, and what attention over them gives."""

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from tests.oracles.sparse_attention import attend, record_values

LAYERS, LAYER, POOL_LAYER = 3, 2, 1
ROTARY = 64


def random_records(rng, *shape, width, exponent=0):
    """Values of about 2^exponent."""
    plain = width - ROTARY
    codes = rng.standard_normal((*shape, plain)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    rotary = rng.standard_normal((*shape, ROTARY)) * 2.0**exponent
    rotary = rotary.astype(ml_dtypes.bfloat16).view(np.uint8)
    scales = np.zeros((*shape, 8), np.uint8)
    scales[..., : plain // 64] = rng.integers(124, 129, (*shape, plain // 64)) + exponent
    return np.concatenate([codes, rotary], -1), scales


def garbage_records(*shape, width):
    """NaN wherever it is read."""
    return (
        np.full((*shape, width + ROTARY), 0xFF, np.uint8),
        np.full((*shape, 8), 0xFF, np.uint8),
    )


@dataclass
class Case:
    """Sequences with their newest tokens and all entries, and the cache that holds them."""

    q: np.ndarray
    sink: np.ndarray
    omega: np.ndarray
    start: np.ndarray
    length: np.ndarray
    tokens: list  # of each sequence the records of its newest tokens, the chunk's the last
    entries: list  # records of each sequence's entries
    ids: np.ndarray | None
    table: np.ndarray
    ring: tuple
    new: tuple
    pool: tuple
    window: int
    ratio: int
    per_block: int

    @property
    def scale(self):
        return self.q.shape[-1] ** -0.5


def make_case(
    rng,
    start,
    length=None,
    *,
    t=1,
    heads=5,
    width=192,
    window=16,
    ring=None,
    ratio=0,
    top_k=None,
    capacity=None,
    exponent=0,
):
    """`top_k` None: all complete entries. The ring is that of before, `new` the chunk."""
    start = np.asarray(start, np.int32)
    b = len(start)
    length = np.full(b, t, np.int32) if length is None else np.asarray(length, np.int32)
    ring = ring or window
    per_block = 128 // ratio if ratio else 1
    complete = (start + t) // ratio if ratio else np.zeros(b, int)
    blocks_each = (-(-int(complete.max()) // per_block) if capacity is None else capacity) + 1
    num_slots, num_blocks = b + 1, b * blocks_each + 2

    ring_planes = garbage_records(LAYERS, num_slots, ring, width=width)
    new = random_records(rng, b, t, width=width, exponent=exponent)
    tokens = []
    for s in range(b):
        old = min(int(start[s]), ring)
        held = random_records(rng, old, width=width, exponent=exponent)
        slots = np.arange(start[s] - old, start[s]) % ring
        for plane, values in zip(ring_planes, held, strict=True):
            plane[LAYER, s, slots] = values
        tokens.append(tuple(np.concatenate([x, y[s]]) for x, y in zip(held, new, strict=True)))

    table = np.full((b, blocks_each), -1, np.int32)
    pool = garbage_records(2, num_blocks, per_block, width=width)
    shuffled = rng.permutation(num_blocks)
    entries = []
    for s in range(b):
        used = -(-int(complete[s]) // per_block)
        table[s, :used], shuffled = shuffled[:used], shuffled[used:]
        held = random_records(rng, complete[s], width=width, exponent=exponent)
        index = np.arange(complete[s])
        for plane, values in zip(pool, held, strict=True):
            plane[POOL_LAYER, table[s, index // per_block], index % per_block] = values
        entries.append(held)

    ids = None
    if top_k is not None:
        ids = np.full((b, t, top_k), -1, np.int32)
        for s, i in np.ndindex(b, t):
            visible = int(start[s] + i + 1) // ratio
            chosen = rng.permutation(visible)[:top_k]
            ids[s, i, np.sort(rng.permutation(top_k)[: len(chosen)])] = chosen
    q = rng.standard_normal((b, t, heads, width)).astype(ml_dtypes.bfloat16).astype(np.float32)
    sink = rng.standard_normal(heads).astype(np.float32)
    omega = np.float32(160000) ** (-np.arange(0, ROTARY, 2, dtype=np.float32) / ROTARY)
    return Case(
        q, sink, omega, start, length, tokens, entries, ids, table, ring_planes, new, pool,
        window, ratio, per_block,
    )  # fmt: skip


def written(case):
    """The case with the chunk's own records in its ring."""
    ring = tuple(plane.copy() for plane in case.ring)
    for s in range(len(case.start)):
        at = (case.start[s] + np.arange(case.length[s])) % ring[0].shape[2]
        for plane, values in zip(ring, case.new, strict=True):
            plane[LAYER, s, at] = values[s, : case.length[s]]
    return replace(case, ring=ring, new=None)


def expected(case):
    o = np.zeros(case.q.shape)
    all_tokens, all_entries = (
        [record_values(*records, ROTARY) for records in sequences]
        for sequences in (case.tokens, case.entries)
    )
    for s, i in np.ndindex(*case.q.shape[:2]):
        if i >= case.length[s]:
            continue
        tokens, entries = all_tokens[s], all_entries[s]
        newest = len(tokens) - case.q.shape[1] + i + 1
        position = int(case.start[s]) + i
        if case.ids is not None:
            chosen = case.ids[s, i][case.ids[s, i] >= 0]
        else:
            chosen = np.arange((position + 1) // case.ratio if case.ratio else 0)
        o[s, i] = attend(
            case.q[s, i].astype(np.float64),
            position,
            tokens[:newest],
            entries,
            chosen,
            case.sink.astype(np.float64),
            case.scale,
            case.window,
            case.omega,
        )
    return o


def wrong_in_bfloat16(found, correct):
    """Where a result is outside of what FlashMLA's test of its decode kernel allows.

    Its values are of about 1/8.
    """
    error = np.abs(found - correct)
    return ~((error < 1e-3) | (error < 2.01 / 128 * np.abs(correct)))


def full_size(rng, start, **options):
    return make_case(rng, start, **{"width": 512, "window": 128, "exponent": -3, **options})
