"""One linear layer for every weight format."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv4_jax.formats import fp8_block, mxfp4, nvfp4, tiled
from dsv4_jax.layers.parameter import parameter
from dsv4_jax.numerics import Numerics
from dsv4_jax.ops.gemm import gemm, grouped_gemm
from dsv4_jax.ops.product import product

# How a weight of each format is put into the kernels' blocks, and the parameters it takes.
_TILINGS: dict[str, tuple[Callable[..., tiled.TiledWeight], tuple[str, ...]]] = {
    "float": (tiled.tile_bf16, ("weight",)),
    "fp8_block": (tiled.tile_fp8_block, ("weight", "scale")),
    "mxfp4": (tiled.tile_mxfp4, ("weight", "scale")),
    "nvfp4": (tiled.tile_nvfp4, ("weight", "scale", "scale_2")),
}


class Linear(nnx.Module):
    """y = x Wᵀ, the weight kept as the checkpoint stores it.

    `weight_format` is "float" (float32 or bfloat16), "fp8_block" (E4M3 with a power-of-two scale
    per 128 x 128 block), "mxfp4" (E2M1 pairs with a power-of-two scale per 32 inputs) or "nvfp4"
    (E2M1 pairs, E4M3 scale per 16 inputs, float32 scale per matrix). A packed weight has its
    input quantised (Q1) when `numerics` says so. `stack` puts leading axes before [out, in].
    After `tile` the weight is one parameter `blocks` instead, and products run on kernels where
    there are some.
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

    def tile(self) -> None:
        """Puts the weight into the blocks that kernels read; float32 weights stay as they are."""
        tile, names = _TILINGS[self.weight_format]
        arrays = [getattr(self, name)[...] for name in names]
        if self.weight_format == "float" and arrays[0].dtype != jnp.bfloat16:
            return

        @jax.jit
        def each(*arrays: Array) -> tiled.TiledWeight:
            # One matrix of a stack at a time: unpacked codes take several times the room.
            return jax.lax.map(lambda one: tile(*one), arrays) if self.stack else tile(*arrays)

        for name in names:
            delattr(self, name)
        self.blocks = nnx.Param(each(*arrays))

    @property
    def is_tiled(self) -> bool:
        return hasattr(self, "blocks")

    @property
    def rounds_input(self) -> bool:
        """Whether the input is quantised first (Q1)."""
        return self.weight_format != "float" and self.quantize_activations

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
        if self.rounds_input:
            x = fp8_block.round_trip(x)
        return x.astype(dtype), self.decoded(dtype, index)

    def __call__(
        self, x: Float[Array, "*batch i"], out_dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch o"]:
        """x Wᵀ accumulated in float32, returned in x's dtype or `out_dtype`."""
        if self.is_tiled:
            blocks = self.blocks.get_value()
            return gemm(x, blocks, round_input=self.rounds_input, out_dtype=out_dtype)
        a, w = self.operands(x, out_dtype)
        return product("...i,oi->...o", a, w).astype(out_dtype or x.dtype)

    def grouped(self, x: Float[Array, "*batch groups i"]) -> Float[Array, "*batch o"]:
        """Block-diagonal product: each group of inputs gives its share of the outputs.

        The input is never quantised; the result has its dtype.
        """
        if self.is_tiled:
            return grouped_gemm(x, self.blocks.get_value())
        *batch, num_groups, width = x.shape
        w = self.decoded(x.dtype).reshape(num_groups, -1, width)
        return product("...gi,goi->...go", x, w).astype(x.dtype).reshape(*batch, -1)
