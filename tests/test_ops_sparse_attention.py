"""Attention over cache records, against the oracle."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_ffi
from dsv4_jax.cache.storage import EntryRecord
from dsv4_jax.ops.sparse_attention import Entries, sparse_attention
from tests.attention_cases import (
    LAYER,
    POOL_LAYER,
    expected,
    full_size,
    make_case,
    random_records,
    written,
    wrong_in_bfloat16,
)

PLATFORM = jax.default_backend().replace("gpu", "cuda")
IMPLEMENTATIONS = [
    "xla",
    pytest.param(
        "ffi",
        marks=pytest.mark.skipif(
            (missing := dsv4_ffi.missing(PLATFORM)) is not None, reason=missing or ""
        ),
    ),
]
STATIC = (
    *(
        "storage",
        "scale",
        "window",
        "layer",
        "pool_layer",
        "ratio",
        "batch_invariant",
        "implementation",
    ),
)
jitted = jax.jit(sparse_attention, static_argnames=STATIC)


def run(case, implementation, dtype=jnp.float32, **static):
    def on_device(planes):
        return None if planes is None else tuple(map(jnp.asarray, planes))

    entries = None
    if case.ratio:
        ids = None if case.ids is None else jnp.asarray(case.ids)
        entries = Entries(on_device(case.pool), jnp.asarray(case.table), ids)
    o = jitted(
        jnp.asarray(case.q).astype(dtype),
        jnp.asarray(case.sink),
        jnp.asarray(case.omega),
        jnp.asarray(case.start),
        jnp.asarray(case.length),
        on_device(case.ring),
        on_device(case.new),
        entries,
        storage=EntryRecord(case.q.shape[-1], 2 * len(case.omega)),
        scale=case.scale,
        window=case.window,
        layer=LAYER,
        pool_layer=POOL_LAYER if case.ratio else 0,
        ratio=case.ratio,
        implementation=implementation,
        **static,
    )
    return np.asarray(o.astype(jnp.float32))


def check(case, implementation, dtype=jnp.float32, **static):
    found, correct = run(case, implementation, dtype, **static), expected(case)
    error = np.abs(found - correct)
    if dtype == jnp.float32:
        assert error.max() < 2e-5 * np.abs(correct).max(initial=1)
        return found
    wrong = wrong_in_bfloat16(found, correct)
    assert not wrong.any(), (wrong.sum(), error.max())
    difference = 1 - 2 * (found * correct).sum() / max((found**2 + correct**2).sum(), 1e-30)
    assert difference < 5e-6 or not correct.any()
    return found


STARTS = [0, 3, 15, 16, 17, 61, 127, 128, 300]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["window", "csa", "hca"])
def test_one_token(kind, implementation):
    options = {"window": {}, "csa": {"ratio": 4, "top_k": 24}, "hca": {"ratio": 128}}[kind]
    case = make_case(np.random.default_rng(0), STARTS, **options)
    case.length[2] = 0
    check(written(case), implementation)
    check(case, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("ring", [15, 16, 19, 40])
def test_several_tokens_see_what_each_may(ring, implementation):
    case = make_case(
        np.random.default_rng(1),
        [0, 2, 14, 125, 126, 253],
        [4, 3, 4, 4, 0, 1],
        t=4,
        ring=ring,
        ratio=4,
        top_k=20,
    )
    check(case, implementation)
    if ring >= 19:
        check(written(case), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_entries_of_each_token(implementation):
    """Ratio 4 without ids, and entries that are completed inside the chunk."""
    rng = np.random.default_rng(2)
    check(make_case(rng, [2, 30, 122], t=7, ratio=4), implementation)
    check(make_case(rng, [2, 125, 254], t=7, ratio=128), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_many_tokens(implementation):
    rng = np.random.default_rng(13)
    check(make_case(rng, [0, 90], [66, 50], t=66, heads=2, ratio=4, top_k=20), implementation)
    check(written(make_case(rng, [7], t=65, heads=2, ring=81)), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation):
    case = make_case(np.random.default_rng(3), [40, 200], t=2, ratio=4, top_k=24, exponent=-3)
    check(case, implementation, jnp.bfloat16)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scales(implementation):
    check(make_case(np.random.default_rng(11), [40], exponent=60), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_but_the_sink_and_no_token(implementation):
    case = make_case(np.random.default_rng(4), [50, 70], ratio=4, top_k=8)
    case.ids[:] = -1
    check(case, implementation)
    case.sink[:] = [1e4, 1e3, -1e4, -np.inf, 0]
    found = run(case, implementation)
    np.testing.assert_array_equal(found[:, :, :2], 0)
    assert np.isfinite(found).all() and (found[:, :, 2:] != 0).any()
    case.length[:] = 0
    case.table[:] = -1
    np.testing.assert_array_equal(run(case, implementation), 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_long_positions(implementation):
    """At a million tokens the angle is one float32 product."""
    case = make_case(np.random.default_rng(5), [0, 0], ratio=4, top_k=8, capacity=5)
    case = replace(case, start=np.array([1048575, 1048570], np.int32))
    case.ids[:] = -1
    rng = np.random.default_rng(6)
    held = random_records(rng, 2, 17, width=192)
    for s in range(2):
        at = np.arange(case.start[s] - 16, case.start[s]) % 16
        for plane, values in zip(case.ring, held, strict=True):
            plane[LAYER, s, at] = values[s, :16]
    case = replace(
        case,
        new=tuple(x[:, 16:] for x in held),
        tokens=[tuple(x[s] for x in held) for s in range(2)],
    )
    check(case, implementation)


def test_refuses():
    case = make_case(np.random.default_rng(7), [40], t=3, ring=14, ratio=4)
    with pytest.raises(ValueError, match="ring: got 14 tokens, expected at least 15"):
        run(case, "xla")
    case = make_case(np.random.default_rng(7), [40], t=3, ring=17, ratio=4)
    with pytest.raises(ValueError, match="ring: got 17 tokens, expected at least 18"):
        run(replace(case, new=None), "xla")
    with pytest.raises(ValueError, match="ratio: got 0"):
        sparse_attention(
            *(jnp.zeros((1, 1, 1, 192)), jnp.zeros(1), jnp.zeros(32), *[jnp.zeros(1, int)] * 2),
            tuple(jnp.zeros((1, 1, 16, n), jnp.uint8) for n in (256, 8)),
            entries=Entries(
                tuple(jnp.zeros((1, 1, 1, n), jnp.uint8) for n in (256, 8)), jnp.zeros((1, 1), int)
            ),
            storage=EntryRecord(192, 64),
            scale=1.0,
            window=16,
            layer=0,
        )


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("start", "options"),
    [
        ([5, 127, 128, 700], {"heads": 64}),
        ([40], {"heads": 64, "exponent": 60}),
        ([2600], {"heads": 64, "ratio": 4, "top_k": 512}),
        ([0, 3, 300, 1023, 4096], {"heads": 128, "ratio": 4, "top_k": 200}),
        ([9000, 126, 255, 40000], {"heads": 64, "ratio": 128}),
        ([300000], {"heads": 70, "ratio": 128}),
        ([1020, 2, 600], {"heads": 40, "ratio": 4, "top_k": 64, "t": 4, "length": [4, 2, 0]}),
        ([1020, 125], {"heads": 3, "ratio": 128, "t": 5, "ring": 132}),
        ([300], {"heads": 64, "ratio": 4, "top_k": 130, "t": 300}),
        ([0, 5, 129], {"heads": 70, "t": 65, "length": [65, 64, 0]}),
        ([3, 900], {"heads": 128, "ratio": 4, "top_k": 200, "t": 70, "length": [70, 33]}),
        ([6, 20000], {"heads": 5, "ratio": 128, "t": 130, "ring": 260}),
        ([100] * 140, {"heads": 8, "ratio": 4, "top_k": 20}),
    ],
)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_gpu_kernel(start, options, batch_invariant):
    case = full_size(np.random.default_rng(len(start)), start, **options)
    check(case, "ffi", jnp.bfloat16, batch_invariant=batch_invariant)
    if options.get("t", 1) == 1 or "ring" in options:
        check(written(case), "ffi", jnp.bfloat16, batch_invariant=batch_invariant)


@pytest.mark.gpu
def test_gpu_peaks_that_rise():
    case = full_size(np.random.default_rng(14), [900], heads=64, ratio=4, top_k=200, t=64)
    case.q *= 64
    found, correct = run(case, "ffi", jnp.bfloat16), expected(case)
    # A weight is rounded to bfloat16, and so is the output.
    assert np.abs(found - correct).max() < 2**-7 * np.abs(correct).max()


@pytest.mark.gpu
def test_gpu_nothing_but_the_sink():
    case = full_size(np.random.default_rng(8), [50, 70], ratio=4, top_k=8, heads=5)
    case.ids[:] = -1
    case.sink[:] = [1e4, 1e3, -1e4, -np.inf, 0]
    found = run(case, "ffi", jnp.bfloat16)
    np.testing.assert_array_equal(found[:, :, :2], 0)
    assert np.isfinite(found).all() and (found[:, :, 2:] != 0).any()
    case.length[:] = 0
    case.table[:] = -1
    np.testing.assert_array_equal(run(case, "ffi", jnp.bfloat16), 0)


def check_batch_invariant(case, dtype):
    """Each row alone, and with a longer table, gives the same bits."""
    together = run(case, "ffi", dtype, batch_invariant=True)
    for s in range(len(case.start)):
        row = slice(s, s + 1)
        alone = replace(
            case,
            **{name: getattr(case, name)[row] for name in ("q", "start", "length")},
            ids=None if case.ids is None else case.ids[row],
            table=np.pad(case.table[row], ((0, 0), (0, 300)), constant_values=-1),
            ring=tuple(plane[:, row] for plane in case.ring),
            new=tuple(plane[row] for plane in case.new),
        )
        found = run(alone, "ffi", dtype, batch_invariant=True)
        np.testing.assert_array_equal(found[0], together[s])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("options", [{}, {"ratio": 4, "top_k": 24}, {"ratio": 128}])
def test_batch_invariant(options, implementation):
    del implementation
    case = make_case(np.random.default_rng(12), [200, 17, 300], t=2, **options)
    check_batch_invariant(case, jnp.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("start", "options"),
    [
        ([3000, 70000, 90, 20000], {"ratio": 128}),
        ([3000, 700, 90], {"ratio": 4, "top_k": 300, "t": 2}),
        ([300, 4], {}),
    ],
)
def test_gpu_batch_invariant(start, options):
    case = full_size(np.random.default_rng(9), start, heads=64, **options)
    check_batch_invariant(case, jnp.bfloat16)


@pytest.mark.gpu
def test_gpu_kernel_refuses():
    case = make_case(np.random.default_rng(10), [40])
    with pytest.raises(NotImplementedError, match="sparse_attention: the kernel is for 512"):
        run(case, "ffi", jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="sparse_attention: the kernel takes bfloat16"):
        run(case, "ffi")
