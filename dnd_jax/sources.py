"""Where a task's rows come from, in the forms that users have. Imports the `datasets` library lazily.

A source is the name of a JSON list, of JSON lines (`.jsonl`) or of a folder that `datasets` saved to disk; or a mapping with the
fields of an entry of LLaMA-Factory's `dataset_info.json`, as far as ENTRY and COLUMNS list them; or a reference to such an entry:

    "support_train.json"
    {"file_name": "support.jsonl", "columns": {"prompt": "question", "response": "answer"}}
    {"hf_hub_url": "google/boolq", "split": "train", "columns": {"prompt": "question", "response": "answer"}}
    {"registry": "data/dataset_info.json", "name": "support"}
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from dnd_jax import files
from dnd_jax.types import InputError

# what is looked for in files whose columns no source names; the first whose first column occurs
DEFAULT_COLUMNS: tuple[dict[str, str], ...] = (
    {"messages": "conversations", "system": "system", "images": "images"},
    {"messages": "messages", "system": "system", "images": "images"},
    {"prompt": "prompt", "response": "response", "system": "system", "images": "images"},
    {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "images": "images"},
)
COLUMNS = ("prompt", "query", "response", "system", "images", "messages")
JSON_LINES = (".jsonl", ".ndjson")
PLACE = "<image>"  # where a prompt has an image, by the convention of such datasets; images without one come first
HERE = "\ufdd0"  # no character, so in no text: in place of an image that is a part of a chat's turn
SPEAKERS = {"human": "prompt", "user": "prompt", "gpt": "response", "assistant": "response", "system": "system"}
TAGS = {"user_tag": "prompt", "assistant_tag": "response", "system_tag": "system"}
ENTRY: dict[str, type] = {"file_name": str, "hf_hub_url": str, "subset": str, "split": str, "num_samples": int, "formatting": str,
                          "columns": Mapping, "tags": Mapping}
ELSEWHERE = {"ms_hub_url", "om_hub_url"}  # of LLaMA-Factory: the same rows on other hubs


@dataclasses.dataclass(frozen=True)
class Row:
    """One example; `system` may be empty. `images` is a tuple of paths, or of what the `datasets` library decoded."""

    prompt: str
    response: str
    system: str = ""
    images: Any = ()


@dataclasses.dataclass(frozen=True)
class Source:
    """Where rows are.

    Attributes:
      place: file, folder, or with `hub` a name on the Hugging Face hub or a folder of data files.
      hub: read by `datasets.load_dataset`, which without network finds what it has read before.
      subset: of a hub dataset.
      split: of a hub dataset or a saved one, by default `train`.
      num_samples: rows that are taken, from the first; None for all.
      columns: of COLUMNS, under which names the rows have them; None to find out.
      tags: `role_tag`, `content_tag` and the names of speakers in chats, where they are not the usual ones.
    """

    place: str
    hub: bool = False
    subset: str | None = None
    split: str | None = None
    num_samples: int | None = None
    columns: Mapping[str, str] | None = None
    tags: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return "/".join(part for part in (self.place, self.subset, self.split) if part)

    @property
    def key(self) -> str:
        """A name that no other source has: that of a file, or all fields."""
        return self.place if self == Source(self.place) else repr(self)

    def sha256(self) -> str:
        """Return a hash of a file's bytes, or of the rows where they don't follow from these alone; of images count the paths."""
        if self == Source(self.place) and pathlib.Path(self.place).is_file():
            return files.sha256_file(self.place)
        texts = [[row.prompt, row.response, row.system, *map(image_text, row.images)] for row in read(self)]
        return files.sha256_text(json.dumps(texts))


def parse(value: Any, folder: pathlib.Path, where: str) -> Source:
    """Return the source that a task or a registry names; files are relative to `folder`.

    Raises:
      InputError: unknown fields or columns, values of another kind, or a file that isn't there; the message begins with `where`.
    """
    if isinstance(value, str):
        value = {"file_name": value}
    value = value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: a source is {str(value)[:60]!r}, expected a file's name or a mapping")
    if "registry" in value:
        return _registered(value, folder, where)
    for field, kind in ENTRY.items():
        found = value.get(field)
        texts = [text for pair in found.items() for text in pair] if isinstance(found, Mapping) else []
        if not isinstance(found, kind | type(None)) or not all(isinstance(text, str) for text in texts):
            expected = {Mapping: "names by their use", int: "a number", str: "a text"}[kind]
            raise InputError(f"{where}: {field} is {str(found)[:60]!r}, expected {expected}")
    columns, tags = value.get("columns"), value.get("tags") or {}
    if unknown := [*map(str, set(value) - set(ENTRY) - ELSEWHERE), *(set(columns or ()) - set(COLUMNS))]:
        raise InputError(f"{where}: {sorted(unknown)} are unknown, expected some of {tuple(ENTRY)}, with columns of {COLUMNS}")
    if value.get("formatting") == "sharegpt" and "messages" not in (columns or {}):
        columns = {"messages": "conversations"} | (columns or {})
    if (samples := value.get("num_samples")) is not None and (samples is True or samples < 1):
        raise InputError(f"{where}: num_samples is {samples!r}, expected a number of rows, at least 1")
    options = {key: value[key] for key in ("subset", "split", "num_samples") if value.get(key) is not None}
    if name := value.get("hf_hub_url"):
        return Source(name, True, columns=columns, tags=tags, **options)
    if not value.get("file_name"):
        raise InputError(f"{where}: names no source, expected 'file_name' or 'hf_hub_url'")
    path = folder / value["file_name"]
    if not path.exists():
        raise InputError(f"{where}: {path} is not there")
    if "subset" in options or (path.is_file() and options.get("split", "train") != "train"):
        raise InputError(f"{where}: {path}: subset is {options.get('subset')!r} and split is {options.get('split')!r}, which "
                         "datasets of a hub have, and a split also saved folders; give the rows a file of their own")
    return Source(str(path), columns=columns, tags=tags, **options)


def _registered(reference: Mapping[str, Any], folder: pathlib.Path, where: str) -> Source:
    """Return the source that an entry of a registry describes."""
    registry, name = reference["registry"], reference.get("name")
    if not isinstance(registry, str) or not isinstance(name, str):
        raise InputError(f"{where}: registry is {str(registry)[:60]!r} and name {str(name)[:60]!r}, expected two texts")
    path = folder / registry
    known = files.read_json(path)
    if not isinstance(known, dict) or name not in known:
        there = sorted(known) if isinstance(known, dict) else "a list"
        raise InputError(f"{where}: {path} has no dataset {name!r}, only {there}")
    if isinstance(known[name], dict) and "registry" in known[name]:
        raise InputError(f"{path}: {name}: refers to another registry, expected a source")
    return parse(known[name], path.parent, f"{path}: {name}")


def read(source: files.PathLike | Source) -> list[Row]:
    """Return a source's rows as they are; fields that a row lacks are empty.

    Raises:
      InputError: a missing or malformed file or row, or columns of which none occurs.
    """
    source = source if isinstance(source, Source) else Source(str(source))
    return to_rows(read_raw(source), source)


def to_rows(raw: Sequence[Mapping[str, Any]], source: Source) -> list[Row]:
    """Return rows as they are under the columns of a source; raise InputError, which names it, at what isn't one."""
    names = set().union(*raw)
    columns = source.columns or next((c for c in DEFAULT_COLUMNS if next(iter(c.values())) in names), DEFAULT_COLUMNS[2])
    for field, name in (source.columns or {}).items():
        if name not in names:
            raise InputError(f"{source}: no row has a column {name!r} for the {field}, there are {sorted(names)}")
    prompt = columns.get("messages") or columns.get("prompt")
    if prompt not in names:
        raise InputError(f"{source}: no row has a column {prompt!r} for the prompt, there are {sorted(names)}")
    return [_to_row(row, columns, source, i) for i, row in enumerate(raw)]


