"""Root-mean-square normalisation with a learned weight."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dsv4_jax.kernels import Kernels
from dsv4_jax.layers.parameter import parameter
from dsv4_jax.ops.norms import rms_norm


class RMSNorm(nnx.Module):
    """`ops.norms.rms_norm` with a weight of its own."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.is_arranged = False
        self.weight = parameter(width, init="ones")

    def arrange(self, kernels: Kernels, dtype: DTypeLike) -> None:
        """Puts the weight into float32 where kernels, which read that, run on inputs of `dtype`."""
        if kernels.take_weights("hyper_connections", ("9.0", "10."), dtype):
            self.weight = nnx.Param(self.weight[...].astype(jnp.float32))
            self.is_arranged = True

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        return rms_norm(x, self.weight[...], self.eps)
