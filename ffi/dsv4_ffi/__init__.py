"""The compiled kernels and CPU handlers of DeepSeek-V4's operations, called through XLA's FFI."""

from collections.abc import Mapping
from typing import Any

import jax

from dsv4_ffi.library import load, missing

__all__ = ["call", "missing", "platform"]


def call(
    name: str,
    result_shape_dtypes: Any,
    *arrays: jax.Array,
    aliases: Mapping[int, int] | None = None,
    vmap_method: str = "sequential",
    **attributes: Any,
) -> Any:
    """Calls the handler "dsv4_<name>" on the default device's platform, CPU or CUDA.

    Args:
        name: of `targets.CALLS`.
        result_shape_dtypes: a jax.ShapeDtypeStruct, or a sequence of them for a list of results.
        arrays: the operands, row-major.
        aliases: {operand: result} that share memory.
        vmap_method: as of jax.ffi.ffi_call.
        attributes: static values; numbers as NumPy scalars of the handler's type.

    Raises:
        NotImplementedError: no usable library holds the call; says why.
    """
    if (reason := _obstacle(name)) is not None:
        raise NotImplementedError(f"{name}: {reason}")
    results = jax.ffi.ffi_call(
        f"dsv4_{name}",
        result_shape_dtypes,
        vmap_method=vmap_method,
        input_output_aliases=dict(aliases or {}),
    )(*arrays, **attributes)
    # Within shard_map, results differ from shard to shard where an operand does.
    varying = frozenset[str]().union(*map(_varying, arrays))
    return jax.tree.map(lambda result: _vary(result, varying), results)


def _varying(x: jax.Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def _vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing_axes = tuple(axes - _varying(x))
    return jax.lax.pcast(x, missing_axes, to="varying") if missing_axes else x


def _obstacle(name: str) -> str | None:
    found_platform = platform()
    if found_platform not in ("cpu", "cuda"):
        return f"there are handlers for CPUs and CUDA devices, not for {found_platform}"
    if (reason := missing(found_platform)) is not None:
        return reason
    # Beside a GPU, arrays may also be put on the CPU device.
    load("cpu")
    found = load(found_platform)
    return None if name in found.calls else f"{found.path} does not hold it"


def platform() -> str:
    """Of JAX's default device: "cpu", "cuda" or another."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    name = getattr(device, "platform", device) or jax.default_backend()
    return "cuda" if name == "gpu" else name
