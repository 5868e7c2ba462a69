"""What else than PEFT takes an adapter, and the plain form that everything takes."""

from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dnd_jax.adapters import keys
from dnd_jax.adapters.spec import Leaf, Spec, rank_of, scale_of
from dnd_jax.types import InputError, Tree

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
ALTERS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
BEYOND_LORA = {
    "use_dora": "DoRA", "lora_bias": "LoRA biases", "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trained tokens", "target_parameters": "adapted expert parameters",
    "alora_invocation_tokens": "activation by invocation tokens", "use_qalora": "QALoRA",
    "layer_replication": "layer replication", "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA", "use_bdlora": "block-diagonal LoRA", "arrow_config": "Arrow",
}


def alters_base(config: dict[str, Any]) -> str | None:
    """Return the name of the initialisation or variant that changed the base model's own weights, if one did."""
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(ALTERS_BASE):
        return init
    return "kasa" if config.get("kasa_config") else None


def beyond_lora(spec: Spec) -> list[str]:
    """Return what an adapter has that is not B A on linear layers, in words."""
    found = [words for field, words in BEYOND_LORA.items() if spec.config.get(field)]
    if spec.config.get("bias", "none") != "none":
        found.append("trained biases")
    if altered := alters_base(spec.config):
        found.append(f"initialisation {altered}, which altered the base model")
    named = {keys.MAGNITUDE, keys.LORA_BIAS, keys.MODULE, keys.BIAS, keys.TOKENS}
    return found + [f"{kind} tensors" for kind in keys.count_kinds(spec) if kind not in named]


def vllm_obstacles(spec: Spec) -> list[str]:
    """Return why vLLM would refuse an adapter or apply it wrongly; empty if it takes it."""
    ranks = sorted({rank_of(module, spec.config) for module in spec.modules})
    odd = [rank for rank in ranks if rank not in VLLM_RANKS]
    return (
        beyond_lora(spec)
        + ([f"rank {', '.join(map(str, odd))} (it takes {', '.join(map(str, VLLM_RANKS))})"] if odd else [])
        + [f"{field} (it applies one scale to all)" for field in ("rank_pattern", "alpha_pattern") if spec.config.get(field)]
    )


def sglang_obstacles(spec: Spec) -> list[str]:
    """Return why SGLang would refuse an adapter or apply it wrongly; empty if it takes it."""
    found = beyond_lora(spec)
    if len({rank_of(module, spec.config) for module in spec.modules}) > 1:
        found.append("more than one rank")
    found += [f"{field} (it ignores it)" for field in ("use_rslora", "alpha_pattern") if spec.config.get(field)]
    if isinstance(spec.config.get("target_modules"), str) and spec.config["target_modules"] != "all-linear":
        found.append("target_modules is a pattern, not a list")
    return found


def portable(tree: Tree, spec: Spec) -> tuple[Tree, Spec]:
    """Return the same adapter as plain LoRA: the scale folded into B, one rank that vLLM takes, alpha = r, no patterns.

    Ranks are filled up with zeros. B, rounded to the spec's dtype before as `write` does, keeps that where it holds the scaled
    values exactly, else it becomes float32 (float64 stays as it is).

    Raises:
      InputError: something that plain LoRA can't express, or a rank above 512.
    """
    if obstacles := beyond_lora(spec):
        raise InputError(f"no portable profile: the adapter has {', '.join(obstacles)}")
    largest = max(rank_of(module, spec.config) for module in spec.modules)
    rank = next((r for r in VLLM_RANKS if r >= largest), None)
    if rank is None:
        raise InputError(f"no portable profile: rank {largest}, at most {VLLM_RANKS[-1]}")
    flat = flatten_dict(tree, sep="/")
    made: dict[str, np.ndarray] = {}
    for module in spec.modules:
        path_a, path_b = spec.pair(module)
        a, b = flat[path_a], flat[path_b]
        missing = rank - len(a)
        made[path_a] = np.pad(a, ((0, missing), (0, 0)))
        made[path_b] = np.pad(_scaled(b, scale_of(module, spec.config), spec.leaves[path_b].dtype), ((0, 0), (0, missing)))
    leaves = {path: Leaf(made[path].shape, spec.leaves[path].dtype) for path in spec.leaves}
    leaves |= {path: Leaf(made[path].shape, made[path].dtype.name) for path in made if path.endswith("lora_B")}
    config = spec.config | {
        "r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "init_lora_weights": True,
        "target_modules": _targets(spec), "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None,
    }
    return unflatten_dict(made, sep="/"), Spec(config, leaves)


def _scaled(b: np.ndarray, scale: float, dtype: str) -> np.ndarray:
    wide = np.promote_types(dtype, np.float32)
    with np.errstate(over="ignore"):
        scaled = b.astype(dtype).astype(wide) * wide.type(scale)
        cast = scaled.astype(dtype)
    return cast if np.array_equal(cast.astype(wide), scaled) else scaled


def _targets(spec: Spec) -> list[str]:
    """Return short module names where the config gives them without exceptions, else every module by its full name."""
    targets = spec.config.get("target_modules")
    exceptions = spec.config.get("exclude_modules") or spec.config.get("layers_to_transform") not in (None, [])
    if isinstance(targets, list) and not exceptions:
        return sorted(targets)
    return sorted(spec.modules)
