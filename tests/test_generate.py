"""Many prompt files by one command: one compilation, the adapters of single calls, and no file's error costs the others."""

import json
import os
import re
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
from conftest import ROOT, run_module

from dnd_jax import adapters, checkpoints, files, generate
from dnd_jax.types import InputError

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def prompt_files(tmp_path, smoke, monkeypatch):
    """Three prompt files of different words and lengths; the process is where the smoke run's encoder is found."""
    monkeypatch.chdir(smoke)
    words = {"a.txt": "zib", "b.json": "mok", "c,d.txt": "tal"}
    for number, (name, word) in enumerate(words.items(), 1):
        texts = [f"how {word} is the thing{i} :" for i in range(15 * number)]
        (tmp_path / name).write_text(json.dumps(texts) if name.endswith("json") else "\n".join(texts))
    return [str(tmp_path / name) for name in words]


def run(names, out, **options):
    """Generate in this process; return how many programs XLA has compiled for it."""
    compiled = []
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    settings = {"workdir": "build/tenants-smoke/run", "prompts": names, "out": str(out), "seed": 0, "profile": "faithful"}
    try:
        generate.main(types.SimpleNamespace(**settings | options))
    finally:
        jax.monitoring.clear_event_listeners()
    return compiled.count(COMPILED)


def test_several_files_compile_once_and_equal_single_calls(prompt_files, tmp_path, capsys):
    a, b, c = prompt_files
    together = run([f"{a},{b}", c], tmp_path / "together")
    lines = capsys.readouterr().out.splitlines()
    links = [tmp_path / "together" / name for name in ("a", "b", "c,d")]
    assert [line.split(" -> ")[0] for line in lines] == list(map(str, links))
    alone = []
    for path, link in zip(prompt_files, links, strict=True):
        alone.append(run([path], tmp_path / "alone" / link.name))
        assert (tmp_path / "alone" / link.name).resolve().name == link.resolve().name == adapters.content_hash(link)
    assert alone == [together] * 3 and together > 0
    assert len({link.resolve() for link in links}) == 3


def test_the_command_line_names_failing_files_and_keeps_the_others(prompt_files, tmp_path, smoke):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "long.txt").write_text("how zib is the whale ? :\n" + "how zib is the whale ? : " * 9)
    a, b, _ = prompt_files
    done = run_module("dnd_jax.generate", "--workdir=build/tenants-smoke/run", f"--prompts={a},{tmp_path}/empty.txt",
                      f"--prompts={tmp_path}/nowhere.txt", f"--prompts={b}", f"--prompts={tmp_path}/long.txt",
                      f"--out={tmp_path}/many", "--profile=portable", cwd=smoke, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith(f"error: 2 of 5 prompt files gave no adapter: {tmp_path}/empty.txt: no prompts")
    assert f"; {tmp_path}/nowhere.txt: " in message
    assert sorted(p.name for p in (tmp_path / "many").iterdir() if p.is_symlink()) == ["a", "b", "long"]
    assert re.search(r"/long\.txt: \d of 14 texts have more than the encoder's 14 tokens, and are cut there\n", done.stdout)
    assert adapters.read(tmp_path / "many" / "b")[1].config["r"] == 8


def test_a_pipe_is_read_once_and_one_that_nobody_reads_costs_nothing(prompt_files, tmp_path, smoke):
    command = (f"cat {prompt_files[0]} | {sys.executable} -m dnd_jax.generate --workdir=build/tenants-smoke/run "
               f"--prompts=/dev/stdin,{prompt_files[1]} --out={tmp_path}/out | head -c 0")
    done = subprocess.run(["bash", "-c", command], cwd=smoke, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True)
    assert "gave no adapter" not in done.stderr, done.stderr
    piped, named = ((tmp_path / "out" / name / "README.md").read_text() for name in ("stdin", "b"))
    assert "15 from stdin" in piped and "sha256" not in piped.split("15 from stdin")[1].splitlines()[0]
    assert f"30 from b.json, sha256 {files.sha256_file(prompt_files[1])}" in named


def test_an_adapter_that_is_not_finite_or_not_written_costs_no_other(prompt_files, tmp_path, monkeypatch):
    names, generated, written = [*prompt_files, str(tmp_path / "last.txt")], [], []
    (tmp_path / "last.txt").write_text("how rol is the thing :")
    whole, write = generate.Generator.__call__, adapters.write_addressed

    def broken(self, condition):
        generated.append(condition)
        return whole(self, np.full_like(condition, np.nan) if len(generated) == 1 else condition)

    def full(*args):
        written.append(args)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        return write(*args)

    monkeypatch.setattr(generate.Generator, "__call__", broken)
    monkeypatch.setattr(adapters, "write_addressed", full)
    said = (rf"2 of 4 prompt files gave no adapter: {names[0]}: checkpoint \d generates \d+ non-finite values; "
            rf"{names[2]}: .* No space")
    with pytest.raises(InputError, match=said):
        run(names, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_symlink()) == ["b", "last"]


def test_parameters_of_other_shapes_are_named(prompt_files, tmp_path, monkeypatch):
    step, params, *rest = checkpoints.load_best("build/tenants-smoke/run/checkpoints")
    params["layers_0"]["out_conv"] = np.moveaxis(params["layers_0"]["out_conv"], -1, 0)
    monkeypatch.setattr(checkpoints, "load_best", lambda folder: (step, params, *rest))
    with pytest.raises(InputError, match=rf"checkpoints/{step}: layers_0/out_conv has shape \(.*\) there, \(.*\)"):
        run(prompt_files[:1], tmp_path / "out")


def test_a_checkpoint_of_another_version_is_named(prompt_files, tmp_path, monkeypatch):
    step, params, about, metrics = checkpoints.load_best("build/tenants-smoke/run/checkpoints")
    del about["runs_sha256"]
    monkeypatch.setattr(checkpoints, "load_best", lambda folder: (step, params, about, metrics))
    with pytest.raises(InputError, match=rf"checkpoints/{step}: is of another version .* says nothing of runs_sha256"):
        run(prompt_files[:1], tmp_path / "out")


def test_one_is_written_while_the_next_is_computed():
    """Computing B ends only when A is being written, and A is written only when B is being computed."""
    computing, writing, order = threading.Event(), threading.Event(), []

    def compute(name):
        if name == "b":
            computing.set()
            assert writing.wait(10)
        return name.upper()

    def finish(name, result):
        writing.set()
        assert computing.wait(10)
        time.sleep(0.05 if name == "a" else 0)
        order.append(result)

    failures = {}
    generate.overlap("abc", compute, finish, failures)
    assert order == ["A", "B", "C"] and not failures


@pytest.mark.parametrize("names,out,message", [
    (["x/a.txt", "y/a.json"], "o", r"x/a\.txt and y/a\.json: both adapters would be named o/a"),
    ([","], "o", "--prompts names no file"), (["a,b"], "link", "link: is a link, expected a folder for the adapters of 2"),
])
def test_names_that_can_not_be(tmp_path, monkeypatch, names, out, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("elsewhere")
    with pytest.raises(InputError, match=message):
        generate.plan_links(names, out)
