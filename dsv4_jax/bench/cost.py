"""Bytes that a step must move and operations it must do, by part, and how long a GPU needs."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from dsv4_jax.cache.schema import CacheSchema
from dsv4_jax.cache.storage import Storage
from dsv4_jax.config import Config
from dsv4_jax.layers.linear import Linear
from dsv4_jax.model import Model

PARTS = (
    "attention projections",
    "indexer",
    "attention",
    "hyper-connections",
    "router",
    "experts",
    "head",
    "other",
)
# What kernels do in one launch is one part: all projections of an input, all experts.
_PART_OF = {
    "attn": "attention projections",
    "hc_attn": "hyper-connections",
    "hc_ffn": "hyper-connections",
    "hc_head": "hyper-connections",
    "gate": "router",
    "experts": "experts",
    "shared_experts": "experts",
    "head": "head",
}


@dataclass(frozen=True)
class Limits:
    """What was measured on a device: bytes/s of reading, FLOP/s of BF16 products."""

    bytes_per_s: float
    flops_per_s: float


# Of the largest copies and products: a sum over 8.6 GB and a product of 8,192^3.
LIMITS = {"NVIDIA H200": Limits(4.59e12, 733e12)}


@dataclass(frozen=True)
class Cost:
    """Bytes read or written once, and floating-point operations."""

    num_bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.num_bytes + other.num_bytes, self.flops + other.flops)

    def floor_us(self, limits: Limits) -> float:
        """The longer of moving the bytes and doing the operations."""
        return 1e6 * max(self.num_bytes / limits.bytes_per_s, self.flops / limits.flops_per_s)


def part_of(path: tuple[Any, ...]) -> str:
    """The part that a parameter belongs to; the innermost module that names one decides."""
    return next((_PART_OF[name] for name in reversed(path) if name in _PART_OF), "other")


def prompt_cost(model: Model, batch: int, prompt: int, chunk: int, context: int) -> dict[str, Cost]:
    """Cost of steps of `chunk` tokens that together append `prompt` to each sequence."""
    costs = dict.fromkeys(PARTS, Cost())
    for begin in range(context, context + prompt, chunk):
        for part, cost in step_cost(model, batch, chunk, begin).items():
            costs[part] += cost
    return costs


def step_cost(model: Model, batch: int, num_tokens: int, context: int) -> dict[str, Cost]:
    """Cost of a step by part, in the order of PARTS.

    Args:
        model: gives sizes, and the bytes of each weight as it lies in memory.
        batch: sequences.
        num_tokens: new tokens of each.
        context: tokens of each sequence before the step.
    """
    config, rows = model.config, batch * num_tokens
    costs: dict[str, Cost] = defaultdict(Cost)
    modules = nnx.merge(model.graph, model.params)
    for path, linear in nnx.iter_modules(modules):
        if not isinstance(linear, Linear):
            continue
        # The head runs for the last token of a sequence only.
        inputs = batch if part_of(path) == "head" else rows
        costs[part_of(path)] += Cost(0.0, linear_flops(config, linear, inputs))
    for path, variable in nnx.to_flat_state(model.params):
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(variable))
        costs[part_of(path)] += Cost(num_bytes * share_read(config, path, rows))
    schema = CacheSchema.of(config, model.numerics, model.dtype, None)
    entry, key = schema.entries, schema.keys
    streams = 2.0 * rows * config.hc_mult * config.hidden_size * model.dtype.itemsize
    for ratio in config.layer_ratios:
        costs["attention"] += _attention_cost(config, ratio, batch, num_tokens, context, entry)
        if ratio == 4:
            costs["indexer"] += indexer_cost(config, batch, num_tokens, context, key)
        projected = 2 * 2.0 * rows * (2 + config.hc_mult) * config.hc_mult**2 * config.hidden_size
        costs["hyper-connections"] += Cost(2 * streams, projected)
    return {part: costs[part] for part in PARTS}


def expected_experts(config: Config, num_tokens: int) -> float:
    """Experts of a layer that at least one of so many tokens takes, if they choose at random."""
    missed = (1 - config.num_experts_per_tok / config.n_routed_experts) ** num_tokens
    return config.n_routed_experts * (1 - missed)


def share_read(config: Config, path: tuple[Any, ...], num_tokens: int) -> float:
    """The share of a parameter that a step of so many tokens reads, if experts are random."""
    if "experts" in path:
        return expected_experts(config, num_tokens) / config.n_routed_experts
    if path[0] == "embed" or path[-1] == "tid2eid":
        return min(num_tokens / config.vocab_size, 1.0)
    return 1.0


def linear_flops(config: Config, linear: Linear, num_tokens: int) -> float:
    """Operations of one product; of a stack of experts those that the tokens take."""
    matrices = config.num_experts_per_tok if linear.stack else 1
    return 2.0 * num_tokens * linear.in_features * linear.out_features * matrices


def entries_seen(config: Config, ratio: int, context: int) -> int:
    """Cache entries that the attention of one query reads in a layer."""
    seen = min(context + 1, config.sliding_window)
    if ratio == 4:
        return seen + min(context // 4, config.index_topk)
    return seen + (context // ratio if ratio else 0)


def _attention_cost(
    config: Config, ratio: int, batch: int, num_tokens: int, context: int, entry: Storage
) -> Cost:
    seen = entries_seen(config, ratio, context)
    # Queries of a chunk share what they read at best; each selects entries of its own.
    read = float(batch * seen * entry_bytes(entry))
    width = config.num_attention_heads * config.head_dim
    queries = 2.0 * batch * num_tokens * width * 2
    return Cost(read + queries, 4.0 * batch * num_tokens * width * seen)


def indexer_cost(config: Config, batch: int, num_tokens: int, context: int, key: Storage) -> Cost:
    num_entries = context // 4
    if num_entries <= config.index_topk:
        return Cost()
    width = config.index_n_heads * config.index_head_dim
    products = 2.0 * batch * num_tokens * num_entries * width
    return Cost(float(batch * num_entries * entry_bytes(key)), products)


def entry_bytes(storage: Storage) -> int:
    """Bytes of one entry."""
    return sum(width * dtype.itemsize for width, dtype in storage.planes)
