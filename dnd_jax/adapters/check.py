"""Explain an adapter folder in plain words: what it is, whether it is sound, and which servers would take it."""

import pathlib
import re

import numpy as np
from flax.traverse_util import flatten_dict

from dnd_jax import files
from dnd_jax.adapters import keys, profiles
from dnd_jax.adapters.folder import TENSORS, content_hash, read
from dnd_jax.adapters.spec import Spec, rank_of, scale_of
from dnd_jax.types import InputError, Tree


def explain(folder: files.PathLike) -> str:
    """Return what there is to know about an adapter folder, a fact a line; raises InputError where it is unsound."""
    tree, spec = read(folder)
    content, name = content_hash(folder), pathlib.Path(folder).resolve().name
    if re.fullmatch("[0-9a-f]{16}", name) and name != content:  # as `write_addressed` names them
        raise InputError(f"{folder}: its content has hash {content}, the folder's name says {name}")
    size = (pathlib.Path(folder) / TENSORS).stat().st_size
    lines = {
        "base model": str(spec.config.get("base_model_name_or_path")),
        "adapter": _adapter(tree, spec),
        "modules": _modules(spec),
        "file": f"{size:,} bytes, content {content}",
        "carried": ", ".join(f"{n} x {kind}" for kind, n in keys.count_kinds(spec).items()) or "nothing beside A and B",
        "sound": _remarks(tree, spec),
        "vLLM": _verdict(profiles.vllm_obstacles(spec), _vllm_flag(spec)),
        "SGLang": _verdict(profiles.sglang_obstacles(spec), ""),
    }
    if not profiles.beyond_lora(spec) and "would not" in lines["vLLM"] + lines["SGLang"]:
        lines["way out"] = ("the portable profile of the same adapter, which both take: `generate --profile=portable`, or the "
                            "function `adapters.portable`")
    width = max(map(len, lines))
    return "\n".join(f"{name.ljust(width)}  {_printable(text)}" for name, text in lines.items())


def _printable(text: str) -> str:
    """Return text without what could steer a terminal: names are a stranger's."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def _adapter(tree: Tree, spec: Spec) -> str:
    values = flatten_dict(tree, sep="/").values()
    dtypes = ", ".join(sorted({v.dtype.name for v in values})) or "none"
    ranks = _range([rank_of(m, spec.config) for m in spec.modules] or [spec.config["r"]])
    scales = _range([scale_of(m, spec.config) for m in spec.modules] or [scale_of("", spec.config)])
    kind = "DoRA" if spec.config.get("use_dora") else "rank-stabilised LoRA" if spec.config.get("use_rslora") else "LoRA"
    return f"{kind}, rank {ranks}, scale {scales}, {sum(v.size for v in values):,} parameters in {dtypes}"


def _range(numbers: list[float]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _modules(spec: Spec) -> str:
    plain = [module.replace(".base_layer", "") for module in spec.modules]
    names = sorted({module.rpartition(".")[2] for module in plain})
    layers = {match[0] for module in plain if (match := re.match(r".*?\.\d+(?=\.)", module))}
    return f"{len(spec.modules)} in {len(layers)} layers: {', '.join(names) or 'none'}"


def _remarks(tree: Tree, spec: Spec) -> str:
    flat = flatten_dict(tree, sep="/")
    zero = [m for m in spec.modules if not np.any(flat[spec.pair(m)[1]])]
    if not zero:
        return "yes: every tensor is expected, finite and of its shape"
    return f"yes, but B is zero in {len(zero)} of {len(spec.modules)} modules, which changes nothing there: untrained?"


def _vllm_flag(spec: Spec) -> str:
    rank = max((rank_of(m, spec.config) for m in spec.modules), default=0)
    return f", with --max-lora-rank {rank}" if rank > 16 else ""


def _verdict(obstacles: list[str], needs: str) -> str:
    return f"would not take it as it is: {'; '.join(obstacles)}" if obstacles else f"takes it{needs}"
