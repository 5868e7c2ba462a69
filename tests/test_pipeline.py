"""The whole line on a miniature, through its command lines: every station's files, and what it does the second time."""

import hashlib
import json
import re
import shutil
import types

import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT, run_module

from data_pipeline import export
from dnd_jax import adapters, checkpoints, checksums, evaluate, pairs, rungs, tokens, workdirs
from dnd_jax.encoders import SentenceEncoder
from experiments import run
from experiments.configs import common_sense, tenants

CONFIG = f"--config={ROOT}/experiments/configs/tenants.py:smoke"


@pytest.fixture(scope="module")
def root(smoke):
    return smoke / "build" / "tenants-smoke"


def test_world_is_loadable_by_the_usual_classes(root):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(root / "base"), AutoModelForCausalLM.from_pretrained(root / "base")
    assert type(model).__name__ == "Qwen2ForCausalLM"
    pieces = tokenizer.tokenize("how zib is the whale ? reply in roman :")
    assert len(pieces) == 10 and tokenizer.decode(tokenizer("how zib is the whale :").input_ids) == "how zib is the whale :"
    tasks = json.loads((root / "tasks.json").read_text())
    assert sorted(entry["split"] for entry in tasks.values()) == ["test"] * 2 + ["train"] * 6 + ["validation"] * 2
    rows = json.loads((root / next(iter(tasks.values()))["train"]).read_text())
    assert rows[0].keys() == {"prompt", "response", "system"}


def test_encoder_gives_a_prompt_the_same_condition_in_any_batch(root):
    encoder = SentenceEncoder(str(root / "encoder"), 14)
    prompts = [f"how {word} is the {entity} :" for word in ("zib", "mok") for entity in ("whale", "ant", "bear")]
    together = encoder(prompts)
    assert together.shape == (6, 14, encoder.width) and together.dtype == np.float16
    for i, prompt in enumerate(prompts):
        np.testing.assert_array_equal(encoder([prompt])[0], together[i])


def test_runs_share_the_initial_a_and_say_what_made_them(root):
    tasks, seeds = json.loads((root / "tasks.json").read_text()), set()
    for name in (*tasks, "multi_task"):
        run = json.loads((root / "adapters" / name / "run.json").read_text())
        assert {"task", "files", "base", "collect", "loss", "seconds"} <= run.keys() and all(np.isfinite(run["loss"]))
        steps = sorted((root / "adapters" / name).glob("step_*"))
        assert len(steps) == run["checkpoints"] == (1 if name == "multi_task" else 2)
        assert run["loss"][0] != run["loss"][-1] and len(run["loss"]) == run["steps"] + run["checkpoints"]
        seeds.add(run["initial_seed"])
    assert len(seeds) == 1


def test_store_holds_the_adapters_and_the_conditions(root):
    store = pairs.open_store(root / "store")
    task = store.split("test")[0]
    folders = sorted((root / "adapters" / task.name).glob("step_*"))
    for stored, folder in zip(task.tokens, folders, strict=True):
        tree, spec = adapters.read(folder)
        assert spec.leaves == store.spec.leaves
        np.testing.assert_array_equal(stored, tokens.encode(tree, store.layout)[0])
    encoder = SentenceEncoder(str(root / "encoder"), store.manifest["encoder"]["length"])
    np.testing.assert_array_equal(task.condition, encoder(task.prompts))
    assert store.importance.shape == (store.layout.shape[0],)
    np.testing.assert_allclose(store.importance.mean(), 1, rtol=1e-3)


def test_generated_folder_loads_in_peft_and_acts(root, smoke, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    (tmp_path / "prompts.txt").write_text("".join(f"how zib is the thing{i} :\n" for i in range(3)))
    done = run_module("dnd_jax.generate", f"--workdir={root}/run", f"--prompts={tmp_path}/prompts.txt",
                      f"--out={tmp_path}/adapter", cwd=smoke)
    assert "3 prompts given, the decoder takes" in done.stdout
    assert "s from prompts to files" in done.stdout and "s of compilation before" in done.stdout
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(root / "base")(ids).logits
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / "base"), tmp_path / "adapter")
        assert not torch.equal(model(ids).logits, plain)
    state = {k: v.numpy() for k, v in model.state_dict().items() if "lora_A" in k}
    tree, _ = adapters.read(tmp_path / "adapter")
    written = tree["model"]["layers"]["0"]["self_attn"]["q_proj"]["lora_A"]
    np.testing.assert_array_equal(state["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"], written)


def generate(root, folder, *options, check=True):
    (folder / "prompts.txt").write_text("how zib is the thing :\n")
    return run_module("dnd_jax.generate", f"--workdir={root}/run", f"--prompts={folder}/prompts.txt",
                      f"--out={folder}/mine", *options, cwd=root.parent.parent, check=check)


