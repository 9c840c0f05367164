"""Which arrays a cache consists of, derived from the config."""

from dataclasses import dataclass, field
from typing import Literal, no_type_check

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv4_jax.cache.flush import OVERLAP_ROWS
from dsv4_jax.cache.paged import BLOCK_TOKENS
from dsv4_jax.cache.storage import (
    Planes,
    Storage,
    entry_storage,
    key_storage,
    resolve_format,
)
from dsv4_jax.config import Config
from dsv4_jax.numerics import Numerics

PoolName = Literal["csa", "csa_keys", "hca"]


@dataclass(frozen=True)
class CacheSchema:
    """What every layer keeps.

    Attributes:
        ratios: compression ratio of each layer: 0 (window only), 4 (CSA) or 128 (HCA).
        window: tokens of the sliding window, the size of the ring.
        entries: storage of window and compressed entries.
        keys: storage of indexer keys.
    """

    ratios: tuple[int, ...]
    window: int
    head_dim: int
    index_head_dim: int
    entries: Storage
    keys: Storage

    @classmethod
    def of(
        cls,
        config: Config,
        numerics: Numerics,
        dtype: DTypeLike,
        cache_format: str | None = None,
    ) -> "CacheSchema":
        resolved = resolve_format(config, numerics, cache_format)
        return cls(
            config.layer_ratios,
            config.sliding_window,
            config.head_dim,
            config.index_head_dim,
            entry_storage(config, numerics, dtype, resolved),
            key_storage(config, numerics, dtype, resolved),
        )

    def storage(self, pool: PoolName) -> Storage:
        """How the entries of a pool are kept; the window's are those of "csa" and "hca"."""
        return self.keys if pool == "csa_keys" else self.entries

    def pool_index(self, layer: int) -> int:
        """Which of its kind a layer is: its row in the pools and tails of that kind."""
        return self.ratios[:layer].count(self.ratios[layer])


# JAX builds this tree with leaves of its own kinds too; `no_type_check` lets them pass.
@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CacheArrays:
    """The device arrays of a cache; s slots, l layers, n blocks.

    Attributes:
        lengths: [s] tokens of each sequence.
        block_table: [s, n], -1 where no block is allocated.
        window: planes [l, s, window, ...].
        csa, csa_keys: planes [l_csa, n, 32, ...].
        hca: planes [l_hca, n, 1, ...].
        csa_tail, key_tail: [l_csa, s, 8, 2, 2w], ring of the last rows (value, score) of the
            compressor and of the indexer's.
        hca_tail: [l_hca, s, 3, w], running (max, sum, weighted sum).
        schema: what the layers keep; static under jit.
    """

    lengths: Int[Array, "s"]
    block_table: Int[Array, "s n"]
    window: Planes
    csa: Planes
    csa_keys: Planes
    hca: Planes
    csa_tail: Float[Array, "csa s 8 2 w2"]
    key_tail: Float[Array, "csa s 8 2 k2"]
    hca_tail: Float[Array, "hca s 3 w"]
    schema: CacheSchema = field(metadata={"static": True})


def new_arrays(schema: CacheSchema, max_sequences: int, num_blocks: int) -> CacheArrays:
    """Empty sequences: every array zero, no block allocated."""
    num_csa, num_hca = schema.ratios.count(4), schema.ratios.count(128)

    def planes(storage: Storage, *shape: int) -> Planes:
        return tuple(jnp.zeros((*shape, width), dtype) for width, dtype in storage.planes)

    def tail(num_layers: int, *shape: int) -> Array:
        return jnp.zeros((num_layers, max_sequences, *shape), jnp.float32)

    csa_entries, hca_entries = BLOCK_TOKENS // 4, BLOCK_TOKENS // 128
    return CacheArrays(
        lengths=jnp.zeros(max_sequences, jnp.int32),
        block_table=jnp.full((max_sequences, num_blocks), -1, jnp.int32),
        window=planes(schema.entries, len(schema.ratios), max_sequences, schema.window),
        csa=planes(schema.entries, num_csa, num_blocks, csa_entries),
        csa_keys=planes(schema.keys, num_csa, num_blocks, csa_entries),
        hca=planes(schema.entries, num_hca, num_blocks, hca_entries),
        csa_tail=tail(num_csa, OVERLAP_ROWS, 2, 2 * schema.head_dim),
        key_tail=tail(num_csa, OVERLAP_ROWS, 2, 2 * schema.index_head_dim),
        hca_tail=tail(num_hca, 3, schema.head_dim),
        schema=schema,
    )
