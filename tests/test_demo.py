"""The demo: what has not changed is not done again, and its numbers are the ones that the README claims."""

import json

import pytest
from conftest import ROOT, run_module

from experiments import demo
from experiments.configs import tenants


@pytest.fixture
def project(tmp_path):
    """A folder with the code and no build."""
    for name in ("dnd_jax", "data_pipeline", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_a_gauges_folders_are_beside_those_of_the_demo():
    """But for the world, which is one, and which another gauge's config doesn't make anew."""
    plain, other = demo.stations(""), demo.stations("gauge=align")
    assert plain["tenants"] == other["tenants"]
    for name in ("collect", "export", "train", "generate", "evaluate"):
        assert not set(plain[name][1]) & set(other[name][1])
        assert demo.stamp_of(tenants.get_config(""), name) != demo.stamp_of(tenants.get_config("gauge=align"), name)
    assert demo.stamp_of(tenants.get_config(""), "tenants") == demo.stamp_of(tenants.get_config("gauge=align"), "tenants")


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
    report = json.loads((root / "run" / "report.json").read_text())
    mean = {name: rung["mean"] for name, rung in report["rungs"].items()}
    assert mean["in_task"] >= 0.8 and mean["base"] <= 0.1 and mean["mean_adapter"] <= 0.15
    assert mean["dnd"] >= 0.45 and mean["dnd"] >= 0.55 * mean["in_task"]
    assert report["differences"][f"dnd-{report['best_label_free']}"]["ci95"][0] > 0
    assert report["differences"]["dnd-dnd_shuffled"]["ci95"][0] > 0
