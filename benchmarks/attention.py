"""Attention over cache records: sparse decode and prefill, growth with the context, cache writes.

python -m benchmarks.attention [sparse] [context] [writes]
"""

import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cache_writes, indexer
from benchmarks.harness import device_time_us, empty_kernel_us, memory_floor_us, write_results
from dsv4_jax.cache.storage import EntryRecord
from dsv4_jax.config import Config
from dsv4_jax.ops.sparse_attention import Entries, sparse_attention

WINDOW, WIDTH, ROTARY, RECORD_BYTES = 128, 512, 64, 584
FLOPS_PER_US = 2 * 2048 * 132 * 1755  # of BF16 products: 2,048 each clock and SM, at 1,755 MHz
RATIOS = {"window": 0, "csa": 4, "hca": 128}
CONTEXTS = (4096, 16384, 65536, 262144, 1048576)

# (kind, heads, batch, tokens of each sequence, entries)
Shape = tuple[str, int, int, int, int]
# FlashMLA's sparse kernels on an H200, records from memory, without the inverse rotation
# (2026-11-21). Prefill from a BF16 workspace, ours from records by way of one.
PEERS: dict[Shape, float | None] = {
    **{("csa", 64, b, 1, 512): us for b, us in {1: 15.2, 16: 20.2, 64: 45.3, 128: 46.5}.items()},
    **{("csa", 128, b, 1, 1024): us for b, us in {1: 16.8, 16: 31.9, 64: 62.5, 128: 120}.items()},
    **{("window", 64, b, 1, 0): us for b, us in {1: 13.2, 64: 14.8}.items()},
    ("hca", 64, 1, 1, 8192): None,
    ("csa", 64, 64, 2, 512): 46.7,
    ("csa", 64, 1, 2048, 512): 338,
}


def random_records(*shape: int) -> tuple[jax.Array, jax.Array]:
    random_bytes = partial(jax.random.randint, jax.random.key(0), dtype=jnp.uint8)
    bodies = random_bytes((*shape, WIDTH + ROTARY), 0, 120)
    return bodies, random_bytes((*shape, 8), 118, 122)


def arguments(shape: Shape) -> tuple[Any, ...]:
    """Of every CSA sequence half of the entries are selected in decode, some of 16,384 in prefill.

    So what is selected from the pool's copies, which take turns, does not fit into the L2 cache.
    """
    kind, heads, batch, tokens, num_entries = shape
    rng = np.random.default_rng(0)
    entries, context = None, 4096
    if kind != "window":
        size = num_entries if kind == "hca" else 16384 if tokens > 16 else 2 * num_entries
        context = RATIOS[kind] * size
        per_block, blocks_each = 128 // RATIOS[kind], context // 128
        table = rng.permutation(batch * blocks_each).reshape(batch, blocks_each)
        ids = None
        if kind == "csa":  # different ones: the step is odd, the size a power of two
            first = rng.integers(0, size, (batch, tokens, 1))
            step = 2 * rng.integers(0, size // 2, (batch, tokens, 1)) + 1
            ids = jnp.asarray((first + step * np.arange(num_entries)) % size, jnp.int32)
        pool = random_records(1, batch * blocks_each, per_block)
        entries = Entries(pool, jnp.asarray(table, jnp.int32), ids)
    return (
        jax.random.normal(jax.random.key(1), (batch, tokens, heads, WIDTH), jnp.bfloat16),
        jnp.zeros(heads),
        jnp.asarray(160000.0 ** (-np.arange(0, ROTARY, 2) / ROTARY), jnp.float32),
        jnp.full(batch, context - tokens, jnp.int32),
        jnp.full(batch, tokens, jnp.int32),
        random_records(1, batch, WINDOW),
        random_records(batch, tokens) if tokens > 1 else None,
        entries,
    )


def attend_us(shape: Shape, batch_invariant: bool = False) -> float:
    def attend(*args: Any) -> jax.Array:
        return sparse_attention(
            *args,
            storage=EntryRecord(WIDTH, ROTARY),
            scale=WIDTH**-0.5,
            window=WINDOW,
            layer=0,
            ratio=RATIOS[shape[0]],
            batch_invariant=batch_invariant,
            implementation="ffi",
        )

    return device_time_us(attend, *arguments(shape), cold=(5, 7))


def sparse_row(shape: Shape) -> dict[str, Any]:
    kind, heads, batch, tokens, num_entries = shape
    elapsed = attend_us(shape)
    seen = batch * tokens * (WINDOW + num_entries)
    flops = 4 * seen * heads * WIDTH
    result = {
        "kind": kind,
        "heads": heads,
        "batch": batch,
        "tokens": tokens,
        "entries": num_entries,
        "us": elapsed,
        "best_peer_us": PEERS[shape],
        "tflops": flops / elapsed / 1e6,
        "flops_floor_us": flops / FLOPS_PER_US,
    }
    if tokens == 1:
        result["bytes_floor_us"] = memory_floor_us(seen * RECORD_BYTES)
    if kind == "csa" and heads == 64 and tokens == 1:
        result["batch_invariant_us"] = attend_us(shape, batch_invariant=True)
    return result


def context_row(context: int, window_us: float, selected_us: float) -> dict[str, Any]:
    """Attention of one new token in every layer of Flash: what grows with the context."""
    num_entries = context // RATIOS["csa"]
    keys = indexer.arguments("mxfp4", 1, 1, num_entries)
    indexer_us = device_time_us(partial(indexer.topk, "ffi"), *keys, cold=(2,))
    hca_us = attend_us(("hca", 64, 1, 1, context // RATIOS["hca"]))
    layer_us = {0: window_us, 4: indexer_us + selected_us, 128: hca_us}
    layers: Counter[int] = Counter(Config.FLASH.layer_ratios)
    return {
        "context": context,
        "csa_us": selected_us,
        "indexer_us": indexer_us,
        "hca_us": hca_us,
        "step_us": sum(number * layer_us[ratio] for ratio, number in layers.items()),
    }


def write_sparse() -> None:
    rows: list[dict[str, Any]] = [sparse_row(shape) for shape in PEERS]
    # As many entries as that prefill first writes to its workspace.
    num_rows = 16384 + 2048 + WINDOW - 1
    gathered = cache_writes.gather_row(1, num_rows)
    rows.append(
        {
            "kind": "gather_kv",
            "batch": 1,
            "tokens": 1,
            "entries": num_rows,
            "us": gathered["us"],
            "bytes_floor_us": gathered["floor_us"],
        }
    )
    rows.append({"kind": "empty kernel", "us": empty_kernel_us()})
    write_results("sparse-attention", rows)


def write_context() -> None:
    window_us, selected_us = (attend_us((kind, 64, 1, 1, 512)) for kind in ("window", "csa"))
    write_results(
        "attention-context", [context_row(context, window_us, selected_us) for context in CONTEXTS]
    )


SECTIONS: dict[str, Callable[[], None]] = {
    "sparse": write_sparse,
    "context": write_context,
    "writes": partial(cache_writes.main, quick=True),
}


def main(names: list[str]) -> None:
    for name in names or SECTIONS:
        SECTIONS[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
