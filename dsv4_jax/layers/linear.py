"""One linear layer for every weight format."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv4_jax.formats import fp8_block, mxfp4, nvfp4
from dsv4_jax.layers.parameter import parameter
from dsv4_jax.numerics import Numerics
from dsv4_jax.ops.product import product


class Linear(nnx.Module):
    """y = x Wᵀ, the weight kept as the checkpoint stores it.

    `weight_format` is "float" (float32 or bfloat16), "fp8_block" (E4M3 with a power-of-two scale
    per 128 x 128 block), "mxfp4" (E2M1 pairs with a power-of-two scale per 32 inputs) or "nvfp4"
    (E2M1 pairs, E4M3 scale per 16 inputs, float32 scale per matrix). A packed weight has its
    input quantised (Q1) when `numerics` says so. `stack` puts leading axes before [out, in].
    """

    def __init__(
        self, in_features: int, out_features: int, numerics: Numerics, stack: tuple[int, ...] = ()
    ):
        self.in_features = in_features
        self.out_features = out_features
        self.stack = stack
        self.quantize_activations = numerics.quantize_activations
        self.weight_format = "float"
        self.weight = parameter(*stack, out_features, in_features)

    def repack(self, weight_format: str) -> None:
        """Declares the parameters of another weight format; their values are lost."""
        *lead, rows, columns = *self.stack, self.out_features, self.in_features
        match weight_format:
            case "float":
                return
            case "fp8_block":
                self.weight = parameter(*lead, rows, columns, dtype=jnp.float8_e4m3fn)
                self.scale = parameter(*lead, -(-rows // 128), -(-columns // 128), dtype=jnp.uint8)
            case "mxfp4":
                self.weight = parameter(*lead, rows, columns // 2, dtype=jnp.uint8)
                self.scale = parameter(*lead, rows, columns // 32, dtype=jnp.uint8)
            case "nvfp4":
                self.weight = parameter(*lead, rows, columns // 2, dtype=jnp.uint8)
                self.scale = parameter(*lead, rows, columns // 16, dtype=jnp.float8_e4m3fn)
                self.scale_2 = parameter(*lead)
                self.input_scale = parameter(*lead)
            case _:
                raise ValueError(
                    f"weight_format: got {weight_format!r}, expected one of "
                    "'float', 'fp8_block', 'mxfp4', 'nvfp4'"
                )
        self.weight_format = weight_format

    def decoded(self, dtype: DTypeLike, index: Int[Array, "n"] | None = None) -> Array:
        """The weight [*stack, out, in] in `dtype`; with `index`, these rows of the stack.

        E2M1 and E4M3 values times their block scales are exact in bfloat16.
        """

        def take(param: nnx.Param) -> Array:
            return param[...] if index is None else param[...][index]

        match self.weight_format:
            case "float":
                return take(self.weight).astype(dtype)
            case "fp8_block":
                return fp8_block.dequantize(take(self.weight), take(self.scale), dtype)
            case "mxfp4":
                return mxfp4.dequantize(take(self.weight), take(self.scale), dtype)
            case _:
                return nvfp4.dequantize(
                    take(self.weight), take(self.scale), take(self.scale_2), dtype
                )

    def operands(
        self,
        x: Float[Array, "..."],
        out_dtype: DTypeLike | None = None,
        index: Int[Array, "n"] | None = None,
    ) -> tuple[Array, Array]:
        """The two factors of the product: x after Q1 and the decoded weight, in one dtype.

        The dtype is x's, except that a float32 result of a float32 weight is computed from
        float32 operands.
        """
        dtype = x.dtype
        if self.weight_format == "float" and out_dtype is not None:
            dtype = jnp.promote_types(dtype, self.weight[...].dtype)
        if self.weight_format != "float" and self.quantize_activations:
            x = fp8_block.round_trip(x)
        return x.astype(dtype), self.decoded(dtype, index)

    def __call__(
        self, x: Float[Array, "*batch i"], out_dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch o"]:
        """x Wᵀ accumulated in float32, returned in x's dtype or `out_dtype`."""
        a, w = self.operands(x, out_dtype)
        return product("...i,oi->...o", a, w).astype(out_dtype or x.dtype)
