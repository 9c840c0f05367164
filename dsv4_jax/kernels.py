"""Which implementation of each operation a model runs."""

import importlib
import pkgutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

import dsv4_ffi

IMPLEMENTATIONS = ("xla", "ffi", "pallas")


@cache
def operations() -> tuple[str, ...]:
    """The modules of `dsv4_jax.ops` that choose between implementations."""
    from dsv4_jax import ops

    names = [module.name for module in pkgutil.iter_modules(ops.__path__)]
    modules = {name: importlib.import_module(f"{ops.__name__}.{name}") for name in names}
    choosing = (name for name, module in modules.items() if name != "dispatch")
    return tuple(name for name in choosing if hasattr(modules[name], "dispatch"))


@dataclass(frozen=True, init=False)
class Kernels:
    """A choice for every operation, part of a model like its `Numerics`.

    `Kernels.FASTEST` takes what is fastest and supported on the device, `Kernels.XLA` the reference
    everywhere, `Kernels("xla", gemm="ffi")` is a mix. An operation named by keyword runs
    exactly that implementation, or the model raises; so do those that have an implementation of
    the `default`'s name, others are chosen automatically. What an operation does inside (a top-k
    in the indexer) is an operation of its own. Linears and routed experts run "gemm" and
    "experts" on weights that `load` has put into the kernels' order; float32 weights stay in XLA.

    Attributes:
        default: "xla", "ffi", "pallas" or None.
        chosen: (operation, implementation) of those that differ.

    Raises:
        ValueError: an unknown operation or default.
    """

    default: str | None
    chosen: tuple[tuple[str, str], ...]

    FASTEST: ClassVar["Kernels"]
    XLA: ClassVar["Kernels"]

    def __init__(self, default: str | None = None, **chosen: str):
        if default not in (*IMPLEMENTATIONS, None):
            raise ValueError(
                f"kernels: got {default!r}, expected one of {', '.join(IMPLEMENTATIONS)} or None"
            )
        for name in chosen:
            if name not in operations():
                raise ValueError(
                    f"kernels: got operation {name!r}, expected one of {', '.join(operations())}"
                )
        object.__setattr__(self, "default", default)
        object.__setattr__(self, "chosen", tuple(sorted(chosen.items())))

    def implementation(self, operation: str, available: Collection[str]) -> str | None:
        """The name of what runs, None for the fastest; `available` are those the operation has."""
        default = self.default if self.default in available else None
        return dict(self.chosen).get(operation, default)

    def take_weights(self, operation: str, capabilities: tuple[str, ...], dtype: DTypeLike) -> bool:
        """Whether kernels, which have an order of weights of their own, run an operation here.

        Args:
            operation: one with "ffi" kernels for bfloat16.
            capabilities: how compute capabilities begin for which they are compiled.
            dtype: of the inputs.
        """
        chosen = self.implementation(operation, ("ffi", "xla"))
        if chosen is not None:
            return chosen == "ffi"
        if jax.default_backend() != "gpu" or dtype != jnp.bfloat16:
            return False
        found = jax.local_devices()[0].compute_capability
        return found.startswith(capabilities) and dsv4_ffi.missing("cuda") is None


Kernels.FASTEST = Kernels()
Kernels.XLA = Kernels("xla")

# Part of the key under which jax.jit keeps what it traced.
_current = jax.make_user_context(Kernels.FASTEST)


@contextmanager
def running(kernels: Kernels) -> Iterator[None]:
    """What operations run that are traced inside and are not told by `implementation=`."""
    with _current(kernels):
        yield


def current() -> Kernels:
    return _current.value
