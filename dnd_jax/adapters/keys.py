"""What each tensor of an adapter file is, judged by the config; missing, extra and misshapen ones are errors.

PEFT itself warns at most of a missing key and says nothing of an extra one, so exactness is checked here.
"""

import collections
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from dnd_jax.adapters.spec import PREFIX, Spec, key_of, matches, rank_of
from dnd_jax.types import InputError

Shapes = Mapping[str, tuple[int, ...]]

MATRIX, MAGNITUDE, LORA_BIAS, BIAS = "LoRA matrix", "DoRA magnitude", "LoRA bias", "bias"
EMBEDDING, TOKENS, MODULE, VOCABULARY = "embedding LoRA", "trained tokens", "full module", "full embedding"
VARIANT = "state of a LoRA variant"
KINDS = {
    MATRIX: re.compile(r"(.+)\.lora_[AB]\.weight"),
    MAGNITUDE: re.compile(r"(.+)\.lora_magnitude_vector(?:\.weight)?"),
    LORA_BIAS: re.compile(r"(.+)\.lora_B\.bias"),
    EMBEDDING: re.compile(r"(.+)\.lora_embedding_[AB]"),
    TOKENS: re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta"),
    VARIANT: re.compile(r"(.+)\.lora_(?:diag|monteclora_sampler)(?:\..+)?"),
}
EMBEDDING_NAMES = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embeddings")
ASKED_BY = {MAGNITUDE: ("use_dora",), LORA_BIAS: ("lora_bias",), TOKENS: ("trainable_token_indices",),
            VARIANT: ("kasa_config", "monteclora_config")}


