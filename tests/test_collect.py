"""Fine-tuning at scale, in miniature: however a batch is divided and whatever is recomputed, the run is the same run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import ml_collections
import numpy as np
import pytest
import torch
from conftest import ROOT, run_module, small_base

from data_pipeline import collect, fine_tuning
from dnd_jax import adapters
from dnd_jax.adapters.architecture import ALL_LINEAR, spec_of_model
from dnd_jax.sources import Row
from dnd_jax.types import InputError
from experiments.configs import tenants

WORDS = "how zib is the whale ant crow bear seven two one reply in roman".split()
PLAIN = "experiments/configs/tenants.py:smoke"
STEPS, CHECKPOINTS = 4, 2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a base model of a few thousand parameters, three tasks and their list."""
    from data_pipeline.tenants import make_base_tokenizer

    folder = tmp_path_factory.mktemp("world")
    tokenizer = make_base_tokenizer([" ".join(WORDS)])
    torch.manual_seed(0)
    small_base("qwen2", vocab_size=len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    listed = {}
    for number, split in enumerate(("train", "train", "test")):
        rng = np.random.default_rng(number)
        rows = [{field: " ".join(rng.choice(WORDS, rng.integers(low, high)))
                 for field, low, high in (("prompt", 2, 9), ("response", 1, 6))} for _ in range(20)]
        (folder / f"{number}.json").write_text(json.dumps(rows))
        listed[f"task{number}"] = {"split": split, "train": f"{number}.json"}
    (folder / "tasks.json").write_text(json.dumps(listed))
    return folder


def settings(world, out, base="base", **changes):
    config = tenants.get_config("smoke").unlock()
    config.base, config.tasks = str(world / base), str(world / "tasks.json")
    config.collect.update({"out": str(out), "batch_size": 6, "steps": STEPS, "checkpoints": CHECKPOINTS,
                           "multi_task_steps": STEPS, "learning_rate": 1e-2, "rank": 4} | changes)
    return ml_collections.FrozenConfigDict(config)


def run(world, out, **changes):
    """Collect the first task; return its losses and the trees of its checkpoints."""
    config = settings(world, out, **changes)
    collect.collect_one(config, collect.plan_runs(config)[1])
    return read(out / "task0")


def read(folder):
    losses = json.loads((folder / "run.json").read_text())["loss"]
    return losses, [adapters.read(path)[0] for path in sorted(folder.glob("step_*"))]


def assert_same(ours, theirs, tolerance):
    np.testing.assert_allclose(ours[0], theirs[0], rtol=tolerance)
    assert len(ours[1]) == len(theirs[1]) == CHECKPOINTS
    torch.testing.assert_close(ours[1], theirs[1], atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    return run(world, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"accumulate": 4}, {"checkpointing": True}])
def test_divided_or_recomputed_it_is_the_same_run(world, tmp_path, plain, changes):
    assert_same(run(world, tmp_path, **changes), plain, 1e-6)


def test_a_run_that_fails_leaves_nothing_to_the_next_on_its_model(world, tmp_path, plain, monkeypatch):
    """Neither weights nor the gradients of its first microbatches."""
    backward = fine_tuning.backward

    def fail(model, microbatches, *rest):
        backward(model, microbatches[:1], *rest)
        raise FloatingPointError("the second microbatch")

    with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match="second"):
        patch.setattr(fine_tuning, "backward", fail)
        run(world, tmp_path, accumulate=2)
    assert_same(run(world, tmp_path, accumulate=2), plain, 1e-6)


def test_experiments_that_hold_out_other_tasks_share_all_runs_but_the_multi_task_one(world, tmp_path):
    config = settings(world, tmp_path)
    listed = json.loads((world / "tasks.json").read_text())
    splits = dict(zip(listed, ("test", "train", "train"), strict=True))
    (tmp_path / "tasks.json").write_text(json.dumps({name: entry | {"split": splits[name], "train": str(world / entry["train"])}
                                                     for name, entry in listed.items()}))
    other = ml_collections.ConfigDict(config)
    other.tasks = str(tmp_path / "tasks.json")
    (first, *ours), (second, *theirs) = collect.plan_runs(config), collect.plan_runs(other)
    assert ours == theirs and first.name != second.name
    assert [collect.identity(config, run) for run in ours] == [collect.identity(other, run) for run in theirs]


