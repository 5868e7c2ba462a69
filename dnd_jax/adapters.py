"""A PEFT LoRA folder <-> (tree, spec), without torch.

The tree holds what a decoder generates, the matrices A `[r, in]` and B `[out, r]` of every adapted linear layer:

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight
        <->  tree["model"]["layers"]["3"]["self_attn"]["q_proj"]["lora_A"]

The spec holds all the rest of the folder, so that writing gives back the same tensors and an equal config.
"""

import dataclasses
import json
import pathlib
import re
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from dnd_jax import files
from dnd_jax.tensor_files import check_header
from dnd_jax.types import InputError, Tree

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LEARNED = re.compile(r"base_model\.model\.(.+\.lora_[AB])\.weight")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Shape and dtype name of one matrix of the tree."""

    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Spec:
    """Everything of an adapter folder that is not in its tree.

    Attributes:
      config: `adapter_config.json` as parsed.
      leaves: what the tree must hold, by `/`-separated path.
      carried: tensors that no decoder generates, by their key in the file, written back as they are.
    """

    config: dict[str, Any]
    leaves: dict[str, Leaf]
    carried: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return config and leaves as plain JSON values; `carried` arrays are stored apart."""
        return {"config": self.config, "leaves": {p: [list(v.shape), v.dtype] for p, v in self.leaves.items()}}

    @classmethod
    def from_json(cls, value: dict[str, Any], carried: dict[str, np.ndarray] | None = None) -> "Spec":
        """Return the spec that `to_json` described."""
        leaves = {p: Leaf(tuple(shape), dtype) for p, (shape, dtype) in value["leaves"].items()}
        return cls(value["config"], leaves, carried or {})


def read(folder: files.PathLike) -> tuple[Tree, Spec]:
    """Read a PEFT LoRA folder.

    Returns:
      The tree of A and B matrices in the dtypes of the file, and the spec.

    Raises:
      InputError: a missing or malformed file, an adapter that isn't LoRA, a matrix without its partner, a rank other
        than the config's, or a value that isn't finite; the message names file and key.
    """
    folder = pathlib.Path(folder)
    config = files.read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else config
        raise InputError(f"{folder / CONFIG}: peft_type is {found!r}, expected 'LORA'")
    path = folder / TENSORS
    check_header(path)
    tensors = safetensors.numpy.load_file(path)
    matches = {key: LEARNED.fullmatch(key) for key in tensors}
    flat = {m[1].replace(".", "/"): tensors[key] for key, m in matches.items() if m and tensors[key].ndim == 2}
    carried = {key: value for key, value in tensors.items() if not matches[key] or value.ndim != 2}
    for key, value in tensors.items():
        if not key.startswith(PREFIX):
            raise InputError(f"{path}: {key}: expected a key that starts with {PREFIX!r}")
        _check_finite(value, f"{path}: {key}")
    _check_pairs(flat, config, path)
    return unflatten_dict(flat, sep="/"), Spec(config, {p: Leaf(v.shape, v.dtype.name) for p, v in flat.items()}, carried)


def write(folder: files.PathLike, tree: Tree, spec: Spec) -> None:
    """Write a PEFT LoRA folder that `read` gives back as it is; the tree is cast to the spec's dtypes.

    Raises:
      InputError: a tree whose paths or shapes are not the spec's, or a value that isn't finite; nothing is written.
    """
    flat = flatten_dict(tree, sep="/")
    check_matches(flat, spec, str(folder))
    tensors = dict(spec.carried)
    for path, leaf in spec.leaves.items():
        value = np.asarray(flat[path])
        _check_finite(value, f"{folder}: {path}")
        tensors[key_of(path)] = np.ascontiguousarray(value.astype(leaf.dtype, copy=False))
    config = dict(spec.config)
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])
    with files.atomic_folder(folder) as temporary:
        safetensors.numpy.save_file(tensors, temporary / TENSORS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def key_of(path: str) -> str:
    """Return a matrix's key in the file, given its path in the tree."""
    return f"{PREFIX}{path.replace('/', '.')}.weight"


def check_matches(flat: dict[str, np.ndarray], spec: Spec, where: str) -> None:
    """Raise InputError unless a flattened tree has exactly the spec's paths and shapes."""
    for path in sorted(flat.keys() ^ spec.leaves.keys()):
        raise InputError(f"{where}: {path} is {'not in the spec' if path in flat else 'missing from the tree'}")
    for path, leaf in spec.leaves.items():
        if tuple(flat[path].shape) != leaf.shape:
            raise InputError(f"{where}: {path} is {list(flat[path].shape)}, expected {list(leaf.shape)}")


def rank_of(module: str, config: dict[str, Any]) -> int:
    """Return the rank that PEFT gives to a module (dotted name), by `rank_pattern` and then `r`."""
    for pattern, rank in (config.get("rank_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return rank
    return config["r"]


def _check_pairs(flat: dict[str, np.ndarray], config: dict[str, Any], path: pathlib.Path) -> None:
    if not flat:
        raise InputError(f"{path}: holds no lora_A or lora_B matrix of a linear layer")
    for name, value in flat.items():
        module, side = name.rsplit("/", 1)
        partner = f"{module}/lora_{'B' if side == 'lora_A' else 'A'}"
        if partner not in flat:
            raise InputError(f"{path}: {key_of(partner)} is missing, its partner {key_of(name)} is there")
        rank, expected = value.shape[0 if side == "lora_A" else 1], rank_of(module.replace("/", "."), config)
        if rank != expected:
            raise InputError(f"{path}: {key_of(name)} is {list(value.shape)} of rank {rank}, the config says {expected}")


def _check_finite(value: np.ndarray, where: str) -> None:
    if value.dtype == ml_dtypes.bfloat16:
        finite = bool(((value.view(np.uint16) & 0x7F80) != 0x7F80).all())
    else:
        finite = bool(np.isfinite(value).all())
    if not finite:
        raise InputError(f"{where}: holds a value that is not finite")
