"""How programs are compiled: XLA's options, and where compiled programs are kept."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

# Every kind of work that a step consists of, so that a step is launched as few graphs. Loops stay
# on the host: their bodies are graphs.
_COMMAND_BUFFER = "CONDITIONAL,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,FUSION"


def compiler_options() -> dict[str, str | int]:
    """Options for `jax.jit(..., compiler_options=)` under which decode steps become CUDA graphs.

    `dsv4 bench` compiles with them; the library's other programs have XLA's defaults. Empty where
    JAX's default device is no NVIDIA GPU.
    """
    if jax.default_backend() != "gpu":
        return {}
    return {"xla_gpu_enable_command_buffer": _COMMAND_BUFFER, "xla_gpu_graph_min_graph_size": 1}


def without_graphs() -> dict[str, str | int]:
    """Options under which nothing becomes a CUDA graph, for profiles by instruction."""
    return {"xla_gpu_enable_command_buffer": ""} if jax.default_backend() == "gpu" else {}


def cache_directory() -> Path:
    """Where the command line keeps compiled programs: $DSV4_CACHE_DIR, else under the user's cache.

    That is $XDG_CACHE_HOME/dsv4-jax, by default ~/.cache/dsv4-jax.
    """
    if chosen := os.environ.get("DSV4_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv4-jax"


def keep_compiled_programs(directory: Path) -> None:
    """Makes JAX keep compiled programs, and XLA its autotuning results, from run to run.

    A directory that JAX was already told of (JAX_COMPILATION_CACHE_DIR) stays.
    """
    if _directory() is None:
        _keep_in(str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@contextmanager
def empty_program_cache() -> Iterator[None]:
    """For its duration compiled programs are kept in a directory that is empty at first."""
    before = _directory()
    with tempfile.TemporaryDirectory() as directory:
        _keep_in(directory)
        try:
            yield
        finally:
            _keep_in(before)


def _directory() -> str | None:
    found: str | None = jax.config.values["jax_compilation_cache_dir"]
    return found


def _keep_in(directory: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", directory)
    compilation_cache.reset_cache()
