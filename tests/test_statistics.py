"""Bootstrap intervals cover what they should, and pair what is paired."""

import numpy as np
import pytest

from dnd_jax import report
from dnd_jax.scoring.kinds import Scores
from dnd_jax.statistics import Bootstrap


def test_mean_is_over_tasks_not_items():
    mean, (low, high) = Bootstrap([2, 8]).interval([np.ones(2), np.zeros(8)])
    assert mean == 0.5 and low == 0.0 and high == 1.0


def test_interval_covers_the_truth_about_95_times_in_100():
    rng, covered = np.random.default_rng(0), 0
    bootstrap = Bootstrap([30] * 12)
    for _ in range(100):
        rates = rng.beta(6, 4, 12)
        _, (low, high) = bootstrap.interval([rng.random(30) < rate for rate in rates])
        covered += low <= 0.6 <= high
    assert 85 <= covered <= 100


def test_paired_differences_are_narrower_than_unpaired():
    rng = np.random.default_rng(0)
    bootstrap = Bootstrap([40] * 10)
    hard = [rng.random(40) < rng.random() for _ in range(10)]
    better = [np.maximum(h, rng.random(40) < 0.1) for h in hard]
    _, (low, high) = bootstrap.interval([b.astype(float) - h for b, h in zip(better, hard, strict=True)])
    _, (wide_low, wide_high) = bootstrap.interval(better)
    assert low > 0 and high - low < 0.5 * (wide_high - wide_low)


@pytest.mark.parametrize("others", [(), ("loglikelihood",)])
def test_report_compares_rungs_and_shows_further_metrics(rng, others):
    names = ("choice", *others)
    found = {rung: [[Scores({name: rng.integers(0, 2, size).astype(float) for name in names}, np.zeros(size)) for _ in range(2)]
                    for size in (5, 8)] for rung in report.ORDER}
    result = report.summarise(found, {"ridge": "penalty 1"}, ["small", "large"])
    nearest = result["rungs"]["nearest"]
    expected = [np.mean([draw.main for draw in task]) for task in found["nearest"]]
    assert nearest["mean"] == pytest.approx(np.mean(expected)) and nearest["per_task"]["large"] == pytest.approx(expected[1])
    assert result["scoring"] == "choice" and result["rungs"]["ridge"]["chosen"] == "penalty 1"
    lines = report.table(result | {"harm": {}, "cost": {"collect_s": 1, "train_s": 1, "generate_s": 1, "in_task_s": 1,
                                                        "adapters_to_break_even": None}}).splitlines()
    assert lines[0].endswith(others[0] if others else "won-lost")
    if others:
        value = np.mean([np.mean([draw.metrics["loglikelihood"].mean() for draw in task]) for task in found["dnd"]])
        assert nearest["metrics"].keys() == {"loglikelihood"} and f"{value:.1%}" in lines[11].split()[-1]
