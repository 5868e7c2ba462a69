"""Several processes as one run: who takes part, how a dead one ends the others, and the job files of clusters."""

import os
import pathlib
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import types

import pytest
import yaml
from conftest import ROOT, start_module, train_command

from dnd_jax import checkpoints, distributed
from dnd_jax.types import InputError

CLUSTER = ROOT / "experiments" / "cluster"


def settings(environ=(), coordinator=None, num_processes=None, process_id=None):
    flags = types.SimpleNamespace(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
    return distributed.settings(flags, dict(environ))


def test_a_process_alone_joins_nothing():
    assert settings() is None and settings({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}) is None
    assert settings({"SLURM_STEP_NODELIST": "a", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) is None


def test_clusters_are_left_to_jax_and_flags_come_before_them():
    slurm = {"SLURM_STEP_NODELIST": "a,b", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
    for environ in (slurm, {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
                    {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}):
        assert settings(environ) == {}
    assert settings(slurm, "host:1", 2, 0) == {"coordinator_address": "host:1", "num_processes": 2, "process_id": 0}


@pytest.mark.parametrize("flags", [("host:1", 2, None), (None, 2, 0), ("host:1", 2, 2), ("host", 2, 0)])
def test_flags_that_do_not_fit_are_refused(flags):
    with pytest.raises(InputError, match=r"--coordinator is .*--num_processes .*--process_id"):
        settings((), *flags)


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start_pair(command, own=((), ())):
    """Start two processes of two devices each as one run; each has words of its own."""
    port = free_port()
    return [start_module(*command, f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={i}", *words,
                         env={"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}) for i, words in enumerate(own)]


@pytest.mark.parametrize("victim,number", [
    (1, signal.SIGKILL), *(pytest.param(*case, marks=pytest.mark.slow)
                           for case in ((0, signal.SIGKILL), (1, signal.SIGSTOP), (1, signal.SIGTERM)))])
def test_a_process_that_ends_or_hangs_ends_the_other(tmp_path, store, victim, number):
    """Within 30 s, with a message and status; after SIGTERM both save the same step and exit with 0."""
    log = tmp_path / "run" / "metrics.jsonl"
    pair = start_pair(train_command(store, tmp_path / "run", steps=10**6, validate_every=10**5))
    try:
        while not (log.exists() and log.stat().st_size):
            assert all(process.poll() is None for process in pair)
            time.sleep(0.1)
        pair[victim].send_signal(number)
        out, err = pair[1 - victim].communicate(timeout=30)
        if number == signal.SIGTERM:
            assert [process.wait(30) for process in pair] == [0, 0] and "is saved" in out + pair[victim].communicate()[0]
        else:
            assert pair[1 - victim].returncode != 0 and "another task died" in err
    finally:
        for process in pair:
            process.kill()
            process.communicate()


def test_processes_of_different_configs_are_refused_in_all_of_them(tmp_path, store):
    """Each would go its own way from the first step, and only the first one's config would be known."""
    pair = start_pair(train_command(store, tmp_path / "run"), [[f"--config.train.learning_rate={rate}"] for rate in (1e-3, 3e-2)])
    try:
        said = [process.communicate(timeout=60)[1] for process in pair]
    finally:
        for process in pair:
            process.kill()
            process.communicate()
    assert [process.returncode for process in pair] == [1, 1] and not (tmp_path / "run").exists()
    assert all("error: process 1: config.train.learning_rate is 0.03, process 0 has 0.001" in text for text in said)


def test_a_process_that_cannot_write_is_heard_at_once_and_ends_the_run(tmp_path, store):
    """Orbax itself lets it wait for the other first, and the other for it, for as long as a save may take."""
    port = free_port()
    command = [sys.executable, "-m", *train_command(store, tmp_path / "run", steps=10**6, validate_every=30, log_every=10)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    pair = [subprocess.Popen([*command, "--config.mesh.fsdp=2", f"--coordinator=localhost:{port}", "--num_processes=2",
                              f"--process_id={i}"], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) for i in range(2)]
    try:
        while not (tmp_path / "run" / "checkpoints" / "30" / "sha256.json").exists():
            assert all(process.poll() is None for process in pair)
            time.sleep(0.1)
        resource.prlimit(pair[1].pid, resource.RLIMIT_FSIZE, (100, -1))
        said = [process.communicate(timeout=60)[1] for process in pair]
    finally:
        for process in pair:
            process.kill()
            process.communicate()
    assert [process.returncode for process in pair] == [1, 1]
    assert re.search(r"error: .*checkpoints/\d+: this checkpoint is not written: .*File too large", said[1])
    assert re.search(r"error: .*this checkpoint is not written: process 1 of 2 could not write its part", said[0])
    assert checkpoints.load_latest(tmp_path / "run" / "checkpoints")[0] >= 30


COMMAND = "python -m dnd_jax.train --config="
# In place of the cluster's commands: the first training process waits for SIGTERM and exits 0, a later one ends by itself.
STUBS = {
    "srun": '[ "$1" = --kill-on-bad-exit=1 ] && exec env --default-signal=TERM "${@:2}"',  # SLURM starts them, not srun
    "python": """echo "$@" > arguments
[ -e started ] && exit "${STATUS:-0}"
trap 'sleep 0.3; echo "terminated: step 3 is saved, the same command goes on from there"; exit 0' TERM
echo $$ > pid && mv pid started
while :; do sleep 0.05; done""",
    "squeue": 'echo "$@" > squeue.arguments; echo "$STATE"',
    "scontrol": 'echo "$@" >> scontrol.arguments',
}


@pytest.fixture
def cluster(tmp_path):
    """Return what starts a script, by default the SLURM job, with the stubs of a cluster."""
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "sweep").write_text("--workdir=a\n--workdir=b --config.train.learning_rate=1e-4")  # no line break at its end
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "STATE": "RUNNING"}
    job = [CLUSTER / "train.sbatch", "x.py:v", "--config.seed=1"]
    return lambda *words, **more: subprocess.Popen(["bash", *(words or job)], cwd=tmp_path, env=env | more,
                                                   stdout=subprocess.PIPE, text=True)


def wait_for(process, path):
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.02)
    return path


ELEMENT = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "SWEEP": "sweep"}


@pytest.mark.parametrize("job,state,requeued", [  # an array's element may have the number that stands for the whole array
    ({}, "RUNNING", "7"), (ELEMENT, "RUNNING", "7_1"), (ELEMENT, "COMPLETING", None)])
def test_sbatch_requeues_what_was_terminated_but_not_what_was_cancelled(tmp_path, cluster, job, state, requeued):
    process = cluster(**job, STATE=state)
    started = wait_for(process, tmp_path / "started")
    for pid in (int(started.read_text()), process.pid):  # SLURM's signals reach the script, too
        os.kill(pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and "terminated: step 3" in said
    of = (tmp_path / "squeue.arguments").read_text().split()
    assert of == ["--noheader", f"--jobs={'7_1' if job else '7'}", "--format=%T"]
    found = (tmp_path / "scontrol.arguments").read_text().split() if (tmp_path / "scontrol.arguments").exists() else None
    assert found == (["requeue", requeued] if requeued else None)


@pytest.mark.parametrize("status,requeued", [("0", False), ("3", False), ("143", True)])  # SIGTERM before it is heard
def test_sbatch_requeues_nothing_that_ended_by_itself(tmp_path, cluster, status, requeued):
    (tmp_path / "started").touch()
    process = cluster(STATUS=status)
    process.communicate(timeout=20)
    assert process.returncode == int(status)
    assert (tmp_path / "scontrol.arguments").exists() == requeued


def test_sbatch_runs_the_command_with_the_flags_of_its_element(tmp_path, cluster):
    text = (CLUSTER / "train.sbatch").read_text()
    assert COMMAND in text and "#SBATCH --requeue" in text
    (tmp_path / "started").touch()
    cluster(**ELEMENT).communicate(timeout=20)
    assert (tmp_path / "arguments").read_text().split() == [
        "-m", "dnd_jax.train", "--config=x.py:v", "--config.seed=1", "--workdir=b", "--config.train.learning_rate=1e-4"]
    (tmp_path / "arguments").unlink()
    process = cluster(**ELEMENT | {"SLURM_ARRAY_TASK_ID": "2"})  # no such line
    process.communicate(timeout=20)
    assert process.returncode == 1 and not (tmp_path / "arguments").exists()


def test_jobset_is_an_indexed_job_of_the_command_that_starts_again(tmp_path, cluster):
    jobset = yaml.safe_load((CLUSTER / "jobset.yaml").read_text())
    assert (jobset["kind"], jobset["apiVersion"]) == ("JobSet", "jobset.x-k8s.io/v1alpha2")
    (job,) = jobset["spec"]["replicatedJobs"]
    job = job["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"]  # JAX's detection needs it
    (container,) = job["template"]["spec"]["containers"]
    script = container["command"][-1]
    assert script.startswith(COMMAND) and jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    process = cluster("-c", script)
    wait_for(process, tmp_path / "started")
    process.terminate()
    said, _ = process.communicate(timeout=20)
    assert "terminated: step 3" in said and process.returncode == 143  # a failure, so that the JobSet starts all again
    for status in (0, 3):
        process = cluster("-c", script, STATUS=str(status))
        process.communicate(timeout=20)
        assert process.returncode == status
    config = script.split("--config=/app/")[1].split(":")[0]
    assert pathlib.Path(ROOT / config).exists()


def test_every_job_file_says_how_it_is_used():
    for path in CLUSTER.iterdir():
        comment = [line for line in path.read_text().splitlines() if line.startswith("# ")]
        assert len(comment) >= 3 and any("experiments/cluster/" + path.name in line for line in comment), path
