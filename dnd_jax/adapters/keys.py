"""What each tensor of an adapter file is, judged by the config; missing, extra and misshapen ones are errors.

PEFT itself warns at most of a missing key and says nothing of an extra one, so exactness is checked here.
"""

import collections
import re
from collections.abc import Mapping
from typing import Any

from dnd_jax.adapters import consistency, patterns
from dnd_jax.adapters.consistency import EMBEDDING_NAMES, Shapes
from dnd_jax.adapters.spec import PREFIX, Spec
from dnd_jax.types import InputError

MATRIX, MAGNITUDE, LORA_BIAS, BIAS = "LoRA matrix", "DoRA magnitude", "LoRA bias", "bias"
EMBEDDING, TOKENS, MODULE, VOCABULARY = "embedding LoRA", "trained tokens", "full module", "full embedding"
VARIANT, TIED = "state of a LoRA variant", "tied head"
MATRICES = (".lora_A.weight", ".lora_B.weight")
KINDS = {
    MAGNITUDE: re.compile(r"(.+)\.lora_magnitude_vector(?:\.weight)?"),
    LORA_BIAS: re.compile(r"(.+)\.lora_B\.bias"),
    EMBEDDING: re.compile(r"(.+)\.lora_embedding_[AB]"),
    TOKENS: re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta"),
    VARIANT: re.compile(r"(.+)\.lora_(?:diag|monteclora_sampler|velora_embed)(?:\..+)?"),
}
ASKED_BY = {MAGNITUDE: ("use_dora",), LORA_BIAS: ("lora_bias",), TOKENS: ("trainable_token_indices",),
            VARIANT: ("kasa_config", "monteclora_config", "velora_config")}
MAX_DEPTH = 24


def kind_of(key: str, config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the kind of a tensor and the dotted name of its module.

    Raises:
      InputError: a key that doesn't start as PEFT's do, or that nothing in the config explains.
    """
    name = key.removeprefix(PREFIX)
    if name == key or "/" in key or ".." in key or name[:1] in ("", ".") or key[-1] == "." or key.count(".") >= MAX_DEPTH:
        raise InputError(f"{key}: expected up to {MAX_DEPTH} dotted names, after {PREFIX!r}")
    if name.endswith(MATRICES):
        module = name[: -len(MATRICES[0])]
        return TIED if _is_tied_head(module, config) else MATRIX, module
    for kind, pattern in KINDS.items():
        if match := pattern.fullmatch(name):
            if (fields := ASKED_BY.get(kind)) and not any(config.get(field) for field in fields):
                raise InputError(f"{key}: {kind}, but the config's {' and '.join(fields)} is not set")
            return kind, match[1]
    module, _, parameter = name.rpartition(".")
    saved = tuple(config.get("modules_to_save") or ())
    if any(parent.endswith(saved) for parent in consistency.parents(module)):
        return MODULE, module
    if parameter == "bias" and config.get("bias", "none") != "none":
        return BIAS, module
    if parameter == "weight" and module.removesuffix(".base_layer").rpartition(".")[2] in EMBEDDING_NAMES:
        return VOCABULARY, module
    raise InputError(f"{key}: nothing in the config explains this tensor")


def _is_tied_head(module: str, config: Mapping[str, Any]) -> bool:
    """Return whether a head's matrices are those of an adapted embedding, saved twice as `ensure_weight_tying` asks."""
    if not config.get("ensure_weight_tying"):
        return False
    name, targets = module.rpartition(".")[2], config.get("target_modules") or ()
    return name in EMBEDDING_NAMES and name not in targets


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
    patterns.check(config, sorted(modules[MATRIX] | modules[EMBEDDING]))
    for module in sorted(modules[MATRIX]):
        consistency.check_pair(module, shapes, config)
    for module in sorted(modules[EMBEDDING]):
        consistency.check_embedding(module, shapes, config)
    consistency.check_targets(modules[MATRIX] | modules[EMBEDDING], config)
    consistency.check_gaps(modules[MATRIX], config)
    consistency.check_widths(modules[MATRIX], shapes)
    consistency.check_saved(modules[MODULE], config)
    consistency.check_token_rows(modules[TOKENS], shapes, config)
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
