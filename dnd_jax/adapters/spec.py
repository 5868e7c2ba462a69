"""What an adapter is besides its matrices, and what its config says of a module."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dnd_jax.adapters import patterns
from dnd_jax.types import InputError

PREFIX = "base_model.model."
MAX_NAMES = 100
MAX_RANK = 1 << 20
LARGEST = 1e30  # of a scale in float32


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

    @property
    def modules(self) -> list[str]:
        """The adapted modules, dotted names in order of the tree."""
        return list(dict.fromkeys(path.rsplit("/", 1)[0].replace("/", ".") for path in self.leaves))

    def pair(self, module: str) -> tuple[str, str]:
        """Return the paths of a module's A and B."""
        path = module.replace(".", "/")
        return f"{path}/lora_A", f"{path}/lora_B"


def key_of(path: str) -> str:
    """Return a matrix's key in the file, given its path in the tree."""
    return f"{PREFIX}{path.replace('/', '.')}.weight"


def rank_of(module: str, config: Mapping[str, Any]) -> int:
    """Return the rank that PEFT gives to a module (dotted name), by `rank_pattern` and then `r`."""
    return patterns.value_of(config.get("rank_pattern"), module, config["r"])


def scale_of(module: str, config: Mapping[str, Any]) -> float:
    """Return what PEFT multiplies B A by: alpha / r, or alpha / sqrt(r) with `use_rslora`."""
    rank = rank_of(module, config)
    alpha = patterns.value_of(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


# --- what a config must be -----------------------------------------------------------------------------------------------


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_RANK


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST


def _is_table(value: Any, of: Callable[[Any], bool]) -> bool:
    return value is None or (isinstance(value, dict) and all(map(of, value.values())))


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) and name for name in value))


def _are_few_names(value: Any) -> bool:
    return _are_names(value) and len(value or ()) <= MAX_NAMES


def _are_layers(value: Any) -> bool:
    return value is None or type(value) is int or (isinstance(value, list) and all(type(layer) is int for layer in value))


def _are_names_or_pattern(value: Any) -> bool:
    return isinstance(value, str) or _are_names(value)


FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, f"a positive integer up to {MAX_RANK}"), "lora_alpha": (_is_number, "a number of ordinary size"),
    "rank_pattern": (lambda value: _is_table(value, _is_rank), "an object of positive integers"),
    "alpha_pattern": (lambda value: _is_table(value, _is_number), "an object of numbers"),
    "target_modules": (_are_names_or_pattern, "names or a pattern"),
    "exclude_modules": (_are_names_or_pattern, "names or a pattern"),
    "modules_to_save": (_are_few_names, f"a list of names, at most {MAX_NAMES}"),
    "target_parameters": (_are_few_names, f"a list of names, at most {MAX_NAMES}"),
    "layers_to_transform": (_are_layers, "a layer's number or a list of them"),
    "layers_pattern": (_are_names_or_pattern, "names or a pattern"),
}


def check_config(config: Any) -> None:
    """Raise InputError unless a parsed `adapter_config.json` is one of LoRA with usable ranks, scales and targets."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else config
        raise InputError(f"peft_type is {str(found)[:80]!r}, expected 'LORA'")
    for field, (is_fine, expected) in FIELDS.items():
        if not is_fine(config.get(field)):
            raise InputError(f"{field} is {repr(config.get(field))[:80]}, expected {expected}")
