"""How an entry is kept: as numbers of the model's dtype, or as the quantised record."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dsv4_jax.config import Config
from dsv4_jax.formats import indexer_key, kv_entry, kv_entry_float_scale
from dsv4_jax.numerics import Numerics

CacheFormat = Literal["dense", "records"]
Planes = tuple[Array, ...]


@runtime_checkable
class Storage(Protocol):
    """Entries [..., width] to and from the planes they are stored in.

    What `decode` returns is what attention computes with, whether or not the entry went through
    a cache: reading back never differs from using at once.
    """

    @property
    def planes(self) -> tuple[tuple[int, jnp.dtype], ...]:
        """(width, dtype) of each plane of one entry."""

    def encode(self, x: Float[Array, "*batch c"]) -> Planes: ...

    def decode(self, planes: Planes, dtype: DTypeLike) -> Float[Array, "*batch c"]: ...


@dataclass(frozen=True)
class Dense:
    """Numbers of the model's dtype, rounded to what the record of their kind would hold or not."""

    width: int
    dtype: jnp.dtype
    rounding: Literal["none", "entry", "key"]
    rope_dim: int = 0

    @property
    def planes(self) -> tuple[tuple[int, jnp.dtype], ...]:
        return ((self.width, self.dtype),)

    def encode(self, x: Float[Array, "*batch c"]) -> Planes:
        if self.rounding == "entry":
            x = kv_entry.round_trip(x, self.rope_dim)
        elif self.rounding == "key":
            x = indexer_key.round_trip(x)
        return (x.astype(self.dtype),)

    def decode(self, planes: Planes, dtype: DTypeLike) -> Float[Array, "*batch c"]:
        return planes[0].astype(dtype)


@dataclass(frozen=True)
class EntryRecord:
    """584 bytes for head_dim 512: E4M3 and BF16 channels in one plane, scales in another."""

    width: int
    rope_dim: int

    @property
    def planes(self) -> tuple[tuple[int, jnp.dtype], ...]:
        byte = jnp.dtype(jnp.uint8)
        return ((self.width + self.rope_dim, byte), (8, byte))

    def encode(self, x: Float[Array, "*batch c"]) -> Planes:
        return kv_entry.encode(x, self.rope_dim)

    def decode(self, planes: Planes, dtype: DTypeLike) -> Float[Array, "*batch c"]:
        body, scales = planes
        return kv_entry.decode(body, scales, self.rope_dim, dtype)


@dataclass(frozen=True)
class FloatScaleRecord:
    """580 bytes for head_dim 512: as `EntryRecord` with one float32 scale for all E4M3 channels."""

    width: int
    rope_dim: int

    @property
    def planes(self) -> tuple[tuple[int, jnp.dtype], ...]:
        body = (self.width + self.rope_dim, jnp.dtype(jnp.uint8))
        return (body, (1, jnp.dtype(jnp.float32)))

    def encode(self, x: Float[Array, "*batch c"]) -> Planes:
        return kv_entry_float_scale.encode(x, self.rope_dim)

    def decode(self, planes: Planes, dtype: DTypeLike) -> Float[Array, "*batch c"]:
        body, scale = planes
        return kv_entry_float_scale.decode(body, scale, self.rope_dim, dtype)


@dataclass(frozen=True)
class KeyRecord:
    """MXFP4: 64 + 4 bytes for an indexer key of 128."""

    width: int

    @property
    def planes(self) -> tuple[tuple[int, jnp.dtype], ...]:
        byte = jnp.dtype(jnp.uint8)
        return ((self.width // 2, byte), (self.width // 32, byte))

    def encode(self, x: Float[Array, "*batch c"]) -> Planes:
        return indexer_key.encode(x)

    def decode(self, planes: Planes, dtype: DTypeLike) -> Float[Array, "*batch c"]:
        codes, scales = planes
        return indexer_key.decode(codes, scales, dtype)


def record_obstacles(config: Config) -> list[str]:
    """Why the model's sizes do not fit the records; empty when they do."""
    obstacles = []
    nope = config.head_dim - config.qk_rope_head_dim
    if nope % 64 or nope // 64 > 8:
        obstacles.append(
            f"head_dim - qk_rope_head_dim is {nope}, a record holds a multiple of 64, at most 512"
        )
    if config.index_head_dim % 32:
        obstacles.append(f"index_head_dim is {config.index_head_dim}, a key holds groups of 32")
    return obstacles


def resolve_format(config: Config, numerics: Numerics, cache_format: str | None) -> CacheFormat:
    """The format to use: storage follows numerics unless it is named.

    Raises:
        ValueError: an unknown name, or "records" for sizes they cannot hold.
    """
    obstacles = record_obstacles(config)
    if cache_format is None:
        rounded = numerics.quantize_kv and numerics.quantize_indexer
        return "records" if rounded and not obstacles else "dense"
    if cache_format == "dense":
        return "dense"
    if cache_format != "records":
        raise ValueError(f"cache_format: got {cache_format!r}, expected 'dense' or 'records'")
    if obstacles:
        raise ValueError(f"cache_format: 'records' does not fit this model: {'; '.join(obstacles)}")
    return "records"


def entry_storage(
    config: Config, numerics: Numerics, dtype: DTypeLike, cache_format: CacheFormat
) -> Storage:
    """Storage of window and compressed KV entries."""
    if cache_format == "records":
        return EntryRecord(config.head_dim, config.qk_rope_head_dim)
    rounding: Literal["none", "entry"] = "entry" if numerics.quantize_kv else "none"
    return Dense(config.head_dim, jnp.dtype(dtype), rounding, config.qk_rope_head_dim)


def key_storage(
    config: Config, numerics: Numerics, dtype: DTypeLike, cache_format: CacheFormat
) -> Storage:
    """Storage of indexer keys."""
    if cache_format == "records":
        return KeyRecord(config.index_head_dim)
    rounding: Literal["none", "key"] = "key" if numerics.quantize_indexer else "none"
    return Dense(config.index_head_dim, jnp.dtype(dtype), rounding)