def read_raw(source: Source) -> list[dict[str, Any]]:
    """Read a source's rows under the columns that it has; raise InputError at a missing or malformed file."""
    path = pathlib.Path(source.place)
    if source.hub or path.is_dir():
        raw = _read_by_datasets(source)
    else:
        raw = read_json_lines(path) if path.suffix.lower() in JSON_LINES else files.read_json(path)
    if not isinstance(raw, list) or not raw or not all(isinstance(row, dict) for row in raw):
        raise InputError(f"{source}: expected a non-empty list of objects, found {str(raw)[:60]!r}")
    return raw[: source.num_samples]


def _to_row(raw: Mapping[str, Any], columns: Mapping[str, str], source: Source, number: int) -> Row:
    found = {field: _text(raw.get(columns[field]), f"{source}: row {number}: {columns[field]}")
             for field in COLUMNS[:4] if field in columns}
    images = raw.get(columns.get("images", "")) or []
    images = images if isinstance(images, list) else [images]
    for image in images:
        if not isinstance(image, str) and not hasattr(image, "size"):
            raise InputError(f"{source}: row {number}: an image is {str(image)[:60]!r}, expected a path or an image")
    if "messages" in columns:
        turns = _turns(raw.get(columns["messages"]), source.tags, f"{source}: row {number}: a turn")
        exchange, heard = _first_exchange(turns, source, number)
        found |= {field: text for field, text in exchange.items() if text}
        if images and any(HERE in text for _, text in turns):  # those of later exchanges are not of this row
            if (places := sum(text.count(HERE) for text in heard)) > len(images):
                raise InputError(f"{source}: row {number}: {places} images up to its first answer, {len(images)} in their column")
            images = images[:places]
    prompt = "\n".join(part for part in (found.get("prompt"), found.get("query")) if part).replace(HERE, PLACE if images else "")
    folder = pathlib.Path(source.place).parent
    response, system = (found.get(field, "").replace(HERE, "") for field in ("response", "system"))
    return Row(prompt, response, system, tuple(
        str(folder / image) if isinstance(image, str) and not source.hub else image for image in images))


