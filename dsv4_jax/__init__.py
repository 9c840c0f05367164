"""DeepSeek-V4 inference in JAX.

model = dsv4_jax.load("mini")
print(model.generate("def main("))
"""

import jax as _jax

_OLDEST, _NEWEST = (0, 10, 2), (0, 12)
if not _jax.__version_info__ >= _OLDEST or _jax.__version_info__[:2] > _NEWEST:
    raise ImportError(f"dsv4_jax: got jax {_jax.__version__}, expected 0.10.2 to 0.12")

from dsv4_jax.cache.allocator import OutOfBlocksError
from dsv4_jax.cache.manager import Cache, CacheUnusableError, OutOfSlotsError
from dsv4_jax.checkpoint.errors import CheckpointError
from dsv4_jax.compilation import compiler_options
from dsv4_jax.config import Config
from dsv4_jax.kernels import Kernels
from dsv4_jax.model import Model, load
from dsv4_jax.numerics import Numerics
from dsv4_jax.transformer import (
    Capture,
    decode_step,
    draft_logits,
    forward,
    initialize,
    prefill_step,
)

__all__ = [
    "Cache",
    "CacheUnusableError",
    "Capture",
    "CheckpointError",
    "Config",
    "Kernels",
    "Model",
    "Numerics",
    "OutOfBlocksError",
    "OutOfSlotsError",
    "compiler_options",
    "decode_step",
    "draft_logits",
    "forward",
    "initialize",
    "load",
    "prefill_step",
]
