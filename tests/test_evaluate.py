"""The ladder: settings, runs and decoders that it refuses, and what it leaves out."""

import json
import re
import shutil
import types

import numpy as np
import pytest
from conftest import SMOKE, run_module

from dnd_jax import adapters, checkpoints, checksums, embeddings, evaluate, pairs, rungs
from dnd_jax.tasks import multi_task, read_tasks
from experiments.configs import tenants


@pytest.mark.parametrize("field,value,expected", [
    ("top_k", (0,), "positive numbers"), ("top_k", (), "one at least"), ("penalties", (1.0, -1.0), "positive numbers"),
    ("draws", 0, "at least 1"), ("ridge_draws", 0, "at least 1"), ("batch_size", 0, "at least 1"), ("samples", 0, "at least 1"),
    ("max_new_tokens", 0, "at least 1"), ("in_context_examples", -1, "at least 0"), ("temperature", 0.0, "a positive number"),
    ("scoring", "guess", "one of")])
def test_settings_that_no_rung_can_be_asked_with_are_named(field, value, expected):
    settings = tenants.get_config("smoke").unlock().evaluate
    evaluate.check(settings)
    settings[field] = value
    with pytest.raises(adapters.InputError, match=f"{field} is {re.escape(repr(value))}, expected .*{expected}"):
        evaluate.check(settings)


@pytest.mark.parametrize("change,message", [
    ("adapters", r"run: it was trained on adapters of \w+ with sha256 another, .*store says"),
    ("decoder", r"run: it was trained on \['another', .*/store says \["),
    ("encoder", "run: its encoder is .*'length': 15.*store says"),
    ("layout", "run: its layout is"), ("split", "config.tasks: the split of .* is train, .*store says test"),
    ("new task", "config.tasks: the split of late is test, .*store says None"),
    ("base", "config.base: .*/other has sha256 .*, .*store says")])
def test_a_ladder_of_parts_that_do_not_belong_together_is_refused(root, smoke, tmp_path, monkeypatch, change, message):
    """A decoder of another split has been trained on what is held out here; on another base all answers are noise."""
    monkeypatch.chdir(smoke)
    config = tenants.get_config("smoke").unlock()
    store, about = pairs.open_store(root / "store"), checkpoints.load_best(root / "run" / "checkpoints")[2]
    listed = {name: entry["split"] for name, entry in store.manifest["tasks"].items()}
    rungs.check_belonging(config, store, about, "run", listed)
    rungs.check_belonging(config, store, about | {"encoder_sha256": None}, "run", listed)  # a hub's commit isn't always known
    if change == "decoder":
        about["embeddings"] = {"another": [0.0]} | about["embeddings"]
    elif change == "adapters":
        about["runs_sha256"] = dict.fromkeys(about["runs_sha256"], "another")
    elif change == "encoder":
        about["encoder"] = about["encoder"] | {"length": 15}
    elif change == "layout":
        about["layout"] = about["layout"] | {"chunk": 7}
    elif change == "split":
        listed[store.split("test")[0].name] = "train"
    elif change == "new task":
        listed["late"] = "test"  # or it would be missing from the report without a word
    else:
        config.base = str(shutil.copytree(root / "base", tmp_path / "other"))
        (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(adapters.InputError, match=message):
        rungs.check_belonging(config, store, about, "run", listed)


def test_ridge_is_offered_what_the_decoder_sees_and_chooses_on_validation_tasks():
    """Here two tasks' prompts have the same words at other positions, which a pooled embedding can't tell apart."""
    words = np.eye(3, dtype=np.float16)
    conditions = {"a": words[[0, 1, 2]], "b": words[[1, 0, 2]], "c": words[[0, 2, 1]]}
    tasks = {name: types.SimpleNamespace(name=name, condition=np.stack([x] * 4)) for name, x in conditions.items()}
    made = [{"m/lora_A": np.full((1, 1), float(i)), "m/lora_B": np.ones((1, 1))} for i in range(3)]

    class Few(rungs.Evaluation):
        def __init__(self):
            self.e = types.SimpleNamespace(ridge_draws=2, penalties=(1e-6, 1.0))
            self.train, self.train_adapters = [*tasks.values()], made

        def draw(self, task, draw):
            return task.condition

        def with_carried(self, flat):
            return flat

    kinds = {"pooled": embeddings.pool, **embeddings.WIDE}
    found = dict(rungs.ridges(Few(), kinds))
    assert [*found] == [f"{kind}, penalty {p}" for kind in kinds for p in (1e-6, 1.0)]
    value = {name: [make(tasks[task], 0)["m/lora_A"][0, 0] for task in "abc"] for name, make in found.items()}
    np.testing.assert_allclose(value["positions, penalty 1e-06"], [0, 1, 2], atol=1e-3)
    np.testing.assert_allclose(value["pooled, penalty 1e-06"], 1, atol=1e-3)  # the mean


def test_the_table_is_printed_where_the_report_can_not_be_written(tmp_path, monkeypatch, capsys):
    ev = types.SimpleNamespace(test=[], validation=[], rows={"train": {}, "test": {}}, generator=types.SimpleNamespace(step=1),
                               store=types.SimpleNamespace(manifest={"form": "prompt"}))
    for name, made in {"Evaluation": ev, "ask_all": ({}, {}), "harms": {}, "cost": {}}.items():
        monkeypatch.setattr(evaluate, name, lambda *args, made=made: made)
    monkeypatch.setattr(evaluate.report, "summarise", lambda *args: {})
    monkeypatch.setattr(evaluate.report, "table", lambda result: "hours of answers")
    (tmp_path / "report.json").mkdir()
    with pytest.raises(OSError, match=r"report\.json"):
        evaluate.climb(tenants.get_config("smoke"), tmp_path)
    assert "hours of answers" in capsys.readouterr().out


def test_runs_that_the_store_was_not_made_of_are_not_evaluated(root, tmp_path):
    store = pairs.open_store(root / "store")
    one, other = (task.name for task in store.split("test")[:2])
    for name in (one, other, multi_task(read_tasks(root / "tasks.json"))):
        rungs.check_exported(root / "adapters" / name, name, store)
    with pytest.raises(adapters.InputError, match=rf"{one}: its adapters have sha256 .*, those that {store.folder} was made of"):
        rungs.check_exported(root / "adapters" / one, other, store)
    shutil.copytree(root / "adapters" / one, tmp_path / one)
    path = tmp_path / one / "run.json"
    path.write_text(path.read_text().replace('"seconds": ', '"seconds": 1'))
    checksums.write(tmp_path / one)
    rungs.check_exported(tmp_path / one, one, store)  # how long it took is no part of it
    (tmp_path / one / checksums.NAME).unlink()  # of an older one it isn't known
    rungs.check_exported(tmp_path / one, other, store)


def test_a_run_that_was_changed_is_not_evaluated(root, smoke, tmp_path):
    shutil.copytree(root / "adapters", tmp_path / "adapters")
    name = pairs.open_store(root / "store").split("test")[0].name
    path = next((tmp_path / "adapters" / name).glob("step_*")) / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))
    done = run_module("dnd_jax.evaluate", SMOKE, f"--config.collect.out={tmp_path}/adapters",
                      f"--workdir={root.relative_to(smoke)}/run", cwd=smoke, check=False)
    assert done.returncode == 1 and f"{name}/{path.parent.name}/adapter_config.json: sha256 is" in done.stderr


