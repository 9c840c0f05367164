"""What fits on a device, before anything is allocated."""

from bisect import bisect_right
from dataclasses import dataclass

from dsv4_jax.bench.random_model import first_layers, weight_sizes
from dsv4_jax.cache.paged import BLOCK_TOKENS
from dsv4_jax.config import Config
from dsv4_jax.info import block_bytes, state_bytes
from dsv4_jax.memory import check_room, free_bytes

# For what lives during a step only, beside what its tokens need.
_WORKSPACE_BYTES = 1 << 30
# Of the largest weight, while weights are made and put into the order of kernels.
_COPIES = 3


@dataclass(frozen=True)
class Plan:
    """Weights, caches of so many sequences of at most so many tokens, and a step of `num_rows`."""

    model: Config
    experts: str
    linears: str
    num_sequences: int
    num_tokens: int
    num_rows: int

    def needed_bytes(self, num_layers: int) -> int:
        """For the first so many layers."""
        config = first_layers(self.model, num_layers)
        weights = weight_sizes(config, self.experts, self.linears)
        blocks = -(-self.num_tokens // BLOCK_TOKENS)
        cache = self.num_sequences * (state_bytes(config) + blocks * block_bytes(config))
        # Queries and streams, each in a few forms at once.
        of_row = 8 * config.num_attention_heads * config.head_dim
        of_row += 16 * config.hc_mult * config.hidden_size
        step = self.num_rows * of_row + _WORKSPACE_BYTES
        return sum(weights) + _COPIES * max(weights) + cache + step

    def config(self, num_layers: int | None) -> Config:
        """The model's first layers: so many, or as many as fit.

        Raises:
            ValueError: they do not fit; says what would.
        """
        asked = num_layers or max(self._fitting(free_bytes()), 1)
        config = first_layers(self.model, asked)
        check_room(
            f"{asked} layers with {self.num_sequences} sequences of {self.num_tokens:,} tokens",
            self.needed_bytes(asked),
            lambda free: f"{self._fitting(free) or 'no'} layers",
        )
        return config

    def _fitting(self, free: int | None) -> int:
        num_layers = self.model.num_hidden_layers
        if free is None:
            return num_layers
        return bisect_right(range(1, num_layers + 1), free, key=self.needed_bytes)
