"""Instructions on registers against NumPy or Python's integers."""

import numpy as np
import pytest

from tests.oracles import formats
from tests.ptx.snippets import places, run

DTYPES = {"f32": "f4"} | {f"{s}{n}": f"{d}{n // 8}" for s, d in ["uu", "si"] for n in (16, 32, 64)}
REGISTERS = {"16": "h", "32": "r", "64": "d"}


def inputs(kind: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    dtype = np.dtype(DTYPES[kind])
    if kind == "f32":
        special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1, -1, 2.5], dtype)
        return np.concatenate([special, rng.standard_normal(24).astype(dtype)])[rng.permutation(32)]
    limits = np.iinfo(dtype)
    special = np.array([0, 1, limits.max, limits.min, 3, 31, 7, 8], dtype)
    values = rng.integers(limits.min, limits.max, 24, dtype, endpoint=True)
    return np.concatenate([special, values])[rng.permutation(32)]


def compute(instruction: str, kinds: list[str], to: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """(results, sources) of `instruction`, which names its registers {to} and {0}, {1}, {2}."""
    sources = [inputs(kind, seed) for seed, kind in enumerate(kinds)]
    out = np.zeros(32, DTYPES[to])
    body = ""
    registers = []
    arrays = [out, *sources]
    for i, (kind, array) in enumerate(zip([to, *kinds], arrays, strict=True)):
        body += f"ld.param.u64 %d{i + 20}, [pointer_{i}];\nmov.u32 %r50, %tid.x;\n"
        body += f"mad.wide.u32 %d{i + 20}, %r50, {array.itemsize}, %d{i + 20};\n"
        prefix = "f" if kind == "f32" else REGISTERS[kind[1:]]
        registers.append(f"%{prefix}{i + 1}")
        if i:
            body += f"ld.global.{kind} {registers[i]}, [%d{i + 20}];\n"
    body += instruction.format(*registers[1:], to=registers[0]) + ";\n"
    body += f"st.global.{to} [%d20], {registers[0]};\n"
    run(body, *arrays)
    return out, sources


def as_integers(array: np.ndarray) -> list[int]:
    return [int(x) for x in array]


def wrapped(values: list[int], to: str) -> np.ndarray:
    dtype = np.dtype(DTYPES[to])
    bits = 8 * dtype.itemsize
    return np.array([v % 2**bits for v in values], f"u{dtype.itemsize}").view(dtype)


def shifted_right(a: int, n: int) -> int:
    return a >> min(n, 64)


INTEGER = [
    ("add", lambda a, b: a + b),
    ("sub", lambda a, b: a - b),
    ("mul.lo", lambda a, b: a * b),
    ("min", min),
    ("max", max),
    ("div", lambda a, b: None if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)),
    ("rem", lambda a, b: None if b == 0 else abs(a) % abs(b) * (-1 if a < 0 else 1)),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize(("name", "function"), INTEGER, ids=[n for n, _ in INTEGER])
def test_integer(name, function, kind):
    out, (a, b) = compute(f"{name}.{kind} {{to}}, {{0}}, {{1}}", [kind, kind], kind)
    pairs = zip(as_integers(a), as_integers(b), strict=True)
    expected = [function(x, y) for x, y in pairs]
    defined = [i for i, e in enumerate(expected) if e is not None]
    np.testing.assert_array_equal(out[defined], wrapped([expected[i] for i in defined], kind))


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_wide_and_high_products(kind):
    wide = kind[0] + "64"
    out, (a, b) = compute(f"mul.wide.{kind} {{to}}, {{0}}, {{1}}", [kind, kind], wide)
    products = [x * y for x, y in zip(as_integers(a), as_integers(b), strict=True)]
    np.testing.assert_array_equal(out, wrapped(products, wide))
    out, _ = compute(f"mul.hi.{kind} {{to}}, {{0}}, {{1}}", [kind, kind], kind)
    np.testing.assert_array_equal(out, wrapped([p >> 32 for p in products], kind))
    out, (a, b, c) = compute(
        f"mad.wide.{kind} {{to}}, {{0}}, {{1}}, {{2}}", [kind, kind, wide], wide
    )
    sums = [x * y + z for x, y, z in zip(*map(as_integers, (a, b, c)), strict=True)]
    np.testing.assert_array_equal(out, wrapped(sums, wide))


@pytest.mark.parametrize(("kind", "bits"), [("u32", 32), ("s32", 32), ("u64", 64), ("s64", 64)])
def test_shifts_by_more_than_the_width_clamp(kind, bits):
    out, (a, n) = compute(f"shl.b{bits} {{to}}, {{0}}, {{1}}", [kind, "u32"], kind)
    pairs = list(zip(as_integers(a), as_integers(n), strict=True))
    np.testing.assert_array_equal(out, wrapped([x << y if y < 64 else 0 for x, y in pairs], kind))
    out, _ = compute(f"shr.{kind} {{to}}, {{0}}, {{1}}", [kind, "u32"], kind)
    np.testing.assert_array_equal(out, wrapped([x >> min(y, 64) for x, y in pairs], kind))


FLOAT = {
    "add.f32": np.add,
    "sub.f32": np.subtract,
    "mul.f32": np.multiply,
    "max.f32": np.fmax,
    "min.f32": np.fmin,
    "div.rn.f32": np.divide,
}


@pytest.mark.parametrize("name", FLOAT)
def test_float(name):
    out, (a, b) = compute(f"{name} {{to}}, {{0}}, {{1}}", ["f32", "f32"], "f32")
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(out, FLOAT[name](a, b))


def test_fma_rounds_once():
    out, (a, b, c) = compute("fma.rn.f32 {to}, {0}, {1}, {2}", ["f32"] * 3, "f32")
    with np.errstate(all="ignore"):
        exact = a.astype(np.float64) * b + c
        np.testing.assert_array_equal(out, exact.astype(np.float32))


ORDERED = {"eq": np.equal, "ne": None, "lt": np.less, "le": np.less_equal, "gt": np.greater}


@pytest.mark.parametrize("name", [*ORDERED, "equ", "neu", "ltu", "num", "nan"])
def test_float_comparison_of_nan(name):
    out, (a, b) = compute(
        f"setp.{name}.f32 %p1, {{0}}, {{1}};\nselp.u32 {{to}}, 1, 0, %p1", ["f32", "f32"], "u32"
    )
    unordered = np.isnan(a) | np.isnan(b)
    expected = {
        "ne": (a < b) | (a > b),
        "equ": (a == b) | unordered,
        "neu": a != b,
        "ltu": (a < b) | unordered,
        "num": ~unordered,
        "nan": unordered,
    }
    value = expected[name] if name in expected else ORDERED[name](a, b)
    np.testing.assert_array_equal(out, value)


def test_comparison_combines_with_a_predicate_and_gives_its_opposite():
    out, (a, b) = compute(
        "setp.lt.s32 %p1, {0}, 0;\nsetp.gt.and.s32 %p2|%p3, {1}, 0, %p1;\n"
        "selp.u32 %r40, 1, 0, %p2;\nselp.u32 {to}, 2, %r40, %p3",
        ["s32", "s32"],
        "u32",
    )
    np.testing.assert_array_equal(out, np.where(a < 0, np.where(b > 0, 1, 2), 0))


def test_bit_logic():
    out, (a, b, c) = compute("lop3.b32 {to}, {0}, {1}, {2}, 0xE4", ["u32"] * 3, "u32")
    np.testing.assert_array_equal(out, (c & a) | (~c & b))
    out, (a, b) = compute("prmt.b32 {to}, {0}, {1}, 0x9750", ["u32"] * 2, "u32")
    low, high = a.view(np.uint8).reshape(-1, 4), b.view(np.uint8).reshape(-1, 4)
    sign = np.where(low[:, 1] & 0x80, 0xFF, 0).astype(np.uint8)
    expected = np.stack([low[:, 0], high[:, 1], high[:, 3], sign], 1).view("u4")[:, 0]
    np.testing.assert_array_equal(out, expected)
    out, (a,) = compute("not.b32 {to}, {0}", ["u32"], "u32")
    np.testing.assert_array_equal(out, ~a)
    out, (a,) = compute("popc.b32 {to}, {0}", ["u32"], "u32")
    np.testing.assert_array_equal(out, [bin(x).count("1") for x in as_integers(a)])
    out, (a,) = compute("bfe.u32 {to}, {0}, 5, 7", ["u32"], "u32")
    np.testing.assert_array_equal(out, a >> 5 & 127)
    out, (a, b) = compute("shf.l.wrap.b32 {to}, {0}, {1}, 40", ["u32"] * 2, "u32")
    np.testing.assert_array_equal(out, b << 8 | a >> 24)


def test_move_packs_and_unpacks():
    out, (a, b) = compute("mov.b64 {to}, {{{0}, {1}}}", ["u32", "u32"], "u64")
    np.testing.assert_array_equal(out, a.astype("u8") | b.astype("u8") << np.uint64(32))
    out, (a,) = compute("mov.b64 {{%r40, {to}}}, {0}", ["u64"], "u32")
    np.testing.assert_array_equal(out, (a >> np.uint64(32)).astype("u4"))


@pytest.mark.parametrize(
    ("name", "kind", "to"),
    [("s64.s32", "s32", "s64"), ("u64.u32", "u32", "u64"), ("u32.u64", "u64", "u32"),
     ("s32.s16", "s16", "s32"), ("u16.u32", "u32", "u16"), ("s16.s8", "u32", "s16")],
)  # fmt: skip
def test_integer_conversion(name, kind, to):
    out, (a,) = compute(f"cvt.{name} {{to}}, {{0}}", [kind], to)
    source = a.astype("u1").view("i1") if name == "s16.s8" else a
    np.testing.assert_array_equal(out, source.astype(DTYPES[to]))


def test_float_conversion():
    out, (a,) = compute("cvt.rn.f32.s32 {to}, {0}", ["s32"], "f32")
    np.testing.assert_array_equal(out, a.astype(np.float32))
    out, (a,) = compute("cvt.rzi.s32.f32 {to}, {0}", ["f32"], "s32")
    finite = np.nan_to_num(a.astype(np.float64), nan=0, posinf=2**31 - 1, neginf=-(2**31))
    np.testing.assert_array_equal(out, np.trunc(finite).astype(np.int64))


def test_bfloat16_conversion():
    out, (a,) = compute("cvt.rn.bf16.f32 %h5, {0};\ncvt.u32.u16 {to}, %h5", ["f32"], "u32")
    got = (out << 16).view(np.float32)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(a))
    number = ~np.isnan(a)
    np.testing.assert_array_equal(got[number], formats.to_bfloat16(a[number].astype(np.float64)))
    out, (a, b) = compute("cvt.rn.bf16x2.f32 {to}, {0}, {1}", ["f32", "f32"], "u32")
    low = (out << 16).view(np.float32)
    number = ~np.isnan(b)
    np.testing.assert_array_equal(low[number], formats.to_bfloat16(b[number].astype(np.float64)))


def test_unknown_instruction_is_refused_before_it_runs():
    with pytest.raises(NotImplementedError, match="wgmma"):
        run("bra end;\nwgmma.fence.sync.aligned;\nend:\n")


def test_guard_selects_lanes():
    out = np.zeros(32, np.uint32)
    body = (
        places(4)
        + """
        setp.lt.u32 %p1, %r0, 5;
        mov.u32 %r1, 7;
        @%p1 mov.u32 %r1, 8;
        @!%p1 add.u32 %r1, %r1, 10;
        st.global.u32 [%d0], %r1;
    """
    )
    run(body, out)
    np.testing.assert_array_equal(out, np.where(np.arange(32) < 5, 8, 17))
