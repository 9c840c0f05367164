"""The whole model over one sequence, float64, from the equations."""

from dataclasses import dataclass, field

import numpy as np

from tests.oracles.attention import attention
from tests.oracles.experts import moe
from tests.oracles.hyper_connections import hc_head, hc_post, hc_pre
from tests.oracles.indexer import Selection
from tests.oracles.norms import rms_norm
from tests.oracles.router import Routing
from tests.oracles.weights import EXACT, Rounding, Tensors, below, float64


@dataclass
class Capture:
    """What the layers did, one item a layer; streams [T, n, d] are those that leave it."""

    streams: list[np.ndarray] = field(default_factory=list)
    routing: list[Routing] = field(default_factory=list)
    selection: list[Selection | None] = field(default_factory=list)

    @property
    def margin(self) -> float:
        """How close the closest top-k choice of all layers was."""
        return min(choice.margin for choice in self.routing + self.selection if choice)


def block(
    streams: np.ndarray,
    token_ids: np.ndarray,
    w: Tensors,
    ratio: int,
    config: dict,
    rounding: Rounding = EXACT,
) -> tuple[np.ndarray, Routing, Selection | None]:
    """Streams [T, n, d] before the layer to (streams after it, routing, selection)."""
    eps = config["rms_norm_eps"]

    def pre(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return hc_pre(
            streams, *(w[f"hc_{name}_{part}"] for part in ("fn", "scale", "base")), config
        )

    u, post, comb = pre("attn")
    u = rms_norm(u, w["attn_norm.weight"], eps)
    y, selection = attention(u, below(w, "attn."), ratio, config, rounding)
    streams = hc_post(y, streams, post, comb)
    u, post, comb = pre("ffn")
    u = rms_norm(u, w["ffn_norm.weight"], eps)
    y, routing = moe(u, token_ids, below(w, "ffn."), config, rounding)
    return hc_post(y, streams, post, comb), routing, selection


def logits_of(streams: np.ndarray, w: Tensors, head: np.ndarray, config: dict) -> np.ndarray:
    """Collapse, norm and head; w holds hc_head_* and norm.weight."""
    y = hc_head(streams, w["hc_head_fn"], w["hc_head_scale"], w["hc_head_base"], config)
    return rms_norm(y, w["norm.weight"], config["rms_norm_eps"]) @ head.T


def forward(
    config: dict, tensors: Tensors, tokens: np.ndarray, capture: bool = False, **rounding
) -> np.ndarray | tuple[np.ndarray, Capture]:
    """Logits [T, V] of one sequence tokens [T], float64; with `capture` (logits, Capture).

    `tensors` has decoded weights under their official names; `rounding` are the fields of
    `Rounding`.
    """
    w = float64(tensors)
    streams = np.repeat(w["embed.weight"][tokens][:, None], config["hc_mult"], axis=1)
    seen = Capture()
    for layer in range(config["num_hidden_layers"]):
        streams, routing, selection = block(
            streams,
            tokens,
            below(w, f"layers.{layer}."),
            config["compress_ratios"][layer],
            config,
            Rounding(**rounding),
        )
        seen.streams.append(streams)
        seen.routing.append(routing)
        seen.selection.append(selection)
    logits = logits_of(streams, w, w["head.weight"], config)
    return (logits, seen) if capture else logits
