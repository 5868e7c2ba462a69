"""Audit of data before any model is asked: labels, empty fields, duplicates, prompts that were trained on."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dnd_jax.scoring.choice import FEW_LABELS, list_of, listed
from dnd_jax.sources import Row, image_text


def audit(test: Mapping[str, Sequence[Row]], trained: Mapping[str, Sequence[Row]], *, ngram: int | None = None) -> dict[str, Any]:
    """Return the facts of every test set under `tasks`, and `findings`, one sentence each, empty when all is sound.

    Args:
      test: rows of each test set; fields may be empty.
      trained: rows of each training set.
      ngram: also count test prompts that share so many consecutive words with a training prompt.
    """
    seen = {_question(row): name for name, rows in trained.items() for row in rows}
    grams = {gram for rows in trained.values() for row in rows for gram in _ngrams(row.prompt, ngram)}
    tasks: dict[str, Any] = {}
    findings: list[str] = []
    for name, rows in test.items():
        tasks[name] = facts = _facts(rows)
        overlap = [row for row in rows if _question(row) in seen]
        shared = sum(1 for row in rows if _question(row) not in seen and not grams.isdisjoint(_ngrams(row.prompt, ngram)))
        facts |= {"prompts_trained_on": len(overlap)} | ({f"share_{ngram}_words": shared} if ngram else {})
        findings += [f"{name}: {sentence}" for sentence in _faults(rows, facts)]
        if overlap:
            first = overlap[0]
            findings.append(f"{name}: {len(overlap)} of {len(rows)} prompts occur in training, first {first.prompt[:80]!r} in "
                            f"{seen[_question(first)]}")
        if shared:
            findings.append(f"{name}: {shared} of {len(rows)} prompts share {ngram} consecutive words with a training prompt")
    return {"tasks": tasks, "findings": findings + _same_files(trained, test)}


def _facts(rows: Sequence[Row]) -> dict[str, Any]:
    """Return rows, distinct responses, and of sets of choice the majority's share and chance.

    A response that is the text of one of the prompt's options counts as the label before it. Chance is among the options that a
    prompt lists, or else among the labels.
    """
    labels = Counter(label for row in rows if (label := _label(row)))
    facts: dict[str, Any] = {"rows": len(rows), "labels": len(labels)}
    if 0 < len(labels) <= FEW_LABELS:
        chance = sum(1 / (len(listed(row)) or len(labels)) for row in rows) / len(rows)
        facts |= {"majority": max(labels.values()) / labels.total(), "chance": chance,
                  "distribution": {label: count / labels.total() for label, count in labels.most_common()}}
    return facts


def _label(row: Row) -> str:
    response = row.response.strip()
    return next((label for label, text in list_of(row.prompt).items() if text == response), response)


def _faults(rows: Sequence[Row], facts: Mapping[str, Any]) -> list[str]:
    found = []
    for field in ("prompt", "response"):
        empty = sum(1 for row in rows if not getattr(row, field).strip())
        if empty:
            found.append(f"{empty} of {len(rows)} rows have no {field}")
    if facts["labels"] == 1 and len(rows) > 1:
        found.append(f"every one of {len(rows)} responses is {next(iter(facts['distribution']))!r}")
    repeated = len(rows) - len({(row.system, row.response, *_question(row)) for row in rows})
    if repeated:
        found.append(f"{repeated} of {len(rows)} rows repeat another")
    return found


def _same_files(trained: Mapping[str, Sequence[Row]], test: Mapping[str, Sequence[Row]]) -> list[str]:
    first: dict[Any, str] = {}
    found = []
    for name, rows in (*((f"{name}, training rows" if name in test else name, rows) for name, rows in trained.items()),
                       *test.items()):
        content = tuple(sorted((row.response, *_question(row)) for row in rows))
        if content in first:
            found.append(f"{name}: the same rows as {first[content]}")
        first.setdefault(content, name)
    return found


def _question(row: Row) -> tuple[str, ...]:
    """Return what a row asks, whatever its white space: the same text about another picture is another question."""
    return " ".join(row.prompt.split()), *map(image_text, row.images)


def _ngrams(text: str, n: int | None) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower()) if n else []
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)} if n else set()
