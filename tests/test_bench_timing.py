"""Device times of calls within a program."""

import time

import jax
import jax.numpy as jnp

from dsv4_jax.bench import timing


def test_slope_is_the_median_difference_per_extra_call():
    assert timing.slope([(100.0, 600.0), (200.0, 600.0), (100.0, 9000.0)], 100) == 5.0


def test_copies_fill_twice_the_cache():
    assert timing.num_copies(timing.L2_BYTES) == 3
    assert timing.num_copies(2 * timing.L2_BYTES + 1) == 1
    assert timing.num_copies(64) == timing.MANY_CALLS


def test_programs_hold_every_call():
    x = jnp.arange(4.0)
    for cold in ((), (1,)):
        variants = timing._variants((x, x), cold)
        args_of_calls = [variants[i % len(variants)] for i in range(5)]
        program = timing._program(lambda x, y: jnp.sort(x + y), (), args_of_calls)
        assert program.as_text().count(" sort(") == 5


def test_carried_results_replace_arguments():
    program = timing._program(lambda n, x: (n + x, n), (jnp.int32(3),), [(jnp.int32(2),)] * 4)
    state, results = program((jnp.int32(3),), [(jnp.int32(2),)] * 4)
    assert state == (11,)
    assert results == [(3,), (5,), (7,), (9,)]


def test_the_clock_runs_in_nanoseconds():
    before = timing._clock(jnp.zeros(2, jnp.uint32))
    start = timing._nanoseconds(before)
    time.sleep(0.01)
    assert 1e7 <= timing._nanoseconds(timing._clock(before)) - start < 1e10


def test_device_time_of_slow_calls_is_above_that_of_quick_ones(monkeypatch):
    small = dict(FLUSH_BYTES=1 << 10, FEW_CALLS=1, MANY_CALLS=3, REPEATS=3, WARM_UP_S=0)
    for name, value in small.items():
        monkeypatch.setattr(timing, name, value)

    def spin(count, x):
        return jax.lax.fori_loop(0, count, lambda i, x: jnp.sin(x) + i, x)

    x = jnp.ones(1000)
    quick = timing.device_time_us(spin, jnp.int32(1), x, cold=(1,))
    slow = timing.device_time_us(spin, jnp.int32(1000), x, cold=(1,))
    assert slow > quick
