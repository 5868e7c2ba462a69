"""The frozen base model: its tokenizer, its weights and what identifies it. Imports transformers lazily."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError

from dnd_jax import files
from dnd_jax.types import InputError

UNKNOWN = "None"  # the commit of a hub repository, where it can't be told
WORDS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*", "chat_template*",
         "*processor*.json")  # files that change what a base is asked


def load_tokenizer(base: str) -> Any:
    """Load the tokenizer of a base model; transformers answers a folder without one by an empty tokenizer, we raise."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if pathlib.Path(base).is_dir() and not any(pathlib.Path(base).glob("tokenizer*")):
        raise InputError(f"{base}: holds no tokenizer files, expected tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise InputError(f"{base}: no tokenizer: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"{base}: the tokenizer has no end-of-text token, found {tokenizer.special_tokens_map}")
    return tokenizer


def load_base(base: str, **options: Any) -> Any:
    """Load a base model, of language or of vision and language, by transformers; raise InputError if that can't be."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    try:
        vision = hasattr(AutoConfig.from_pretrained(base), "vision_config")
        kind: Any = AutoModelForImageTextToText if vision else AutoModelForCausalLM
        loaded = kind.from_pretrained(base, output_loading_info=True, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{base}: no model: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    return complete(loaded, base)


def complete(loaded: tuple[Any, Mapping[str, Any]], name: str) -> Any:
    """Return a model of `from_pretrained(..., output_loading_info=True)`; what its files lack, transformers draws at random.

    Raises:
      InputError: names the parameters that the files lack.
    """
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{name}: its files lack {len(missing)} parameters of {type(model).__name__}, such as {missing[0]}")
    return model


def identity(base: str) -> dict[str, str]:
    """Return a base model's name and hashes: of a folder's weights and config, and of its tokenizer; or a hub's commit."""
    folder = pathlib.Path(base)
    if folder.is_dir():
        weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))  # as transformers chooses
        words = sorted({path for pattern in WORDS for path in folder.glob(pattern) if path.is_file()})
        return {"name": base, "tokenizer_sha256": files.sha256_files(words), "sha256": files.sha256_text(
            files.sha256_files(weights) + files.sha256_files(folder.glob("config.json")))}
    return {"name": base, "sha256": hub_commit(base) or UNKNOWN}


def is_same(base: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Tell whether two bases are one by their hashes, or by their names where a hub repository's commit wasn't known."""
    if len({b["tokenizer_sha256"] for b in (base, other) if "tokenizer_sha256" in b}) > 1:  # not of adapters from elsewhere
        return False
    known = UNKNOWN not in (base["sha256"], other["sha256"])
    return base["sha256"] == other["sha256"] if known else base["name"] == other["name"]


def hub_commit(name: str) -> str | None:
    """Return the commit of a hub repository as it was downloaded, or None where that can't be told."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        return extract_commit_hash(cached_file(name, "config.json"), None)
    except OSError:
        return None
