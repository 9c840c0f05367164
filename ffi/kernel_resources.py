"""Registers, shared memory and spills of the compiled kernels: kernel_resources.py BUILD/kernels.

Reads what ptxas reported; exits with 1 if a kernel spills registers to memory.
"""

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


class Resources(NamedTuple):
    """Of one kernel for one architecture; sizes in bytes, shared memory without the dynamic."""

    kernel: str
    architecture: str
    registers: int
    shared_bytes: int
    spill_bytes: int


def parse(log: str) -> list[Resources]:
    """The kernels of a ptxas -v report."""
    entries = list(_ENTRY.finditer(log))
    found = []
    for entry, following in itertools.zip_longest(entries, entries[1:]):
        # Device functions that are called are reported too, after the kernel's name.
        text = log[entry.end() : following.start() if following else len(log)]
        spills = sum(int(size) for pair in _SPILLS.findall(text) for size in pair)
        registers = max(map(int, _REGISTERS.findall(text)))
        shared = max(map(int, _SHARED.findall(text)), default=0)
        found.append(Resources(entry[1], entry[2], registers, shared, spills))
    return found


def demangled(names: list[str]) -> list[str]:
    """The names as in C++ without parameters, where c++filt is at hand."""
    if shutil.which("c++filt") is None or not names:
        return names
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    return [_short(name) for name in text.splitlines()]


def _short(name: str) -> str:
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:i]
    return name


def main(directory: Path) -> int:
    found = [kernel for log in sorted(directory.glob("*/log")) for kernel in parse(log.read_text())]
    if not found:
        print(f"no kernels under {directory}: the CUDA library was not built", file=sys.stderr)
        return 1
    print("registers  shared bytes  spilled bytes  kernel")
    names = demangled([kernel.kernel for kernel in found])
    for name, kernel in sorted(zip(names, found, strict=True)):
        print(
            f"{kernel.registers:9}  {kernel.shared_bytes:12}  {kernel.spill_bytes:13}  "
            f"{kernel.architecture:7} {name}"
        )
    spilling = sum(kernel.spill_bytes > 0 for kernel in found)
    print(f"{len(found)} kernels, {spilling} with spills")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
