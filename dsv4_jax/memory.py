"""What devices can still hold, asked before anything is put there."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax


def free_bytes(devices: Sequence[jax.Device] | None = None) -> int | None:
    """What JAX may still allocate on each of these devices, by default its default one.

    The limit is the share of the memory that JAX was configured with. None where the backend does
    not say.
    """
    found = []
    for device in devices or jax.devices()[:1]:
        stats = device.memory_stats() or {}
        if not stats.get("bytes_limit"):
            return None
        found.append(stats["bytes_limit"] - stats["bytes_in_use"])
    return min(found)


def check_room(
    what: str,
    num_bytes: int,
    would_fit: Callable[[int], str],
    devices: Sequence[jax.Device] | None = None,
) -> None:
    """Raises ValueError unless each device, by default JAX's default one, has so many bytes free.

    Args:
        what: needs them; a plural.
        num_bytes: on each device.
        would_fit: says what there is room for in so many bytes.
        devices: where.
    """
    free = free_bytes(devices)
    if free is not None and num_bytes > free:
        raise ValueError(
            f"memory: {what} need {num_bytes:,} bytes, free are {free:,} of those that JAX may "
            f"take; {would_fit(free)} would fit"
        )


def tree_bytes(tree: Any) -> int:
    """Of all arrays of a tree, or of what describes their shapes and dtypes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def use_all_memory_as_needed() -> None:
    """Before JAX starts: no memory is taken ahead, and nearly all may be, unless the user set it.

    For the command line, which is alone in its process.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")