def test_generated_folder_is_addressed_by_content_and_has_a_card(root, tmp_path):
    done = generate(root, tmp_path)
    folder = (tmp_path / "mine").resolve()
    assert folder.parent == tmp_path and folder.name == adapters.content_hash(folder) and folder.name in done.stdout
    card = (folder / "README.md").read_text()
    run = json.loads((root / "adapters" / "multi_task" / "run.json").read_text())
    digest = hashlib.sha256((tmp_path / "prompts.txt").read_bytes()).hexdigest()
    for part in ("library_name: peft", run["base"]["sha256"], "run, step", digest, "nearest training tasks | ", "| date | 20"):
        assert part in card
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    generate(root, tmp_path)
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before and sum(1 for _ in tmp_path.iterdir()) == 3
    generate(root, tmp_path, "--profile=portable")
    _, spec = adapters.read(tmp_path / "mine")
    assert spec.config["r"] == spec.config["lora_alpha"] == 8 and (tmp_path / "mine").resolve() != folder


def test_dora_runs_train_and_generate_saying_what_is_not_generated(smoke, tmp_path):
    """Magnitudes, which no decoder generates, go from the runs through store and workdir into the adapter."""
    shutil.copytree(smoke / "build", tmp_path / "build")
    root = tmp_path / "build" / "tenants-smoke"
    for number, folder in enumerate(sorted((root / "adapters").glob("*/step_*"))):
        path = folder / "adapter_model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        tensors |= {k.replace("lora_B.weight", "lora_magnitude_vector"): np.full(len(v), number, np.float32)
                    for k, v in tensors.items() if "lora_B" in k}
        safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
        checksums.write(folder.parent)
    shutil.rmtree(root / "run")
    run_module("data_pipeline.export", CONFIG, cwd=tmp_path)
    run_module("dnd_jax.train", CONFIG, "--workdir=build/tenants-smoke/run", cwd=tmp_path)
    shutil.rmtree(root / "store")
    done = generate(root, tmp_path)
    said = "not generated but taken from the training runs: 9 x DoRA magnitude (mean of the training runs)"
    assert said in done.stdout and said in (tmp_path / "mine" / "README.md").read_text()
    _, spec = adapters.read(tmp_path / "mine")
    tasks = json.loads((root / "tasks.json").read_text())
    last = [sorted((root / "adapters" / name).glob("step_*"))[-1] for name, entry in tasks.items() if entry["split"] == "train"]
    expected = np.mean([next(iter(adapters.read(folder)[1].carried.values()))[0] for folder in last])
    assert len(spec.carried) == 9 and all((value == np.float32(expected)).all() for value in spec.carried.values())
    path = root / "run" / pairs.CARRIED
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    done = generate(root, tmp_path, check=False)
    assert done.returncode == 1 and f"{pairs.CARRIED}: sha256 is" in done.stderr and "the checkpoint says" in done.stderr


@pytest.fixture(scope="module")
def seeds(smoke, tmp_path_factory):
    """A copy of the world whose runs start from different A."""
    folder = tmp_path_factory.mktemp("seeds")
    shutil.copytree(smoke / "build", folder / "build")
    run_module("data_pipeline.collect", f"{CONFIG},gauge=none", "--jobs=2", cwd=folder)
    return folder


@pytest.mark.parametrize("gauge", ["canonical", "align"])
def test_gauges_keep_products_of_runs_from_different_seeds(seeds, gauge):
    root = seeds / "build" / "tenants-smoke"
    run_module("data_pipeline.export", f"{CONFIG},gauge={gauge}", cwd=seeds)
    store = pairs.open_store(root / f"store-{gauge}")
    starts = set()
    for task in store.tasks:
        folder = sorted((root / "adapters-seeds" / task.name).glob("step_*"))[-1]
        trained, _ = adapters.read(folder)
        starts.add(json.loads((folder.parent / "run.json").read_text())["initial_seed"])
        stored = tokens.decode(task.tokens[-1], store.layout)
        for name in ("q_proj", "v_proj"):
            ours, theirs = (t["model"]["layers"]["1"]["self_attn"][name] for t in (stored, trained))
            product = theirs["lora_B"] @ theirs["lora_A"]
            # Tokens round each factor to 2e-6; where an alignment is steep, the factors are large beside their product.
            factors = np.abs(ours["lora_B"]) @ np.abs(ours["lora_A"])
            np.testing.assert_allclose(ours["lora_B"] @ ours["lora_A"], product, rtol=0, atol=1e-5 * factors.max())
    assert len(starts) == len(store.tasks)


