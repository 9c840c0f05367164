"""dsv4 info --kernels, and the report of compiled kernels' resources."""

import importlib.util
import re
import sys
from pathlib import Path

import jax
import pytest

import dsv4_ffi
from dsv4_jax import cli, kernel_info

REPORT = Path(__file__).parents[1] / "ffi" / "kernel_resources.py"


def test_what_runs_and_why_the_rest_does_not(monkeypatch):
    reasons = {"cpu": None, "cuda": "there is no NVIDIA driver (libcuda.so.1)"}
    monkeypatch.setattr(dsv4_ffi, "missing", reasons.get)
    monkeypatch.setattr(kernel_info, "pallas_names", lambda: ["kernel_of_pallas"])
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    lines = kernel_info.render().splitlines()
    row = next(line for line in lines if line.startswith("nvfp4_quantize "))
    assert row.split()[1] == "yes"
    assert row.split()[2] in ("off", "-")
    assert next(line for line in lines if line.startswith("kernel_of_pallas")).split()[1:] == [
        "-",
        "-",
        "off",
    ]
    assert "CUDA library: off; there is no NVIDIA driver (libcuda.so.1)" in lines
    assert any(line.startswith("Pallas kernels: off; they need jax 0.11") for line in lines)
    assert any(line.startswith("CPU library: on; ") for line in lines)
    assert re.search(r"Kernels\(\.\.\.\) chooses for: .*\bgemm,", " ".join(lines))


def test_pallas_without_a_gpu(monkeypatch):
    def none(platform):
        raise RuntimeError

    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    monkeypatch.setattr(jax, "devices", none)
    assert "finds no CUDA device" in kernel_info.pallas_obstacle()
    monkeypatch.setattr(jax, "devices", lambda platform: [object()])
    assert kernel_info.pallas_obstacle() is None


def test_the_command_needs_no_model(monkeypatch, capsys):
    monkeypatch.setattr(kernel_info, "render", lambda: "the table")
    monkeypatch.setattr(sys, "argv", ["dsv4", "info", "--kernels"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert capsys.readouterr().out == "the table\n"


LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90a'
ptxas info    : Function properties for first
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 62 registers, used 1 barriers, 128 bytes smem
ptxas info    : Compiling entry function 'second' for 'sm_100f'
ptxas info    : Function properties for second
    104 bytes stack frame, 112 bytes spill stores, 196 bytes spill loads
ptxas info    : Function properties for called_by_second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 104 bytes cumulative stack size
"""


@pytest.fixture
def report(monkeypatch):
    spec = importlib.util.spec_from_file_location("kernel_resources", REPORT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    return module


def test_resources_of_each_kernel(report):
    assert report.parse(LOG) == [
        ("first", "sm_90a", 62, 128, 0),
        ("second", "sm_100f", 255, 0, 308),
    ]


def test_spills_fail_the_report(report, tmp_path, capsys):
    (tmp_path / "one").mkdir()
    log = tmp_path / "one" / "log"
    log.write_text(LOG)
    assert report.main(tmp_path) == 1
    assert "2 kernels, 1 with spills" in capsys.readouterr().out
    log.write_text(LOG.replace("112", "0").replace("196", "0"))
    assert report.main(tmp_path) == 0


def test_no_kernels_fail_the_report(report, tmp_path):
    assert report.main(tmp_path) == 1


def test_names_without_parameters(report):
    name = "void dsv4::(anonymous namespace)::Kernel<float, (dsv4::(anonymous namespace)::S)2>(int)"
    assert report._short(name) == "dsv4::Kernel<float, (dsv4::S)2>"
