"""Harm: what adapters do to rows that have nothing to do with the tasks they were made for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dnd_jax.scoring.kinds import Scores
from dnd_jax.sources import Row
from dnd_jax.statistics import crossed_interval


def measure(unrelated: Sequence[tuple[str, str, Sequence[Row]]], adapters: Mapping[str, Sequence[Any]],
            ask: Callable[[str, Sequence[Row], Any], Scores]) -> dict[str, Any]:
    """Score adapters on unrelated rows, beside the base.

    Args:
      unrelated: files, each with its scoring and rows.
      adapters: by rung, the adapter of every test task.
      ask: scores rows by a kind of scoring with an adapter, or with None for the base alone.

    Returns:
      By file: scoring, number of rows, the base's mean, and for every rung its mean and the paired difference to the base
      with a 95% interval over tasks and rows; negative is harm.
    """
    result: dict[str, Any] = {}
    for path, kind, rows in unrelated:
        base = ask(kind, rows, None).main
        found = result[path] = {"scoring": kind, "n": len(rows), "base": float(base.mean()), "rungs": {}}
        for name, made in adapters.items():
            scores = np.stack([ask(kind, rows, adapter).main for adapter in made])
            mean, interval = crossed_interval(scores - base)
            found["rungs"][name] = {"mean": float(np.mean(scores)), "difference": mean, "ci95": interval}
    return result


def lines(result: Mapping[str, Any]) -> list[str]:
    """Return a result of `measure` as lines of text."""
    text = []
    for path, found in result.items():
        text.append(f"harm on {path}, {found['n']} rows by {found['scoring'].replace('_', ' ')}: base {found['base']:.1%}"
                    + "".join(f", {name} {rung['mean']:.1%} ({rung['difference']:+.1%}, {rung['ci95'][0]:+.1%} to "
                              f"{rung['ci95'][1]:+.1%})" for name, rung in found["rungs"].items()))
    return text or ["harm: not measured, config.evaluate.unrelated names no files"]
