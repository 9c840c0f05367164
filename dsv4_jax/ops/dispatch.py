"""Which of an operation's implementations runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax

import dsv4_ffi
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
            if they say nothing, for the fastest that supports these arguments where JAX's default
            device is a CUDA device, and "xla" where it is not. Nothing else is traced: a step
            would take several times as long to trace with all references in it.
        implementations: fastest first; among them "xla", which supports everything and is defined
            in the operation's module. Each is called as f(*arrays, **static); a kernel raises
            NotImplementedError, with the reason, for what it does not support.
        arrays: pytrees of arrays.
        static: what is known when the program is traced.

    Raises:
        ValueError: there is no implementation of that name.
        NotImplementedError: the one asked for by name does not support the arguments.
    """
    if (observer := _observer.get()) is not None:
        observer(implementations, arrays, static)
        with observed(None):
            return dispatch(implementation, implementations, *arrays, **static)
    if implementation is None:
        operation = operation_name(implementations)
        implementation = kernels.current().implementation(operation, implementations)
    if implementation is not None:
        if implementation not in implementations:
            raise ValueError(
                f"implementation: got {implementation!r}, expected one of "
                f"{', '.join(map(repr, implementations))} or None"
            )
        return implementations[implementation](*arrays, **static)
    if dsv4_ffi.platform() == "cuda":
        for function in implementations.values():
            with suppress(NotImplementedError):
                return function(*arrays, **static)
    return implementations["xla"](*arrays, **static)


def differentiable(kernel: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` with the derivatives of `reference`, a function of the same arrays."""
    function = jax.custom_jvp(kernel)

    @function.defjvp
    def _(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        return function(*primals), jax.jvp(reference, primals, tangents)[1]

    return function


def operation_name(implementations: Mapping[str, Callable[..., Any]]) -> str:
    """The module that defines the operation."""
    function = implementations["xla"]
    while isinstance(function, partial):
        function = function.func
    return function.__module__.rpartition(".")[2]


Observer = Callable[[Mapping[str, Callable[..., Any]], tuple[Any, ...], dict[str, Any]], None]

_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


@contextmanager
def observed(observer: Observer | None) -> Iterator[None]:
    """Shows `observer` every operation called inside, but not what operations call themselves.

    It gets the implementations, the arrays and the static arguments.
    """
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)
