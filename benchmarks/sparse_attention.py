"""Attention over cache records: sparse decode and prefill, the best kernel known, and the floors.

python -m benchmarks.sparse_attention
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import device_time_us, empty_kernel_us, memory_floor_us, write_results
from dsv4_jax.cache.storage import EntryRecord
from dsv4_jax.ops.sparse_attention import Entries, sparse_attention

WINDOW, WIDTH, ROTARY, RECORD_BYTES = 128, 512, 64, 584
FLOPS_PER_US = 2 * 2048 * 132 * 1755  # of BF16 products: 2,048 each clock and SM, at 1,755 MHz
CSA_ENTRIES = 16384  # of each sequence, of which some are selected
# (kind, heads, batch, tokens, entries): FlashMLA's sparse kernels on an H200, records from memory,
# without the inverse rotation (2026-11-21). Prefill from a BF16 workspace.
PEERS: dict[tuple[str, int, int, int, int], float | None] = {
    **{("csa", 64, b, 1, 512): us for b, us in {1: 15.2, 16: 20.2, 64: 45.3, 128: 46.5}.items()},
    **{("csa", 128, b, 1, 1024): us for b, us in {1: 16.8, 16: 31.9, 64: 62.5, 128: 120}.items()},
    **{("window", 64, b, 1, 0): us for b, us in {1: 13.2, 16: 14.5, 64: 14.8}.items()},
    ("hca", 64, 1, 1, 8192): None,
    ("hca", 64, 16, 1, 512): 20.3,
    ("csa", 64, 64, 2, 512): 46.7,
    ("csa", 64, 1, 2048, 512): 338,
}


def random_records(*shape: int) -> tuple[jax.Array, jax.Array]:
    random_bytes = partial(jax.random.randint, jax.random.key(0), dtype=jnp.uint8)
    bodies = random_bytes((*shape, WIDTH + ROTARY), 0, 120)
    return bodies, random_bytes((*shape, 8), 118, 122)


def arguments(kind: str, heads: int, batch: int, tokens: int, num_entries: int) -> tuple[Any, ...]:
    """Of contexts of 65,536 tokens, and of those that have `num_entries` in an HCA layer."""
    rng = np.random.default_rng(0)
    entries, context = None, 4 * CSA_ENTRIES if kind == "csa" else 128 * max(num_entries, 512)
    if kind != "window":
        per_block = 32 if kind == "csa" else 1
        blocks_each = context // 128
        num_blocks = batch * blocks_each
        table = rng.permutation(num_blocks).reshape(batch, blocks_each)
        ids = None
        if kind == "csa":
            last = CSA_ENTRIES - tokens // 4
            chosen = [rng.permutation(last)[:num_entries] for _ in range(batch * tokens)]
            ids = jnp.asarray(np.reshape(chosen, (batch, tokens, -1)), jnp.int32)
        entries = Entries(
            random_records(1, num_blocks, per_block), jnp.asarray(table, jnp.int32), ids
        )
    q = jnp.asarray(rng.standard_normal((batch, tokens, heads, WIDTH)), jnp.bfloat16)
    new = random_records(batch, tokens) if tokens > 1 else None
    return (
        q,
        jnp.zeros(heads),
        jnp.asarray(160000.0 ** (-np.arange(0, ROTARY, 2) / ROTARY), jnp.float32),
        jnp.full(batch, context - tokens, jnp.int32),
        jnp.full(batch, tokens, jnp.int32),
        random_records(1, batch, WINDOW),
        new,
        entries,
    )


def attend(kind: str, batch_invariant: bool, *args: Any) -> jax.Array:
    return sparse_attention(
        *args,
        storage=EntryRecord(WIDTH, ROTARY),
        scale=WIDTH**-0.5,
        window=WINDOW,
        layer=0,
        ratio={"csa": 4, "hca": 128, "window": 0}[kind],
        batch_invariant=batch_invariant,
        implementation="ffi",
    )


def row(shape: tuple[str, int, int, int, int]) -> dict[str, Any]:
    kind, heads, batch, tokens, num_entries = shape
    args = arguments(*shape)
    elapsed = device_time_us(partial(attend, kind, False), *args, cold=(5, 7))
    seen = batch * tokens * (WINDOW + num_entries)
    flops = 4 * seen * heads * WIDTH
    result = {
        "kind": kind,
        "heads": heads,
        "batch": batch,
        "tokens": tokens,
        "entries": num_entries,
        "us": elapsed,
        "peer_us": PEERS[shape],
        "tflops": flops / elapsed / 1e6,
        "flops_floor_us": flops / FLOPS_PER_US,
    }
    if tokens == 1:
        result["bytes_floor_us"] = memory_floor_us(seen * RECORD_BYTES)
        result["batch_invariant_us"] = device_time_us(
            partial(attend, kind, True), *args, cold=(5, 7)
        )
    return result


def main() -> None:
    rows = [row(shape) for shape in PEERS]
    rows.append({"kind": "empty kernel", "us": empty_kernel_us()})
    write_results("sparse_attention", rows)


if __name__ == "__main__":
    main()
