"""All stages by one command: what it runs, what it says first, and what the report holds."""

import json
import types

import pytest
from conftest import SMOKE, run_module

from dnd_jax import adapters, embeddings, pairs, workdirs
from experiments import run
from experiments.configs import common_sense, tenants


@pytest.fixture(scope="module")
def ran(root, smoke):
    """The one command, on what the stages have made: its output and the files that it changed."""
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    done = run_module("experiments.run", SMOKE, f"--workdir={root.relative_to(smoke)}/run", cwd=smoke)
    after = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    return done.stdout, {str(p.relative_to(root)) for p, time in after.items() if before.get(p) != time}


def test_one_command_runs_all_stages_and_repeats_no_work(ran, root):
    said, changed = ran
    assert "all 11 runs are there" in said and [line.split()[3] for line in said.splitlines() if line.startswith("== ")] == [
        "data_pipeline.datasets", "data_pipeline.collect", "data_pipeline.export", "dnd_jax.train", "dnd_jax.generate",
        "dnd_jax.generate", "dnd_jax.evaluate"]
    assert "build/tenants-smoke/store: is there, made of the same" in said
    assert {name for name in changed if not name.startswith(("run/generated/", "run/report."))} <= {
        "run/metrics.jsonl", "run/.lock"}
    for task in pairs.open_store(root / "store").split("test"):
        assert adapters.read(root / "run/generated" / task.name)[1].config["peft_type"] == "LORA"


def test_one_command_of_a_paper_experiment_ends_with_its_ladder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = common_sense.get_config("ARC-c")
    for entry in config.tasks.values():
        for part in ("train", "test"):
            (tmp_path / entry[part]).parent.mkdir(exist_ok=True)
            (tmp_path / entry[part]).touch()
    commands = run.stages(config, ["--config=c.py"], "w", 2)
    assert [words[0] for words in commands] == [
        "data_pipeline.collect", "data_pipeline.export", "dnd_jax.train", *["dnd_jax.generate"] * 2, "dnd_jax.evaluate"]
    assert commands[3][2:] == ["--prompts=runs/common_sense/ARC-c/store/tasks/ARC-c/prompts.json", "--out=w/generated/ARC-c"]
    assert commands[-1] == ["dnd_jax.evaluate", "--config=c.py", "--workdir=w"]
    assert run.stages(config, ["--config=c.py"], "w", 2, True)[-1] == [*commands[-1], "--despite_findings"]


def test_report_has_every_rung_and_stands_alone(ran, root):
    said, _ = ran
    report = json.loads((root / "run" / "report.json").read_text())
    rungs = ("base", "in_context", "mean_adapter", "mean_product", "best_single", "nearest", "weighted_topk", "ridge",
             "ridge_wide", "random", "multi_task", "dnd", "dnd_shuffled", "in_task")
    assert set(rungs) <= report["rungs"].keys()
    for name in rungs:
        rung = report["rungs"][name]
        assert 0 <= rung["ci95"][0] <= rung["mean"] <= rung["ci95"][1] <= 1 and len(rung["per_task"]) == 2
        assert name in said
    assert report["rungs"]["ridge_wide"]["chosen"].split(",")[0] in embeddings.WIDE
    assert {"collect_s", "train_s", "generate_s", "adapters_to_break_even"} <= report["cost"].keys()
    assert [place.rsplit("/")[-1] for place in report["harm"]] == ["questions.json", "conversions.json"]
    assert all(found["n"] == 96 and found["rungs"].keys() == {"dnd", "in_task"} for found in report["harm"].values())
    assert report["audit"]["findings"] == [] and report["verdict"] in said
    page = (root / "run" / "report.html").read_text()
    assert page.count("<svg") == 3 and report["verdict"].split(":")[0] in page
    assert "src=" not in page and "href=\"http" not in page


@pytest.mark.parametrize("field,value,said", [
    ("evaluate.scoring", "guess", "scoring is 'guess'"), ("condition.form", "poem", "condition.form is 'poem'"),
    ("export.gauge", "alin", "gauge is 'alin'"),
    ("condition.pool", -3, "pool is -3"), ("encoder.kind", "sentance", "kind is 'sentance'"),
    ("evaluate.unrelated", ("a.json", "exact"), "unrelated has 'a.json', expected pairs"),
    ("train.clip_norm", -1.0, "clip_norm is -1.0"),
    ("evaluate.unrelated", (("nowhere.json", "exact"),), "config.evaluate.unrelated: nowhere.json")])
def test_what_a_late_stage_would_refuse_is_refused_first(root, smoke, monkeypatch, field, value, said):
    monkeypatch.chdir(smoke)
    config = tenants.get_config("smoke").unlock()
    run.check(config)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(adapters.InputError, match=said):
        run.check(config)


def test_rows_that_cannot_be_scored_are_refused_first(tmp_path):
    (tmp_path / "tests.json").write_text(json.dumps([{"prompt": "def f():", "response": "assert (", "system": ""}]))
    config = tenants.get_config("smoke").unlock()
    del config.tasks
    config.tasks = {"f": {"split": "test", "train": str(tmp_path / "tests.json"), "test": str(tmp_path / "tests.json")}}
    config.evaluate.unrelated, config.evaluate.scoring = (), "code"
    with pytest.raises(adapters.InputError, match=r"tests\.json: row 0: the response is to be tests in Python"):
        run.check(config)
    config.evaluate.unrelated = ((str(tmp_path / "tests.json"), "code"),)
    with pytest.raises(adapters.InputError, match=r"unrelated: .*tests\.json: row 0: the response is to be tests in Python"):
        run.check(config)
    config.evaluate.unrelated, config.tasks.f.split = (), "validation"
    with pytest.raises(adapters.InputError, match="no task has the split 'test'"):
        run.check(config)
    config.tasks.g = {"split": "test", "train": str(tmp_path / "tests.json")}
    config.evaluate.scoring = "exact"
    with pytest.raises(adapters.InputError, match="g names no 'test' file"):
        run.check(config)


def test_a_terminated_training_ends_all_stages(root, smoke, monkeypatch):
    """It ends with status 0, as jobs want it."""
    monkeypatch.chdir(smoke)
    config, done = tenants.get_config("smoke"), []
    workdirs.check_trained(config, root / "run")
    args = types.SimpleNamespace(config=config.copy_and_resolve_references(), workdir=str(smoke / "new"), jobs=1,
                                 despite_findings=False)
    monkeypatch.setattr(run, "run", lambda command: done.append(command[0]))
    monkeypatch.setattr(run.cli, "config_words", lambda: ["--config=c.py"])
    with pytest.raises(adapters.InputError, match="new: training ended before step 4; the same command goes on from there"):
        run.main(args)
    assert done == ["data_pipeline.datasets", "data_pipeline.collect", "data_pipeline.export", "dnd_jax.train"]
