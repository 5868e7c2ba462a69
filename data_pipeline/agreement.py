"""Which runs can be learned from together: they agree in everything but the values that a decoder generates."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dnd_jax.adapters import Spec, keys, profiles
from dnd_jax.types import InputError

# Beside what concerns training only: bases are compared by their hashes, and a folder may have moved.
IRRELEVANT = ("lora_dropout", "inference_mode", "peft_version", "auto_mapping", "base_model_name_or_path")
AVERAGED = (keys.MAGNITUDE, keys.LORA_BIAS, keys.BIAS)
CONVERT = ("pissa", "olora", "corda")


def refuse_altered_base(spec: Spec, where: str) -> None:
    """Raise InputError, with the way out, at an adapter that acts on altered base weights, which no folder holds."""
    if (found := profiles.alters_base(spec.config)) is None:
        return
    way_out = ("save the run by PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), which makes it plain LoRA"
               if found.lower().startswith(CONVERT) else "train with init_lora_weights=True")
    raise InputError(f"{where}: {found} altered the base model's weights, on which alone this adapter acts; {way_out}")


def disagreements(reference: Spec, spec: Spec, where: str, first: str) -> list[str]:
    """Return every way in which an adapter's config, matrices or carried tensors differ from a reference's, in words."""
    found = []
    for key in sorted((reference.config.keys() | spec.config.keys()) - set(IRRELEVANT)):
        ours, theirs = (_unordered(s.config.get(key)) for s in (spec, reference))
        if ours != theirs:
            found.append(f"{where}: {key} is {ours!r}, {first} has {theirs!r}")
    for path in sorted(reference.leaves.keys() | spec.leaves.keys()):
        if reference.leaves.get(path) != spec.leaves.get(path):
            found.append(f"{where}: {path} is {spec.leaves.get(path)}, {first} has {reference.leaves.get(path)}")
    for key in sorted(reference.carried.keys() | spec.carried.keys()):
        ours, theirs = (s.carried[key].shape if key in s.carried else None for s in (spec, reference))
        if ours != theirs:
            found.append(f"{where}: {key} is {ours}, {first} has {theirs}")
    return found


def default_parts(runs: Mapping[str, Spec]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return what generated adapters carry beside A and B, and the kinds of it that are means over the runs.

    Tensors that are equal in all runs are taken as they are. Magnitudes and biases that differ become their mean.

    Raises:
      InputError: another tensor that differs: no decoder generates it, and a mean of it would mean nothing.
    """
    first, *others = runs
    reference = runs[first]
    parts, averaged = {}, set()
    for key, value in reference.carried.items():
        different = [name for name in others if not np.array_equal(runs[name].carried[key], value)]
        kind = keys.kind_of(key, reference.config)[0]
        if different and kind not in AVERAGED:
            raise InputError(f"{different[0]}: {key} is not the same as in {first}; no decoder generates a {kind}, so train "
                             "the runs without it, or with it frozen")
        if different:
            averaged.add(kind)
            value = np.mean([spec.carried[key].astype(np.float32) for spec in runs.values()], axis=0).astype(value.dtype)
        parts[key] = value
    return parts, sorted(averaged)


def check_initial_seeds(seeds: Mapping[str, Any], gauge: str) -> list[str]:
    """Return the runs that didn't start from the first one's A, in words; any start will do in a gauge of its own."""
    first, *others = seeds
    if gauge != "none":
        return []
    return [f"{name}: its A started from seed {seeds[name]}, that of {first} from {seeds[first]}; set export.gauge, or train "
            "all runs from one seed" for name in others if seeds[name] != seeds[first]]


def raise_all(found: Sequence[str]) -> None:
    """Raise one InputError that names every disagreement, if there is any."""
    if found:
        raise InputError("; ".join(found))


def _unordered(value: Any) -> Any:
    return sorted(value, key=json.dumps) if isinstance(value, list) else value
