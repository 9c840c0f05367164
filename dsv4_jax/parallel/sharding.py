"""How parameters are split over a mesh: one table."""

import re
from collections.abc import Sequence

from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "model"

# First match wins; what matches nothing is replicated. Heads, vocabulary rows, output groups and
# experts are split; a scale is split with its weight.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"^(embed|head)\.", PartitionSpec(AXIS)),
    (r"\.ffn\.experts\.", PartitionSpec(AXIS)),
    (r"\.attn\.(indexer\.)?(wq_b|weights_proj|wo_a)\.", PartitionSpec(AXIS)),
    (r"\.attn\.sink$", PartitionSpec(AXIS)),
    (r"\.attn\.wo_b\.", PartitionSpec(None, AXIS)),
)


def check_mesh(mesh: Mesh) -> None:
    """Raises ValueError unless the mesh has an automatic axis named "model"."""
    if AXIS not in mesh.axis_names:
        raise ValueError(f"mesh: got axes {mesh.axis_names}, expected one named {AXIS!r}")
    kind = mesh.axis_types[mesh.axis_names.index(AXIS)]
    if kind != AxisType.Auto:
        raise ValueError(f"mesh: axis {AXIS!r} is {kind}, expected AxisType.Auto")


def param_sharding(mesh: Mesh, path: Sequence[str | int], shape: tuple[int, ...]) -> NamedSharding:
    """Where a parameter lives.

    Args:
        mesh: devices with an axis "model".
        path: the parameter's path, e.g. ("layers", 3, "attn", "wq_b", "weight").
        shape: its shape; an axis that the mesh does not divide evenly stays whole.
    """
    name = ".".join(map(str, path))
    spec = next((spec for pattern, spec in RULES if re.search(pattern, name)), PartitionSpec())
    divides = len(spec) <= len(shape) and all(
        axis is None or size % mesh.shape[axis] == 0
        for axis, size in zip(spec, shape, strict=False)
    )
    return NamedSharding(mesh, spec if divides else PartitionSpec())
