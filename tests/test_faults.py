"""What breaks around a run: bytes that change, disks that are full or can't be written. Nothing is lost unsaid."""

import contextlib
import errno
import fcntl
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from conftest import ROOT, make_store, run_module, tiny_config, train_command, write_adapter

from dnd_jax import adapters, checkpoints, checksums, files, folders, logs, pairs, train, workdirs
from dnd_jax.types import InputError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A store and a finished run on it, whose config names the store `store`."""
    folder = tmp_path_factory.mktemp("trained")
    make_store(folder / "store", np.random.default_rng(0))
    files.write_text(folder / "store" / pairs.SEAL, files.sha256_file(folder / "store" / "manifest.json"))
    with contextlib.chdir(folder):
        train.run(tiny_config("store"), folder / "run")
    write_adapter(folder / "runs" / "task" / "step_1", np.random.default_rng(0))
    checksums.write(folder / "runs" / "task")
    return folder


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def open_runs(folder):
    from data_pipeline import export

    _, spec = adapters.read(folder / "store" / "template")
    export.read_run(folder / "runs" / "task", lambda tree: tree, spec, pairs.open_store(folder / "store").layout, "first")


OPEN_STORE = lambda folder: pairs.open_store(folder / "store")  # noqa: E731
CLAIM = lambda folder: workdirs.claim(tiny_config("store"), folder / "run")  # noqa: E731
RESUME = lambda folder: train.run(tiny_config("store"), folder / "run")  # noqa: E731
# file, what reads it, and the first and the last place of a flipped byte
FILES = {
    "store/manifest.json": OPEN_STORE, "store/manifest.sha256": OPEN_STORE, "store/importance.npy": OPEN_STORE,
    "store/tasks/task1/tokens.npy": OPEN_STORE, "store/tasks/task1/condition.npy": OPEN_STORE,
    "store/tasks/task1/prompts.json": OPEN_STORE,
    "runs/task/step_1/adapter_model.safetensors": open_runs, "runs/task/step_1/adapter_config.json": open_runs,
    "runs/task/sha256.json": open_runs, "run/config.json": CLAIM, "run/metrics.jsonl": RESUME,
}


@pytest.mark.parametrize("place", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_an_error_that_names_the_file(folder, name, place):
    data = bytearray((folder / name).read_bytes())
    at = int(place * len(data))
    if name.endswith(("config.json", "metrics.jsonl")) and "run/" in name:
        data[at:at + 1] = b"\x00"  # a changed digit of a log is no error that anyone could see
    else:
        data[at] ^= 1
    (folder / name).write_bytes(data)
    said = name.replace(".", r"\.")
    if name.endswith((pairs.SEAL, checksums.NAME)):  # of a file and its hash either may have changed, and the message names both
        said = said.rpartition("/")[2]
    with pytest.raises(InputError, match=said):
        FILES[name](folder)


def test_a_checkpoint_with_a_changed_byte_is_set_aside_and_training_goes_on_to_the_same_end(folder, capsys):
    whole = checkpoints.load_latest(folder / "run" / "checkpoints")[1]
    log = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    path = max((p for p in (folder / "run" / "checkpoints" / "6" / "state").rglob("*") if p.is_file()),
               key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    RESUME(folder)
    assert "checkpoints/6: damaged" in capsys.readouterr().out and (folder / "run" / "checkpoints" / "6.damaged").is_dir()
    step, params = checkpoints.load_latest(folder / "run" / "checkpoints")
    assert step == 6 and json.dumps(params, default=np.ndarray.tolist) == json.dumps(whole, default=np.ndarray.tolist)
    assert [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()] == [
        json.loads(line)["loss"] for line in log]


@contextlib.contextmanager
def full_from(first, limit, last=None):
    """Let no file grow beyond a limit from one checkpoint of a run on, or until another one."""
    before, saved = resource.getrlimit(resource.RLIMIT_FSIZE), checkpoints.Checkpointer.save

    def save(self, step, state, metrics):
        if step in (first, last):
            self.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit if step == first else before[0], before[1]))
        saved(self, step, state, metrics)
        self.wait()  # so that the run notices before its next line

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints.Checkpointer, "save", save)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


ORBAX_LOOP = "ignore::pytest.PytestUnraisableExceptionWarning"  # its threads call the loop it has closed
NOT_SAVED = r"checkpoints/\d: this checkpoint is not written: .*last good .*checkpoints/2$"
NOT_LOGGED = r"full/metrics.jsonl: not written: File too large$"


@pytest.mark.filterwarnings(ORBAX_LOOP)
@pytest.mark.parametrize("choice,limit,logged,said", [  # files of checkpoints fit or don't, and so does the log
    ("stop", 2500, 4, NOT_SAVED), ("continue", 2500, 6, NOT_SAVED),
    ("stop", 900, 4, NOT_SAVED), ("continue", 900, 4, NOT_LOGGED)])
def test_a_run_that_cannot_write_stops_or_goes_on_by_the_configs_choice(folder, capsys, choice, limit, logged, said):
    config = tiny_config("store", on_failed_save=choice)
    with full_from(4, limit), pytest.raises(OSError, match=said):
        train.run(config, folder / "full")
    errors = capsys.readouterr().err
    assert "checkpoints/4: this checkpoint is not written" in errors
    assert ("checkpoints/6: this" in errors) == (choice == "continue") and ("metrics.jsonl" in errors) == (said == NOT_LOGGED)
    assert len(logs.read_metrics(folder / "full")) == logged
    train.run(config, folder / "full")
    assert checkpoints.load_latest(folder / "full" / "checkpoints")[0] == 6
    assert [entry["step"] for entry in logs.read_metrics(folder / "full")] == [1, 2, 3, 4, 5, 6]


def test_a_save_that_fails_late_stops_the_run_too(folder, monkeypatch):
    """Not before the next one waits for it is it known."""
    watched = checkpoints.Checkpointer._watch

    def watch(self, step, response):
        def fail():
            response.result()
            time.sleep(2)  # steps take milliseconds
            raise OSError(errno.ENOSPC, "No space left on device")

        watched(self, step, types.SimpleNamespace(result=fail) if step == 2 else response)

    monkeypatch.setattr(checkpoints.Checkpointer, "_watch", watch)
    with pytest.raises(OSError, match=r"checkpoints/2: this checkpoint is not written: .*No space left on device"):
        train.run(tiny_config("store", on_failed_save="stop"), folder / "full")
    assert [entry["step"] for entry in logs.read_metrics(folder / "full")] == [1, 2, 3]


def test_what_a_failed_save_has_left_goes_before_anything_is_written(folder):
    left = folder / "run" / "checkpoints" / "9.orbax-checkpoint-tmp"
    (left / "state").mkdir(parents=True)
    checkpoints.Checkpointer(folder / "run" / "checkpoints", {}).close()
    assert not left.exists() and checkpoints.load_latest(folder / "run" / "checkpoints")[0] == 6


def test_standard_output_that_is_full_ends_nothing(folder):
    shutil.rmtree(folder / "store")
    make_store(folder / "store", np.random.default_rng(0), validation=0)  # of which training says that it is so
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", *train_command(folder / "store", folder / "new")], cwd=ROOT, stdout=full,
                              stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    assert checkpoints.load_latest(folder / "new" / "checkpoints")[0] == 6


@pytest.mark.filterwarnings(ORBAX_LOOP)
def test_a_disk_that_is_full_for_a_while_costs_only_that_checkpoint(folder, capsys):
    with full_from(4, 900, last=6):
        train.run(tiny_config("store", on_failed_save="continue"), folder / "full")
    assert "full/metrics.jsonl: not written: File too large" in capsys.readouterr().err
    assert {path.name for path in (folder / "full" / "checkpoints").iterdir()} == {"2", "6"}
    log, whole = (logs.read_metrics(folder / run) for run in ("full", "run"))
    assert [(entry["step"], entry["loss"]) for entry in log] == [(entry["step"], entry["loss"]) for entry in whole]


@pytest.mark.filterwarnings(ORBAX_LOOP)
def test_a_failed_save_does_not_hide_a_loss_that_is_not_finite(folder, monkeypatch):
    def watch(self, step, metrics):
        if step == 5:
            raise FloatingPointError("step 5: loss is nan")

    monkeypatch.setattr(train.guards.Watch, "follow", watch)
    with full_from(4, 2500), pytest.raises(FloatingPointError, match="step 5: loss is nan"):
        train.run(tiny_config("store", on_failed_save="continue"), folder / "full")


def test_a_run_does_not_go_on_with_another_store(folder):
    shutil.rmtree(folder / "store")
    make_store(folder / "store", np.random.default_rng(1))
    known = (folder / "run" / pairs.SEAL).read_text()
    with pytest.raises(InputError, match=rf"store/manifest.json: sha256 is .*run/{pairs.SEAL} says {known[:12]}.*the store has"):
        RESUME(folder)
    assert (folder / "run" / pairs.SEAL).read_text() == known


@contextlib.contextmanager
def read_only(folder):
    """Mount a folder on itself, for reading only."""
    if subprocess.run(["mount", "--bind", folder, folder], capture_output=True).returncode:
        pytest.skip("mounting a folder for reading only needs root")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def write_generated(folder):
    tree, spec = adapters.read(folder / "runs" / "task" / "step_1")
    adapters.write_addressed(folder / "run" / "adapters", tree, spec, "card")


WRITERS = {
    "train again": RESUME, "train anew": lambda folder: train.run(tiny_config("store"), folder / "run" / "new"),
    "generate": write_generated,
    "write a store": lambda folder: folders.atomic_folder(folder / "run" / "store", "manifest.json").__enter__(),
    "write a report": lambda folder: files.write_text(folder / "run" / "report.html", ""),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_that_cannot_be_written_is_named(folder, writer):
    run = folder / "run"
    with read_only(run), pytest.raises((InputError, OSError), match=rf"{run}.*Read-only|Read-only.*{run}"):
        WRITERS[writer](folder)
    with read_only(run):
        assert checkpoints.load_best(folder / "run" / "checkpoints")[0] in (2, 4, 6)


def test_the_command_says_it_in_one_line(folder):
    done = run_module(*train_command("store", "run/config.json/below"), cwd=folder, check=False)
    assert done.returncode == 1 and done.stderr == f"error: {folder.resolve()}/run/config.json/below: Not a directory\n"


def test_a_full_disk_names_the_file_that_is_not_written(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    tree, spec = adapters.read(write_folder(tmp_path))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=f"{tmp_path}/report.html: not written: File too large"):
            files.write_text(tmp_path / "report.html", "x" * 5000)
        with (pytest.raises(OSError, match=f"{tmp_path}/store: not written"),
              folders.atomic_folder(tmp_path / "store", "manifest.json") as store):
            np.save(store / "tokens.npy", np.zeros(5000))
        with pytest.raises(OSError, match=f"{tmp_path}/out.*: not written"):
            adapters.write_addressed(tmp_path / "out", tree, spec, "card")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.rglob("*") if "tmp" in path.name or path.name == "store") == []


def test_what_a_killed_writer_left_is_removed_by_the_next_but_not_what_another_is_writing(tmp_path):
    host, old = socket.gethostname(), time.time() - 2 * folders.NEW_S
    assert len({files.temporary_name(tmp_path / "store") for _ in range(99)}) == 99  # whatever two containers share
    left, used, new, elsewhere = (tmp_path / f".store.tmp-{name}" for name in (f"{host}-1", f"{host}-2", f"{host}-3", "host-1"))
    for path in (left, used, new, elsewhere):
        path.mkdir()
        if path != new:
            os.utime(path, (old, old))
    descriptor = os.open(used, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    for _ in range(2):
        with folders.atomic_folder(tmp_path / "store", "manifest.json") as folder:
            os.utime(folder, (old, old))
    os.close(descriptor)
    assert {path.name for path in tmp_path.iterdir()} == {"store", used.name, new.name, elsewhere.name}


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "where the system can't"])
@pytest.mark.parametrize("before", ["empty", "folder", "link"])
def test_a_folder_replaces_what_has_its_name(tmp_path, monkeypatch, before, at_once):
    final, elsewhere = tmp_path / "store", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "new").touch()
    {"empty": final.mkdir, "folder": lambda: shutil.copytree(elsewhere, final),
     "link": lambda: final.symlink_to(elsewhere)}[before]()
    if at_once:
        monkeypatch.setattr(folders.os, "rename", lambda *names: pytest.fail("a moment without it"))
    else:
        (tmp_path / ".store.old-host-1").mkdir()
        monkeypatch.setattr(folders.ctypes, "CDLL", lambda name: None)
    with folders.atomic_folder(final, "new") as folder:
        (folder / "new").touch()
    assert [path.name for path in final.iterdir()] == ["new"] and not final.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"store", "elsewhere"} and elsewhere.is_dir()


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_what_is_not_of_the_same_kind_is_not_replaced(tmp_path, kind):
    theirs, final = tmp_path / "thesis", tmp_path / "store"
    theirs.mkdir()
    (theirs / "chapter.tex").write_text("mine")
    {"folder": lambda: shutil.copytree(theirs, final), "link": lambda: final.symlink_to(theirs),
     "file": lambda: final.write_text("mine")}[kind]()
    with (pytest.raises(InputError, match=f"{final}: is there .* holds no manifest.json"),
          folders.atomic_folder(final, "manifest.json")):
        pytest.fail("what would be lost is told before the work")
    assert (final if kind == "file" else final / "chapter.tex").read_text() == "mine"


def test_a_file_system_without_locks_is_said_and_no_obstacle(tmp_path, monkeypatch, capsys):
    def flock(descriptor, flags):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(folders.fcntl, "flock", flock)
    folders.lock(tmp_path / "run")
    assert f"warning: {tmp_path}/run: this file system has no locks (Function not implemented)" in capsys.readouterr().err
    with folders.atomic_folder(tmp_path / "store", "manifest.json"):
        pass
    assert (tmp_path / "store").is_dir()


def write_folder(tmp_path):
    write_adapter(tmp_path / "adapter", np.random.default_rng(0))
    return tmp_path / "adapter"
