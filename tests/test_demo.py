"""The demo: what has not changed is not done again."""

import pytest
from conftest import ROOT, run_module


@pytest.mark.slow
def test_second_demo_only_prints(tmp_path):
    for name in ("dnd_jax", "data_pipeline", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    first = run_module("experiments.demo", "--arg=smoke", cwd=tmp_path)
    assert first.stdout.count("== ") == 6
    build = tmp_path / "build"
    before = {p: p.stat().st_mtime_ns for p in build.rglob("*") if p.is_file()}
    second = run_module("experiments.demo", "--arg=smoke", cwd=tmp_path)
    assert "== " not in second.stdout and "dnd_shuffled" in second.stdout
    assert {p: p.stat().st_mtime_ns for p in build.rglob("*") if p.is_file()} == before
    changed = build / "tenants-smoke" / "run" / "report.json"
    changed.unlink()
    third = run_module("experiments.demo", "--arg=smoke", cwd=tmp_path)
    assert third.stdout.count("== ") == 1 and changed.exists()
