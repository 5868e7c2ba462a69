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
SHORTEN = {
    "down_proj.weight": "shorten/down_weight", "down_proj.bias": "shorten/down_bias",
    "gate_proj.weight": "shorten/gate_weight", "gate_proj.bias": "shorten/gate_bias",
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
    flat = {_path_of(name): np.asarray(value) for name, value in state.items() if not NOT_DECODER.search(name)}
    layers = {path.split("/")[0] for path in flat}
    expected = {f"layers_{i}/{ours}": f"{PREFIX}{i}.{theirs}" for i in range(len(layers - {"shorten"}))
                for theirs, ours in NAMES.items()}
    if "shorten" in layers:
        expected |= {ours: theirs for theirs, ours in SHORTEN.items()}
    for path, name in expected.items():
        if path not in flat:
            raise InputError(f"state dict: {name} is missing, found {', '.join(sorted(layers))}")
    return unflatten_dict(flat, sep="/")


def _path_of(name: str) -> str:
    """Return where a parameter of the published code lies in our tree."""
    if (match := re.fullmatch(r"(?:.+\.)?((?:down|gate)_proj\.\w+)", name)) and match[1] in SHORTEN:
        return SHORTEN[match[1]]
    match = re.fullmatch(r"(?:model\.)?(?:decoder\.)?module_list\.(\d+)\.(.+)", name)
    if match is None or match[2] not in NAMES:
        raise InputError(f"state dict: {name!r} is not a parameter of the published decoder")
    return f"layers_{match[1]}/{NAMES[match[2]]}"


def params_to_torch(params: Params) -> dict[str, np.ndarray]:
    """Return the state dict in the released checkpoints' names; the inverse of `params_from_torch`."""
    theirs = {ours: name for name, ours in (NAMES | SHORTEN).items()}
    state = {}
    for path, value in flatten_dict(dict(params), sep="/").items():
        layer, ours = path.split("/", 1)
        name = theirs[path] if path in theirs else f"{PREFIX}{layer.removeprefix('layers_')}.{theirs[ours]}"
        state[name] = np.asarray(value)
    return state