def kind_of(key: str, config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the kind of a tensor and the dotted name of its module.

    Raises:
      InputError: a key that doesn't start as PEFT's do, or that nothing in the config explains.
    """
    name = key.removeprefix(PREFIX)
    if name == key or "/" in key or "" in key.split("."):
        raise InputError(f"{key}: expected dotted names after {PREFIX!r}")
    for kind, pattern in KINDS.items():
        if match := pattern.fullmatch(name):
            if (fields := ASKED_BY.get(kind)) and not any(config.get(field) for field in fields):
                raise InputError(f"{key}: {kind}, but the config's {' and '.join(fields)} is not set")
            return kind, match[1]
    module, _, parameter = name.rpartition(".")
    if any(parent.endswith(saved) for parent in _parents(module) for saved in config.get("modules_to_save") or ()):
        return MODULE, module
    if parameter == "bias" and config.get("bias", "none") != "none":
        return BIAS, module
    if parameter == "weight" and module.removesuffix(".base_layer").rpartition(".")[2] in EMBEDDING_NAMES:
        return VOCABULARY, module
    raise InputError(f"{key}: nothing in the config explains this tensor")


def check_keys(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the kind of every tensor, given their shapes by key.

    Raises:
      InputError: a key too many or missing, or a shape that contradicts the config or another tensor; names key and values.
    """
    kinds: dict[str, str] = {}
    modules: dict[str, set[str]] = collections.defaultdict(set)
    for key in shapes:
        kinds[key], module = kind_of(key, config)
        modules[kinds[key]].add(module)
    if not (modules[MATRIX] or modules[EMBEDDING]):
        raise InputError("holds no LoRA matrix")
    for module in sorted(modules[MATRIX]):
        _check_pair(module, shapes, config)
    for module in sorted(modules[EMBEDDING]):
        _check_embedding(module, shapes, config)
    _check_targets(modules[MATRIX] | modules[EMBEDDING], config)
    _check_gaps(modules[MATRIX], config)
    for name in config.get("modules_to_save") or ():
        if not any(part.endswith(name) for module in modules[MODULE] for part in _parents(module)):
            raise InputError(f"{name}: in modules_to_save, but the file holds no tensor of it")
    _check_token_rows(modules[TOKENS], shapes, config)
    return kinds


def check_matches(flat: Mapping[str, Any], spec: Spec, where: str) -> None:
    """Raise InputError unless a flattened tree has exactly the spec's paths and shapes."""
    for path in sorted(flat.keys() ^ spec.leaves.keys()):
        raise InputError(f"{where}: {path} is {'not in the spec' if path in flat else 'missing from the tree'}")
    for path, leaf in spec.leaves.items():
        if tuple(flat[path].shape) != leaf.shape:
            raise InputError(f"{where}: {path} is {list(flat[path].shape)}, expected {list(leaf.shape)}")


def count_kinds(spec: Spec) -> dict[str, int]:
    """Return how many carried tensors there are of each kind."""
    return dict(collections.Counter(kind_of(key, spec.config)[0] for key in sorted(spec.carried)))


# --- parts of check_keys ---------------------------------------------------------------------------------------------


def _check_pair(module: str, shapes: Shapes, config: Mapping[str, Any]) -> None:
    if re.search(r"\.lora_[AB](\.|$)", module):
        raise InputError(f"{PREFIX}{module}: a matrix inside a matrix")
    a, b = (key_of(f"{module}.lora_{side}") for side in "AB")
    for here, partner in ((a, b), (b, a)):
        if here not in shapes:
            raise InputError(f"{here} is missing, its partner {partner} is there")
    if len(shapes[a]) < 2 or len(shapes[b]) != len(shapes[a]):
        raise InputError(f"{a} is {list(shapes[a])} and {b} is {list(shapes[b])}, expected two matrices")
    rank = rank_of(module, config)
    for key, found in ((a, shapes[a][0]), (b, shapes[b][1])):
        if found != rank and not (_is_stack(module, config) and found % rank == 0 and shapes[a][0] == shapes[b][1]):
            raise InputError(f"{key} is {list(shapes[key])} of rank {found}, the config says {rank}")
    if _is_stack(module, config):
        return
    out = shapes[b][0]
    for kind, flag, names in (("magnitude", "use_dora", ("lora_magnitude_vector", "lora_magnitude_vector.weight")),
                              ("bias", "lora_bias", ("lora_B.bias",))):
        keys = [f"{PREFIX}{module}.{name}" for name in names]
        found_keys = [key for key in keys if key in shapes]
        if config.get(flag) and not found_keys:
            raise InputError(f"{keys[0]} is missing, {flag} is {config[flag]}")
        for key in found_keys:
            if math.prod(shapes[key]) != out:
                raise InputError(f"{key} is {list(shapes[key])}, expected a {kind} for each of {out} outputs")


def _check_embedding(module: str, shapes: Shapes, config: Mapping[str, Any]) -> None:
    a, b = (f"{PREFIX}{module}.lora_embedding_{side}" for side in "AB")
    for here, partner in ((a, b), (b, a)):
        if here not in shapes:
            raise InputError(f"{here} is missing, its partner {partner} is there")
    rank = rank_of(module, config)
    if len(shapes[a]) != 2 or len(shapes[b]) != 2 or shapes[a][0] != rank or shapes[b][1] != rank:
        raise InputError(f"{a} is {list(shapes[a])} and {b} is {list(shapes[b])}, the config says rank {rank}")


def _is_stack(module: str, config: Mapping[str, Any]) -> bool:
    """Return whether a module is adapted through `target_parameters`: experts, their ranks laid side by side."""
    name = module
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    parameters = config.get("target_parameters") or ()
    return any(_ends_with(name, parameter.rpartition(".")[0]) for parameter in parameters)


def _check_targets(modules: Iterable[str], config: Mapping[str, Any]) -> None:
    """Raise InputError at a module that the config doesn't target.

    A pattern that fits no module at all was written for other module names (they change between library versions), so
    it says nothing.
    """
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return
    rest = [module for module in sorted(modules) if not _is_stack(module, config)]
    if isinstance(targets, str):
        hits = [module for module in rest if matches(targets, module)]
    else:
        exact, endings = set(targets), tuple(f".{target}" for target in targets)
        hits = [module for module in rest if module in exact or module.endswith(endings)]
    if len(hits) < len(rest) and (hits or not isinstance(targets, str)):
        extra = next(module for module in rest if module not in hits)
        raise InputError(f"{PREFIX}{extra}: not a target, target_modules is {str(targets)[:200]}")


def _check_gaps(modules: Iterable[str], config: Mapping[str, Any]) -> None:
    """Raise InputError where a block of one layer lacks a module that the same block has in another layer.

    Only where the config names modules without exceptions; layers whose blocks have no module in common are of two sorts.
    """
    targets = config.get("target_modules")
    exceptions = ("exclude_modules", "layers_to_transform", "target_parameters", "layer_replication")
    if not isinstance(targets, list) or any(config.get(field) for field in exceptions):
        return
    if any("." in target for target in targets):
        return
    blocks: dict[str, dict[str, set[str]]] = collections.defaultdict(lambda: collections.defaultdict(set))
    for module in modules:
        block, _, name = module.rpartition(".")
        blocks[re.sub(r"\.\d+(?=\.|$)", ".*", block)][block].add(name)
    for layers in blocks.values():
        union = set().union(*layers.values())
        for block, names in sorted(layers.items()):
            missing = sorted(union - names)
            if missing and any(names & other and set(missing) & other for other in layers.values()):
                raise InputError(f"{key_of(f'{block}.{missing[0]}.lora_A')} is missing, other layers have it")


def _check_token_rows(modules: set[str], shapes: Shapes, config: Mapping[str, Any]) -> None:
    indices = config.get("trainable_token_indices")
    if indices and not modules:
        raise InputError("trainable_tokens_delta is missing, the config has trainable_token_indices")
    for module in modules:
        key = f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"
        chosen = indices if isinstance(indices, list) else next(
            (v for name, v in indices.items() if _ends_with(module, name)), None) if isinstance(indices, dict) else None
        if not isinstance(chosen, list) or len(shapes[key]) != 2 or shapes[key][0] != len(chosen):
            raise InputError(f"{key} is {list(shapes[key])}, trainable_token_indices is {str(indices)[:80]}")


def _parents(module: str) -> list[str]:
    return [module[: m.end()] for m in re.finditer(r"[^.]+", module)]


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")
