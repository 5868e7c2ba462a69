"""Harm is the paired difference to the base on rows that no task has anything to do with."""

import numpy as np
import pytest

from dnd_jax import harm
from dnd_jax.scoring.kinds import Scores
from dnd_jax.sources import Row

ROWS = [Row(f"what is {i} ?", str(i)) for i in range(6)]


def ask(kind, rows, adapter):
    """Score as an adapter would that spoils its first few rows, where the base is right."""
    values = np.ones(len(rows))
    values[: adapter or 0] = 0
    return Scores({kind: values}, np.zeros(len(rows)))


def test_harm_is_the_difference_to_the_base_over_tasks_and_rows():
    found = harm.measure([("a.json", "exact", ROWS)], {"dnd": [3, 0], "in_task": [6, 6]}, ask)["a.json"]
    assert (found["scoring"], found["n"], found["base"]) == ("exact", 6, 1.0)
    dnd, in_task = found["rungs"]["dnd"], found["rungs"]["in_task"]
    assert dnd["mean"] == 0.75 and dnd["difference"] == pytest.approx(-0.25)
    assert -0.75 < dnd["ci95"][0] < -0.25 < dnd["ci95"][1] <= 0
    assert in_task["difference"] == -1 and in_task["ci95"] == [-1, -1]


def test_the_report_says_harm_or_that_it_was_not_measured():
    assert "not measured" in harm.lines({})[0]
    line, = harm.lines(harm.measure([("a.json", "exact", ROWS)], {"dnd": [3, 0]}, ask))
    assert line.startswith("harm on a.json, 6 rows by exact: base 100.0%, dnd 75.0% (-25.0%, ")
