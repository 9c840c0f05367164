"""How many compressed entries a query may see."""

from jaxtyping import Array, Int


def compute_valid_lens(positions: Int[Array, "*batch"], ratio: int) -> Int[Array, "*batch"]:
    """floor((p + 1) / ratio): the entries whose last token is not after the query at p.

    Never the number of allocated blocks times entries of a block: blocks are allocated ahead.
    """
    return (positions + 1) // ratio
