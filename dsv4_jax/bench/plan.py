"""What fits on a device, before anything is allocated."""

from bisect import bisect_right
from dataclasses import dataclass

from dsv4_jax.bench.random_model import first_layers, weight_bytes
from dsv4_jax.cache.paged import BLOCK_TOKENS
from dsv4_jax.config import Config
from dsv4_jax.info import block_bytes, state_bytes
from dsv4_jax.memory import free_bytes

# For what lives during a step only.
_WORKSPACE_BYTES = 2 << 30


@dataclass(frozen=True)
class Plan:
    """Weights and caches of so many sequences, each of at most so many tokens."""

    model: Config
    experts: str
    linears: str
    num_sequences: int
    num_tokens: int

    def needed_bytes(self, num_layers: int) -> int:
        """For the first so many layers."""
        config = first_layers(self.model, num_layers)
        blocks = -(-self.num_tokens // BLOCK_TOKENS)
        cache = self.num_sequences * (state_bytes(config) + blocks * block_bytes(config))
        return weight_bytes(config, self.experts, self.linears) + cache + _WORKSPACE_BYTES

    def config(self, num_layers: int | None) -> Config:
        """The model's first layers: so many, or as many as fit.

        Raises:
            ValueError: they do not fit; says what would.
        """
        free = free_bytes()
        if free is None:
            return first_layers(self.model, num_layers or self.model.num_hidden_layers)
        fitting = bisect_right(
            range(1, self.model.num_hidden_layers + 1), free, key=self.needed_bytes
        )
        asked = num_layers or max(fitting, 1)
        if asked > fitting:
            raise ValueError(
                f"memory: {asked} layers with {self.num_sequences} sequences of "
                f"{self.num_tokens:,} tokens need {self.needed_bytes(asked):,} bytes, free are "
                f"{free:,}; {fitting or 'no'} layers would fit"
            )
        return first_layers(self.model, asked)
