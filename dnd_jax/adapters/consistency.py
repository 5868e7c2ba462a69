"""Whether an adapter's tensors are all there, of the shapes that its config and each other ask for."""

import collections
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from dnd_jax.adapters import patterns
from dnd_jax.adapters.spec import PREFIX, key_of, rank_of
from dnd_jax.types import InputError

Shapes = Mapping[str, tuple[int, ...]]

EMBEDDING_NAMES = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embeddings", "embed_in", "embed_out", "shared",
                   "tok_embeddings")
HEADS = ("classifier", "score")  # PEFT has both names in the config of every classifier, and a model has one of them
# what reads from the residual stream, and what writes to it: as wide in every layer of a stack
READERS, WRITERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
SHARED = ("k_proj", "v_proj")  # which Gemma 3n and 4 lack in layers that take another's keys, or their keys for values
NESTED = re.compile(r"\.lora_[AB](\.|$)")
NUMBER = re.compile(r"\.\d+(?=\.|$)")


def check_pair(module: str, shapes: Shapes, config: Mapping[str, Any]) -> None:
    """Raise InputError unless a module has both A and B, of the rank that the config gives it, and none inside the other."""
    if NESTED.search(module):
        raise InputError(f"{PREFIX}{module}: a matrix inside a matrix")
    a, b = f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"
    for here, partner in ((a, b), (b, a)):
        if here not in shapes:
            raise InputError(f"{here} is missing, its partner {partner} is there")
    if len(shapes[a]) < 2 or len(shapes[b]) != len(shapes[a]):
        raise InputError(f"{a} is {list(shapes[a])} and {b} is {list(shapes[b])}, expected two matrices")
    rank = rank_of(module, config)
    blocks, is_stack = _blocks(config), _is_stack(module, config)
    for key, found in ((a, shapes[a][0]), (b, shapes[b][1])):
        experts = is_stack and found % rank == 0 and shapes[a][0] == shapes[b][1]
        grouped = key == b and len(shapes[b]) > 2 and rank % found == 0  # of a convolution in groups B has the ranks of one
        if found not in (rank, rank / blocks) and not experts and not grouped:
            raise InputError(f"{key} is {list(shapes[key])} of rank {found}, the config says {rank}")
    if not is_stack:
        _check_vectors(module, shapes, config)


def _check_vectors(module: str, shapes: Shapes, config: Mapping[str, Any]) -> None:
    """Raise InputError unless the vectors that the config asks for are there, with a value for each output of B."""
    out = shapes[f"{PREFIX}{module}.lora_B.weight"][0]
    for kind, flag, names in (("magnitude", "use_dora", ("lora_magnitude_vector", "lora_magnitude_vector.weight")),
                              ("bias", "lora_bias", ("lora_B.bias",))):
        if not config.get(flag):
            continue
        keys = [f"{PREFIX}{module}.{name}" for name in names]
        found_keys = [key for key in keys if key in shapes]
        if not found_keys:
            raise InputError(f"{keys[0]} is missing, {flag} is {config[flag]}")
        for key in found_keys:
            if math.prod(shapes[key]) != out:
                raise InputError(f"{key} is {list(shapes[key])}, expected a {kind} for each of {out} outputs")


def check_embedding(module: str, shapes: Shapes, config: Mapping[str, Any]) -> None:
    """Raise InputError unless an embedding's A and B are both there, of the rank that the config gives it."""
    a, b = (f"{PREFIX}{module}.lora_embedding_{side}" for side in "AB")
    for here, partner in ((a, b), (b, a)):
        if here not in shapes:
            raise InputError(f"{here} is missing, its partner {partner} is there")
    rank = rank_of(module, config)
    if len(shapes[a]) != 2 or len(shapes[b]) != 2 or shapes[a][0] != rank or shapes[b][1] != rank:
        raise InputError(f"{a} is {list(shapes[a])} and {b} is {list(shapes[b])}, the config says rank {rank}")


def _blocks(config: Mapping[str, Any]) -> int:
    """Return of how many blocks block-diagonal matrices consist; such a B has the columns of one."""
    blocks = value.get("nblocks") if isinstance(value := config.get("use_bdlora"), dict) else 1
    return blocks if type(blocks) is int and blocks > 0 else 1


def _is_stack(module: str, config: Mapping[str, Any]) -> bool:
    """Return whether a module is adapted through `target_parameters`: experts, their ranks laid side by side.

    Of "all-linear" PEFT makes parameters' bare names, which are of any module that isn't a target itself.
    """
    if not (parameters := config.get("target_parameters")):
        return False
    name = module
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    owners, targets = {parameter.rpartition(".")[0] for parameter in parameters}, config.get("target_modules")
    if "" in owners and not (isinstance(targets, list) and _is_named(name, frozenset(targets))):
        return True
    return any(_ends_with(name, owner) for owner in owners if owner)


def check_targets(modules: Iterable[str], config: Mapping[str, Any]) -> None:
    """Raise InputError at a module that the config doesn't target.

    A pattern that fits no module at all was written for other module names (they change between library versions), so
    it says nothing.
    """
    targets = config.get("target_modules")
    rest = [module for module in sorted(modules) if not _is_stack(module, config)]
    _check_exceptions(rest, config)
    if targets is None or targets == "all-linear":
        return
    named = targets if isinstance(targets, str) else frozenset(targets)
    hits = {module for module in rest if _is_named(module, named)}
    if len(hits) < len(rest) and (hits or not isinstance(targets, str)):
        extra = next(module for module in rest if module not in hits)
        raise InputError(f"{PREFIX}{extra}: not a target, target_modules is {str(targets)[:200]}")


