import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.decoding.sampling import (
    SamplingArrays,
    SamplingParams,
    filter_logits,
    greedy,
    sample,
)

INF, NAN = np.inf, np.nan
DTYPES = (jnp.float32, jnp.int32, jnp.float32, jnp.float32)

jitted_filter, jitted_sample = jax.jit(filter_logits), jax.jit(sample)


def oracle(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """(probability of each token, distance of the nearest decision from its threshold)."""
    x = [-INF if np.isnan(v) else float(v) for v in logits]
    ranked = sorted((i for i in range(len(x)) if x[i] > -INF), key=lambda i: (-x[i], i))
    if top_k:
        ranked = ranked[:top_k]
    p = np.exp([(x[i] - x[ranked[0]]) / temperature for i in ranked])
    p /= p.sum()
    margin = INF
    if top_p < 1:
        before = np.concatenate([[0.0], np.cumsum(p)[:-1]])
        margin = np.abs(before - top_p).min()
        p = p[: np.count_nonzero(before < top_p)]
    if min_p > 0:
        margin = min(margin, np.abs(p / p[0] - min_p).min())
        p = p[: np.count_nonzero(p >= min_p * p[0])]
    result = np.zeros(len(x))
    result[ranked[: len(p)]] = p / p.sum()
    return result, margin


def weights(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    options = (f(x) for f, x in zip(DTYPES, (temperature, top_k, top_p, min_p), strict=True))
    return np.asarray(jitted_filter(jnp.asarray(logits, jnp.float32), *options))


def support(logits, **options):
    return np.flatnonzero(weights(logits, **options) > -INF).tolist()


def draw(logits, seeds, steps=None, **options):
    params = [SamplingParams(seed=int(s), **options) for s in seeds]
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (len(params), len(logits)))
    steps = jnp.zeros(len(params), jnp.int32) if steps is None else jnp.asarray(steps)
    return np.asarray(jitted_sample(rows, SamplingArrays.of(params), steps))


def test_filters_against_the_oracle():
    rng = np.random.default_rng(0)
    decided = 0
    for v, temperature, top_k, top_p, min_p in itertools.product(
        (1, 2, 37), (0.3, 1.0, 2.5), (0, 1, 5), (0.1, 0.7, 1.0), (0.0, 0.2)
    ):
        logits = (rng.standard_normal(v) * 2).round(1).astype(np.float32)
        logits[rng.random(v) < 0.1] = -INF
        logits[rng.integers(v)] = 1.0
        options = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        expected, margin = oracle(logits, **options)
        if margin > 1e-6:
            decided += 1
            assert support(logits, **options) == np.flatnonzero(expected).tolist(), options
            actual = np.exp(weights(logits, **options))
            actual /= actual.sum()
            np.testing.assert_allclose(actual, expected, atol=1e-6)
    assert decided > 140


TIES = [0.0, 1.0, 1.0, -1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 2, 4]),
        ({"top_k": 5}, [0, 1, 2, 4, 5]),
        ({"top_k": 6}, [0, 1, 2, 3, 4, 5]),
        ({"top_k": 60}, [0, 1, 2, 3, 4, 5]),
        ({"min_p": 1.0}, [1, 2, 4, 5]),
        ({"top_k": 4, "top_p": 0.5}, [1, 2]),
        ({"top_k": 4, "top_p": 0.500001}, [1, 2, 4]),
        ({"top_k": 4, "top_p": 0.25}, [1]),
        ({"top_p": 1e-30}, [1]),
        ({"top_k": 2, "min_p": 1.0}, [1, 2]),
    ],
)
def test_ties_at_the_threshold_go_to_the_lower_id(options, expected):
    assert support(TIES, **options) == expected


def test_negative_zero_ties_with_zero():
    assert support([-1.0, -0.0, 0.0], top_k=1) == [1]
    assert support([-1.0, 0.0, -0.0], top_k=1) == [1]
    assert greedy(jnp.array([-1.0, -0.0, 0.0])) == 1


def test_each_filter_sees_what_the_ones_before_left():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert support(logits, top_p=0.55) == [0, 1]
    assert support(logits, top_k=2, top_p=0.55) == [0]
    assert support(logits, temperature=100.0, top_p=0.55) == [0, 1, 2]
    assert support(logits, min_p=0.6) == [0, 1]
    assert support(logits, temperature=0.5, min_p=0.6) == [0]


