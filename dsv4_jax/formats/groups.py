"""Arrays cut into the groups and blocks that share a scale; the last ones may be shorter."""

import jax.numpy as jnp
from jaxtyping import Array, Shaped


def count(length: int, size: int) -> int:
    """How many groups of `size` cover `length` elements."""
    return -(-length // size)


def split(x: Shaped[Array, "..."], *sizes: int) -> Shaped[Array, "..."]:
    """Each of the last len(sizes) axes, of length n, becomes two: [ceil(n / size), size].

    What is missing to whole groups is filled with zeros.
    """
    batch, axes = x.shape[: -len(sizes)], x.shape[-len(sizes) :]
    counts = [count(length, size) for length, size in zip(axes, sizes, strict=True)]
    padding = [
        (0, number * size - length)
        for length, number, size in zip(axes, counts, sizes, strict=True)
    ]
    padded = jnp.pad(x, [(0, 0)] * len(batch) + padding)
    return padded.reshape(*batch, *(n for pair in zip(counts, sizes, strict=True) for n in pair))


def join(groups: Shaped[Array, "..."], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
    """The inverse of `split`: an array of `shape`."""
    num_axes = groups.ndim - len(shape)
    batch, pairs = shape[:-num_axes], groups.shape[-2 * num_axes :]
    padded = groups.reshape(
        *batch, *(pairs[axis] * pairs[axis + 1] for axis in range(0, len(pairs), 2))
    )
    return padded[(..., *(slice(length) for length in shape[-num_axes:]))]


def within(num_axes: int) -> tuple[int, ...]:
    """The axes that run inside a group after `split` on `num_axes` axes."""
    return tuple(range(-1, -2 * num_axes, -2))
