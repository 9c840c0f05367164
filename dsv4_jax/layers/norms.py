"""Root-mean-square normalisation with a learned weight."""

from flax import nnx
from jaxtyping import Array, Float

from dsv4_jax.layers.parameter import parameter
from dsv4_jax.ops.norms import rms_norm


class RMSNorm(nnx.Module):
    """`ops.norms.rms_norm` with a weight of its own."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.weight = parameter(width, init="ones")

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        return rms_norm(x, self.weight[...], self.eps)
