"""Checkpoints: damage is found and passed by, a failed write is reported and costs no older checkpoint."""

import contextlib
import errno
import gc
import io
import resource
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from dnd_jax import checkpoint_folders, checkpoints, checksums
from dnd_jax.types import InputError

ABOUT = {"kernel_size": 3}


def state_of(step, size=1000):
    return {"params": {"kernel": jnp.arange(size, dtype=jnp.float32) + step}, "step": jnp.asarray(step)}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Checkpoints 1 (best), 2 and 3."""
    folder = tmp_path_factory.mktemp("written")
    checkpointer = checkpoints.Checkpointer(folder, ABOUT, last=3)
    for step, loss in ((1, 0.1), (2, 0.3), (3, 0.2)):
        checkpointer.save(step, state_of(step), {"validation_loss": loss})
    checkpointer.close()
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "checkpoints")


def largest(path):
    return max((file for file in (path / "state").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip(path, place=-100):
    data = bytearray(path.read_bytes())
    data[max(place, -len(data))] ^= 4
    path.write_bytes(data)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "state flipped": lambda path: flip(largest(path)),
    "state cut short": lambda path: halve(largest(path)),
    "state lost": lambda path: largest(path).unlink(),
    "metadata flipped": lambda path: flip(path / "_CHECKPOINT_METADATA"),
    "metadata lost": lambda path: (path / "_CHECKPOINT_METADATA").unlink(),
    "hashes cut short": lambda path: halve(path / checksums.NAME),
    "no hashes, state cut short": lambda path: ((path / checksums.NAME).unlink(), halve(largest(path))),
}


def restored(folder):
    return checkpoints.Checkpointer(folder, ABOUT).restore(state_of(0))


def fails(error):
    def load(*args, **kwargs):
        raise error

    return load


@pytest.mark.parametrize("hashes,error", [
    (True, ValueError("structures differ")), (True, OSError("Input/output error")), (False, MemoryError("of the host")),
    (False, RuntimeError("RESOURCE_EXHAUSTED: Out of memory"))])
def test_what_keeps_a_sound_checkpoint_from_loading_ends_the_run_there(folder, monkeypatch, hashes, error):
    if not hashes:
        (folder / "3" / checksums.NAME).unlink()
    checkpointer = checkpoints.Checkpointer(folder, ABOUT)
    monkeypatch.setattr(checkpoints.ocp, "load_checkpointables", fails(error))
    monkeypatch.setattr(checkpoints.ocp, "load", fails(error))
    with pytest.raises(OSError, match=rf"checkpoints/3: process 0 can't load it: {error}"):
        checkpointer.restore(state_of(0))
    with pytest.raises(OSError, match=rf"checkpoints/3: .*bytes are those written: {error}"):
        checkpoints.load_latest(folder)
    assert (folder / "3").is_dir() and not list(folder.glob("*.damaged"))


def test_what_only_some_processes_can_read_ends_the_run_and_is_left_as_it_is(folder, monkeypatch):
    (folder / "3" / checksums.NAME).unlink()
    checkpointer = checkpoints.Checkpointer(folder, ABOUT)
    monkeypatch.setattr(checkpoints.ocp, "load", fails(ValueError("no such file")))
    answers = iter([None, 0, 1])  # both can list its arrays, process 1 has read them
    monkeypatch.setattr(checkpoints.distributed, "first_with", lambda flag: next(answers))
    with pytest.raises(OSError, match="checkpoints/3: process 0 can't load it, process 1 can: no such file"):
        checkpointer.restore(state_of(0))
    assert (folder / "3").is_dir() and not list(folder.glob("*.damaged")) and not (folder / "3" / checksums.NAME).exists()


def test_a_checkpoint_of_another_state_is_left_as_it_is(folder):
    with pytest.raises(OSError, match=r"checkpoints/3: process 0 can't load it: (?s:.*)more"):
        checkpoints.Checkpointer(folder, ABOUT).restore({**state_of(0), "more": jnp.zeros(1)})
    assert (folder / "3").is_dir() and not list(folder.glob("*.damaged"))


def test_an_imported_decoder_is_not_trained_on(folder):
    with pytest.raises(InputError, match=r"checkpoints/3: has no state of an optimizer; a decoder that was imported"):
        checkpoints.Checkpointer(folder, ABOUT).restore({**state_of(0), "opt_state": jnp.zeros(1)})
    assert (folder / "3").is_dir() and not list(folder.glob("*.damaged"))


def test_a_file_that_cannot_be_read_is_no_damage(folder, monkeypatch):
    monkeypatch.setattr(checksums.files, "sha256_file", fails(PermissionError(13, "Permission denied", "state/d/1")))
    for read in (restored, checkpoints.load_latest):
        with pytest.raises(PermissionError, match="state/d/1"):
            read(folder)
    assert (folder / "3").is_dir() and not list(folder.glob("*.damaged"))


def test_metrics_that_cannot_be_read_cost_no_checkpoint_and_stay(folder, monkeypatch):
    def read(path, whole=checksums.files.sha256_file):
        if path == folder / "1" / checkpoint_folders.METRICS:
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return whole(path)

    before = (folder / "1" / checkpoint_folders.METRICS).read_bytes()
    monkeypatch.setattr(checksums.files, "sha256_file", read)
    for action in (lambda: checkpoint_folders.prune(folder, last=1, every=0), lambda: checkpoint_folders.tidy(folder),
                   lambda: checkpoints.load_best(folder)):
        with pytest.raises(OSError, match=r"Too many open files.*1/metrics/metrics"):
            action()
    assert [path.name for path in checkpoint_folders.steps(folder)] == ["1", "2", "3"]
    assert (folder / "1" / checkpoint_folders.METRICS).read_bytes() == before


def test_a_process_that_cannot_even_list_the_arrays_keeps_all_from_reading_them(folder, monkeypatch):
    monkeypatch.setattr(checkpoints.distributed, "first_with", lambda flag: 1)  # process 1 can't
    monkeypatch.setattr(checkpoints.ocp, "load", lambda *args, **kwargs: pytest.fail("Orbax counts its calls"))
    assert checkpoints._fault_in_loading(folder / "3") is None


def test_sound_parameters_of_other_shapes_stop_training_and_are_left_as_they_are(folder):
    with pytest.raises(InputError, match=r"checkpoints/3: kernel has shape \(1000,\) there, \(999,\) in this decoder"):
        checkpoints.Checkpointer(folder, ABOUT).restore(state_of(0, 999))
    assert (folder / "3").is_dir() and not list(folder.glob("*.damaged"))


# Orbax leaves coroutines of a load that fails half-way to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_by_readers_and_set_aside_by_training(folder, capsys, damage):
    DAMAGE[damage](folder / "3")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    step, params = checkpoints.load_latest(folder)
    assert step == 2 and params["kernel"][0] == 2
    assert ("3: damaged" in capsys.readouterr().out) == (damage != "metadata lost")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    state = restored(folder)
    assert int(state["step"]) == 2 and (folder / "3.damaged").is_dir() and not (folder / "3").exists()
    assert f"{folder}/3: damaged" in capsys.readouterr().out
    shutil.rmtree(folder / "2")
    DAMAGE[damage](folder / "1")
    with pytest.raises(InputError, match=r"is sound|holds no checkpoint"):
        checkpoints.load_best(folder)
    assert restored(folder) is None
    gc.collect()


@pytest.mark.parametrize("text", ["{", "[1]", '{"validation_loss": 0.9}', "\xff\xfe{"])
def test_damaged_metrics_cost_the_metrics_only(folder, capsys, text):
    (folder / "1" / checkpoint_folders.METRICS).write_text(text, encoding="latin-1")
    step, _, about, metrics = checkpoints.load_best(folder)
    assert step == 3 and metrics == {"validation_loss": 0.2} and about == ABOUT
    assert "metrics: damaged" in capsys.readouterr().out
    checkpointer = checkpoints.Checkpointer(folder, ABOUT, last=2)
    assert int(checkpointer.restore(state_of(0))["step"]) == 3
    checkpointer.save(4, state_of(4), {"validation_loss": 0.4})
    checkpointer.close()
    assert {path.name for path in folder.iterdir()} == {"3", "4"}  # 1 no longer counts as the best


def test_lost_metrics_are_told_once(folder, capsys):
    (folder / "3" / checkpoint_folders.METRICS).write_text("{")
    (folder / "2" / checkpoint_folders.METRICS).unlink()
    for step in (4, 5):
        checkpointer = checkpoints.Checkpointer(folder, ABOUT, last=5)
        assert int(checkpointer.restore(state_of(0))["step"]) == step - 1
        checkpointer.save(step, state_of(step), {"validation_loss": 0.4})
        checkpointer.close()
        assert capsys.readouterr().out.count("metrics: damaged") == (2 if step == 4 else 0)
    assert checkpoints.load_best(folder)[0] == 1


def test_what_a_killed_run_was_to_prune_goes_before_the_next_save(folder):
    shutil.copytree(folder / "2", folder / checkpoint_folders.REMOVED)  # killed amid this
    checkpointer = checkpoints.Checkpointer(folder, ABOUT, last=1)
    assert not (folder / checkpoint_folders.REMOVED).exists() and (folder / "2").is_dir()
    assert int(checkpointer.restore(state_of(0))["step"]) == 3
    assert {path.name for path in folder.iterdir()} == {"1", "3"}  # and before this


def test_lost_metrics_empty_folders_and_halves_do_not_keep_the_others_from_opening(folder, capsys):
    shutil.rmtree(folder / "3" / "metrics")
    (folder / "4").mkdir()
    (folder / "5.orbax-checkpoint-tmp").mkdir()
    assert checkpoints.load_best(folder)[0] == 1 and checkpoints.load_latest(folder)[0] == 3
    checkpointer = checkpoints.Checkpointer(folder, ABOUT, last=3)
    assert int(checkpointer.restore(state_of(0))["step"]) == 3
    checkpointer.save(4, state_of(4), {})
    checkpointer.close()
    assert {path.name for path in folder.iterdir()} == {"1", "2", "3", "4"}


def test_a_kill_between_commit_and_hashes_costs_neither(folder):
    known = (folder / "3" / checksums.NAME).read_text()
    (folder / "3" / checksums.NAME).unlink()
    assert checkpoints.load_latest(folder)[0] == 3
    assert int(restored(folder)["step"]) == 3 and (folder / "3" / checksums.NAME).read_text() == known


def test_a_kill_while_pruning_leaves_no_half_of_a_checkpoint(folder, monkeypatch):
    def killed(path, ignore_errors=False):
        if path.exists():
            largest(path).unlink()
            raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folders.shutil, "rmtree", killed)
        with pytest.raises(OSError, match="killed"):
            checkpoint_folders.prune(folder, last=1, every=0)
    assert [path.name for path in checkpoint_folders.steps(folder)] == ["1", "3"]
    assert not any(checkpoint_folders.fault_of(path) for path in checkpoint_folders.steps(folder))
    checkpointer = checkpoints.Checkpointer(folder, ABOUT, last=2)
    assert int(checkpointer.restore(state_of(0))["step"]) == 3
    checkpointer.save(4, state_of(4), {"validation_loss": 0.5})
    checkpointer.close()
    assert {path.name for path in folder.iterdir()} == {"1", "3", "4"}  # what the kill left goes, if nothing else does


@contextlib.contextmanager
def file_size_limit(folder):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def small_disk(folder):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("full", [file_size_limit, small_disk])
def test_a_failed_write_is_reported_at_once_and_costs_no_older_checkpoint(tmp_path, capsys, full):
    values = jnp.asarray(np.random.default_rng(0).normal(size=300_000), jnp.float32)
    with full(tmp_path):
        checkpointer = checkpoints.Checkpointer(tmp_path, ABOUT)
        checkpointer.save(1, state_of(1), {"validation_loss": 0.1})
        checkpointer.save(2, {**state_of(2), "more": values}, {"validation_loss": 0.2})
        checkpointer.wait()
        said = f"{tmp_path}/2: this checkpoint is not written: "
        assert checkpointer.failed() and f"error: {said}" in capsys.readouterr().err
        assert checkpoints.load_latest(tmp_path)[0] == 1
        checkpointer.save(3, state_of(3), {"validation_loss": 0.3})
        checkpointer.wait()
        assert not checkpointer.failed() and checkpoints.load_latest(tmp_path)[0] == 3
        assert {path.name for path in tmp_path.iterdir()} == {"1", "3"}
        checkpointer.save(4, {**state_of(4), "more": values}, {"validation_loss": 0.4})
        with pytest.raises(OSError, match=f"{tmp_path}/4: this checkpoint is not written: .*; the last good .*{tmp_path}/3$"):
            checkpointer.close()


@pytest.mark.parametrize("last", [1, 2])
def test_a_failed_write_costs_no_older_checkpoint_where_it_cannot_even_be_said(tmp_path, monkeypatch, last):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    values = jnp.asarray(np.random.default_rng(0).normal(size=300_000), jnp.float32)
    checkpointer = checkpoints.Checkpointer(tmp_path, ABOUT, last=last)
    for step in (1, 2):
        checkpointer.save(step, state_of(step), {"validation_loss": 1 / step})
    with file_size_limit(tmp_path):
        for step in (3, 4, 5):
            checkpointer.save(step, {**state_of(step), "more": values}, {"validation_loss": 1 / step})
            checkpointer.wait()
            assert checkpointer.failed()
        with pytest.raises(OSError, match=f"last good checkpoint is {tmp_path}/2$"):
            checkpointer.close()
    assert [path.name for path in checkpoint_folders.steps(tmp_path)] == ["1", "2"][-last:]
    assert int(restored(tmp_path)["step"]) == 2


@pytest.mark.parametrize("break_it", [
    lambda path: (path / "_CHECKPOINT_METADATA").write_text("[1]"),
    lambda path: ((path / checksums.NAME).unlink(), (path / checkpoint_folders.METRICS).write_text('{"validation_loss": null}')),
    lambda path: ((path / checkpoint_folders.METRICS).unlink(), (path / checkpoint_folders.METRICS).mkdir()),
    lambda path: (shutil.rmtree(path / "metrics"), (path / "metrics").write_text("{}"))])
def test_damage_to_an_older_checkpoint_keeps_no_later_one_from_being_saved(folder, break_it):
    break_it(folder / "2")
    checkpointer = checkpoints.Checkpointer(folder, ABOUT, last=3)
    assert int(checkpointer.restore(state_of(0))["step"]) == 3
    checkpointer.save(4, state_of(4), {"validation_loss": 0.5})
    checkpointer.close()
    assert checkpoints.load_latest(folder)[0] == 4 and checkpoints.load_best(folder)[0] == 1
