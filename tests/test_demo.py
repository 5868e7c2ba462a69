"""The demo: what has not changed is not done again, and its numbers are the ones that the README claims."""

import itertools
import json

import pytest
from conftest import ROOT, run_module

from dnd_jax import report
from experiments import demo
from experiments.configs import tenants


@pytest.fixture
def project(tmp_path):
    """A folder with the code and no build."""
    for name in ("dnd_jax", "data_pipeline", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_a_gauges_folders_are_beside_those_of_the_demo():
    """But for what they share, the world and, of gauges, the runs: that has the same stamp and key then."""
    args = ("", "gauge=align", "gauge=canonical")
    configs, stages = [tenants.get_config(arg) for arg in args], [demo.stages(arg) for arg in args]
    shared = {"tenants": {(0, 1), (0, 2), (1, 2)}, "collect": {(1, 2)}}
    for name in stages[0]:
        for i, j in itertools.combinations(range(3), 2):
            same = (i, j) in shared.get(name, ())
            assert (set(stages[i][name][1]) == set(stages[j][name][1])) == same
            assert (demo.stamp_of(configs[i], name) == demo.stamp_of(configs[j], name)) == same
            assert (demo.settings_of(configs[i], name) == demo.settings_of(configs[j], name)) == same
            if not same:
                assert not set(stages[i][name][1]) & set(stages[j][name][1])


@pytest.mark.slow
def test_second_demo_only_prints(project):
    first = run_module("experiments.demo", "--arg=smoke", cwd=project)
    assert first.stdout.count("== ") == 6
    build = project / "build"
    before = {p: p.stat().st_mtime_ns for p in build.rglob("*") if p.is_file()}
    second = run_module("experiments.demo", "--arg=smoke", cwd=project)
    assert "== " not in second.stdout and "dnd_shuffled" in second.stdout
    assert {p: p.stat().st_mtime_ns for p in build.rglob("*") if p.is_file()} == before
    lost = build / "tenants-smoke" / "run" / "report.json"
    lost.unlink()
    third = run_module("experiments.demo", "--arg=smoke", cwd=project)
    assert third.stdout.count("== ") == 1 and lost.exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_numbers(project, seed):
    run_module("experiments.demo", f"--arg=seed={seed}" if seed else "--arg=", cwd=project)
    root = project / "build" / (f"tenants-seed{seed}" if seed else "tenants")
    known = json.loads((root / "base_model.json").read_text())
    assert known["fact_recall"] >= 0.95 and known["tenants_prompts"] < 0.1
    found = json.loads((root / "run" / "report.json").read_text())
    mean = {name: rung["mean"] for name, rung in found["rungs"].items()}
    assert mean["in_task"] >= 0.8 and mean["base"] <= 0.1 and mean["mean_adapter"] <= 0.15
    assert mean["dnd"] >= 0.45 and mean["dnd"] >= 0.55 * mean["in_task"]
    beaten = [name for name in report.LABEL_FREE if name != "ridge_wide"]  # which is as good: README says so
    assert all(found["differences"][f"dnd-{name}"]["ci95"][0] > 0 for name in (*beaten, "dnd_shuffled"))
