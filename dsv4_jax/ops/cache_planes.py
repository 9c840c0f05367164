"""Which storage of cache entries the compiled handlers write and read."""

import jax.numpy as jnp
import numpy as np

from dsv4_jax.cache.storage import Dense, EntryRecord, FloatScaleRecord, KeyRecord, Storage

HEAD_DIM, ROPE_DIM, KEY_DIM = 512, 64, 128


def check_entries(call: str, storage: Storage, dtype: np.dtype) -> None:
    """Raises NotImplementedError unless entries are the kernels': 448 + 64 channels, bfloat16."""
    bfloat16 = jnp.dtype(jnp.bfloat16)
    if dtype != bfloat16:
        raise NotImplementedError(f"{call}: the kernel computes in bfloat16, not {dtype}")
    supported: tuple[Storage, ...] = (
        EntryRecord(HEAD_DIM, ROPE_DIM),
        FloatScaleRecord(HEAD_DIM, ROPE_DIM),
        Dense(HEAD_DIM, bfloat16, "none", ROPE_DIM),
    )
    if storage not in supported:
        raise NotImplementedError(f"{call}: the kernel does not know {storage}")


def check_keys(call: str, storage: Storage) -> None:
    """Raises NotImplementedError unless keys are the kernels': 128 channels, MXFP4 or bfloat16."""
    if storage not in (KeyRecord(KEY_DIM), Dense(KEY_DIM, jnp.dtype(jnp.bfloat16), "none")):
        raise NotImplementedError(f"{call}: the kernel does not know {storage}")
