"""The kinds of scoring: what a model is asked for, and what its answers are worth.

  exact         greedy answers equal to the responses
  choice        greedy answers that name the right option; the likeliest option
  final_answer  greedy answers with the right final answer
  code          sampled programs that pass the row's tests, pass@1, 5 and 10
  vision        choice where a row lists options, else the final answer; rows usually have images
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from dnd_jax.scoring import choice, code, final_answer
from dnd_jax.scoring.model import Model, exact_match
from dnd_jax.sources import Row
from dnd_jax.types import InputError

KINDS = ("exact", "choice", "final_answer", "code", "vision")
PASSES = (1, 5, 10)
NOT_PYTHON = ("SyntaxError", "IndentationError", "TabError")


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of every row: the metrics, 0 to 1, the one that counts first; and the share of its answers that can't be parsed."""

    metrics: dict[str, np.ndarray]
    unparsable: np.ndarray

    @property
    def main(self) -> np.ndarray:
        return next(iter(self.metrics.values()))


def check(kind: str) -> None:
    """Raise InputError at an unknown kind."""
    if kind not in KINDS:
        raise InputError(f"scoring is {kind!r}, expected one of {KINDS}")


def check_rows(kind: str, rows: Sequence[Row], where: str) -> None:
    """Raise InputError, its message beginning with `where`, at a row that can't be scored by a kind, before a model is asked."""
    if kind == "choice":
        choice.options(rows, where)
    if kind == "code":
        code.check_rows(rows, where)
    if kind == "final_answer":
        final_answer.golds(rows, where)
    if kind == "vision":
        final_answer.golds([row for row in rows if not choice.listed(row)], where)


def score(kind: str, model: Model, rows: Sequence[Row], *, valid: Collection[str], samples: int, temperature: float,
          **ask: Any) -> Scores:
    """Ask a model for every row and score what it answers.

    Args:
      kind: of KINDS.
      model: a base with an adapter in use, or without.
      rows: of one task.
      valid: of `exact`, all answers of the task; any other is unparsable.
      samples: of `code`, answers to each row.
      temperature: of `code`.
      ask: `adapter` and `examples`, as `Model.answer` takes them.
    """
    check(kind)
    if kind == "code":
        return _code(model.sample(rows, samples, temperature, **ask), rows)
    if kind == "vision":
        return _vision(model, rows, ask)
    answers = model.answer(rows, **ask)
    if kind == "exact":
        valid = {answer.strip() for answer in valid}
        return Scores({"exact_match": exact_match(answers, rows)}, np.array([float(a not in valid) for a in answers]))
    if kind == "final_answer":
        right, unparsable = final_answer.correct(answers, rows)
        return Scores({"final_answer": right}, unparsable)
    options = choice.options(rows)
    right, unparsable = choice.by_answer(answers, options, rows)
    likeliest = choice.by_loglikelihood(model.loglikelihood(rows, options, **ask), options, rows)
    return Scores({"choice": right, "loglikelihood": likeliest}, unparsable)


def _vision(model: Model, rows: Sequence[Row], ask: dict[str, Any]) -> Scores:
    right, unparsable = np.zeros(len(rows)), np.zeros(len(rows))
    for i, (answer, row) in enumerate(zip(model.answer(rows, **ask), rows, strict=True)):
        listed = choice.listed(row)
        (right[i],), (unparsable[i],) = (choice.by_answer([answer], [listed], [row]) if listed
                                         else final_answer.correct([answer], [row]))
    return Scores({"choice_or_final_answer": right}, unparsable)


def _code(answers: Sequence[Sequence[str]], rows: Sequence[Row]) -> Scores:
    outcomes = code.run_all(rows, answers)
    passed = [sum(o.passed for o in found) for found in outcomes]
    broken = [np.mean([o.reason.startswith(NOT_PYTHON) for o in found]) for found in outcomes]
    counts = [k for k in PASSES if k <= len(answers[0])]
    return Scores({f"pass@{k}": np.array([code.pass_at_k(len(found), c, k) for found, c in zip(answers, passed, strict=True)])
                   for k in counts}, np.array(broken))
