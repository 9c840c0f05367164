"""Compiler options, and where compiled programs are kept."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dsv4_jax import compilation


@pytest.fixture
def no_cache():
    before = jax.config.jax_compilation_cache_dir
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    compilation._keep_in(None)
    yield
    compilation._keep_in(before)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def test_options_are_for_gpus_only(monkeypatch):
    assert compilation.compiler_options() == {}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    options = compilation.compiler_options()
    assert {"CUSTOM_CALL", "WHILE"} <= {*options["xla_gpu_enable_command_buffer"].split(",")}
    # Whatever the backend, XLA refuses names and values that it does not know.
    for given in (options, compilation.without_graphs()):
        assert jax.jit(lambda x: x + 1, compiler_options=given)(1.0) == 2.0


def test_directory(monkeypatch):
    monkeypatch.delenv("DSV4_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert compilation.cache_directory() == Path("/caches/dsv4-jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compilation.cache_directory() == Path.home() / ".cache" / "dsv4-jax"
    monkeypatch.setenv("DSV4_CACHE_DIR", "/mine")
    assert compilation.cache_directory() == Path("/mine")


def test_a_directory_that_jax_knows_stays(no_cache, tmp_path):
    compilation.keep_compiled_programs(tmp_path / "first")
    compilation.keep_compiled_programs(tmp_path / "second")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "first")


def test_programs_are_kept(no_cache, tmp_path):
    compilation.keep_compiled_programs(tmp_path)

    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.5
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    def tripled(x):
        return 3 * x

    jax.jit(tripled).lower(jnp.ones(8)).compile()
    assert any("tripled" in file.name for file in tmp_path.iterdir())


def test_an_empty_cache_is_left_behind_by_nobody(no_cache):
    with compilation.empty_program_cache():
        inside = Path(jax.config.jax_compilation_cache_dir)
        assert inside.is_dir() and not list(inside.iterdir())
    assert not inside.exists()
    assert jax.config.jax_compilation_cache_dir is None


def test_programs_have_the_options_and_ask_for_them_when_they_first_run(monkeypatch):
    asked = []
    options = {"xla_cpu_enable_fast_min_max": True}
    monkeypatch.setattr(compilation, "compiler_options", lambda: asked.append(1) or options)
    seen = []
    jit = jax.jit
    monkeypatch.setattr(jax, "jit", lambda f, **given: seen.append(given) or jit(f, **given))
    program = compilation.Program(lambda x, n: x * n, static_argnums=1)
    assert not asked
    assert [float(program(2.0, n)) for n in (1, 2, 1)] == [2.0, 4.0, 2.0]
    assert asked == [1] and program.num_compiled() == 2
    assert seen[0] == {"compiler_options": options, "static_argnums": 1}


def test_importing_starts_no_backend():
    code = (
        "import dsv4_jax.decoding.generate, dsv4_jax.cli; from jax._src import xla_bridge as x;"
        "assert not x.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
