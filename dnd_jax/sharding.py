"""The device mesh and how arrays lie on it: the batch split over all devices, the rest on each."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dnd_jax.types import InputError


def make_mesh() -> Mesh:
    """Return a mesh of all devices with the one axis `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh, size: int) -> NamedSharding:
    """Return the sharding of arrays whose first axis is a batch of `size` examples.

    Raises:
      InputError: a batch that the devices don't divide.
    """
    if size % mesh.size:
        raise InputError(f"a batch of {size} does not divide over {mesh.size} devices")
    return NamedSharding(mesh, PartitionSpec("data"))


def put(mesh: Mesh, *arrays: np.ndarray) -> list[jax.Array]:
    """Place arrays of one batch on the devices."""
    return [jax.device_put(a, over_batch(mesh, len(a))) for a in arrays]
