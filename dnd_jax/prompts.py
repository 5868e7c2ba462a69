"""Prompts and rows as users have them: text and JSON files in, token ids out."""

import json
import pathlib
from typing import Any

from safetensors import SafetensorError

from dnd_jax import files, sources
from dnd_jax.sources import Row, Source
from dnd_jax.types import InputError


def read_rows(source: files.PathLike | Source) -> list[Row]:
    """Read the rows of a source, for instance a JSON list of `{"prompt", "response", "system"}`; `system` may be left out.

    Raises:
      InputError: an empty or malformed source, or a row without prompt or response; the message names the row.
    """
    rows = sources.read(source)
    for i, row in enumerate(rows):
        for field in ("prompt", "response"):
            if not getattr(row, field).strip():
                raise InputError(f"{source}: row {i} has no text in {field!r}: {str(row)[:80]}")
            check_text(getattr(row, field), f"{source}: row {i}")
    return rows


def check_text(text: str, where: str) -> None:
    """Raise InputError at half of a surrogate pair, as JSON may hold it, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {text[:60]!r} holds half of a character, {text[error.start]!r}") from error


def read_prompts(path: files.PathLike) -> list[str]:
    """Read unlabeled prompts: a JSON list (or JSON lines) of strings or of rows as they are trained on, or a text, one a line.

    Raises:
      InputError: a missing or malformed file, or one without prompts.
    """
    path = pathlib.Path(path)
    found: list[Any]
    if path.suffix.lower() in (".json", *sources.JSON_LINES):
        value = sources.read_json_lines(path) if path.suffix.lower() in sources.JSON_LINES else files.read_json(path)
        listed = value if isinstance(value, list) else [value]
        if strange := [v for v in listed if not isinstance(v, str | dict) or listed is not value]:
            raise InputError(f"{path}: expected a list of strings or of rows with a 'prompt', found {str(strange[0])[:60]!r}")
        rows = [v for v in listed if isinstance(v, dict)]
        asked = iter(sources.to_rows(rows, Source(str(path))) if rows else [])
        found = [v if isinstance(v, str) else next(asked).prompt for v in listed]
    else:
        found = [line.rstrip("\r") for line in files.read_lines(path)]
    prompts = [prompt for prompt in found if prompt.strip()]
    for prompt in prompts:
        check_text(prompt, str(path))
    if not prompts:
        raise InputError(f"{path}: no prompts, {len(found)} empty lines")
    return prompts


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
        return kind.from_pretrained(base, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{base}: no model: {(str(error).splitlines() or [type(error).__name__])[0]}") from error


def base_identity(base: str) -> dict[str, str]:
    """Return a base model's name and a hash: of a folder's config and weights, or a hub repository's commit."""
    if pathlib.Path(base).is_dir():
        folder = pathlib.Path(base)
        weights = sorted(path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
        return {"name": base, "sha256": files.sha256_text(
            files.sha256_files(weights) + files.sha256_files(folder.glob("config.json")))}
    from transformers import AutoConfig

    return {"name": base, "sha256": str(getattr(AutoConfig.from_pretrained(base), "_commit_hash", None))}


def messages(row: Row) -> list[dict[str, str]]:
    """Return a prompt as a chat."""
    return [*([{"role": "system", "content": row.system}] if row.system else []), {"role": "user", "content": row.prompt}]


def prompt_text(tokenizer: Any, row: Row) -> str:
    """Return the text of a prompt: through the chat template where the tokenizer has one, else bare."""
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages(row), add_generation_prompt=True, tokenize=False)
    return f"{row.system}\n{row.prompt}" if row.system else row.prompt


def prompt_ids(tokenizer: Any, row: Row) -> list[int]:
    """Return the ids of a prompt; a chat template writes the special tokens itself."""
    return tokenizer(prompt_text(tokenizer, row), add_special_tokens=not tokenizer.chat_template).input_ids


def response_ids(tokenizer: Any, row: Row) -> list[int]:
    """Return the ids of a response, with the end-of-text token."""
    return [*tokenizer(row.response, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
