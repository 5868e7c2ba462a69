"""Prompts and rows as users have them: text and JSON files in, token ids out."""

import pathlib
from typing import Any

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
        for field in ("prompt", "response", "system"):
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
        found = [v.get("prompt") if isinstance(v, dict) else v for v in listed]
        others = [i for i, prompt in enumerate(found) if not isinstance(prompt, str)]  # chats, or instructions
        rows = sources.to_rows([listed[i] for i in others], Source(str(path))) if others else []
        for i, row in zip(others, rows, strict=True):
            if not row.prompt.strip():
                raise InputError(f"{path}: row {i} has no text as its prompt: {str(listed[i])[:60]!r}")
            found[i] = row.prompt
    else:
        found = files.read_lines(path)
    prompts = [prompt for prompt in found if prompt.strip()]
    for prompt in prompts:
        check_text(prompt, str(path))
    if not prompts:
        raise InputError(f"{path}: no prompts, {len(found)} empty lines")
    return prompts


def messages(row: Row, content: Any) -> list[dict[str, Any]]:
    """Return a prompt as a chat; `content` is the user's turn, text or parts."""
    return [*([{"role": "system", "content": row.system}] if row.system else []), {"role": "user", "content": content}]


def prompt_text(tokenizer: Any, row: Row) -> str:
    """Return the text of a prompt: through the chat template where the tokenizer has one, else bare."""
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages(row, row.prompt), add_generation_prompt=True, tokenize=False)
    return f"{row.system}\n{row.prompt}" if row.system else row.prompt


def prompt_ids(tokenizer: Any, row: Row) -> list[int]:
    """Return the ids of a prompt; a chat template writes the special tokens itself."""
    return tokenizer(prompt_text(tokenizer, row), add_special_tokens=not tokenizer.chat_template).input_ids


def response_ids(tokenizer: Any, row: Row) -> list[int]:
    """Return the ids of a response, with the end-of-text token."""
    return [*tokenizer(row.response, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
