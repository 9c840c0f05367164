"""One linear layer for every weight format."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv4_jax.formats import fp8_block, mxfp4, nvfp4, tiled
from dsv4_jax.kernels import Kernels
from dsv4_jax.layers.parameter import parameter
from dsv4_jax.numerics import Numerics
from dsv4_jax.ops.gemm import Segment, grouped_gemm, projections
from dsv4_jax.ops.nvfp4_gemm import nvfp4_gemm, nvfp4_grouped_gemm
from dsv4_jax.ops.product import product
from dsv4_jax.ops.quantize import nvfp4_quantize

# How a weight of each format is put into the kernels' blocks, and the parameters it takes.
_TILINGS: dict[str, tuple[Callable[..., tiled.TiledWeight], tuple[str, ...]]] = {
    "float": (tiled.tile_bf16, ("weight",)),
    "fp8_block": (tiled.tile_fp8_block, ("weight", "scale")),
    "mxfp4": (tiled.tile_mxfp4, ("weight", "scale")),
    "nvfp4": (tiled.tile_nvfp4, ("weight", "scale", "scale_2")),
}
# Compute capabilities of devices with kernels that decode weights, and with FP4 tensor cores.
_DECODING, _FP4_UNITS = ("9.0", "10."), ("10.",)

_swizzled = jax.jit(nvfp4.swizzle)


@partial(jax.jit, static_argnames=("weight_format", "is_stack"))
def _tiled(arrays: list[Array], weight_format: str, is_stack: bool) -> tiled.TiledWeight:
    tile, _ = _TILINGS[weight_format]
    # One matrix of a stack at a time: unpacked codes take several times the room.
    return jax.lax.map(lambda one: tile(*one), arrays) if is_stack else tile(*arrays)


class Linear(nnx.Module):
    """y = x Wᵀ: a weight format, in which the checkpoint stores W, and an activation policy.

    `weight_format` is "float" (float32 or bfloat16), "fp8_block" (E4M3 with a power-of-two scale
    per 128 x 128 block), "mxfp4" (E2M1 pairs with a power-of-two scale per 32 inputs) or "nvfp4"
    (E2M1 pairs, E4M3 scale per 16 inputs, float32 scale per matrix; a stored input_scale is kept
    to be looked at and never used). `inputs` says how x is rounded, as
    `numerics.activations` and the weight format want it. `stack` puts leading axes before
    [out, in].

    `arrange` puts the weight into the order in which kernels read it.
    """

    def __init__(
        self, in_features: int, out_features: int, numerics: Numerics, stack: tuple[int, ...] = ()
    ):
        self.in_features = in_features
        self.out_features = out_features
        self.stack = stack
        self.activations = numerics.activations
        self.weight_format = "float"
        self.is_swizzled = False
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

    @property
    def inputs(self) -> str:
        """How x is rounded: "bf16" (it is not), "e4m3" or "nvfp4", see `Numerics.activations`."""
        if self.weight_format == "float":
            return "bf16"
        if self.activations == "nvfp4" and self.weight_format == "fp8_block":
            return "e4m3"
        return self.activations

    @property
    def rounds_input(self) -> bool:
        """Whether x is rounded to E4M3."""
        return self.inputs == "e4m3"

    def arrange(self, kernels: Kernels, dtype: DTypeLike) -> None:
        """Puts the weight into the order of the kernels that will run on inputs of `dtype`."""
        if self.inputs == "nvfp4":
            if kernels.take_weights("nvfp4_gemm", _FP4_UNITS, dtype):
                self.swizzle()
        elif kernels.take_weights("experts" if self.stack else "gemm", _DECODING, dtype):
            self.tile()

    def tile(self) -> None:
        """Puts the weight into one parameter `blocks`, which kernels decode for 16-bit products.

        A float32 weight stays as it is, and so does one that NVFP4 inputs are multiplied with.
        """
        _, names = _TILINGS[self.weight_format]
        arrays = [getattr(self, name)[...] for name in names]
        if arrays[0].dtype == jnp.float32 or self.inputs == "nvfp4":
            return
        for name in names:
            delattr(self, name)
        self.blocks = nnx.Param(_tiled(arrays, self.weight_format, bool(self.stack)))

    def swizzle(self) -> None:
        """Puts an NVFP4 weight's scales where FP4 tensor cores, for NVFP4 inputs, expect them."""
        if self.weight_format == "nvfp4" and self.inputs == "nvfp4":
            self.scale = nnx.Param(_swizzled(self.scale[...]))
            self.is_swizzled = True

    @property
    def is_tiled(self) -> bool:
        return hasattr(self, "blocks")

    @property
    def is_arranged(self) -> bool:
        """Whether the weight is in a kernel's order, not as the checkpoint stores it."""
        return self.is_tiled or self.is_swizzled

    def decoded(self, dtype: DTypeLike, index: Int[Array, "n"] | None = None) -> Array:
        """The weight [*stack, out, in] in `dtype`; with `index`, these rows of the stack."""
        if self.weight_format != "nvfp4":
            return self._values(dtype, index)
        return (self._values(jnp.float32, index) * self._global_scale(index)).astype(dtype)

    def _values(self, dtype: DTypeLike, index: Array | None) -> Array:
        """`decoded` without the global scale; of packed weights exact in bfloat16."""

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
                codes, scales = take(self.weight), take(self.scale)
                return nvfp4.dequantize(codes, scales, jnp.ones(codes.shape[:-2]), dtype)

    def _global_scale(self, index: Array | None) -> Array:
        scale = self.scale_2[...] if index is None else self.scale_2[...][index]
        return scale[..., None, None] if self.stack else scale

    def _product(
        self, spec: str, x: Array, dtype: DTypeLike, index: Array | None = None
    ) -> Float[Array, "..."]:
        """x, rounded, times the weight, both in `dtype`; global scales multiply the sums."""
        row_scale = None
        if self.inputs == "e4m3":
            x = fp8_block.round_trip(x)
        elif self.inputs == "nvfp4":
            codes, scales, row_scale = nvfp4.quantize(x.reshape(-1, x.shape[-1]), per_row=True)
            values = nvfp4.dequantize(codes, scales, jnp.ones_like(row_scale), dtype)
            x, row_scale = values.reshape(x.shape), row_scale.reshape(*x.shape[:-1], 1)
        y = product(spec, x.astype(dtype), self._values(dtype, index))
        if self.weight_format == "nvfp4":
            y = y * self._global_scale(index)
        return y if row_scale is None else y * row_scale

    def __call__(
        self, x: Float[Array, "*batch i"], out_dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch o"]:
        """x Wᵀ accumulated in float32, returned in x's dtype or `out_dtype`.

        Both are multiplied in x's dtype, except that a float32 result of a float32 weight is
        computed from float32 operands.
        """
        out_dtype = jnp.dtype(out_dtype or x.dtype)
        if self.is_tiled:
            return projections(x, [self._segment(out_dtype)])[0]
        if self.is_swizzled:
            y = nvfp4_gemm(self._tokens(x), self._swizzled())
            return y.reshape(*x.shape[:-1], -1).astype(out_dtype)
        dtype = x.dtype
        if self.weight_format == "float" and out_dtype == jnp.float32:
            dtype = jnp.promote_types(dtype, self.weight[...].dtype)
        return self._product("...i,oi->...o", x, dtype).astype(out_dtype)

    def of_tiles(
        self, tiles: Float[Array, "g t i"], index: Int[Array, "g"]
    ) -> Float[Array, "g t o"]:
        """The rows of each tile times one matrix of the stack, float32 sums; `index` ascends."""
        if self.is_swizzled:
            sizes = jnp.bincount(index, length=self.stack[0]) * tiles.shape[1]
            tokens, weights = self._tokens(tiles), self._swizzled()
            y = nvfp4_grouped_gemm(tokens, weights, sizes.astype(jnp.int32))
            return y.reshape(*tiles.shape[:2], -1)
        return self._product("gti,goi->gto", tiles, tiles.dtype, index)

    def grouped(self, x: Float[Array, "*batch groups i"]) -> Float[Array, "*batch o"]:
        """Block-diagonal product: each group of inputs gives its share of the outputs.

        The input is never quantised; the result has its dtype.
        """
        if self.is_tiled:
            return grouped_gemm(x, self.blocks.get_value())
        *batch, num_groups, width = x.shape
        w = self.decoded(x.dtype).reshape(num_groups, -1, width)
        return product("...gi,goi->...go", x, w).astype(x.dtype).reshape(*batch, -1)

    def _segment(self, out_dtype: DTypeLike | None) -> Segment:
        return Segment(self.blocks.get_value(), self.rounds_input, out_dtype)

    @staticmethod
    def _tokens(x: Float[Array, "*batch i"]) -> tuple[Array, Array, Array]:
        return nvfp4_quantize(x.reshape(-1, x.shape[-1]))

    def _swizzled(self) -> tuple[Array, Array, Array]:
        return self.weight[...], self.scale[...], self.scale_2[...]


def products(
    x: Float[Array, "*batch i"], linears: Sequence[tuple[Linear, DTypeLike | None]]
) -> list[Array]:
    """What each linear makes of x, in the dtype beside it (None: x's).

    Those that kernels run take one launch together.
    """
    tiled_ones = [(linear, dtype) for linear, dtype in linears if linear.is_tiled]
    segments = [linear._segment(dtype) for linear, dtype in tiled_ones]
    outputs = iter(projections(x, segments) if segments else ())
    return [next(outputs) if linear.is_tiled else linear(x, dtype) for linear, dtype in linears]
