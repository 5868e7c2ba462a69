"""The overhead table: published sizes, measured costs of cut-down ones, and the ratios recomputed from both."""

import json

import pytest
from conftest import run_module

from experiments.benchmarks import overhead
from experiments.configs import tenants

COST = {"collect_s": 80.0, "train_s": 20.0, "generate_s": 0.1, "in_task_s": 1200.0, "adapters_to_break_even": 1}


def test_the_ratio_of_the_paper_with_and_without_the_rest():
    found = overhead.times_faster(COST)
    assert found["alone"] == pytest.approx(12_000)
    assert found["of_1"] == pytest.approx(1200 / 100.1) and found["of_10000"] == pytest.approx(1200 / 0.11)


def test_cutting_down_keeps_kernel_and_rank_and_fits_the_cut_base():
    for name, get_config in overhead.CONFIGS.items():
        whole, small = get_config(), overhead.cut_down(get_config(), 8)
        (decoder, layout), (large, _) = overhead.make_decoder(small), overhead.make_decoder(whole)
        assert decoder.features[-1] == layout.shape and layout.rank == whole.collect.rank, name
        assert decoder.kernel_size == large.kernel_size and decoder.flops < large.flops / 500
        assert bool(decoder.length) == bool(large.length)


@pytest.mark.slow
def test_command_measures_and_adds_a_finished_run(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.json").write_text(json.dumps({"cost": COST}))
    done = run_module("experiments.benchmarks.overhead", "--models=0.5b", "--scale=100", "--tokens=8", "--repeats=1",
                      "--report=mine/report.json", "--json=out.json", cwd=tmp_path)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["published"]["0.5b"]["parameters"] == pytest.approx(1.11e9, rel=0.03)
    row = found["measured"]["0.5b"]
    assert min(row["generate_s"], row["train_sample_s"], row["lora_step_s"]) > 0 and row["generate_bytes"] > 4 * row["parameters"]
    assert row["in_task_s"] == pytest.approx(row["lora_step_s"] * 5000 / 16)
    assert found["measured"]["mine"]["faster"]["alone"] == pytest.approx(12_000)
    assert "every width divided by 100" in done.stdout and "1.2e+04" in done.stdout and "but for mine" in done.stdout


def test_reports_without_costs_and_unknown_sizes_are_refused(tmp_path):
    (tmp_path / "report.json").write_text('{"cost": {"train_s": 1, "in_task_s": null}}')
    with pytest.raises(overhead.InputError, match=r"report\.json: its cost has no \['collect_s', 'generate_s', 'in_task_s'\]"):
        overhead.read_cost(tmp_path / "report.json")
    done = run_module("experiments.benchmarks.overhead", "--models=70b", cwd=tmp_path, check=False)
    assert done.returncode == 1 and "['70b']" in done.stderr
    with pytest.raises(overhead.InputError, match=r"config\.model is missing"):
        overhead.cut_down(tenants.get_config(), 8)
