"""Several decode steps in one program."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from dsv4_jax.cache.schema import CacheArrays
from dsv4_jax.decoding.sampling import SamplingArrays, sample
from dsv4_jax.transformer import decode_step


def decode_chunk(
    graph: nnx.GraphDef,
    params: nnx.State,
    arrays: CacheArrays,
    tokens: Int[Array, "s"],
    options: SamplingArrays,
    steps: Int[Array, "s"],
    limits: Int[Array, "s"],
    stop_ids: Int[Array, "s n"],
    num_steps: int,
) -> tuple[Int[Array, "s k"], CacheArrays]:
    """Appends tokens to each of the first s sequences and samples the ones that follow.

    Pure; donate `arrays`, whose blocks must hold the new tokens (`Cache.prepare_step`). A
    sequence whose turn is over is masked for the rest of the chunk.

    Args:
        graph, params: the model.
        arrays: of a cache.
        tokens: int32, the newest token of each sequence, which the cache does not hold yet; -1
            leaves a slot as it is.
        options: how to sample.
        steps: int32, new tokens that each sequence has already, `tokens` included.
        limits: int32, how many it may have.
        stop_ids: int32, tokens that end a sequence, -1 padded.
        num_steps: k, static.

    Returns:
        (int32 new tokens, up to and including a stop token, -1 after the end; arrays, which hold
        as many tokens more of a sequence as it has new ones)
    """

    def step(carry, _):
        arrays, tokens, steps = carry
        # Else the compiler decodes packed weights ahead of the loop and holds all of them.
        packed, tokens = jax.lax.optimization_barrier((params, tokens))
        active = tokens >= 0
        logits, arrays = decode_step(graph, packed, arrays, tokens)
        new = jnp.where(active, sample(logits, options, steps), -1)
        steps = steps + active
        ended = (new[:, None] == stop_ids).any(axis=1) | (steps >= limits)
        return (arrays, jnp.where(ended, -1, new), steps), new

    (arrays, _, _), emitted = jax.lax.scan(step, (arrays, tokens, steps), length=num_steps)
    return emitted.T, arrays
