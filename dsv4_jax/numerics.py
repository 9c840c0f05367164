"""Where the forward pass rounds on purpose."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Numerics:
    """The quantisation points the released weights were trained with, as switches.

    Attributes:
        quantize_activations: Q1, inputs of FP8 and FP4 linears to E4M3, one power-of-two scale
            per row and 128 channels. Linears with float weights are never affected.
        quantize_kv: Q2, window and compressed KV entries to the 584-byte record
            (non-rotary channels E4M3 in groups of 64, rotary channels BF16).
        quantize_indexer: Q3, indexer queries and keys to MXFP4 after the Hadamard rotation.

    `Numerics.EXACT` switches all of them off: with `dtype=float32` every product is a true
    float32 product on every backend. `Numerics.CHECKPOINT`, the default everywhere, switches all
    of them on.
    """

    quantize_activations: bool = True
    quantize_kv: bool = True
    quantize_indexer: bool = True

    EXACT: ClassVar["Numerics"]
    CHECKPOINT: ClassVar["Numerics"]


Numerics.EXACT = Numerics(False, False, False)
Numerics.CHECKPOINT = Numerics()
