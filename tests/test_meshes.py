"""Meshes and processes: a run's losses are those of one device, and it goes on exactly on any of them."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, make_store, read_log, start_module, tiny_config, train_command, without_times

from dnd_jax import checksums, pairs, train


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    """A store, the workdir of a run on it with one process and one device, and that run's log."""
    folder = tmp_path_factory.mktemp("one")
    store = make_store(folder / "store", np.random.default_rng(0))
    train.train(tiny_config(store), pairs.open_store(store), folder / "run")
    return store, folder / "run", read_log(folder / "run")


def assert_same_losses(log, other, tolerance=1e-6):
    for one, two in zip(log, other, strict=True):
        assert one["step"] == two["step"]
        for name in ("loss", "validation_loss"):
            np.testing.assert_allclose(two.get(name, 0), one.get(name, 0), rtol=tolerance, err_msg=str((one["step"], name)))


def unfinished(workdir, target):
    """Return a copy of a finished run's workdir in which the last checkpoint isn't there: it resumes from step 4."""
    shutil.copytree(workdir, target)
    shutil.rmtree(target / "checkpoints" / "6")
    return target


EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
ON_EIGHT = """
import pathlib, sys, jax
from conftest import tiny_config
from dnd_jax import pairs, sharding, train
from dnd_jax.decoder import HyperConvDecoder
from dnd_jax.settings import check_here
store, folder = sys.argv[1], pathlib.Path(sys.argv[2])
for name, sizes, settings in (
        ("8,1,1", (8, 1, 1), {}), ("2,4,1", (2, 4, 1), {}), ("2,2,2", (2, 2, 2), {"accumulate": 2}), ("resumed", (2, 2, 2), {})):
    config = tiny_config(store, **settings).unlock()
    config.mesh = dict(zip(sharding.AXES, sizes))
    train.train(config, pairs.open_store(store), folder / name)

for name, sizes in (("bf16", (8, 1, 1)), ("bf16 in parts", (2, 2, 2))):
    config = tiny_config(store, compute_dtype="bfloat16").unlock()
    config.mesh = dict(zip(sharding.AXES, sizes))
    train.train(config, pairs.open_store(store), folder / name)
mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
config = tiny_config(store, optimizer="adamw_factored", param_dtype="bfloat16")
state = train.make_state(config, HyperConvDecoder(((2, 128, 4), (4, 128, 4)), 1), mesh)
kernel, factored = state.params["layers_0"]["width_conv_l"], state.opt_state[1]
print(kernel.shape, kernel.addressable_shards[0].data.shape, kernel.sharding.spec)
print(factored.v_row["layers_0"]["width_conv_l"].shape, factored.v_row["layers_0"]["width_conv_l"].sharding.is_fully_replicated)
moment = state.opt_state[3].ema["layers_0"]["width_conv_l"]
print(moment.dtype, moment.sharding == kernel.sharding)
sharding.check_moments(state)
whole = jax.device_put(state.opt_state, sharding.replicated(mesh))
try:
    sharding.check_moments(train.State(state.step, state.params, whole, state.rng))
except RuntimeError as error:
    print(error)
try:
    check_here(tiny_config(store, accumulate=2))
except ValueError as error:
    print(error)
try:
    train.train(tiny_config(store, batch_size=6), pairs.open_store(store), folder / "six")
except ValueError as error:
    print(error)
"""


def test_one_device_equals_every_mesh_of_eight(tmp_path, on_one_device):
    """So does a run that one device began, and one in microbatches; moments lie where their parameters lie."""
    store, workdir, log = on_one_device
    unfinished(workdir, tmp_path / "resumed")
    env = {**os.environ, **EIGHT, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    done = subprocess.run([sys.executable, "-c", ON_EIGHT, store, tmp_path], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("8,1,1", "2,4,1", "2,2,2", "resumed"):
        assert_same_losses(log, read_log(tmp_path / name))
    train.train(tiny_config(store, compute_dtype="bfloat16"), pairs.open_store(store), tmp_path / "bf16 on one")
    for name in ("bf16", "bf16 in parts"):
        assert_same_losses(read_log(tmp_path / "bf16 on one"), read_log(tmp_path / name), 3e-3)
    assert "(1, 1, 128, 128) (1, 1, 64, 64) P(None, None, 'fsdp', 'tensor')" in done.stdout
    assert "(1, 1, 128) True" in done.stdout and "float32 True" in done.stdout
    assert "a batch of 6 does not divide over 8 devices" in done.stdout
    assert ("config.train.batch_size is 8, in 2 microbatches (config.train.accumulate) of 4 examples, which config.mesh.data x "
            "config.mesh.fsdp = 8 devices don't divide") in done.stdout
    shares = [float(line.split()[-4].rstrip("%")) for line in done.stdout.splitlines() if line.endswith("of the parameters")]
    assert shares[0] == 100 and max(shares[1:4]) < 70 and len(shares) == 7
    assert "optimizer state" in done.stdout and "its parameter as" in done.stdout


def test_two_processes_of_four_devices_equal_one_of_one(tmp_path, on_one_device):
    """The run that they began goes on in one process."""
    store, _, log = on_one_device
    (_, first), (out, second) = train_by_two(store, tmp_path / "run")
    assert_same_losses(log, read_log(tmp_path / "run"))
    assert "train:" in first and not out and "train:" not in second
    resumed = unfinished(tmp_path / "run", tmp_path / "resumed")
    train.train(tiny_config(store), pairs.open_store(store), resumed)
    assert_same_losses(log, read_log(resumed))


def train_by_two(store, workdir):
    """Train by two processes of four devices each, which find each other by SLURM's variables; return what they print."""
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    command, pair = [*train_command(store, workdir), "--config.mesh.data=4", "--config.mesh.tensor=2"], []
    for i in range(2):
        pair.append(start_module(*command, env={
            **job, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}))
    said = [process.communicate() for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said[0][1][-2000:] + said[1][1][-2000:]
    return said


@pytest.mark.parametrize("recorded", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_processes_go_on_exactly_where_they_were_before_a_damaged_checkpoint(tmp_path, on_one_device, recorded):
    """Also if its writer was killed before it recorded the hashes; a sound one is taken, and they are recorded then."""
    store, _, log = on_one_device
    newest = tmp_path / "run" / "checkpoints" / "6"
    train_by_two(store, tmp_path / "run")
    whole = without_times(tmp_path / "run")
    state = [path for path in (newest / "state").rglob("*") if path.is_file()]
    if recorded:
        damaged = max(state, key=lambda path: path.stat().st_size)
        data = damaged.read_bytes()
        damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        hashes = (newest / checksums.NAME).read_bytes()
        (newest / checksums.NAME).unlink()
        (out, _), _ = train_by_two(store, tmp_path / "run")
        assert "damaged" not in out and (newest / checksums.NAME).read_bytes() == hashes
        (newest / checksums.NAME).unlink()
        for path in state:  # not all of it is read again: some is of one process only
            os.truncate(path, path.stat().st_size // 2)
    (out, _), _ = train_by_two(store, tmp_path / "run")
    assert "checkpoints/6: damaged" in out and newest.with_name("6.damaged").is_dir()
    assert without_times(tmp_path / "run") == whole
    assert_same_losses(log, whole)