def test_generation_needs_the_checkpoint_folder_only(root):
    _, _, about, _ = checkpoints.load_best(root / "run" / "checkpoints")
    assert about["encoder"]["length"] == 14 and about["base"]["sha256"] and about["spec"]["config"]["peft_type"] == "LORA"
    assert tokens.Layout.from_json(about["layout"]).shape == tuple(about["features"][-1])


@pytest.fixture(scope="module")
def ran(root, smoke):
    """The one command, on what the stations have made: its output and the files that it changed."""
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    done = run_module("experiments.run", CONFIG, f"--workdir={root.relative_to(smoke)}/run", cwd=smoke)
    after = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    return done.stdout, {str(p.relative_to(root)) for p, time in after.items() if before.get(p) != time}


def test_one_command_runs_all_stations_and_repeats_no_work(ran, root):
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
    commands = run.stations(config, ["--config=c.py"], "w", 2)
    assert [words[0] for words in commands] == [
        "data_pipeline.collect", "data_pipeline.export", "dnd_jax.train", *["dnd_jax.generate"] * 2, "dnd_jax.evaluate"]
    assert commands[3][2:] == ["--prompts=runs/common_sense/ARC-c/store/tasks/ARC-c/prompts.json", "--out=w/generated/ARC-c"]
    assert commands[-1] == ["dnd_jax.evaluate", "--config=c.py", "--workdir=w"]
    assert run.stations(config, ["--config=c.py"], "w", 2, True)[-1] == [*commands[-1], "--despite_findings"]


@pytest.mark.parametrize("field,value,said", [
    ("evaluate.scoring", "guess", "scoring is 'guess'"), ("condition.form", "poem", "condition.form is 'poem'"),
    ("export.gauge", "alin", "gauge is 'alin'"), ("train.clip_norm", -1.0, "clip_norm is -1.0"),
    ("evaluate.unrelated", (("nowhere.json", "exact"),), "config.evaluate.unrelated: nowhere.json")])
def test_what_a_late_station_would_refuse_is_refused_first(root, smoke, monkeypatch, field, value, said):
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


def test_a_terminated_training_ends_all_stations(root, smoke, monkeypatch):
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


@pytest.mark.parametrize("change,message", [
    ("adapters", r"run: it was trained on adapters of \w+ with sha256 another, .*store says"),
    ("decoder", r"run: it was trained on \['another', .*/store says \["),
    ("encoder", "run: its encoder is .*'length': 15.*store says"),
    ("layout", "run: its layout is"), ("split", "config.tasks: the split of .* is train, .*store says test"),
    ("base", "config.base: .*/other has sha256 .*, .*store says")])