def _text(value: Any, where: str) -> str:
    """Return a field as text; of a list of parts, as chats with images have it, text and the places of images."""
    if isinstance(value, list):
        if not all(isinstance(part, dict) and ("type" in part or "text" in part) for part in value):
            raise InputError(f"{where} is {str(value)[:60]!r}, expected a text, or a list of parts with 'type' and 'text'")
        return "".join(_part(part, where) for part in value)
    return "" if value is None or value != value else str(value)  # NaN is what pandas writes for an empty cell


def _part(part: Mapping[str, Any], where: str) -> str:
    return HERE if part.get("type") in ("image", "image_url") else _text(part.get("text"), where)


def _turns(chat: Any, tags: Mapping[str, str], where: str) -> list[tuple[Any, str]]:
    """Return the turns of a chat: who speaks, as the file has it, and the text."""
    turns = []
    for turn in chat if isinstance(chat, list) else [chat]:
        turn = turn if isinstance(turn, dict) else {"content": turn}
        content = turn.get(tags.get("content_tag", "value"))
        turns.append((turn.get(tags.get("role_tag", "from")) or turn.get("role"),
                      _text(turn.get("content") if content is None else content, where)))
    return turns


def _first_exchange(turns: Sequence[tuple[Any, str]], source: Source, number: int) -> tuple[dict[str, str], list[str]]:
    """Return the first answer, the question before it and the first system text; and the texts of all turns before the answer."""
    speakers = SPEAKERS | {source.tags[tag]: field for tag, field in TAGS.items() if tag in source.tags}
    fields, heard = {"prompt": "", "response": "", "system": ""}, []
    for speaker, text in turns:
        if not isinstance(speaker, str) or speaker not in speakers:
            raise InputError(f"{source}: row {number}: a turn is {text[:60]!r} of {speaker!r}, expected one of "
                             f"{sorted(speakers)}")
        field = speakers[speaker]
        if field == "response" and not fields["prompt"]:
            continue  # a greeting
        if field == "response" and text:
            fields[field] = text
            break
        heard.append(text)
        fields[field] = text if field == "prompt" else fields[field] or text
    return fields, heard


def read_json_lines(path: pathlib.Path) -> list[Any]:
    """Read JSON lines; raise InputError that names the line."""
    rows = []
    for number, line in enumerate(files.read_lines(path), 1):
        if line.strip():
            try:
                rows.append(json.loads(line, object_pairs_hook=files.unique))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}: line {number}: not JSON: {error}") from error
    return rows


def _read_by_datasets(source: Source) -> list[Any]:
    """Return rows by the `datasets` library, labels by their names."""
    import datasets

    datasets.disable_progress_bars()
    try:
        found = (datasets.load_dataset(source.place, source.subset, split=source.split or "train") if source.hub
                 else datasets.load_from_disk(source.place))
    except Exception as error:  # the library raises errors of many kinds, also of its parsers
        raise InputError(f"{source}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    if isinstance(found, datasets.DatasetDict):
        split = source.split or "train"
        if split not in found:
            raise InputError(f"{source}: has no split {split!r}, only {sorted(found)}")
        found = found[split]
    elif not source.hub and source.split not in (None, there := str(found.split or "train")):
        raise InputError(f"{source}: has no split {source.split!r}, only {there!r}")
    rows = list(found)
    for name, feature in found.features.items():
        if isinstance(feature, datasets.ClassLabel):
            rows = [row | {name: feature.int2str(label) if (label := row[name]) is not None and label >= 0 else None}
                    for row in rows]  # a label of -1 is none, as of test sets whose labels are kept back
    return rows


def image_text(image: Any) -> str:
    """Return a path as it is, and a hash of an image's values."""
    return image if isinstance(image, str) else files.sha256_text(repr(getattr(image, "tobytes", lambda: image)()))