def test_a_ladder_without_validation_tasks_and_with_one_test_task(root, smoke, tmp_path):
    """Rungs that choose are left out, nothing is said about other tasks, and what the audit finds is said."""
    store = shutil.copytree(root / "store", tmp_path / "store")
    manifest = json.loads((store / "manifest.json").read_text())
    keep = {"test": 1, "validation": 0}
    for split, count in keep.items():
        for name in [name for name, entry in manifest["tasks"].items() if entry["split"] == split][count:]:
            del manifest["tasks"][name]
    (store / "manifest.json").write_text(json.dumps(manifest))
    (store / pairs.SEAL).unlink()
    shutil.copytree(root / "run", tmp_path / "run", ignore=shutil.ignore_patterns("report.*", "metrics.jsonl"))
    shutil.copytree(root / "datasets", tmp_path / "datasets")
    listed = {name: entry for name, entry in json.loads((root / "tasks.json").read_text()).items() if name in manifest["tasks"]}
    (tmp_path / "tasks.json").write_text(json.dumps(listed))
    (name,) = (name for name, entry in manifest["tasks"].items() if entry["split"] == "test")
    path = tmp_path / "datasets" / f"{name}_test.json"
    path.write_text(json.dumps([row | {"response": "one"} for row in json.loads(path.read_text())]))
    command = ["dnd_jax.evaluate", SMOKE, f"--config.export.store={store}", f"--config.tasks={tmp_path}/tasks.json",
               f"--workdir={tmp_path}/run"]
    refused = run_module(*command, cwd=smoke, check=False)
    assert refused.returncode == 1 and f"{name}: every one of" in refused.stderr
    done = run_module(*command, "--despite_findings", cwd=smoke)
    assert f"finding of the audit: {name}: every one of" in done.stdout
    assert "left out, as no validation tasks are there to choose on: best_single, weighted_topk, ridge, ridge_wide" in done.stdout
    assert "One held-out task says nothing about others" in done.stdout and "training unknown" in done.stdout
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {"mean_adapter", "nearest", "dnd", "dnd_shuffled", "in_task"} <= report["rungs"].keys()
    assert (tmp_path / "run" / "report.html").read_text().count("<svg") == 2
