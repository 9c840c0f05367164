"""A warp's registers seen as each data type, and access to operands.

An instruction is linked once: `link(kernel)` turns it into a function of (warp, mask) by way of the
functions that modules register with `instruction`. `mask` says which of the 32 lanes take part.
"""

import functools
from collections.abc import Callable

import numpy as np

from tests.ptx.emulator.parser import (
    Address,
    Immediate,
    Instruction,
    Kernel,
    Negated,
    Register,
    Sink,
    Special,
    Symbol,
)

WARP = 32
LANES = np.arange(WARP)
# A generic address of shared memory is this plus its address in the shared window.
SHARED_WINDOW = 1 << 60
RANK_SHIFT = 24
GARBAGE = 0x7FC0DEAD_7FC0DEAD  # NaN as float32 and as float64

_KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}

Effect = Callable[[object, np.ndarray], None]
_BUILDERS: dict[str, Callable[[Instruction], Effect]] = {}


class Blocked(Exception):
    """The instruction cannot finish now and is to be tried again."""


class Spinning(Exception):
    """The instruction finished, but the warp polls: let others run."""


def instruction(*opcodes: str):
    """Registers the builder of opcodes that begin with one of these; the longest match wins."""

    def register(builder):
        for opcode in opcodes:
            _BUILDERS[opcode] = builder
        return builder

    return register


@functools.cache
def link(kernel: Kernel) -> list[Effect | None]:
    return [_build(i) for i in kernel.instructions]


def _build(instruction: Instruction) -> Effect | None:
    parts = instruction.parts
    if parts[0] in ("bra", "ret", "exit"):
        return None
    for length in range(len(parts), 0, -1):
        builder = _BUILDERS.get(".".join(parts[:length]))
        if builder:
            return builder(instruction)
    raise NotImplementedError(f"instruction: {instruction.text}")


def dtype_of(name: str) -> str:
    """NumPy dtype of a PTX type: "u32" -> "u4"; bf16 types are their bits."""
    if name == "pred":
        return "pred"
    if name in ("bf16", "f16x2", "bf16x2"):
        return "u2" if name == "bf16" else "u4"
    return _KINDS[name[0]] + str(int(name[1:]) // 8)


class Registers:
    """[registers, 32 lanes] of 64 bits; `as_type[dtype]` views the low bits of each."""

    def __init__(self, count: int):
        self.bits = np.full((count, WARP), GARBAGE, np.uint64)
        self.as_type = {"pred": self.bits}
        for size in (1, 2, 4, 8):
            for kind in "uif" if size > 1 else "ui":
                view = self.bits.view(f"{kind}{size}").reshape(count, WARP, 8 // size)
                self.as_type[f"{kind}{size}"] = view[:, :, 0]


def reader(operand: object, dtype: str) -> Callable[[object], np.ndarray]:
    """The operand's value in all lanes; of predicates, booleans."""
    if isinstance(operand, Register):
        index = operand.index
        if dtype == "pred":
            return lambda warp: warp.registers.bits[index] != 0
        return lambda warp: warp.registers.as_type[dtype][index]
    if isinstance(operand, Negated):
        index = operand.predicate.index
        return lambda warp: warp.registers.bits[index] == 0
    if isinstance(operand, Immediate):
        bits = np.full(WARP, operand.bits, np.uint64)
        value = bits != 0 if dtype == "pred" else _low_bits(bits, dtype)
        value.flags.writeable = False
        return lambda warp: value
    if isinstance(operand, Special):
        return lambda warp: warp.special(operand.name, operand.axis).astype(dtype)
    if isinstance(operand, Symbol):
        return lambda warp: np.full(WARP, warp.symbol_address(operand), np.uint64).astype(dtype)
    raise NotImplementedError(f"operand: {operand}")


def _low_bits(bits: np.ndarray, dtype: str) -> np.ndarray:
    return bits.view(dtype).reshape(len(bits), -1)[:, 0].copy()


def writer(operand: object, dtype: str) -> Callable[[object, np.ndarray, np.ndarray], None]:
    """(warp, mask, values): integers are extended to the whole register."""
    if isinstance(operand, Sink):
        return lambda warp, mask, values: None
    index = operand.index
    if dtype == "pred":
        wide, convert = "u8", np.asarray
    elif dtype[0] == "f":
        bits = "u" + dtype[1:]
        wide, convert = "u8", lambda values: np.asarray(values, dtype).view(bits)
    else:
        wide, convert = dtype[0] + "8", lambda values: np.asarray(values).astype(dtype)

    def write(warp, mask, values):
        np.copyto(warp.registers.as_type[wide][index], convert(values), where=mask)

    return write


def address_reader(operand: Address) -> Callable[[object], np.ndarray]:
    """Addresses as signed 64-bit integers."""
    base, offset = reader(operand.base, "u8"), operand.offset
    return lambda warp: base(warp).astype(np.int64) + offset


def address_reader_32(operand: Address) -> Callable[[object], np.ndarray]:
    """Addresses in the shared window or in tensor memory."""
    base, offset = reader(operand.base, "u4"), operand.offset
    return lambda warp: base(warp).astype(np.int64) + offset


def only_lane(mask: np.ndarray, text: str) -> int:
    """The one lane of an instruction that one thread must issue."""
    lanes = np.flatnonzero(mask)
    if len(lanes) != 1:
        raise RuntimeError(f"{text}: issued by {len(lanes)} threads, expected one")
    return int(lanes[0])
