"""dsv4/formats.h, the number formats of the compiled handlers, against the oracle."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.oracles import formats
from tests.oracles.format_inputs import FLOAT32, neighbours

INCLUDE = Path(__file__).parents[1] / "ffi" / "include"
COMPILER = shutil.which("c++")
SOURCE = """
#include "dsv4/formats.h"
#define EACH(name, result)                                                  \\
  extern "C" void name(const float* x, const unsigned* code, float* value,  \\
                       unsigned* bits, int count) {                         \\
    for (int i = 0; i < count; ++i) result;                                 \\
  }
EACH(from_bfloat16, value[i] = dsv4::FromBfloat16(code[i]))
EACH(to_bfloat16, bits[i] = dsv4::ToBfloat16(x[i]))
EACH(decode_e2m1, value[i] = dsv4::DecodeE2m1(code[i]))
EACH(encode_e2m1, bits[i] = dsv4::EncodeE2m1(x[i], 0.5f))
EACH(decode_e4m3, value[i] = dsv4::DecodeE4m3(code[i]))
EACH(encode_e4m3, bits[i] = dsv4::EncodeE4m3(x[i]))
EACH(decode_e8m0, value[i] = dsv4::DecodeE8m0(code[i]))
EACH(scale_e8m0, bits[i] = dsv4::ScaleE8m0(x[i], 1.0f / 448))
"""

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def codecs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("codecs")
    source, library = directory / "codecs.cc", directory / "codecs.so"
    source.write_text(SOURCE)
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-I", INCLUDE, source]
    subprocess.run([*command, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def apply(function, x):
    """(values, bits) of a codec, of which one is filled."""
    x = np.asarray(x)
    given = {np.dtype(np.float32): 0, np.dtype(np.uint32): 1}[x.dtype]
    values, bits = np.empty(x.size, np.float32), np.empty(x.size, np.uint32)
    pointers = [None, None, values.ctypes.data, bits.ctypes.data]
    pointers[given] = x.ctypes.data
    function(*map(ctypes.c_void_p, pointers), x.size)
    return values, bits


def decode(function, num_codes):
    return apply(function, np.arange(num_codes, dtype=np.uint32))[0]


def encode(function, x):
    return apply(function, np.asarray(x, np.float32))[1]


def around(magnitudes, unit=1.0):
    """Every value, every tie and the floats beside them, of both signs; and large ones."""
    ties = (magnitudes[1:] + magnitudes[:-1]) / 2
    random = np.random.default_rng(0).uniform(0, 1.2 * magnitudes[-1], 2000)
    x = np.concatenate([neighbours(np.r_[magnitudes, ties] * unit, FLOAT32), random * unit])
    x = np.r_[x, 1e-45, 1e-38, 1e38, np.inf].astype(np.float32)
    return np.concatenate([x, -x])


@pytest.mark.parametrize(("name", "values"), [("e2m1", formats.E2M1), ("e4m3", formats.E4M3)])
def test_every_code(codecs, name, values):
    found = decode(codecs[f"decode_{name}"], len(values))
    np.testing.assert_array_equal(found, values)
    np.testing.assert_array_equal(
        np.signbit(found)[values == 0], np.arange(len(values))[values == 0] > 0
    )


def test_every_power_of_two(codecs):
    np.testing.assert_array_equal(decode(codecs.decode_e8m0, 256), formats.E8M0)


def test_every_bfloat16(codecs):
    bits = np.arange(1 << 16, dtype=np.uint32)
    np.testing.assert_array_equal(
        decode(codecs.from_bfloat16, 1 << 16), (bits << 16).view(np.float32)
    )


def test_to_bfloat16(codecs):
    finite = np.random.default_rng(0).integers(0, 1 << 32, 20000, dtype=np.uint32).view(np.float32)
    ties = np.array([0x3F808000, 0x3F818000, 0x3F818001, 0x7F7FFFFF, 0x7F800000], np.uint32)
    x = np.concatenate([finite[np.isfinite(finite)], ties.view(np.float32), [-0.0]])
    found = (encode(codecs.to_bfloat16, x) << 16).view(np.float32)
    np.testing.assert_array_equal(found, formats.to_bfloat16(x.astype(np.float64)))
    assert np.isnan((encode(codecs.to_bfloat16, [np.nan]) << 16).view(np.float32)).all()


def test_to_e2m1(codecs):
    x = around(formats.E2M1[:8], unit=0.5)
    np.testing.assert_array_equal(encode(codecs.encode_e2m1, x), formats.to_e2m1(x / 0.5))


def test_to_e4m3(codecs):
    x = around(formats.E4M3[:127])
    found = encode(codecs.encode_e4m3, x)
    np.testing.assert_array_equal(found, formats.to_e4m3(x.astype(np.float64)))
    assert (encode(codecs.encode_e4m3, [np.nan, -np.nan]) & 0x7F == 0x7F).all()


def test_scale(codecs):
    amax = neighbours(448 * 2.0 ** np.arange(-130, 119), FLOAT32)
    amax = np.r_[amax[amax > 1e-35], 1.0, 3e38].astype(np.float32)
    found = encode(codecs.scale_e8m0, amax)
    np.testing.assert_array_equal(found, formats.scale_code(amax.astype(np.float64), 448, 1e-35))
    assert (encode(codecs.scale_e8m0, [np.inf, np.nan]) == 255).all()
