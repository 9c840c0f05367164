"""benchmarks.harness: what it computes from times, and what it writes."""

import json
import time

import jax
import jax.numpy as jnp
import pytest

from benchmarks import harness


def test_slope_is_the_median_difference_per_extra_call():
    assert harness.slope([(100, 600), (200, 600), (100, 9000)], 100) == 5.0


def test_copies_fill_twice_the_cache():
    assert harness.num_copies(harness.L2_BYTES) == 3
    assert harness.num_copies(2 * harness.L2_BYTES + 1) == 1
    assert harness.num_copies(64) == harness.MANY_CALLS


def test_floor():
    assert harness.memory_floor_us(4.59e9) == pytest.approx(1000)


def test_table():
    rows = [{"rows": 16, "us": 2.3456}, {"rows": 1024, "us": 1234.5, "note": "x"}]
    assert harness.table(rows) == ("rows    us  note\n  16  2.35     -\n1024  1234     x")


def test_results_are_dated_and_complete(tmp_path, capsys):
    path = harness.write_results("test", [{"us": 1.5}], tmp_path / "new")
    result = json.loads(path.read_text())
    assert path.name == f"{result['date']}-cpu-test.json"
    assert result["rows"] == [{"us": 1.5}]
    assert set(result) == {"date", "device", "jax", "python", "command", "rows"}
    assert "1.5" in capsys.readouterr().out


def test_programs_hold_every_call():
    x = jnp.arange(4.0)
    for cold in ((), (1,)):
        variants = harness._variants((x, x), cold)
        args_of_calls = [variants[i % len(variants)] for i in range(5)]
        program = harness._program(lambda x, y: jnp.sort(x + y), (), args_of_calls)
        assert program.as_text().count(" sort(") == 5


def test_carried_results_replace_arguments():
    program = harness._program(lambda n, x: (n + x, n), (jnp.int32(3),), [(jnp.int32(2),)] * 4)
    state, results = program((jnp.int32(3),), [(jnp.int32(2),)] * 4)
    assert state == (11,)
    assert results == [(3,), (5,), (7,), (9,)]


def test_the_clock_runs_in_nanoseconds():
    before = harness._clock(jnp.zeros(2, jnp.uint32))
    start = harness._nanoseconds(before)
    time.sleep(0.01)
    assert 1e7 <= harness._nanoseconds(harness._clock(before)) - start < 1e10


def test_device_time_of_slow_calls_is_above_that_of_quick_ones(monkeypatch):
    small = dict(FLUSH_BYTES=1 << 10, FEW_CALLS=1, MANY_CALLS=3, REPEATS=3, WARM_UP_S=0)
    for name, value in small.items():
        monkeypatch.setattr(harness, name, value)

    def spin(count, x):
        return jax.lax.fori_loop(0, count, lambda i, x: jnp.sin(x) + i, x)

    x = jnp.ones(1000)
    quick = harness.device_time_us(spin, jnp.int32(1), x, cold=(1,))
    slow = harness.device_time_us(spin, jnp.int32(1000), x, cold=(1,))
    assert slow > quick
