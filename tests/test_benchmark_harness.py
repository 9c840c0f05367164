"""benchmarks.harness: what it writes."""

import json

import pytest

from benchmarks import harness


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
