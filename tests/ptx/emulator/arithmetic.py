"""Instructions on registers: integer and floating-point arithmetic, comparison, conversion."""

import operator

import numpy as np

from tests.ptx.emulator.lanes import WARP, dtype_of, instruction, reader, writer
from tests.ptx.emulator.parser import Pair, Sink, Vector


def _elementwise(i, dtype, function, count=None):
    """destination = function(sources), all of one dtype."""
    sources = [reader(o, dtype) for o in i.operands[1:count]]
    write = writer(i.operands[0], dtype)
    return lambda warp, mask: write(warp, mask, function(*(read(warp) for read in sources)))


def _bits(dtype: str) -> int:
    return 8 * np.dtype(dtype).itemsize


def _double_width(dtype: str) -> str:
    return dtype[0] + str(2 * int(dtype[1:]))


def _high_half(a, b):
    """Of the product: through Python's integers where 128 bits are needed."""
    bits = _bits(a.dtype)
    if bits < 64:
        wide = _double_width(a.dtype.str[1:])
        return (a.astype(wide) * b.astype(wide) >> bits).astype(a.dtype)
    high = [(int(x) * int(y) >> 64) & (2**64 - 1) for x, y in zip(a, b, strict=True)]
    return np.array(high, np.uint64).astype(a.dtype)


def _truncated_quotient(a, b):
    if a.dtype.kind == "f":
        return a / b
    safe = np.where(b == 0, 1, b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient += (a % safe != 0) & ((a < 0) != (safe < 0))
    return quotient


_BINARY = {
    "add": operator.add,
    "sub": operator.sub,
    "min": np.fmin,
    "max": np.fmax,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "div": _truncated_quotient,
    "rem": lambda a, b: a - _truncated_quotient(a, b) * b,
}


@instruction(*_BINARY)
def _binary(i):
    return _elementwise(i, dtype_of(i.parts[-1]), _BINARY[i.parts[0]])


@instruction("neg", "abs", "not", "sqrt", "rcp", "ex2", "lg2")
def _unary(i):
    dtype = dtype_of(i.parts[-1])
    not_function = np.logical_not if dtype == "pred" else np.invert
    function = {
        "neg": np.negative,
        "abs": np.abs,
        "not": not_function,
        "sqrt": np.sqrt,
        "rcp": np.reciprocal,
        "ex2": np.exp2,
        "lg2": np.log2,
    }[i.parts[0]]
    return _elementwise(i, dtype, function)


@instruction("mul")
def _mul(i):
    dtype = dtype_of(i.parts[-1])
    if "wide" in i.parts:
        return _wide(i, dtype, add=False)
    return _elementwise(i, dtype, _high_half if "hi" in i.parts else operator.mul)


@instruction("mad", "fma")
def _mad(i):
    dtype = dtype_of(i.parts[-1])
    if "wide" in i.parts:
        return _wide(i, dtype, add=True)
    if dtype == "f4":
        return _elementwise(i, dtype, lambda a, b, c: (a.astype("f8") * b + c).astype("f4"))
    product = _high_half if "hi" in i.parts else operator.mul
    return _elementwise(i, dtype, lambda a, b, c: product(a, b) + c)


def _wide(i, dtype, add):
    wide = _double_width(dtype)
    a, b = (reader(o, dtype) for o in i.operands[1:3])
    c = reader(i.operands[3], wide) if add else lambda warp: np.zeros(WARP, wide)
    write = writer(i.operands[0], wide)
    return lambda warp, mask: write(
        warp, mask, a(warp).astype(wide) * b(warp).astype(wide) + c(warp)
    )


@instruction("shl", "shr")
def _shift(i):
    dtype = dtype_of(i.parts[-1])
    if dtype[0] == "u" and i.parts[0] == "shr" and i.parts[-1][0] == "s":
        raise NotImplementedError(i.text)
    value, amount = reader(i.operands[1], dtype), reader(i.operands[2], "u4")
    write, bits, left = writer(i.operands[0], dtype), _bits(dtype), i.parts[0] == "shl"

    def shift(warp, mask):
        x, n = value(warp), amount(warp)
        inside = np.minimum(n, bits - 1).astype(dtype)
        shifted = x << inside if left else x >> inside
        if left or dtype[0] == "u":
            shifted = np.where(n >= bits, np.zeros_like(x), shifted)
        write(warp, mask, shifted)

    return shift


@instruction("shf")
def _funnel_shift(i):
    low, high, amount = (reader(o, "u4") for o in i.operands[1:4])
    write = writer(i.operands[0], "u4")
    left, wrap = "l" in i.parts, "wrap" in i.parts

    def shift(warp, mask):
        pair = high(warp).astype("u8") << np.uint64(32) | low(warp)
        n = amount(warp).astype("u8")
        n = n & np.uint64(31) if wrap else np.minimum(n, np.uint64(32))
        write(warp, mask, pair << n >> np.uint64(32) if left else pair >> n)

    return shift


@instruction("lop3")
def _lop3(i):
    """The table's bit 4 a + 2 b + c is the result's where the sources' bits are a, b, c."""
    table = i.operands[4].bits

    def combine(a, b, c):
        result = np.zeros(WARP, "u4")
        for k in range(8):
            if table >> k & 1:
                result |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
        return result

    return _elementwise(i, "u4", combine, 4)


@instruction("prmt")
def _prmt(i):
    def permute(a, b, selector):
        source = np.stack([a, b], 1).view(np.uint8)
        nibbles = selector[:, None] >> np.arange(0, 16, 4, dtype="u4") & np.uint32(15)
        chosen = np.take_along_axis(source, (nibbles & 7).astype(int), 1)
        sign = np.where(chosen & 0x80, 0xFF, 0).astype(np.uint8)
        return np.where(nibbles & 8, sign, chosen).view("u4")[:, 0]

    return _elementwise(i, "u4", permute)


@instruction("bfe")
def _bit_field_extract(i):
    dtype = dtype_of(i.parts[-1])
    if dtype[0] != "u":
        raise NotImplementedError(f"instruction: {i.text}")
    value, start, length = (
        reader(i.operands[1], dtype),
        *(reader(o, "u4") for o in i.operands[2:]),
    )
    write = writer(i.operands[0], dtype)

    def extract(warp, mask):
        fields = zip(value(warp), start(warp) & 255, length(warp) & 255, strict=True)
        write(warp, mask, np.array([int(v) >> int(s) & (1 << int(n)) - 1 for v, s, n in fields]))

    return extract


@instruction("popc")
def _population_count(i):
    value, write = reader(i.operands[1], dtype_of(i.parts[-1])), writer(i.operands[0], "u4")
    return lambda warp, mask: write(warp, mask, np.bitwise_count(value(warp)))


_COMPARISONS = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le,
    "gt": operator.gt, "ge": operator.ge, "lo": operator.lt, "ls": operator.le,
    "hi": operator.gt, "hs": operator.ge,
}  # fmt: skip


