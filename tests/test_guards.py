"""Signals that end a training run: it saves first, and what started it learns how it ended."""

import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, read_log, tiny_config, train_command

from dnd_jax import checkpoints, guards, workdirs
from dnd_jax.types import InputError


def start_and_wait(store, workdir, step, **settings):
    """Start a training process and wait until its log has reached a step."""
    hearing = ["env", "--default-signal=INT"]  # in a shell's background it is ignored
    command = [*hearing, sys.executable, "-m", *train_command(store, workdir, **settings)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (workdir / "metrics.jsonl").exists() or not read_log(workdir) or read_log(workdir)[-1]["step"] < step:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()[-2000:]
        time.sleep(0.05)
    return process


def test_sigterm_saves_and_a_second_run_is_kept_out(tmp_path, store):
    settings = {"steps": 100_000, "validate_every": 100_000}
    process = start_and_wait(store, tmp_path / "run", 20, **settings)
    with pytest.raises(InputError, match=f"run: is in use by process {process.pid}"):
        workdirs.claim(tiny_config(store, **settings), tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "terminated: step" in stdout
    step, _ = checkpoints.load_latest(tmp_path / "run" / "checkpoints")
    assert step == read_log(tmp_path / "run")[-1]["step"] >= 20 and f"step {step} is saved" in stdout
    assert "validation_loss" not in read_log(tmp_path / "run")[-1]  # there may not be the time for it


def test_an_interrupt_saves_and_a_second_one_ends_at_once(tmp_path, store):
    settings = {"steps": 100_000, "validate_every": 100_000}
    process = start_and_wait(store, tmp_path / "run", 20, **settings)
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=60)
    step, _ = checkpoints.load_latest(tmp_path / "run" / "checkpoints")
    assert process.returncode == -signal.SIGINT and f"terminated: step {step} is saved" in stdout  # so a shell goes no further
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), guards.until_terminated() as terminated:
            signal.raise_signal(signal.SIGINT)
            assert terminated(1)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("goes on")
    finally:
        signal.signal(signal.SIGINT, before)
