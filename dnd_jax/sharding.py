"""The device mesh, and how parameters, optimizer state and batches lie on it.

Axes: `data` holds copies of the parameters, `fsdp` parts of them by input channels, `tensor` parts by output channels; a
batch is split over `data` and `fsdp`. What a rule can't divide evenly stays whole on that axis.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dnd_jax.types import InputError

AXES = ("data", "fsdp", "tensor")
# Parameter path (a regular expression for all of it) -> mesh axis of each of its leading axes. The first match counts.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"layers_\d+/(width|height)_conv_[cl]", ("tensor", "fsdp")),
    (r"layers_\d+/out_conv", ("tensor", "fsdp")),
    (r"layers_\d+/out_bias", ("tensor",)),
    (r"layers_\d+/(bias|norm/(scale|bias))", ()),
    (r"shorten/(down|gate)_weight", ("tensor", "fsdp")),
    (r"shorten/(down|gate)_bias", ("tensor",)),
)


def make_mesh(sizes: Mapping[str, int] | None = None) -> Mesh:
    """Return a mesh of all devices, by default all on `data`; one size may be -1, for the devices that are left.

    Raises:
      InputError: sizes whose product isn't the number of devices.
    """
    shape = {axis: (sizes or {"data": -1}).get(axis, 1) for axis in AXES}
    known = int(np.prod([size for size in shape.values() if size != -1]))
    shape = {axis: jax.device_count() // known if size == -1 else size for axis, size in shape.items()}
    if np.prod(list(shape.values())) != jax.device_count():
        raise InputError(f"config.mesh is {dict(sizes or {})}, which does not fit {jax.device_count()} devices")
    return jax.make_mesh(tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def of_state(mesh: Mesh, state: Any) -> Any:
    """Return the sharding of every leaf of an (abstract) training state: a parameter's rule holds for its moments too.

    Raises:
      InputError: a parameter that no rule covers.
    """
    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        return NamedSharding(mesh, _spec(mesh, name, leaf.shape)) if name else replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, state)


def _spec(mesh: Mesh, name: str, shape: tuple[int, ...]) -> PartitionSpec:
    for pattern, axes in RULES:
        if re.fullmatch(pattern, name):
            return PartitionSpec(*(axis if axis and size % mesh.shape[axis] == 0 else None
                                   for axis, size in zip(axes, shape, strict=False)))
    raise InputError(f"{name} {list(shape)}: no rule of dnd_jax/sharding.py covers this parameter")


def over_batch(mesh: Mesh, size: int) -> NamedSharding:
    """Return the sharding of arrays whose first axis is a batch of `size` examples.

    Raises:
      InputError: a batch that the devices don't divide.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if size % parts:
        raise InputError(f"a batch of {size} does not divide over {parts} devices")
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def put(mesh: Mesh, *arrays: np.ndarray) -> list[jax.Array]:
    """Place arrays of one batch on the devices."""
    return [jax.device_put(a, over_batch(mesh, len(a))) for a in arrays]


def put_filled(mesh: Mesh, *arrays: np.ndarray) -> list[jax.Array]:
    """Place arrays of one batch on the devices, repeating examples from the first on until the devices divide them.

    Never replicate a batch beside parameters in parts: on a 2 x 2 mesh XLA's partitioner (jax 0.10.2) then computes other
    convolutions.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    return put(mesh, *(np.resize(a, (-(-len(a) // parts) * parts, *a.shape[1:])) for a in arrays))
