"""Where the forward pass rounds on purpose, and whether a batch shows in the last bits."""

from dataclasses import dataclass
from typing import ClassVar

ACTIVATIONS = ("bf16", "e4m3", "nvfp4")
GATES = ("stored", "bfloat16", "nvfp4")


@dataclass(frozen=True)
class Numerics:
    """What is rounded beyond the weights; the defaults are what the released ones expect.

    Attributes:
        activations: Q1, inputs of linears with packed weights. Those with float weights, and
            block-diagonal ones, are never affected.
            "bf16": as they are, in the compute dtype: W4A16 and W8A16.
            "e4m3": to E4M3, one power-of-two scale per row and 128 channels: W4A8 and W8A8.
            "nvfp4": of linears with FP4 weights to NVFP4, with a global scale per row of
            amax / (6 * 448), so that no row depends on another: W4A4; of FP8 ones as "e4m3".
        quantize_kv: Q2, window and compressed KV entries to the 584-byte record
            (non-rotary channels E4M3 in groups of 64, rotary channels BF16).
        quantize_indexer: Q3, indexer queries and keys to MXFP4 after the Hadamard rotation.
        gate: what routers multiply: "stored", the checkpoint's weight; "bfloat16" or "nvfp4",
            both operands or the weight rounded to it at load.
        batch_invariant: the kernels of sparse attention split a query's sums by its own entries
            alone, so that what attention gives it has the same bits in any batch and with any
            length of the block table; for few queries this is slower. Only attention: matrix
            products (linears, routers, experts) choose by the number of rows how their sums are
            split, so that a whole step's logits may still differ in their last bits between
            batch sizes.

    `Numerics.EXACT` rounds nothing: with `dtype=float32` every product is a true float32 product
    on every backend. `Numerics.CHECKPOINT`, the default everywhere, rounds where the released
    weights were trained to be rounded.

    Raises:
        ValueError: an unknown name.
    """

    activations: str = "e4m3"
    quantize_kv: bool = True
    quantize_indexer: bool = True
    gate: str = "stored"
    batch_invariant: bool = False

    EXACT: ClassVar["Numerics"]
    CHECKPOINT: ClassVar["Numerics"]

    def __post_init__(self) -> None:
        for name, value, known in (
            ("activations", self.activations, ACTIVATIONS),
            ("gate", self.gate, GATES),
        ):
            if value not in known:
                raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}")


Numerics.EXACT = Numerics("bf16", False, False)
Numerics.CHECKPOINT = Numerics()
