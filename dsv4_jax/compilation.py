"""How programs are compiled: XLA's options, and where compiled programs are kept."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

# Every kind of work that a loop of steps consists of, the loop itself too: one graph for all steps.
_COMMAND_BUFFER = "CONDITIONAL,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,FUSION,WHILE"


def compiler_options() -> dict[str, str | int]:
    """Options for `jax.jit(..., compiler_options=)` under which steps become CUDA graphs.

    The library's own programs have them; a program of yours that contains a step should too.
    Empty where JAX's default device is no NVIDIA GPU.
    """
    if jax.default_backend() != "gpu":
        return {}
    return {
        "xla_gpu_enable_command_buffer": _COMMAND_BUFFER,
        "xla_gpu_graph_min_graph_size": 1,
        # Kernels that do not wait for each other run side by side.
        "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
    }


def without_graphs() -> dict[str, str | int]:
    """Options under which nothing becomes a CUDA graph, for profiles by instruction."""
    return {"xla_gpu_enable_command_buffer": ""} if jax.default_backend() == "gpu" else {}


class Program:
    """`jax.jit(function, **options)` with `compiler_options()`.

    These are asked for at the first call, not before: they start JAX's backend, which a program
    that imports this library may still want to configure.
    """

    def __init__(self, function: Callable[..., Any], **options: Any):
        self._function, self._options = function, options

    @cached_property
    def _jitted(self) -> Any:
        return jax.jit(self._function, compiler_options=compiler_options(), **self._options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._jitted(*args, **kwargs)

    def num_compiled(self) -> int:
        """For how many shapes and models it was compiled."""
        return self._jitted._cache_size()


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
