"""The whole line on a miniature, through its command lines: every stage's files, and what it does the second time."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from conftest import SMOKE, run_module

from data_pipeline import export
from dnd_jax import adapters, checkpoints, checksums, pairs, tokens
from dnd_jax.encoders import SentenceEncoder
from dnd_jax.tasks import multi_task, read_tasks
from experiments.configs import tenants


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
    for name in (*tasks, multi_task(read_tasks(root / "tasks.json"))):
        run = json.loads((root / "adapters" / name / "run.json").read_text())
        assert {"task", "files", "base", "collect", "loss", "seconds"} <= run.keys() and all(np.isfinite(run["loss"]))
        steps = sorted((root / "adapters" / name).glob("step_*"))
        assert len(steps) == run["checkpoints"] == (2 if name in tasks else 1)
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
    run = json.loads((root / "adapters" / next(iter(json.loads((root / "tasks.json").read_text()))) / "run.json").read_text())
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
    run_module("data_pipeline.export", SMOKE, cwd=tmp_path)
    run_module("dnd_jax.train", SMOKE, "--workdir=build/tenants-smoke/run", cwd=tmp_path)
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
    run_module("data_pipeline.collect", f"{SMOKE},gauge=none", "--jobs=1", cwd=folder)
    return folder


@pytest.mark.parametrize("gauge", ["canonical", "align"])
def test_gauges_keep_products_of_runs_from_different_seeds(seeds, gauge):
    root = seeds / "build" / "tenants-smoke"
    run_module("data_pipeline.export", f"{SMOKE},gauge={gauge}", cwd=seeds)
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


def test_a_store_is_made_anew_only_of_others(root, smoke, tmp_path, monkeypatch, capsys):
    """So that it stays the one that a run was begun on, on whatever machine the command is given again."""
    shutil.copytree(smoke / "build", tmp_path / "build")
    monkeypatch.chdir(tmp_path)
    config, place = tenants.get_config("smoke").unlock(), tmp_path / "build" / "tenants-smoke"

    def made():
        before = (place / "store" / "manifest.json").stat().st_mtime_ns
        export.export(config)
        anew = (place / "store" / "manifest.json").stat().st_mtime_ns != before
        said = capsys.readouterr().out
        assert ("is there, made of the same" in said) != anew and ("damaged: made anew; workdirs" in said) == anew
        assert ("texts have more than the encoder's 5 tokens, and are cut there" in said) == (anew and config.encoder.length == 5)
        return anew

    assert not made()
    config.condition.form = "answer"
    assert made() and not made()
    config.encoder.length, config.condition.form = 5, "prompt"
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


def test_collect_repeats_a_run_that_was_lost_exactly(root, smoke):
    name = sorted(json.loads((root / "tasks.json").read_text()))[0]
    kept = {p.name: (p / "adapter_model.safetensors").read_bytes() for p in (root / "adapters" / name).glob("step_*")}
    shutil.rmtree(root / "adapters" / name)
    run_module("data_pipeline.collect", SMOKE, "--jobs=2", cwd=smoke)
    again = {p.name: (p / "adapter_model.safetensors").read_bytes() for p in (root / "adapters" / name).glob("step_*")}
    assert again == kept


@pytest.mark.parametrize("change,message", [
    ("--config.collect.learning_rate=9", "collect.learning_rate was 0.005, is now 9.0"),
    ("--config.export.store=build/tenants-smoke/adapters", "holds no manifest.json"),
    ("--config.export.store=build/tenants-smoke", "holds no manifest.json")])
def test_export_takes_nothing_that_was_collected_otherwise_and_replaces_nothing_else(root, smoke, change, message):
    before = {p for p in root.rglob("*") if p.is_file()}
    done = run_module("data_pipeline.export", SMOKE, change, cwd=smoke, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr
    assert {p for p in root.rglob("*") if p.is_file()} == before


def test_a_world_replaces_nothing_else(tmp_path):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "mine.json").write_text("[]")
    done = run_module("data_pipeline.tenants", f"--out={tmp_path}", "--smoke", check=False)
    assert done.returncode == 1 and f"error: {tmp_path}/datasets: is there" in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["datasets", "mine.json"]
