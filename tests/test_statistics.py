"""Bootstrap intervals cover what they should, and pair what is paired."""

import numpy as np
import pytest

from dnd_jax import report, statistics
from dnd_jax.scoring.kinds import Scores
from dnd_jax.statistics import crossed_interval, nested_interval


def test_mean_is_over_tasks_not_items():
    mean, (low, high) = nested_interval([np.ones(2), np.zeros(8)])
    assert mean == 0.5 and low == 0.0 and high == 1.0


def test_interval_covers_the_truth_about_95_times_in_100():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(100):
        rates = rng.beta(6, 4, 12)
        _, (low, high) = nested_interval([rng.random(30) < rate for rate in rates])
        covered += low <= 0.6 <= high
    assert 85 <= covered <= 100


def test_paired_differences_are_narrower_than_unpaired():
    rng = np.random.default_rng(0)
    hard = [rng.random(40) < rng.random() for _ in range(10)]
    better = [np.maximum(h, rng.random(40) < 0.1) for h in hard]
    _, (low, high) = nested_interval([b.astype(float) - h for b, h in zip(better, hard, strict=True)])
    _, (wide_low, wide_high) = nested_interval(better)
    assert low > 0 and high - low < 0.5 * (wide_high - wide_low)


@pytest.mark.parametrize("others", [(), ("loglikelihood",)])
def test_report_compares_rungs_and_shows_further_metrics(rng, others):
    names = ("choice", *others)
    found = {rung: [[Scores({name: rng.integers(0, 2, size).astype(float) for name in names}, np.eye(size)[0]) for _ in range(2)]
                    for size in (5, 8)] for rung in report.ORDER}
    result = report.summarise(found, {"ridge": "penalty 1"}, ["small", "large"])
    nearest = result["rungs"]["nearest"]
    expected = [np.mean([draw.main for draw in task]) for task in found["nearest"]]
    assert nearest["mean"] == pytest.approx(np.mean(expected)) and nearest["per_task"]["large"] == pytest.approx(expected[1])
    assert nearest["unparsable"] == pytest.approx((1 / 5 + 1 / 8) / 2)  # over tasks, as the mean
    assert result["scoring"] == "choice" and result["rungs"]["ridge"]["chosen"] == "penalty 1"
    cost = {"collect_s": 1, "train_s": None, "generate_s": 0.0123, "in_task_s": 1, "adapters_to_break_even": None}
    tasks = {"small": {"majority": 0.5, "chance": 0.25}, "large": {"majority": 0.3, "chance": 0.15}, "chosen on": {"majority": 1}}
    result |= {"harm": {}, "cost": cost, "form": "prompt", "audit": {"tasks": tasks, "findings": []}}
    lines = report.table(result).splitlines()
    assert "the most frequent response alone 40.0%, at most 50.0%, chance 20.0%, in the mean of 2 of 2 tasks" in lines
    assert "collecting 1 s, training unknown, generating 0.0123 s, in-task training 1 s; not known to pay back" in lines
    assert lines[0].endswith(others[0] if others else "won-lost")
    if others:
        value = np.mean([np.mean([draw.metrics["loglikelihood"].mean() for draw in task]) for task in found["dnd"]])
        (line,) = (line for line in lines if line.startswith("dnd "))
        assert nearest["metrics"].keys() == {"loglikelihood"} and f"{value:.1%}" in line.split()[-1]


VERDICTS = [  # interval of DnD minus shuffled, of DnD minus ridge, tasks; what is said
    ([0.3, 0.5], [0.1, 0.3], 12, "Generalises to held-out tasks: the best label-free rung is ridge"),
    ([0.3, 0.5], [-0.1, 0.3], 12, "Not shown to generalise beyond its rivals"),
    ([-0.01, 0.02], [0.1, 0.3], 12, "The condition does not matter, the generator is an averager"),
    ([-0.1, 0.8], [0.1, 0.3], 12, "Not shown that the condition matters"),
    ([-0.4, -0.2], [0.1, 0.3], 12, "The condition does harm"),
    ([0.3, 0.5], [0.1, 0.3], 6, "Generalises to held-out tasks: the best label-free rung is ridge"),
    ([0.3, 0.5], [0.1, 0.3], 5, "Better than its rivals on 5 held-out tasks, too few to say that it generalises"),
    ([0.3, 0.5], [0.1, 0.3], 1, "One held-out task says nothing about others"),
]


@pytest.mark.parametrize("shuffled,rival,tasks,said", VERDICTS)
def test_the_verdict_claims_what_the_intervals_allow(shuffled, rival, tasks, said):
    differences = {f"dnd-{name}": {"mean": float(np.mean(ci)), "ci95": ci} for name, ci in
                   (("dnd_shuffled", shuffled), ("ridge", rival))}
    rungs = {"dnd": {"per_task": dict.fromkeys(range(tasks), 0.5)}, "ridge": {"mean": 0.4}}
    assert report.verdict(rungs, differences, "ridge").startswith(said)


def test_adapters_that_learned_nothing_are_not_held_against_the_generator():
    differences = {f"dnd-{name}": {"mean": 0.0, "ci95": [0.0, 0.0]} for name in ("ridge", "dnd_shuffled")}
    rungs = {"dnd": {"per_task": {"a": 0.1, "b": 0.1}}, "ridge": {"mean": 0.1}, "base": {"mean": 0.1}, "in_task": {"mean": 0.1}}
    assert report.verdict(rungs, differences, "ridge").startswith("Nothing to generate: adapters trained on a task's own labels")


def test_resamples_are_the_same_however_many_are_made_at_once(rng, monkeypatch):
    scores = [rng.random(size) for size in (5, 30, 11)]
    whole = nested_interval(scores)
    monkeypatch.setattr(statistics, "AT_ONCE", 1000)
    assert nested_interval(scores) == whole


def test_tasks_with_the_same_items_are_not_so_many_independent_ones(rng):
    """Adapters that fail on the same tenth of the rows: more of them make the interval no narrower."""
    covered = 0
    for _ in range(100):
        lost = np.where(rng.random(50) < 0.1, -1.0, 0.0)
        _, (low, high) = crossed_interval(np.tile(lost, (12, 1)))
        covered += low <= -0.1 <= high
    assert covered >= 85
    _, (low, high) = crossed_interval(np.repeat(rng.normal(size=(12, 1)), 50, axis=1))  # all rows alike: the tasks count
    assert high - low > 0.5
