"""benchmarks.agreement: how predictions are compared; kernels against XLA on the mini model."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_jax
from benchmarks.agreement import Run, compare, mini_tokenizer, windows
from benchmarks.quality import texts_of
from dsv4_jax.kernels import Kernels
from dsv4_jax.ops.dispatch import observed, operation_name
from dsv4_jax.transformer import prefill_step

LN2 = math.log(2)


def test_differences_by_their_definition():
    """Two tokens of four: bits that are powers of two, one choice that differs."""
    reference = -LN2 * np.array([[[1.0, 2, 3, 3], [2, 1.5, 3, 4]]])
    found = reference - LN2 * np.array([[[0.0, 0, 0, 0], [0, 1, 0, 0]]])
    row = compare(found, reference, np.array([[0, 1]]), num_bytes=2)
    assert row["tokens"] == 2
    assert row["bits_per_byte"] == pytest.approx((1 + 2.5) / 2)
    assert row["difference"] == pytest.approx(0.5)
    assert row["argmax_agreement"] == 0.5
    assert (row["above_quarter_bit"], row["no_near_tie"]) == (0.5, 0)
    assert row["gap_median"] == row["gap_largest"] == pytest.approx(0.5)
    noise = math.sqrt(3 / 16)
    assert row["gap_in_noise_largest"] == pytest.approx(0.5 / noise)
    size = np.linalg.norm(reference.std(-1) / LN2)
    assert row["relative_l2"] == pytest.approx(noise / size)


def test_nothing_differs():
    table = np.random.default_rng(0).normal(size=(2, 3, 5))
    row = compare(table, table, np.zeros((2, 3), int), num_bytes=6)
    assert row["argmax_agreement"] == 1
    assert row["difference"] == row["relative_l2"] == row["gap_largest"] == 0


def test_windows_of_long_texts():
    tokenizer = mini_tokenizer()
    found = windows(tokenizer, ["import os", "def f(x):\n    return x"], 6)
    assert found.shape == (1, 6)
    assert found[0, 0] == tokenizer.bos_id
    assert "def f(x):\n    return x".startswith(tokenizer.decode(found[0, 1:].tolist()))


@pytest.fixture(scope="module")
def tokens():
    return windows(mini_tokenizer(), texts_of([], None), 256)[:2]


@pytest.mark.gpu
@pytest.mark.parametrize("activations", ["e4m3", "bf16"])
def test_kernels_differ_from_xla_as_xla_does_from_itself(activations, tokens):
    run = Run("XLA", activations)
    reference = run.predictions(tokens)
    kernels, floor = (
        compare(other.predictions(tokens), reference, tokens[:, 1:], num_bytes=tokens.size)
        for other in (replace(run, kernels=Kernels.FASTEST), replace(run, whole_windows=True))
    )
    assert kernels["relative_l2"] < 2 * floor["relative_l2"]
    assert kernels["argmax_agreement"] > floor["argmax_agreement"] - 0.03
    assert kernels["no_near_tie"] == 0


@pytest.mark.gpu
def test_every_operation_of_a_step(tokens):
    """On the values of a real step each kernel gives what XLA gives but for the order of sums."""
    model = dsv4_jax.load("mini", dtype="bfloat16")
    *before, last = jnp.asarray(tokens.T[:16])
    cache = model.new_cache(len(tokens), tokens.size)
    cache.prepare_step([16] * len(tokens))
    calls = {}

    def step(arrays, ids):
        lengths = jnp.ones_like(ids)
        return prefill_step(model.graph, model.params, arrays, ids[:, None], lengths)[1]

    def observe(implementations, arrays, static):
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), arrays)
        calls[operation_name(implementations), str(shapes)] = implementations, arrays, static

    arrays = cache.arrays
    for ids in before:
        arrays = step(arrays, ids)
    with observed(observe):
        step(arrays, last)
    compared = set()
    for (name, _), (implementations, arrays, static) in calls.items():
        try:
            found, expected = (
                jax.jit(partial(implementations[kind], **static))(*arrays)
                for kind in ("ffi", "xla")
            )
        except (KeyError, NotImplementedError):
            continue
        compared.add(name)
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            _assert_same_but_for_sums(name, ours, theirs)
    assert {"append_swa", "gemm", "hyper_connections", "layer_writes", "sparse_attention"} <= (
        compared
    )


def _assert_same_but_for_sums(name, ours, theirs):
    if np.issubdtype(ours.dtype, np.integer):
        if name == "indexer":  # selects in any order
            ours, theirs = (jnp.sort(ids, axis=-1) for ids in (ours, theirs))
        assert np.mean(np.asarray(ours) != np.asarray(theirs)) < 1e-3, name
        return
    ours, theirs = (
        np.nan_to_num(np.asarray(x, np.float64), posinf=0, neginf=0) for x in (ours, theirs)
    )
    # XLA leaves out bfloat16 roundings between what it fuses.
    assert np.linalg.norm(ours - theirs) <= 2**-8 * np.linalg.norm(theirs), name