def test_defaults_keep_every_finite_token():
    assert support([0.0, -80.0, -200.0, -INF, NAN]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([NAN, 1.0, NAN], 1),
        ([-INF, NAN, -5.0], 2),
        ([0.0, INF, 5.0, INF], 1),
        ([NAN, NAN], 0),
        ([-INF, -INF], 0),
        ([2.0, 3.0, 3.0], 1),
        ([7.0], 0),
    ],
)
def test_odd_logits(logits, expected):
    assert greedy(jnp.array(logits)) == expected
    assert draw(logits, [3], temperature=0.0).tolist() == [expected]
    assert draw(logits, [3], temperature=1.0, top_k=1).tolist() == [expected]
    assert draw(logits, [3], temperature=1e-42).tolist() == [expected]


def test_nothing_but_minus_infinity_is_token_0():
    assert draw([-INF, NAN, -INF], range(50), temperature=1.0).tolist() == [0] * 50


def test_tokens_outside_the_support_are_never_drawn():
    drawn = draw([NAN, 1.0, -INF, 0.9, 0.8], range(400), temperature=5.0, top_k=2)
    assert set(drawn.tolist()) == {1, 3}


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 1.5, "top_k": 4},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 2.0, "min_p": 0.4},
    ],
)
def test_distribution(options):
    """Chi-square against the oracle; 20.5 is the 0.1 % point of 5 degrees of freedom."""
    logits = np.array([0.3, 1.2, -0.5, 0.0, 2.0, -1.0])
    expected, margin = oracle(logits, **options)
    assert margin > 1e-3
    n = 4000
    kept = expected > 0
    for drawn in (
        draw(logits, np.arange(n), **options),
        draw(logits, np.full(n, 5), steps=np.arange(n), **options),
    ):
        count = np.bincount(drawn, minlength=6)
        assert count[~kept].sum() == 0
        chi_square = ((count - n * expected)[kept] ** 2 / (n * expected)[kept]).sum()
        assert chi_square < 20.5


def test_a_row_does_not_depend_on_the_others():
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.standard_normal((6, 50)), jnp.float32)
    params = [
        SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m, seed=s)
        for t, k, p, m, s in [
            (1.0, 0, 1.0, 0.0, 1),
            (0.0, 0, 1.0, 0.0, 2),
            (0.7, 5, 1.0, 0.0, 3),
            (1.3, 0, 0.9, 0.0, 2**32 - 1),
            (1.0, 0, 1.0, 0.1, 5),
            (1.0, 0, 1.0, 0.0, 1),
        ]
    ]
    steps = np.array([0, 1, 2, 3, 4, 9], np.int32)
    every = np.asarray(jitted_sample(logits, SamplingArrays.of(params), jnp.asarray(steps)))
    order = np.array([3, 1, 5, 0, 2, 4])
    shuffled = jitted_sample(
        logits[order], SamplingArrays.of([params[i] for i in order]), jnp.asarray(steps[order])
    )
    assert np.array_equal(every[order], shuffled)
    for i, p in enumerate(params):
        one = slice(i, i + 1)
        alone = jitted_sample(logits[one], SamplingArrays.of([p]), jnp.asarray(steps[one]))
        assert alone[0] == every[i]
    assert every[1] == logits[1].argmax()


def test_seed_and_step_decide():
    logits = np.zeros(1000)
    assert len(set(draw(logits, range(20), temperature=1.0).tolist())) > 15
    by_step = draw(logits, [7] * 20, steps=np.arange(20), temperature=1.0)
    assert len(set(by_step.tolist())) > 15
    assert np.array_equal(by_step, draw(logits, [7] * 20, steps=np.arange(20), temperature=1.0))


def test_options_do_not_recompile():
    step = jax.jit(lambda *args: sample(*args))
    logits = jnp.zeros((2, 9))
    for params in (
        SamplingParams(),
        SamplingParams(temperature=1.0, top_k=3, seed=4),
        SamplingParams(temperature=0.1, top_p=0.5, min_p=0.5),
    ):
        step(logits, SamplingArrays.of([params, SamplingParams()]), jnp.zeros(2, jnp.int32))
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", NAN),
        ("temperature", INF),
        ("top_k", -1),
        ("top_k", 2**31),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", NAN),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("seed", -1),
        ("seed", 2**32),
        ("max_new_tokens", 0),
        ("stop", ""),
        ("stop", ("a", "")),
        ("stop_token_ids", (-1,)),
    ],
)
def test_a_wrong_option_is_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}: got .*, expected "):
        SamplingParams(**{field: value})


def test_one_stop_string_may_stand_alone():
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=["ab", "c"]).stop == ("ab", "c")
