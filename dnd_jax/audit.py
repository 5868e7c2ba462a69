"""Audit of the evaluation data, before any model is asked: labels, duplicates, prompts that were trained on."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dnd_jax.prompts import Row


def audit(test: Mapping[str, Sequence[Row]], trained: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Return rows, labels, majority and chance per test task, and `findings`, one sentence each, empty when sound."""
    seen = {row.prompt: task for task, rows in trained.items() for row in rows}
    tasks: dict[str, Any] = {}
    findings: list[str] = []
    files: dict[Any, str] = {}
    for task, rows in test.items():
        labels = Counter(row.response for row in rows)
        overlap = [row.prompt for row in rows if row.prompt in seen]
        tasks[task] = {"rows": len(rows), "labels": len(labels), "majority": max(labels.values()) / len(rows),
                       "chance": 1 / len(labels), "prompts_trained_on": len(overlap)}
        if len(labels) == 1:
            findings.append(f"{task}: every one of {len(rows)} responses is {rows[0].response!r}")
        if overlap:
            first = f"{overlap[0]!r} in {seen[overlap[0]]}"
            findings.append(f"{task}: {len(overlap)} of {len(rows)} prompts occur in training, first {first}")
        content = tuple(sorted((row.prompt, row.response) for row in rows))
        if content in files:
            findings.append(f"{task}: the same rows as {files[content]}")
        files[content] = task
    return {"tasks": tasks, "findings": findings}