def _compare(name, a, b):
    if name in _COMPARISONS:
        # Of the ordered comparisons only "not equal" is true of a NaN in NumPy.
        ordered = True if name != "ne" or a.dtype.kind != "f" else (a == a) & (b == b)
        return _COMPARISONS[name](a, b) & ordered
    unordered = (a != a) | (b != b)
    if name in ("nan", "num"):
        return unordered if name == "nan" else ~unordered
    return _COMPARISONS[name.removesuffix("u")](a, b) | unordered


@instruction("setp")
def _setp(i):
    dtype = dtype_of(i.parts[-1])
    comparison = i.parts[1]
    combine = next((_BINARY[p] for p in i.parts[2:] if p in ("and", "or", "xor")), None)
    a, b = reader(i.operands[1], dtype), reader(i.operands[2], dtype)
    third = reader(i.operands[3], "pred") if combine else None
    pair = i.operands[0] if isinstance(i.operands[0], Pair) else Pair(i.operands[0], Sink())
    write, write_opposite = writer(pair.first, "pred"), writer(pair.second, "pred")

    def compare(warp, mask):
        result = _compare(comparison, a(warp), b(warp))
        other = third(warp) if combine else None
        write(warp, mask, combine(result, other) if combine else result)
        write_opposite(warp, mask, combine(~result, other) if combine else ~result)

    return compare


@instruction("selp")
def _selp(i):
    dtype = dtype_of(i.parts[-1])
    a, b = reader(i.operands[1], dtype), reader(i.operands[2], dtype)
    predicate, write = reader(i.operands[3], "pred"), writer(i.operands[0], dtype)
    return lambda warp, mask: write(warp, mask, np.where(predicate(warp), a(warp), b(warp)))


@instruction("mov")
def _mov(i):
    """Also packs a vector of registers into one and unpacks one into several."""
    dtype = dtype_of(i.parts[-1])
    destination, source = i.operands
    if isinstance(source, Vector):
        part = f"u{_bits(dtype) // 8 // len(source.elements)}"
        readers = [reader(o, part) for o in source.elements]
        write = writer(destination, dtype)
        return lambda warp, mask: write(
            warp, mask, np.stack([r(warp) for r in readers], 1).view(dtype)[:, 0]
        )
    if isinstance(destination, Vector):
        part = f"u{_bits(dtype) // 8 // len(destination.elements)}"
        value = reader(source, dtype)
        writers = [writer(o, part) for o in destination.elements]

        def unpack(warp, mask):
            parts = np.ascontiguousarray(value(warp)).view(part).reshape(WARP, -1)
            for j, write in enumerate(writers):
                write(warp, mask, parts[:, j])

        return unpack
    return _elementwise(i, dtype, lambda x: x)


def round_to_bf16(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16 numbers, ties to even."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


@instruction("cvt")
def _cvt(i):
    to, source = i.parts[-2], i.parts[-1]
    if to in ("bf16", "bf16x2"):
        return _to_bf16(i, source)
    if source == "bf16":
        value, write = reader(i.operands[1], "u2"), writer(i.operands[0], "f4")
        return lambda warp, mask: write(
            warp, mask, (value(warp).astype("u4") << np.uint32(16)).view("f4")
        )
    value, write = reader(i.operands[1], dtype_of(source)), writer(i.operands[0], dtype_of(to))
    if source[0] == "f" and to[0] != "f":
        return _float_to_integer(i, value, write, dtype_of(to))
    target = dtype_of(to)
    return lambda warp, mask: write(warp, mask, value(warp).astype(target))


def _to_bf16(i, source):
    if source != "f32" or "rn" not in i.parts:
        raise NotImplementedError(f"instruction: {i.text}")
    values = [reader(o, "f4") for o in i.operands[1:]]
    if len(values) == 1:
        write = writer(i.operands[0], "u2")
        return lambda warp, mask: write(warp, mask, round_to_bf16(values[0](warp)))
    write = writer(i.operands[0], "u4")

    def convert(warp, mask):
        high, low = (round_to_bf16(read(warp)).astype("u4") for read in values)
        write(warp, mask, high << np.uint32(16) | low)

    return convert


def _float_to_integer(i, value, write, target):
    roundings = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    rounding = next(roundings[p] for p in i.parts if p in roundings)
    limits = np.iinfo(target)

    def convert(warp, mask):
        rounded = np.nan_to_num(rounding(value(warp).astype("f8")), nan=0.0)
        write(warp, mask, np.clip(rounded, float(limits.min), float(limits.max)).astype(target))

    return convert
