"""Parameter names of the published PyTorch code <-> our parameter tree.

    "model.decoder.module_list.0.linear1.conv1w.weight"  <->  params["layers_0"]["width_conv_c"]

Arrays are the same on both sides: kernels `[out, in, k, k]`, norm `[L, C]`.
"""

import re
from collections.abc import Mapping

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dnd_jax.types import InputError, Params

NAMES = {
    "linear1.norm.weight": "norm/scale",
    "linear1.norm.bias": "norm/bias",
    "linear1.conv1w.weight": "width_conv_c",
    "linear1.conv1h.weight": "width_conv_l",
    "linear1.conv2h.weight": "height_conv_l",
    "linear1.conv2w.weight": "height_conv_c",
    "linear1.bias": "bias",
    "linear2.weight": "out_conv",
    "linear2.bias": "out_bias",
}
PREFIX = "model.decoder.module_list."
NOT_DECODER = re.compile(r"criterion_weight$")


def params_from_torch(state: Mapping[str, np.ndarray]) -> Params:
    """Return the decoder's parameters from a state dict in the released checkpoints' names.

    Args:
      state: name -> array; names without the prefix `model.decoder.` are accepted too.

    Raises:
      InputError: a name that is no decoder parameter, or a layer that lacks one.
    """
    flat: dict[str, np.ndarray] = {}
    for name, value in state.items():
        if NOT_DECODER.search(name):
            continue
        match = re.fullmatch(r"(?:model\.)?(?:decoder\.)?module_list\.(\d+)\.(.+)", name)
        if match is None or match[2] not in NAMES:
            raise InputError(f"state dict: {name!r} is not a parameter of the published decoder")
        flat[f"layers_{match[1]}/{NAMES[match[2]]}"] = np.asarray(value)
    layers = {path.split("/")[0] for path in flat}
    for i in range(len(layers)):
        for theirs, ours in NAMES.items():
            if f"layers_{i}/{ours}" not in flat:
                raise InputError(f"state dict: {PREFIX}{i}.{theirs} is missing, {len(layers)} layers found")
    return unflatten_dict(flat, sep="/")


def params_to_torch(params: Params) -> dict[str, np.ndarray]:
    """Return the state dict in the released checkpoints' names; the inverse of `params_from_torch`."""
    theirs = {ours: name for name, ours in NAMES.items()}
    state = {}
    for path, value in flatten_dict(dict(params), sep="/").items():
        layer, ours = path.split("/", 1)
        state[f"{PREFIX}{layer.removeprefix('layers_')}.{theirs[ours]}"] = np.asarray(value)
    return state