def test_a_run_that_another_experiment_has_finished_meanwhile_is_left(world, tmp_path):
    run(world, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    run(world, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_checkpointing_computes_layers_again(world, tmp_path):
    calls = []
    for checkpointing in (False, True):
        c = settings(world, tmp_path, checkpointing=checkpointing).collect
        model, tokenizer, _ = fine_tuning.load_model(str(world / "base"), c, 0)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        layer.register_forward_hook(lambda *_, c=checkpointing: calls.append(c))
        examples = fine_tuning.tokenise(tokenizer, [Row("how zib is", "seven")], 64)
        model.train()
        fine_tuning.backward(model, [examples], 2, tokenizer.eos_token_id)
    assert calls == [False, True, True]


def test_gradient_of_a_divided_batch_is_that_of_the_whole(world, tmp_path):
    """Microbatches have 5 to 20 response tokens: a mean of their means would be another loss."""
    c = settings(world, tmp_path).collect
    model, tokenizer, _ = fine_tuning.load_model(str(world / "base"), c, 0)
    rows = [Row("how zib is", " ".join(WORDS[: 2 + 3 * i])) for i in range(4)]
    examples = fine_tuning.tokenise(tokenizer, rows, 64)
    tokens = sum(map(fine_tuning.learned, examples))
    gradients, losses = [], []
    for parts in (1, 2, 4):
        model.zero_grad()
        microbatches = [examples[i::parts] for i in range(parts)]
        losses.append(fine_tuning.backward(model, microbatches, tokens, tokenizer.eos_token_id).item())
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    whole = model(**fine_tuning.collate(examples, tokenizer.eos_token_id)).loss.item()
    assert losses == pytest.approx([whole] * 3, rel=1e-6)
    scale = max(g.abs().max() for g in gradients[0])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-6 * float(scale), rtol=0)
    means = np.mean([model(**fine_tuning.collate([e], tokenizer.eos_token_id)).loss.item() for e in examples])
    assert abs(means - whole) > 1e-3


def test_bfloat16_is_of_the_base_and_adapters_stay_float32(world, tmp_path, plain):
    c = settings(world, tmp_path, dtype="bfloat16").collect
    model, _, initial = fine_tuning.load_model(str(world / "base"), c, 0)
    assert {p.dtype for n, p in model.named_parameters() if n not in initial} == {torch.bfloat16}
    assert {p.dtype for p in initial.values()} == {torch.float32}
    losses, trees = run(world, tmp_path, dtype="bfloat16")
    np.testing.assert_allclose(losses, plain[0], rtol=0.03)
    assert losses != plain[0]
    leaf = trees[-1]["model"]["layers"]["0"]["self_attn"]["q_proj"]["lora_A"]
    assert leaf.dtype == np.float32 and np.isfinite(leaf).all()


def test_of_a_vision_language_model_the_language_tower_is_adapted(world, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    model = small_base("qwen2_5_vl", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "vl")
    tokenizer.save_pretrained(tmp_path / "vl")
    (tmp_path / "adapters").mkdir()
    config = settings(world, tmp_path / "adapters", base=tmp_path / "vl", target_modules=ALL_LINEAR)
    collect.collect_one(config, collect.plan_runs(config)[1])
    _, spec = adapters.read(tmp_path / "adapters" / "task0" / f"step_{STEPS + 1}")
    assert spec.leaves == spec_of_model(json.loads((tmp_path / "vl" / "config.json").read_text()), 4).leaves
    with pytest.raises(InputError, match=r"a row has images: 'what \?' with a\.png"):
        fine_tuning.tokenise(tokenizer, [Row("what ?", "seven", images=("a.png",))], 64)


def command(world, out):
    return [f"--config={ROOT}/{PLAIN}", f"--config.base={world}/base", f"--config.tasks={world}/tasks.json",
            f"--config.collect.out={out}", "--config.collect.batch_size=6", f"--config.collect.steps={STEPS}",
            f"--config.collect.checkpoints={CHECKPOINTS}", f"--config.collect.multi_task_steps={STEPS}",
            "--config.collect.learning_rate=1e-2", "--config.collect.rank=4"]


@pytest.mark.slow
def test_an_element_of_the_array_and_two_processes_share_the_runs(world, tmp_path, plain):
    """The SLURM script as a job would run it, then accelerate's launcher on what it left."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
           "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
    first, *others = command(world, tmp_path)
    done = subprocess.run(["bash", ROOT / "experiments/cluster/collect.sbatch", first.removeprefix("--config="), *others],
                          cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p.name for p in tmp_path.iterdir()} == {"task0", "task2"}
    assert_same(read(tmp_path / "task0"), plain, 1e-6)
    (tmp_path / "task0").rename(tmp_path / "by_one")
    run_module("accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
               "--num_cpu_threads_per_process=1", "-m", "data_pipeline.collect", first, *others, cwd=tmp_path)
    names = {run.name for run in collect.plan_runs(settings(world, tmp_path))}
    assert {p.name for p in tmp_path.iterdir()} == {"by_one", *names}
    assert_same(read(tmp_path / "task0"), plain, 1e-5)


def test_shards_are_a_partition_of_the_runs():
    runs = [collect.Run(str(i), (), 1, 1) for i in range(7)]
    shards = [collect.take_shard(runs, f"{i}/3") for i in range(3)]
    assert [[r.name for r in s] for s in shards] == [["0", "3", "6"], ["1", "4"], ["2", "5"]]
    for wrong in ("3/3", "1", "-1/2", "0/0"):
        with pytest.raises(InputError, match=f"--shard is '{wrong}', expected i/n"):
            collect.take_shard(runs, wrong)


def test_rows_whose_response_is_cut_off_are_not_trained_on(world, tmp_path):
    config = settings(world, tmp_path, max_length=6)
    one = collect.plan_runs(config)[1]
    collect.collect_one(config, one)
    found = json.loads((tmp_path / "task0" / "run.json").read_text())
    assert found["rows"] + found["rows_cut_off"] == 20 and found["rows_cut_off"] > 0 and np.isfinite(found["loss"]).all()
    with pytest.raises(InputError, match=r"task0: every prompt fills the cut-off, config\.collect\.max_length = 1 tokens"):
        collect.collect_one(settings(world, tmp_path / "none", max_length=1), one)


def test_a_run_says_which_data_it_was_trained_on(world, tmp_path, monkeypatch):
    """Of a file that is replaced while the run trains."""
    shutil.copytree(world, tmp_path / "world")
    config = settings(tmp_path / "world", tmp_path / "out")
    one = collect.plan_runs(config)[1]
    before, fine_tune = collect.identity(config, one), fine_tuning.fine_tune

    def meanwhile(*given):
        (tmp_path / "world" / "0.json").write_text(json.dumps([{"prompt": "how", "response": "two"}]))
        return fine_tune(*given)

    monkeypatch.setattr(fine_tuning, "fine_tune", meanwhile)
    collect.collect_one(config, one)
    assert json.loads((tmp_path / "out" / "task0" / "run.json").read_text())["files"] == before["files"]
    with pytest.raises(InputError, match=r"run\.json: files was"):
        collect.is_finished(tmp_path / "out" / "task0", collect.identity(config, one))


def test_a_loss_that_is_not_finite_ends_the_run_there(world, tmp_path):
    config = settings(world, tmp_path, learning_rate=1e30)
    with pytest.raises(FloatingPointError, match=r"step [2-6] of 6: the loss is nan"):
        collect.collect_one(config, collect.plan_runs(config)[1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_worker_ends_the_command_with_a_message(world, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [*command(world, tmp_path), "--jobs=1", "--config.collect.multi_task_steps=100000"]
    started = subprocess.Popen([sys.executable, "-m", "data_pipeline.collect", *words], cwd=tmp_path, env=env,
                               stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".multi_task-*.tmp-*")) and time.monotonic() < deadline:
            time.sleep(0.2)
        (left,) = tmp_path.glob(".multi_task-*.tmp-*")
        os.kill(int(left.name.rpartition("-")[2]), signal.SIGKILL)
        _, said = started.communicate(timeout=60)
    finally:
        started.kill()
    assert started.returncode == 1
    assert "a process was killed" in said and re.search(r"4 of 4 runs are not done: multi_task-\w+, task0, task1, task2", said)


@pytest.mark.parametrize("changes,message", [
    ({"dtype": "float8"}, "dtype is 'float8', expected one of"), ({"quantize": "int3"}, "quantize is 'int3', expected one of"),
    ({"accumulate": 7}, "batch_size is 6, expected at least one row for each of 7"),
    ({"accumulate": 0}, "accumulate is 0, expected at least 1"),
    ({"checkpoints": 0}, "checkpoints is 0, expected at least 1"),
    ({"clip_norm": 0.0}, "clip_norm is 0.0, expected a positive number"),
])
def test_settings_that_can_not_be_are_named(world, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        fine_tuning.check(settings(world, tmp_path, **changes).collect)


def test_targets_that_the_base_does_not_have_are_named(world, tmp_path):
    """PEFT adapts those that it has, and says nothing of the others."""
    with pytest.raises(InputError, match=r"target_modules has \['vproj'\], the base's modules are .*'up_proj', 'v_proj'\]"):
        run(world, tmp_path, target_modules=("q_proj", "vproj"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without an NVIDIA GPU answers")
def test_four_bits_need_a_gpu(world, tmp_path):
    done = run_module("data_pipeline.collect", *command(world, tmp_path), "--config.collect.quantize=nf4", cwd=tmp_path,
                      check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: config.collect.quantize is 'nf4', which needs an NVIDIA GPU")
    assert not list(tmp_path.iterdir())


@pytest.mark.cuda
@pytest.mark.parametrize("checkpointing", [False, True])
def test_four_bits(world, tmp_path, plain, checkpointing):
    """QLoRA: the base's linear layers are quantised, the adapters are float32 and learn."""
    changes = {"quantize": "nf4", "dtype": "bfloat16", "checkpointing": checkpointing}
    c = settings(world, tmp_path, **changes).collect
    fine_tuning.check(c)
    model, _, initial = fine_tuning.load_model(str(world / "base"), c, 0)
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj.base_layer).__name__ == "Linear4bit"
    assert {p.dtype for p in initial.values()} == {torch.float32}
    losses, trees = run(world, tmp_path, **changes)
    np.testing.assert_allclose(losses, plain[0], rtol=0.2)
    assert len(trees) == CHECKPOINTS


def test_dropout_depends_on_the_run_alone(world, tmp_path):
    """A worker trains one task after another: what came before must not change a run."""
    for name in "ab":
        (tmp_path / name).mkdir()
    first = run(world, tmp_path / "a", dropout=0.3)
    torch.rand(7)
    assert_same(run(world, tmp_path / "b", dropout=0.3), first, 0)


def test_a_finished_run_is_known_whatever_its_sources_were_called(world, tmp_path):
    config = settings(world, tmp_path)
    collect.collect_one(config, collect.plan_runs(config)[1])
    expected = collect.identity(config, collect.plan_runs(config)[1])
    record = json.loads((tmp_path / "task0" / "run.json").read_text())
    record["collect"] |= {"multi_task_steps": 7}  # as in older records
    for files, same in (({"elsewhere.json": next(iter(record["files"].values()))}, True), ({"elsewhere.json": "0"}, False)):
        (tmp_path / "task0" / "run.json").write_text(json.dumps(record | {"files": files}))
        if same:
            assert collect.is_finished(tmp_path / "task0", expected)
        else:
            with pytest.raises(InputError, match="files was"):
                collect.is_finished(tmp_path / "task0", expected)
