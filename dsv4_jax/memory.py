"""What the device can still hold, asked before anything is put there."""

import os

import jax


def free_bytes() -> int | None:
    """What JAX may still allocate on its default device; None where the backend does not say.

    The limit is the share of the memory that JAX was configured with.
    """
    stats = jax.devices()[0].memory_stats()
    return stats["bytes_limit"] - stats["bytes_in_use"] if stats else None


def use_all_memory_as_needed() -> None:
    """Before JAX starts: no memory is taken ahead, and nearly all may be, unless the user set it.

    For the command line, which is alone in its process.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")
