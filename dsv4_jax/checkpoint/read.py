"""Streams a checkpoint into arrays, one parameter at a time."""

import io
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import jax
import numpy as np

from dsv4_jax.checkpoint import names, values
from dsv4_jax.checkpoint.errors import CheckpointError
from dsv4_jax.checkpoint.plan import Leaf, make_plan
from dsv4_jax.checkpoint.shards import NUMPY_DTYPES, Shards
from dsv4_jax.config import Config

Place = Callable[[names.Path, np.ndarray], jax.Array]


@dataclass(frozen=True)
class Checkpoint:
    """What `read` returns.

    Attributes:
        params: every array by its parameter path, as stored: float32 or bfloat16; codes and
            exponent bytes uint8, E4M3 codes and scales float8_e4m3fn; expert ids int32. Experts
            are stacked [E, ...].
        weight_formats: of each matrix that may be packed, by its path without "weight".
        has_mtp: False when the config counts no MTP block, or when the checkpoint has none that
            fits: Hugging Face's drop it, DSpark builds have draft stages of another kind.
    """

    params: dict[names.Path, jax.Array]
    weight_formats: dict[names.Path, names.WeightFormat]
    has_mtp: bool


def read(
    directory: str | Path,
    config: Config,
    *,
    place: Place | None = None,
    check: Callable[[Sequence[Leaf]], None] | None = None,
    progress: bool = False,
) -> Checkpoint:
    """Reads and checks every tensor of a checkpoint.

    Host memory beyond the placed arrays: the parameter that is being read.

    Args:
        directory: holds the safetensors files, with official or Hugging Face names.
        config: the sizes they must have.
        place: puts a parameter, given as a 64-byte aligned NumPy array that is not used again, on
            its devices; by default on JAX's default device, without a copy on CPU.
        check: sees all parameters before the first one is read, and may raise.
        progress: draw a progress bar on stderr.

    Raises:
        CheckpointError: listing missing, surplus, misshapen and mistyped tensors, experts of one
            stack in different formats, NaN scales and expert ids outside [0, E).
    """
    place = place or (lambda path, array: jax.device_put(array))
    params: dict[names.Path, jax.Array] = {}
    findings: list[str] = []
    with Shards(directory) as shards:
        plan = make_plan(shards.tensors, config)
        if plan.findings:
            raise CheckpointError(directory, plan.findings)
        if check is not None:
            check(plan.leaves)
        with click.progressbar(
            length=sum(leaf.num_bytes for leaf in plan.leaves),
            label="Loading",
            file=sys.stderr if progress else io.StringIO(),
        ) as bar:
            for leaf in plan.leaves:
                if not findings or leaf.is_scale or leaf.is_expert_table:
                    array, problems = read_leaf(shards, leaf, config.n_routed_experts)
                    findings += problems
                    if not findings:
                        path = leaf.part.path
                        params[path] = jax.block_until_ready(place(path, array))
                    del array  # before memory for the next one is taken
                bar.update(leaf.num_bytes)
    if findings:
        raise CheckpointError(directory, findings)
    return Checkpoint(params, plan.weight_formats, plan.has_mtp)


def read_leaf(shards: Shards, leaf: Leaf, num_experts: int) -> tuple[np.ndarray, list[str]]:
    out = _aligned_empty(leaf.shape, leaf.dtype)
    rows = out.reshape(len(leaf.sources), *leaf.part.shape)
    findings = []
    for i, source in enumerate(leaf.sources):
        row = rows[i : i + 1]
        stored_dtype = NUMPY_DTYPES[source.dtype]
        stored = row if stored_dtype == leaf.dtype else np.empty(row.shape, stored_dtype)
        shards.read_into(stored, source.tensor, source.start)
        if found := values.problem(leaf, stored, num_experts):
            findings.append(f"{source.tensor}: {found}")
        elif stored is not row:
            row[...] = values.converted(leaf, stored)
    return out, findings


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that XLA's CPU client uses as it is; less aligned arrays are copied."""
    num_bytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(num_bytes + 63, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + num_bytes].view(dtype).reshape(shape)
