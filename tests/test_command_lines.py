"""Bad input on the command lines: one line that names the file and both values, status 1, and nothing written."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, SMOKE, run_module, train_command, write_adapter

from dnd_jax import checksums


def refuse(*command, cwd, contains):
    """Run a command that must fail; compare its one line and the folder's content before and after."""
    before = {p: p.stat().st_mtime_ns for p in cwd.rglob("*") if p.is_file()}
    done = run_module(*command, cwd=cwd, check=False)
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("error: ") and "Traceback" not in done.stderr, done.stderr
    for part in contains:
        assert part in message, message
    assert {p: p.stat().st_mtime_ns for p in cwd.rglob("*") if p.is_file()} == before


def test_configs_missing_unreadable_misspelt(tmp_path):
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    (tmp_path / "choosy.py").write_text("def get_config(arg):\n    raise ValueError(f'no {arg} here')\n")
    refuse("dnd_jax.train", "--workdir=run", cwd=tmp_path, contains=["error: command line: --config is missing; --help lists"])
    refuse("dnd_jax.train", "--workdir=run", "--config=nowhere.py", cwd=tmp_path, contains=["nowhere.py is not there"])
    refuse("dnd_jax.train", "--workdir=run", "--config=choosy.py:tea", cwd=tmp_path, contains=["choosy.py:tea: no tea here"])
    refuse("dnd_jax.generate", "--workdir=run", "--prompts=a", "--out=b", "--seed=-1", cwd=tmp_path, contains=["seed", "-1"])
    refuse("dnd_jax.train", "--workdir=run", "--config=broken.py", cwd=tmp_path, contains=["broken.py", "SyntaxError"])
    refuse("dnd_jax.train", "--workdir=run", SMOKE, "--config.train.step=3", cwd=tmp_path, contains=["no field 'step' there"])
    refuse("dnd_jax.train", "--workdir=run", SMOKE, "--config.train.steps=many", cwd=tmp_path, contains=["steps", "many"])
    refuse("dnd_jax.train", "--workdir=run", SMOKE, "--config.condition.pool=many", cwd=tmp_path,  # None, unless it is set
           contains=["pool", "invalid literal for int() with base 10: 'many'"])


def test_what_is_of_one_file_is_refused_for_the_ladder(tmp_path):
    refuse("dnd_jax.evaluate", SMOKE, "--workdir=run", "--base=base", "--batch_size=32", "--temperature=0.5", cwd=tmp_path,
           contains=["--base and --batch_size and --temperature without --data"])


def test_help_lists_the_flags_that_other_modules_define():
    said = run_module("dnd_jax.train", "--help", check=False).stdout
    assert all(f"--{name}: " in said for name in ("config", "workdir", "coordinator", "num_processes", "process_id"))


def test_store_of_another_format_or_content(tmp_path, store):
    command = train_command(store, "run")
    path = store / "tasks" / "task0" / "tokens.npy"
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    refuse(*command, cwd=tmp_path, contains=["task0/tokens.npy", "sha256"])
    path.write_bytes(sound)
    manifest = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    refuse(*command, cwd=tmp_path, contains=["manifest.json", "99", "expected 3"])


def test_workdir_of_another_config(tmp_path, store):
    run_module(*train_command(store, tmp_path / "run", steps=2), cwd=tmp_path)
    refuse(*train_command(store, tmp_path / "run", steps=4), cwd=tmp_path, contains=["config.json", "train.steps is 2", "says 4"])


def test_prompt_files_empty_or_missing(smoke, tmp_path):
    workdir = f"--workdir={smoke}/build/tenants-smoke/run"
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "wrong.json").write_text('[{"text": "?"}]')
    for name, contains in (("empty.txt", "no prompts"), ("wrong.json", "'prompt'"), ("nowhere.txt", "No such file")):
        refuse("dnd_jax.generate", workdir, f"--prompts={name}", "--out=adapter", cwd=tmp_path, contains=[name, contains])
    refuse("dnd_jax.generate", "--workdir=void", "--prompts=empty.txt", "--out=a", cwd=tmp_path, contains=["empty.txt"])
    (tmp_path / "good.txt").write_text("how zib is the whale :\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("of somebody")
    refuse("dnd_jax.generate", workdir, "--prompts=good.txt", "--out=taken", cwd=tmp_path, contains=["taken", "not a link"])
    refuse("dnd_jax.generate", "--workdir=void", "--prompts=good.txt", "--out=a", cwd=tmp_path, contains=["void", "checkpoint"])


@pytest.fixture
def world(smoke, tmp_path):
    """A copy of the smoke world that a test may damage."""
    shutil.copytree(smoke / "build", tmp_path / "build")
    shutil.rmtree(tmp_path / "build" / "tenants-smoke" / "store")
    return tmp_path


def first_adapter(world):
    runs = world / "build" / "tenants-smoke" / "adapters"
    name = sorted(json.loads((world / "build" / "tenants-smoke" / "tasks.json").read_text()))[0]
    (runs / name / checksums.NAME).unlink()  # else the first thing noticed is that bytes have changed
    return sorted((runs / name).glob("step_*"))[0]


def test_export_refuses_adapters_that_differ(world, rng):
    folder = first_adapter(world)
    write_adapter(folder, rng, rank=3)
    refuse("data_pipeline.export", SMOKE, cwd=world, contains=[str(folder.relative_to(world)), " is ", " has "])


def test_export_refuses_an_adapter_that_is_not_finite(world):
    import safetensors.numpy

    path = first_adapter(world) / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors[min(tensors)][0, 0] = np.inf
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    refuse("data_pipeline.export", SMOKE, cwd=world, contains=["adapter_model.safetensors", "not finite"])


def test_export_refuses_another_base_model(world):
    path = world / "build" / "tenants-smoke" / "base" / "config.json"
    path.write_text(path.read_text().replace("{", '{"altered": true,', 1))
    refuse("data_pipeline.export", SMOKE, cwd=world, contains=["collected on base", "sha256", "the config's is"])


def test_collect_refuses_a_base_without_tokenizer(world):
    for path in (world / "build" / "tenants-smoke" / "base").glob("tokenizer*"):
        path.unlink()
    refuse("data_pipeline.collect", SMOKE, cwd=world, contains=["base", "tokenizer"])


WORDS = """
from absl import flags
from dnd_jax import cli
cli.define_config()
words = __import__("sys").argv[1:]
flags.FLAGS(["x", *words])
if words[0] == "--config":
    print(*cli.config_words(), sep="\\n")
print(cli.config_json(flags.FLAGS.config))
"""


def test_another_command_gets_the_same_config_however_it_was_given():
    def printed(*words):
        return subprocess.run([sys.executable, "-c", WORDS, *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    words, _, config = printed(
        "--config", SMOKE.removeprefix("--config="), "--noconfig.train.calibrate", "-config.train.steps=9",
        "--config.base", "a b", "--config.train.tensorboard", "--config.evaluate.top_k=(3, 4)",
        "--config.evaluate.unrelated=(('a.json', 'exact'),)",
        "--config.condition.pool=7", "--config.decoder.blocks=((1, 2, 3), (4, 5, 6))",
        "--config.evaluate.penalties=(0.5,)").partition("\n{")
    assert words.count("\n") == 9
    assert printed(*words.split("\n")) == "{" + config
    assert '"steps": 9,' in config and '"base": "a b"' in config and '"top_k": [\n   3,' in config
