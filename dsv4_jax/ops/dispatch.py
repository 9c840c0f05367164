"""Which of an operation's implementations runs."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import jax

from dsv4_jax import kernels


def dispatch(
    implementation: str | None,
    implementations: Mapping[str, Callable[..., Any]],
    *arrays: Any,
    **static: Any,
) -> Any:
    """Runs one of several functions of the same contract.

    Args:
        implementation: a name, for exactly that one; None for what the model's `Kernels` say, and
            if they say nothing, for the fastest that supports these arguments where the program
            runs: kernels on CUDA devices, "xla" elsewhere.
        implementations: fastest first; among them "xla", which supports everything and is defined
            in the operation's module. Each is called as f(*arrays, **static); a kernel raises
            NotImplementedError, with the reason, for what it does not support.
        arrays: pytrees of arrays.
        static: what is known when the program is traced.

    Raises:
        ValueError: there is no implementation of that name.
        NotImplementedError: the one asked for by name does not support the arguments.
    """
    if implementation is None:
        operation = _module(implementations["xla"])
        implementation = kernels.current().implementation(operation, implementations)
    if implementation is not None:
        if implementation not in implementations:
            raise ValueError(
                f"implementation: got {implementation!r}, expected one of "
                f"{', '.join(map(repr, implementations))} or None"
            )
        return implementations[implementation](*arrays, **static)
    reference = partial(implementations["xla"], **static)
    for name, function in implementations.items():
        if name == "xla":
            break
        kernel = partial(function, **static)
        with suppress(NotImplementedError):
            return jax.lax.platform_dependent(*arrays, cuda=kernel, default=reference)
    return reference(*arrays)


def _module(function: Callable[..., Any]) -> str:
    while isinstance(function, partial):
        function = function.func
    return function.__module__.rpartition(".")[2]