def _check_exceptions(modules: Iterable[str], config: Mapping[str, Any]) -> None:
    """Raise InputError at a module that the config excludes, by name or by its layer: PEFT would drop it without a word."""
    excluded, layers = config.get("exclude_modules") or (), config.get("layers_to_transform")
    named = excluded if isinstance(excluded, str) else frozenset(excluded)
    chosen = {layers} if type(layers) is int else set(layers or ())
    if not isinstance(config.get("target_modules"), list) or config.get("layers_pattern"):
        chosen = set()  # patterns choose layers themselves; of other stacks' numbers we know nothing
    for module in modules if named or chosen else ():
        if named and _is_named(module, named):
            raise InputError(f"{PREFIX}{module}: excluded, exclude_modules is {str(excluded)[:200]}")
        number = re.search(r"\.(\d+)\.", module)
        if number and chosen and int(number[1]) not in chosen:
            raise InputError(f"{PREFIX}{module}: of layer {number[1]}, layers_to_transform is {str(layers)[:200]}")


def _is_named(module: str, names: str | frozenset[str]) -> bool:
    """Return whether a pattern fits a module, or one of the names is it or its end."""
    if isinstance(names, str):
        return patterns.matches(names, module)
    return module.rpartition(".")[2] in names or not names.isdisjoint(_endings(module))


def check_widths(modules: Iterable[str], shapes: Shapes) -> None:
    """Raise InputError where a module is of another width than the same one of another layer, which no model has."""
    first: dict[str, tuple[str, int]] = {}
    for module in sorted(modules):
        name = module.rpartition(".")[2]
        if name not in (*READERS, *WRITERS):
            continue
        key = key_of(f"{module}.lora_{'A' if name in READERS else 'B'}")
        width = shapes[key][1 if name in READERS else 0]
        other, expected = first.setdefault(_in_any_layer(module), (key, width))
        if width != expected:
            raise InputError(f"{key} is {list(shapes[key])}, another width than {other}, {list(shapes[other])}")


def check_gaps(modules: Iterable[str], config: Mapping[str, Any]) -> None:
    """Raise InputError where a block of one layer lacks a module that the same block has in another layer.

    Only where the config names modules by their last names; layers whose blocks each have a module that the other lacks are of
    two sorts, and keys or values that several layers lack are so by their architecture.
    """
    targets = config.get("target_modules")
    listed = [*targets, *(config.get("exclude_modules") or ())] if isinstance(targets, list) else ["."]
    if any("." in name for name in listed) or config.get("target_parameters") or config.get("layer_replication"):
        return
    blocks: dict[str, dict[str, set[str]]] = collections.defaultdict(lambda: collections.defaultdict(set))
    for module in modules:
        block, _, name = module.rpartition(".")
        blocks[_in_any_layer(block)][block].add(name)
    for layers in blocks.values():
        count = collections.Counter(name for names in layers.values() for name in names)
        union = {name for name, found in count.items() if name not in SHARED or found >= len(layers) - 1}
        for block, names in sorted(layers.items()):
            missing = sorted(union - names)
            if missing and any(names < other and set(missing) & other for other in layers.values()):
                raise InputError(f"{key_of(f'{block}.{missing[0]}.lora_A')} is missing, other layers have it")


def check_saved(modules: Iterable[str], config: Mapping[str, Any]) -> None:
    """Raise InputError if a module that the config says is saved whole isn't there."""
    saved = {part for module in modules for part in parents(module)}
    missing = [name for name in config.get("modules_to_save") or () if not any(part.endswith(name) for part in saved)]
    if any(name in HEADS and name not in missing for name in config.get("modules_to_save") or ()):
        missing = [name for name in missing if name not in HEADS]
    if missing:
        raise InputError(f"{missing[0]}: in modules_to_save, but the file holds no tensor of it")


def check_token_rows(modules: set[str], shapes: Shapes, config: Mapping[str, Any]) -> None:
    """Raise InputError unless the trained tokens of an embedding are those that the config lists."""
    indices = config.get("trainable_token_indices")
    if indices and not modules:
        raise InputError("trainable_tokens_delta is missing, the config has trainable_token_indices")
    for module in modules:
        key = f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"
        chosen = indices if isinstance(indices, list) else next(
            (v for name, v in indices.items() if _ends_with(module, name)), None) if isinstance(indices, dict) else None
        if not isinstance(chosen, list) or len(shapes[key]) != 2 or shapes[key][0] != len(chosen):
            raise InputError(f"{key} is {list(shapes[key])}, trainable_token_indices is {str(indices)[:80]}")


@functools.lru_cache(maxsize=4096)
def _in_any_layer(module: str) -> str:
    return NUMBER.sub(".*", module)


def parents(module: str) -> list[str]:
    """Return a dotted name's beginnings, itself the last."""
    return [module[: m.end()] for m in re.finditer(r"[^.]+", module)]


def _endings(module: str) -> list[str]:
    return [module[m.start() :] for m in re.finditer(r"[^.]+", module)]


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")
