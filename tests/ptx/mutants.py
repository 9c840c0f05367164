"""Mistakes planted in the source of the NVFP4 kernel: do tests on the emulator notice them?"""

import functools
import re

from tests.ptx import nvfp4_gemm
from tests.ptx.emulator import Deadlock, MemoryFault

SEEDS = range(8)
SOURCES = (
    "mbarrier.cuh",
    "tma.cuh",
    "tcgen05.cuh",
    "cluster_sums_sm100.cuh",
    "nvfp4_gemm_sm100.cuh",
)


@functools.cache
def _mutant(tile_tokens: int, old: str, new: str):
    sources = {name: (nvfp4_gemm.FFI / "cuda" / name).read_text() for name in SOURCES}
    assert sum(text.count(old) for text in sources.values()) == 1, f"{old!r} is not unique"
    changed = [(name, text.replace(old, new)) for name, text in sources.items() if old in text]
    return nvfp4_gemm.compiled(tile_tokens, tuple(changed))


def survives(problem, tile_tokens: int, old: str, new: str, **launch) -> bool:
    kernel = _mutant(tile_tokens, old, new)
    for seed in SEEDS:
        try:
            out = nvfp4_gemm.run(problem, tile_tokens, kernel=kernel, seed=seed, **launch)
        except (Deadlock, MemoryFault, RuntimeError, NotImplementedError):
            return False
        wrong, _ = nvfp4_gemm.difference(problem, out)
        if wrong > 1e-3:
            return False
    return True


def ids(mutants):
    return [re.sub(r"\W+", "-", name) for name, _, _ in mutants]