def test_a_ladder_of_parts_that_do_not_belong_together_is_refused(root, smoke, tmp_path, monkeypatch, change, message):
    """A decoder of another split has been trained on what is held out here; on another base all answers are noise."""
    monkeypatch.chdir(smoke)
    config = tenants.get_config("smoke").unlock()
    store, about = pairs.open_store(root / "store"), checkpoints.load_best(root / "run" / "checkpoints")[2]
    listed = {name: entry["split"] for name, entry in store.manifest["tasks"].items()}
    rungs.check_belonging(config, store, about, "run", listed)
    rungs.check_belonging(config, store, about | {"encoder_sha256": None}, "run", listed)  # as a decoder of an older store has it
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
    else:
        config.base = str(shutil.copytree(root / "base", tmp_path / "other"))
        (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(adapters.InputError, match=message):
        rungs.check_belonging(config, store, about, "run", listed)


def test_runs_that_the_store_was_not_made_of_are_not_evaluated(root, tmp_path):
    store = pairs.open_store(root / "store")
    one, other = (task.name for task in store.split("test")[:2])
    for name in (one, other, "multi_task"):
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


def test_a_store_is_made_anew_only_of_others(root, smoke, tmp_path, monkeypatch, capsys):
    """So that it stays the one that a run was begun on, on whatever machine the command is given again."""
    shutil.copytree(smoke / "build", tmp_path / "build")
    monkeypatch.chdir(tmp_path)
    config, place = tenants.get_config("smoke").unlock(), tmp_path / "build" / "tenants-smoke"

    def made():
        before = (place / "store" / "manifest.json").stat().st_mtime_ns
        export.export(config)
        anew = (place / "store" / "manifest.json").stat().st_mtime_ns != before
        assert ("is there, made of the same" in capsys.readouterr().out) != anew
        return anew

    assert not made()
    config.condition.form = "answer"
    assert made() and not made()
    path = place / "store" / "tasks" / pairs.open_store(place / "store").tasks[0].name / "condition.npy"
    path.write_bytes(path.read_bytes()[:-1])
    assert made() and not made()
    listed = json.loads((place / "tasks.json").read_text())
    name = next(name for name, entry in listed.items() if entry["split"] == "validation")
    (place / "tasks.json").write_text(json.dumps({k: v for k, v in listed.items() if k != name}))
    assert made() and name not in pairs.open_store(place / "store").manifest["tasks"]
    path = next((place / "adapters" / pairs.open_store(place / "store").tasks[0].name).glob("step_*/*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(adapters.InputError, match=path.name):
        export.export(config)


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


def test_a_run_that_was_changed_is_not_evaluated(root, smoke, tmp_path):
    shutil.copytree(root / "adapters", tmp_path / "adapters")
    name = pairs.open_store(root / "store").split("test")[0].name
    path = next((tmp_path / "adapters" / name).glob("step_*")) / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))
    done = run_module("dnd_jax.evaluate", CONFIG, f"--config.collect.out={tmp_path}/adapters",
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
    shutil.copyfile(root / "tasks.json", tmp_path / "tasks.json")
    (name,) = (name for name, entry in manifest["tasks"].items() if entry["split"] == "test")
    path = tmp_path / "datasets" / f"{name}_test.json"
    path.write_text(json.dumps([row | {"response": "one"} for row in json.loads(path.read_text())]))
    command = ["dnd_jax.evaluate", CONFIG, f"--config.export.store={store}", f"--config.tasks={tmp_path}/tasks.json",
               f"--workdir={tmp_path}/run"]
    refused = run_module(*command, cwd=smoke, check=False)
    assert refused.returncode == 1 and f"{name}: every one of" in refused.stderr
    done = run_module(*command, "--despite_findings", cwd=smoke)
    assert f"finding of the audit: {name}: every one of" in done.stdout
    assert "left out, as no validation tasks are there to choose on: best_single, weighted_topk, ridge" in done.stdout
    assert "One held-out task says nothing about others" in done.stdout and "training unknown" in done.stdout
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {"mean_adapter", "nearest", "dnd", "dnd_shuffled", "in_task"} <= report["rungs"].keys()
    assert (tmp_path / "run" / "report.html").read_text().count("<svg") == 2


def test_collect_repeats_a_run_that_was_lost_exactly(root, smoke):
    name = sorted(json.loads((root / "tasks.json").read_text()))[0]
    kept = {p.name: (p / "adapter_model.safetensors").read_bytes() for p in (root / "adapters" / name).glob("step_*")}
    shutil.rmtree(root / "adapters" / name)
    run_module("data_pipeline.collect", CONFIG, "--jobs=2", cwd=smoke)
    again = {p.name: (p / "adapter_model.safetensors").read_bytes() for p in (root / "adapters" / name).glob("step_*")}
    assert again == kept


def test_report_has_every_rung_and_stands_alone(ran, root):
    said, _ = ran
    report = json.loads((root / "run" / "report.json").read_text())
    rungs = ("base", "in_context", "mean_adapter", "mean_product", "best_single", "nearest", "weighted_topk", "ridge",
             "random", "multi_task", "dnd", "dnd_shuffled", "in_task")
    assert set(rungs) <= report["rungs"].keys()
    for name in rungs:
        rung = report["rungs"][name]
        assert 0 <= rung["ci95"][0] <= rung["mean"] <= rung["ci95"][1] <= 1 and len(rung["per_task"]) == 2
        assert name in said
    assert {"collect_s", "train_s", "generate_s", "adapters_to_break_even"} <= report["cost"].keys()
    assert [place.rsplit("/")[-1] for place in report["harm"]] == ["questions.json", "conversions.json"]
    assert all(found["n"] == 96 and found["rungs"].keys() == {"dnd", "in_task"} for found in report["harm"].values())
    assert report["audit"]["findings"] == [] and report["verdict"] in said
    page = (root / "run" / "report.html").read_text()
    assert page.count("<svg") == 3 and report["verdict"].split(":")[0] in page
    assert "src=" not in page and "href=\"http" not in page


@pytest.mark.parametrize("change,message", [
    ("--config.collect.learning_rate=9", "collect was"),
    ("--config.export.store=build/tenants-smoke/adapters", "holds no manifest.json"),
    ("--config.export.store=build/tenants-smoke", "holds no manifest.json")])
def test_export_takes_nothing_that_was_collected_otherwise_and_replaces_nothing_else(root, smoke, change, message):
    before = {p for p in root.rglob("*") if p.is_file()}
    done = run_module("data_pipeline.export", CONFIG, change, cwd=smoke, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr
    assert {p for p in root.rglob("*") if p.is_file()} == before


def test_a_world_replaces_nothing_else(tmp_path):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "mine.json").write_text("[]")
    done = run_module("data_pipeline.tenants", f"--out={tmp_path}", "--smoke", check=False)
    assert done.returncode == 1 and f"error: {tmp_path}/datasets: is there" in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["datasets", "mine.json"]
