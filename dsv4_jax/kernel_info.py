"""What `dsv4 info --kernels` prints: which kernels can run here, and why the others cannot."""

import pkgutil
import textwrap
from collections.abc import Iterable

import jax

import dsv4_ffi
import pallas_kernels
from dsv4_ffi.library import load
from dsv4_ffi.targets import CALLS
from dsv4_jax.kernels import operations

PALLAS_SINCE = (0, 11)
_LABELS = {"cpu": "CPU library", "cuda": "CUDA library", "pallas": "Pallas kernels"}


def render() -> str:
    """A table of calls and kernels by platform, the state of each, and what `Kernels` names."""
    reasons = {
        "cpu": dsv4_ffi.missing("cpu"),
        "cuda": dsv4_ffi.missing("cuda"),
        "pallas": pallas_obstacle(),
    }
    held = {
        "cpu": load("cpu").calls,
        "cuda": load("cuda").calls,
        "pallas": frozenset(pallas_names()),
    }
    names = sorted({*CALLS, *held["pallas"]})
    width = max(map(len, names))
    lines = [f"{'kernel':{width}}  CPU   CUDA  Pallas"]
    for name in names:
        cells = (_cell(name, held[column], reasons[column]) for column in ("cpu", "cuda", "pallas"))
        lines.append(f"{name:{width}}  {'  '.join(f'{cell:4}' for cell in cells)}".rstrip())
    lines += ["", "- there is none, off: not usable here", ""]
    for column, label in _LABELS.items():
        state = _state(column, reasons[column])
        lines += textwrap.wrap(f"{label}: {state}", 100, subsequent_indent="  ")
    chosen = f"Operations that kernels=Kernels(...) chooses for: {', '.join(operations())}"
    lines += textwrap.wrap(chosen, 100, subsequent_indent="  ")
    return "\n".join(lines)


def pallas_names() -> Iterable[str]:
    """The modules of pallas_kernels."""
    return (module.name for module in pkgutil.iter_modules(pallas_kernels.__path__))


def pallas_obstacle() -> str | None:
    """Why the Pallas kernels cannot run on a GPU here; None if they can."""
    if jax.__version_info__ < PALLAS_SINCE:
        needed = ".".join(map(str, PALLAS_SINCE))
        return f"they need jax {needed} or later, this is {jax.__version__}"
    try:
        jax.devices("cuda")
    except RuntimeError:
        return f"jax {jax.__version__} finds no CUDA device"
    return None


def _cell(name: str, held: frozenset[str], reason: str | None) -> str:
    if name not in held:
        return "-"
    return "yes" if reason is None else "off"


def _state(column: str, reason: str | None) -> str:
    if reason is not None:
        return f"off; {reason}"
    return "on" if column == "pallas" else f"on; {load(column).path}"
