"""The optimiser and its schedule."""

from collections import defaultdict
from dataclasses import dataclass

import jax.numpy as jnp
import optax
import optax.contrib
from jax import Array
from weights import Flat, decays


@dataclass(frozen=True)
class Recipe:
    """Everything about the optimisation that is fixed before the first step.

    Attributes:
        optimizer: "adamw", or "muon" for the hidden matrices with AdamW for the rest.
        learning_rate: the peak, reached after `warmup_steps`, then linear to 0.
        weight_decay: times the learning rate.
        quantized_from: share of the steps after which weights are rounded as they are stored.
        dense_until: share of the steps in which CSA layers attend to every entry.
        draft_weight: of the MTP block's loss beside the model's.
        balance_rate: step of the router biases, falling like the learning rate.
    """

    optimizer: str = "muon"
    learning_rate: float = 6e-3
    weight_decay: float = 0.6
    warmup_steps: int = 100
    clip_norm: float = 1.0
    quantized_from: float = 0.5
    dense_until: float = 0.4
    draft_weight: float = 0.2
    balance_rate: float = 2e-3

    def schedule(self, step: Array, total_steps: Array) -> tuple[Array, Array]:
        """(learning rate, step of the router biases)."""
        rise = (step + 1) / self.warmup_steps
        fall = (total_steps - step) / jnp.maximum(total_steps - self.warmup_steps, 1)
        fall = jnp.clip(fall, 0.0, 1.0)
        return self.learning_rate * jnp.minimum(rise, fall), self.balance_rate * fall

    def transformation(self) -> optax.GradientTransformation:
        """Updates of a flat dict of parameters, for a learning rate of 1."""
        if self.optimizer == "adamw":
            update = optax.adamw(
                1.0, b1=0.9, b2=0.95, weight_decay=self.weight_decay, mask=_decaying_groups
            )
        else:
            update = optax.contrib.muon(
                1.0,
                weight_decay=self.weight_decay,
                adam_b2=0.95,
                muon_weight_dimension_numbers=_hidden_groups,
                consistent_rms=0.2,
            )
        return grouped(optax.chain(optax.clip_by_global_norm(self.clip_norm), update))


def _group(name: str, array: Array) -> str:
    kind = "other"
    if decays(name, array):
        kind = "table" if name in ("embed.weight", "head.weight") else "hidden"
    return f"{kind} {array.shape}"


def _decaying_groups(groups: Flat) -> dict[str, bool]:
    return {group: not group.startswith("other") for group in groups}


def _hidden_groups(groups: Flat) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
    """Hidden matrices [..., out, in], each by itself."""
    return {
        group: optax.contrib.MuonDimensionNumbers(-1, -2) if group.startswith("hidden") else None
        for group in groups
    }


def grouped(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs `inner` on parameters stacked by kind and shape.

    A model has hundreds of parameters and a dozen shapes; one operation on a stack compiles and
    runs faster than one on each.
    """

    def members(params: Flat) -> dict[str, list[str]]:
        groups = defaultdict(list)
        for name in sorted(params):
            groups[_group(name, params[name])].append(name)
        return groups

    def stack(arrays: Flat, groups: dict[str, list[str]]) -> Flat:
        return {g: jnp.stack([arrays[name] for name in names]) for g, names in groups.items()}

    def init(params: Flat) -> optax.OptState:
        return inner.init(stack(params, members(params)))

    def update(gradient: Flat, state: optax.OptState, params: Flat) -> tuple[Flat, optax.OptState]:
        groups = members(params)
        updates, state = inner.update(stack(gradient, groups), state, stack(params, groups))
        return {
            name: updates[group][i]
            for group, names in groups.items()
            for i, name in enumerate(names)
        }, state

    return optax.GradientTransformation(init, update)
