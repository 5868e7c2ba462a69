"""The device mesh, and how parameters, optimizer state and batches lie on it.

Axes: `data` holds copies of the parameters, `fsdp` parts of them by input channels, `tensor` parts by output channels; a
batch is split over `data` and `fsdp`. If a mesh axis doesn't divide the channels that its rule names, it divides the parameter's
other channels; if not these either, the parameter is replicated over that axis. An optimizer's moments lie where their parameters
lie; the row and column sums of a factored one, which are hundreds of times smaller, are replicated.
"""

import math
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
    (r"layers_\d+/(width|height)_conv_[cl]", (None, None, "fsdp", "tensor")),
    (r"layers_\d+/out_conv", (None, None, "fsdp", "tensor")),
    (r"layers_\d+/out_bias", ("tensor",)),
    (r"layers_\d+/(bias|norm/(scale|bias))", ()),
    (r"shorten/(down|gate)_weight", ("tensor", "fsdp")),
    (r"shorten/(down|gate)_bias", ("tensor",)),
)


def make_mesh(sizes: Mapping[str, int] | None = None) -> Mesh:
    """Return a mesh of all devices, by default all on `data`; one size may be -1, for the devices that are left.

    Raises:
      InputError: sizes below 1, or whose product isn't the number of devices.
    """
    shape = {axis: (sizes or {"data": -1}).get(axis, 1) for axis in AXES}
    known = [size for size in shape.values() if size != -1]
    whole = min(known) > 0 and len(known) >= len(AXES) - 1
    shape = {axis: jax.device_count() // math.prod(known) if whole and size == -1 else size for axis, size in shape.items()}
    if not whole or math.prod(shape.values()) != jax.device_count():
        raise InputError(f"config.mesh is {dict(sizes or {})}, which does not fit {jax.device_count()} devices")
    return jax.make_mesh(tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def of_params(mesh: Mesh, params: Any) -> Any:
    """Return the sharding of every (abstract) parameter.

    Raises:
      InputError: a parameter that no rule covers.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, _spec(mesh, _name(path), leaf.shape)), params)


def of_state(mesh: Mesh, state: Any) -> Any:
    """Return the sharding of every leaf of an (abstract) training state with `params` and `opt_state`.

    Raises:
      InputError: a parameter that no rule covers.
    """
    shapes = {_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = _name(path)
        return NamedSharding(mesh, _spec(mesh, name, leaf.shape)) if shapes.get(name) == leaf.shape else replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, state)


def check_moments(state: Any) -> None:
    """Check on the arrays themselves that every moment lies where its parameter lies.

    Raises:
      RuntimeError: one that doesn't, with both shardings.
    """
    params = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        param = params.get(_name(path))
        if param is not None and leaf.shape == param.shape and not leaf.sharding.is_equivalent_to(param.sharding, leaf.ndim):
            raise RuntimeError(f"optimizer state {jax.tree_util.keystr(path)} lies as {leaf.sharding}, "
                               f"its parameter as {param.sharding}")


def _name(path: tuple[Any, ...]) -> str:
    """Return the path of the parameter that a leaf of the state belongs to, empty if it is no parameter's."""
    return "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def _spec(mesh: Mesh, name: str, shape: tuple[int, ...]) -> PartitionSpec:
    for pattern, axes in RULES:
        if re.fullmatch(pattern, name):
            return PartitionSpec(*(tuple(found) if len(found) > 1 else next(iter(found), None)
                                   for found in _placed(mesh, axes[: len(shape)], shape)))
    raise InputError(f"{name} {list(shape)}: no rule of dnd_jax/sharding.py covers this parameter")


def _placed(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> list[list[str]]:
    """Return the mesh axes that divide each axis of an array: its own by the rule where it can, else another with a rule."""
    placed: list[list[str]] = [[] for _ in axes]
    own = [(axis, place) for place, axis in enumerate(axes) if axis]
    others = [(axis, place) for axis, home in own for _, place in own if place != home]
    for axis, place in [*own, *others]:
        parts = math.prod(mesh.shape[name] for name in (*placed[place], axis))
        if shape[place] % parts == 0 and not any(axis in found for found in placed):
            placed[place].append(axis)
    return placed


def share_of_device(mesh: Mesh, params: Any) -> float:
    """Return which part of all (abstract) parameters one device holds."""
    places = jax.tree.leaves(of_params(mesh, params))
    leaves = jax.tree.leaves(params)
    held = sum(math.prod(place.shard_shape(leaf.shape)) for place, leaf in zip(places, leaves, strict=True))
    return held / sum(math.prod(leaf.shape) for leaf in leaves)


def over_batch(mesh: Mesh, size: int) -> NamedSharding:
    """Return the sharding of arrays whose first axis is a batch of `size` examples.

    Raises:
      InputError: a batch that the devices don't divide.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if size % parts:
        raise InputError(f"a batch of {size} does not divide over {parts} devices")
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def local_rows(mesh: Mesh, size: int) -> list[int]:
    """Return which examples of a batch of `size` this process's devices hold, in order."""
    places = over_batch(mesh, size).addressable_devices_indices_map((size,))
    return sorted({row for index in places.values() if index for row in range(size)[index[0]]})


def put(mesh: Mesh, size: int, *arrays: np.ndarray) -> list[jax.Array]:
    """Assemble a batch of `size` examples on the devices, from each process's `local_rows` of it."""
    place = over_batch(mesh, size)
    return [jax.make_array_from_process_local_data(place, a, (size, *a.shape[1:])) for a in arrays]


def put_filled(mesh: Mesh, *arrays: np.ndarray) -> list[jax.Array]:
    """Place one batch, whole in every process, repeating examples from the first on until the devices divide them.

    Never replicate a batch beside parameters in parts: on a 2 x 2 mesh XLA's partitioner (jax 0.10.2) then computes other
    convolutions.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    size = -(-len(arrays[0]) // parts) * parts
    rows = [row % len(arrays[0]) for row in local_rows(mesh, size)]
    return put(mesh, size, *(a[rows] for a in arrays))


def microbatch_size(size: int, count: int) -> int:
    """Return the examples of each of `count` microbatches of a batch; raise InputError if it doesn't divide."""
    if size % count:
        raise InputError(f"config.train: a batch of {size} does not divide into {count} microbatches")
    return size // count


def microbatches(mesh: Mesh, count: int, *arrays: jax.Array) -> list[jax.Array]:
    """Cut a batch `[B, ...]` inside jit into `[count, B / count, ...]`; every example stays on its device.

    Raises:
      InputError: a batch that doesn't divide into microbatches, or these over the devices.
    """
    size = microbatch_size(len(arrays[0]), count)
    place = NamedSharding(mesh, PartitionSpec(None, *over_batch(mesh, size).spec))
    cut = [a.reshape(size, count, *a.shape[1:]).swapaxes(0, 1) for a in arrays]
    return [jax.lax.with_sharding_constraint(a, place) for a in cut]
