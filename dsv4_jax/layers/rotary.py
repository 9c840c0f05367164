"""Rotary position embedding of the trailing channels, with YaRN frequencies."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Float, Int

from dsv4_jax.config import Config, RopeScaling
from dsv4_jax.ops.rotary import rotate


@dataclass(frozen=True)
class Rotary:
    """Rotates adjacent channel pairs of the last `width` channels.

    Layers with compressed entries use one table (compress_rope_theta, YaRN) for everything in the
    layer; window-only layers use another (rope_theta, no YaRN). There is no attention-temperature
    factor.
    """

    width: int
    base: float
    scaling: RopeScaling | None

    @classmethod
    def of_layer(cls, config: Config, ratio: int) -> "Rotary":
        if ratio == 0:
            return cls(config.qk_rope_head_dim, config.rope_theta, None)
        return cls(config.qk_rope_head_dim, config.compress_rope_theta, config.rope_scaling)

    def frequencies(self) -> np.ndarray:
        """Angular frequencies in radians per token, float32 [width / 2]."""
        omega = self.base ** (-np.arange(0, self.width, 2) / self.width)
        if self.scaling is not None:
            s = self.scaling

            def pair_with_rotations(rotations: float) -> float:
                """The pair that turns `rotations` times over the original context."""
                context = s.original_max_position_embeddings
                periods = math.log(context / (rotations * 2 * math.pi))
                return self.width * periods / (2 * math.log(self.base))

            low = max(math.floor(pair_with_rotations(s.beta_fast)), 0)
            high = min(math.ceil(pair_with_rotations(s.beta_slow)), self.width - 1)
            ramp = (np.arange(self.width // 2) - low) / max(high - low, 1e-3)
            interpolated = np.clip(ramp, 0, 1)
            omega = omega * (1 - interpolated) + omega / s.factor * interpolated
        return omega.astype(np.float32)

    def __call__(
        self,
        x: Float[Array, "*batch c"],
        positions: Int[Array, "..."],
        inverse: bool = False,
    ) -> Float[Array, "*batch c"]:
        """Rotates x by its position, computed in float32, returned in x's dtype.

        Args:
            x: [..., c] with c >= width; channels before the last `width` pass through.
            positions: int32, its shape equal to leading axes of x (missing axes broadcast).
            inverse: rotate by the negative angle.
        """
        return rotate(x, positions, self.frequencies(), inverse)
