"""The miniature pipeline, killed at random moments, ends as if nobody had disturbed it."""

import jax.numpy as jnp
import pytest
from conftest import run_module, start_module

from dnd_jax import checkpoints
from experiments.faults import kill_loop


def start(folder, name, mesh=kill_loop.MESHES[0]):
    words, env = kill_loop.command_of(name, mesh)
    return start_module(*words, cwd=folder, env=env)


def test_ten_kills_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(kill_loop, "start", start)  # which takes a third of the time
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    kill_loop.make_world(tmp_path / "whole")
    found = kill_loop.kill_loop(tmp_path / "whole", tmp_path / "killed", 10, 0)
    assert kill_loop.within(found), found
    assert found["steps"] == [24] and found["compared"] > 50


def test_a_folder_with_other_things_is_not_made_anew(tmp_path):
    (tmp_path / "results.txt").touch()
    done = run_module("experiments.faults.kill_loop", f"--out={tmp_path}", check=False)
    assert done.returncode == 1 and f"error: {tmp_path}: holds ['results.txt'], expected" in done.stderr
    assert (tmp_path / "results.txt").exists()


def test_an_older_checkpoint_that_lacks_a_file_is_seen(tmp_path):
    folder = tmp_path / "killed" / "checkpoints"
    with checkpoints.Checkpointer(folder, {}) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"params": {"kernel": jnp.arange(9.0)}}, {})
    kill_loop.check_visible(tmp_path)
    next(path for path in (folder / "1" / "state").rglob("*") if path.is_file()).unlink()
    with pytest.raises(RuntimeError, match=r"checkpoints/1: state/.*: no such file"):
        kill_loop.check_visible(tmp_path)
