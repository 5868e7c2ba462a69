"""Training: it can fit, it resumes exactly, nothing is lost, and bad input stops it before anything is written."""

import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from conftest import ROOT, make_store, read_log, tiny_config, train_command, without_times

from dnd_jax import checkpoints, inputs, optimizers, pairs, settings, sharding, train, validation, workdirs
from dnd_jax.decoder import HyperConvDecoder
from dnd_jax.tokens import mask_of
from dnd_jax.types import InputError


def assert_same_params(a, b):
    paths_a, paths_b = (jax.tree.leaves_with_path(checkpoints.load_latest(w / "checkpoints")[1]) for w in (a, b))
    assert [p for p, _ in paths_a] == [p for p, _ in paths_b]
    for (path, x), (_, y) in zip(paths_a, paths_b, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=str(path))


def test_overfits_one_pair(tmp_path, rng):
    store = make_store(tmp_path / "store", rng, train=1, checkpoints=1, prompts=4)
    config = tiny_config(store, steps=800, learning_rate=5e-3, weight_decay=0.0, validate_every=800, log_every=100)
    train.train(config, pairs.open_store(store), tmp_path / "run")
    assert read_log(tmp_path / "run")[-1]["loss"] < 1e-4


def test_log_and_checkpoints_say_what_happened(tmp_path, store):
    config = tiny_config(store)
    train.train(config, pairs.open_store(store), tmp_path / "run")
    log = read_log(tmp_path / "run")
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    always = {"step", "loss", "gradient_norm", "learning_rate", "norm_ratio", "steps_per_s", "samples_per_s", "input_wait_s",
              "seconds"}
    assert log[0].keys() == always and log[1].keys() == always | {"validation_loss", "validation_loss/task3"}
    assert log[0]["learning_rate"] == 0 and log[1]["learning_rate"] == pytest.approx(config.train.learning_rate)
    assert 0 < log[0]["norm_ratio"] < 10 and log[1]["validation_loss"] == log[1]["validation_loss/task3"]
    step, params, about, metrics = checkpoints.load_best(tmp_path / "run" / "checkpoints")
    validated = [entry for entry in log if "validation_loss" in entry]
    best = min(reversed(validated), key=lambda entry: entry["validation_loss"])
    assert step == best["step"] and metrics["validation_loss"] == best["validation_loss"] and len(validated) == 3
    assert about["config"]["train"]["steps"] == 6 and about["features"][-1] == list(pairs.open_store(store).layout.shape)
    assert params["layers_0"]["norm"]["scale"].shape == (5, 4)


def test_killed_and_resumed_equals_uninterrupted(tmp_path, store):
    settings = {"steps": 60, "validate_every": 5}
    train.run(tiny_config(store, **settings), tmp_path / "whole")
    command = [sys.executable, "-m", *train_command(store, tmp_path / "killed", **settings)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env=os.environ | {"XLA_FLAGS": ""})
    while process.poll() is None and not list((tmp_path / "killed").glob("checkpoints/[0-9]*/metrics")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert read_log(tmp_path / "killed")[-1]["step"] < 60
    train.run(tiny_config(store, **settings), tmp_path / "killed")
    assert_same_params(tmp_path / "whole", tmp_path / "killed")
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "killed")


def test_a_log_line_cut_short_by_a_kill_does_not_stop_resuming(tmp_path, store):
    config = tiny_config(store)
    train.train(config, pairs.open_store(store), tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 7, "lo')
    train.train(config, pairs.open_store(store), tmp_path / "run")
    assert path.read_text() == whole


def test_a_log_line_without_seconds_does_not_stop_resuming(tmp_path, store):
    train.run(tiny_config(store), tmp_path / "run")
    *lines, last = read_log(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (*lines, {"step": last["step"]})))
    train.run(tiny_config(store), tmp_path / "run")
    assert read_log(tmp_path / "run") == [*lines, {"step": 6}]


def test_without_validation_tasks_the_last_checkpoint_counts(tmp_path, rng, capsys):
    store = make_store(tmp_path / "store", rng, validation=0)
    train.run(tiny_config(store), tmp_path / "run")
    assert "has no validation task" in capsys.readouterr().out
    step, _, _, metrics = checkpoints.load_best(tmp_path / "run" / "checkpoints")
    assert step == 6 and "validation_loss" not in metrics


def test_the_state_is_donated_to_the_step(tmp_path, store, monkeypatch):
    states, make_state = [], train.make_state
    monkeypatch.setattr(train, "make_state", lambda *args: states.append(make_state(*args)) or states[0])
    train.train(tiny_config(store), pairs.open_store(store), tmp_path / "run")
    leaves = jax.tree.leaves((states[0].params, states[0].opt_state))
    assert len(leaves) > 20 and all(leaf.is_deleted() for leaf in leaves)


def take_steps(config, decoder, batch, count):
    """Return the losses of some steps on one batch with fresh noise, the state after them and the step's jaxpr."""
    mesh = sharding.make_mesh()
    state = train.make_state(config, decoder, mesh)
    mask, importance = np.ones(decoder.features[-1], bool), np.ones(decoder.features[-1][0], np.float32)
    step = train.make_train_step(config, decoder, mesh, mask, importance)
    jaxpr, losses = str(jax.make_jaxpr(step)(state, *batch)), []
    step = jax.jit(step)
    for _ in range(count):
        state, metrics = step(state, *batch)
        losses.append(float(metrics["loss"]))
    return np.array(losses), state, jaxpr


@pytest.fixture
def batch(rng):
    return rng.normal(size=(8, 2, 6, 4)).astype(np.float16), rng.normal(size=(8, 4, 3, 5)).astype(np.float32)


def test_microbatches_and_rematerialisation_change_nothing(store, batch):
    decoder = HyperConvDecoder(((2, 6, 4), (4, 5, 6), (4, 3, 5)), 3)
    settings = {"learning_rate": 1e-2, "condition_noise": 0.1}
    whole, state, _ = take_steps(tiny_config(store, **settings), decoder, batch, 4)
    parts, other, jaxpr = take_steps(tiny_config(store, **settings, accumulate=4), decoder.clone(remat=True), batch, 4)
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), other.params, state.params)
    assert "remat" in jaxpr and "scan" in jaxpr and len(set(whole)) == 4
    with pytest.raises(InputError, match="a batch of 8 does not divide into 3 microbatches"):
        take_steps(tiny_config(store, accumulate=3), decoder, batch, 1)


def test_bfloat16_trains_with_moments_and_losses_in_float32(store, batch):
    decoder = HyperConvDecoder(((2, 6, 4), (4, 3, 5)), 3)
    whole, _, _ = take_steps(tiny_config(store, learning_rate=1e-2, steps=100), decoder, batch, 40)
    config = tiny_config(store, learning_rate=1e-2, steps=100, param_dtype="bfloat16", compute_dtype="bfloat16")
    losses, state, jaxpr = take_steps(config, decoder.clone(dtype=jnp.bfloat16), batch, 40)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert {leaf.dtype for leaf in moments} == {jnp.dtype(jnp.float32)} and len(moments) == 2 * len(jax.tree.leaves(state.params))
    assert "bf16" in jaxpr and whole[-1] < 0.8 * whole[0]
    np.testing.assert_allclose(losses, whole, rtol=0.03)


def test_rounding_by_chance_keeps_the_mean():
    x = {"a": jnp.full(40_000, 1 + 2**-10), "b": jnp.full(40_000, -3e-5), "c": jnp.array([0.0, 1.0, -2.5])}
    kept = optimizers.stochastic_round(jax.random.key(0), x, jnp.dtype(jnp.bfloat16))
    assert set(np.asarray(kept["a"], np.float32)) == {1.0, 1 + 2**-7}
    np.testing.assert_allclose(np.asarray(kept["a"], np.float64).mean(), 1 + 2**-10, atol=1e-4)
    np.testing.assert_allclose(np.asarray(kept["b"], np.float64).mean(), -3e-5, rtol=1e-3)
    np.testing.assert_array_equal(np.asarray(kept["c"], np.float32), x["c"])


def test_a_factored_second_moment_trains_in_a_fraction_of_the_memory(store, rng):
    decoder = HyperConvDecoder(((2, 128, 4), (4, 128, 4)), 1)
    batch = rng.normal(size=(4, 2, 128, 4)).astype(np.float16), rng.normal(size=(4, 4, 128, 4)).astype(np.float32)
    config = tiny_config(store, optimizer="adamw_factored", learning_rate=1e-2, steps=60, weight_decay=0.0)
    losses, state, _ = take_steps(config, decoder, batch, 40)
    factored = state.opt_state[1]
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.params, factored)]
    assert losses[-1] < 0.7 * losses[0] and sizes[1] < sizes[0] / 10
    with pytest.raises(InputError, match="optimizer is 'sgd', expected 'adamw' or 'adamw_factored'"):
        optimizers.make_optimizer(tiny_config(store, optimizer="sgd"))
    with pytest.raises(InputError, match="param_dtype is 'float16', expected one of"):
        optimizers.dtype_of(tiny_config(store, param_dtype="float16"), "param_dtype")


def test_a_parameter_without_a_rule_is_refused():
    mesh = sharding.make_mesh()
    with pytest.raises(InputError, match=r"layers_0/gate \[3\]: no rule"):
        sharding.of_params(mesh, {"layers_0": {"gate": np.zeros(3)}})
    with pytest.raises(InputError, match=r"config\.mesh is {'fsdp': 7}, which does not fit"):
        sharding.make_mesh({"fsdp": 7})


def test_another_config_is_refused_naming_the_field(tmp_path, store):
    config = tiny_config(store)
    workdirs.claim(config, tmp_path / "run")
    workdirs.claim(config, tmp_path / "run")
    before = os.stat(tmp_path / "run" / "config.json").st_mtime_ns
    with pytest.raises(InputError, match=r"config\.json: train\.batch_size is 8, the config given says 16"):
        workdirs.claim(tiny_config(store, batch_size=16), tmp_path / "run")
    assert os.stat(tmp_path / "run" / "config.json").st_mtime_ns == before


def test_a_step_that_is_not_finite_stops_the_run_there_and_unsaved(tmp_path, rng):
    """One value of the store is too large to square: the step that first draws it is known beforehand."""
    store = make_store(tmp_path / "store", rng, train=8, checkpoints=1)
    config = tiny_config(store, steps=200, validate_every=4, log_every=1000, batch_size=1)
    opened, names = pairs.open_store(store), [f"task{i}" for i in range(8)]
    drawn = [inputs.names(config, opened.split("train"), step) for step in range(200)]
    first = {name: next(i for i, tasks in enumerate(drawn, 1) if name in tasks) for name in names}
    bad, step = next((name, at) for name, at in first.items() if at > 8 and at % 4)  # neither validated nor logged
    task = next(task for task in opened.tasks if task.name == bad)
    tokens = np.array(task.tokens)
    tokens[np.isfinite(tokens)] = 1e30
    broken = dataclasses.replace(task, tokens=tokens)
    opened = dataclasses.replace(opened, tasks=tuple(broken if t is task else t for t in opened.tasks))
    last = tmp_path / "run" / "checkpoints" / str(step // 4 * 4)
    with pytest.raises(FloatingPointError, match=rf"step {step}: \w+ is (inf|nan), tasks \['{bad}'\]; the last good .*{last}$"):
        train.train(config, opened, tmp_path / "run")
    assert checkpoints.load_latest(last.parent)[0] == int(last.name)


def test_a_validation_loss_that_is_not_finite_names_its_task(tmp_path, rng):
    opened = pairs.open_store(make_store(tmp_path / "store", rng, validation=2))
    condition = np.array(opened.split("validation")[1].condition)
    condition[:] = np.inf
    broken = dataclasses.replace(opened.split("validation")[1], condition=condition)
    opened = dataclasses.replace(opened, tasks=tuple(broken if t.name == broken.name else t for t in opened.tasks))
    with pytest.raises(FloatingPointError, match=rf"step 2: validation_loss/{broken.name} is nan, tasks \['{broken.name}'\]; no"):
        train.train(tiny_config(tmp_path / "store"), opened, tmp_path / "run")


def test_parameters_that_overflow_are_not_saved(tmp_path, store):
    config = tiny_config(store, learning_rate=3e38, clip_norm=1e30, warmup_steps=0, validate_every=1, weight_decay=1e3)
    with pytest.raises(FloatingPointError, match=r"step 1: .* is (inf|nan), tasks \['task.*; no checkpoint was written yet"):
        train.train(config, pairs.open_store(store), tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_every_changed_field_is_named_and_free_ones_may_change(tmp_path, store):
    workdirs.claim(tiny_config(store), tmp_path / "run")
    with pytest.raises(InputError) as caught:
        workdirs.claim(tiny_config(store, steps=7, batch_size=9), tmp_path / "run")
    assert "train.batch_size is 8, the config given says 9" in str(caught.value) and "train.steps is 6" in str(caught.value)
    free = {"log_every": 3, "keep_last": 5, "keep_every": 10, "on_failed_save": "continue", "tensorboard": True, "prefetch": 1,
            "accumulate": 2, "remat": True}
    config = tiny_config(store, **free).unlock()
    config.evaluate.scoring, config.collect.multi_task_steps = "choice", 5
    workdirs.claim(config, tmp_path / "run")


@pytest.mark.parametrize("name,value,said", [
    *((f"train.{name}", 0, "0, expected at least 1") for name in (
        "accumulate", "batch_size", "keep_last", "log_every", "prefetch", "validate_every")),
    ("train.on_failed_save", "ask", "'ask', expected 'stop' or 'continue'"),
    ("train.warmup_steps", 6, "6, expected fewer than config.train.steps, 6"),
    ("train.learning_rate", -1.0, "-1.0, expected at least 0"),
    ("train.learning_rate", math.nan, "nan, expected a finite number"),
    ("evaluate.temperature", math.inf, "inf, expected a finite number"), ("seed", -1, "-1, expected at least 0"),
    ("train.clip_norm", 0.0, "0.0, expected a positive number"), ("train.keep_every", -1, "-1, expected at least 0"),
    ("train.token_noise", -1.0, "-1.0, expected at least 0"), ("train.weight_decay", -0.1, "-0.1, expected at least 0"),
    ("train.optimizer", "adam", "'adam', expected 'adamw' or 'adamw_factored'"),
    ("train.compute_dtype", "bf16", "'bf16', expected one of"), ("train.param_dtype", "half", "'half', expected one of"),
    ("mesh.data", 0, "{'data': 0, 'fsdp': 1, 'tensor': 1}, which does not fit"),
    ("mesh.data", -2, "{'data': -2, 'fsdp': 1, 'tensor': 1}, which does not fit"),
    ("decoder.kernel_size", 0, "0, expected at least 1"), ("condition.prompts", 0, "0, expected at least 1")])
def test_what_no_run_can_begin_with_is_refused_before_anything_is_written(tmp_path, store, name, value, said):
    config = tiny_config(store).unlock()
    config.update_from_flattened_dict({name: value})
    with pytest.raises(InputError, match=rf"config\.{name.removesuffix('.data')} is {said}"):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change,said", [
    ({"decoder.blocks": ((6, 4),)}, r"decoder.blocks has \(6, 4\), expected three numbers"),
    ({"decoder.blocks": ((6, 4, 0),)}, r"decoder.blocks has \(6, 4, 0\), where a size is 0, expected at least 1"),
    ({"decoder.blocks": ((6, 4, 3.5),)}, r"decoder.blocks has \(6, 4, 3.5\), where a size is 3.5, expected a whole number"),
    ({"decoder.blocks": (), "train.steps": 0}, "train.steps is 0"),  # no block is a decoder, of one layer
    ({"decoder.shortened": -2, "train.calibrate": False}, "decoder.shortened is -2, expected at least 1"),
    ({"seed": 10**20}, "seed is 1000000+, expected at least 0 and less than 2"),
    ({"train.accumulate": 3}, "train: a batch of 8 does not divide into 3 microbatches"),
    ({"train.steps": "many"}, "train.steps is 'many', expected a whole number"), ({"train.steps": 6.0}, "train.steps is 6.0, ex"),
    ({"train.learning_rate": "3e-5"}, "train.learning_rate is '3e-5', expected a number"),
    *(({field: None}, f"{field} is missing") for field in ("mesh", "train.keep_every", "train.remat", "decoder.blocks"))])
def test_configs_written_by_hand_are_refused_in_words(store, change, said):
    values = tiny_config(store).to_dict()
    for field, value in change.items():
        *sections, name = field.split(".")
        section = functools.reduce(dict.__getitem__, sections, values)
        section[name] = value
        if value is None:
            del section[name]
    with pytest.raises(InputError, match=rf"config\.{said}"):
        settings.check_anywhere(ml_collections.ConfigDict(values))


@pytest.mark.parametrize("field,value", [("encoder.length", 6), ("condition.form", "mix"), ("export.gauge", "align")])
def test_a_store_that_was_exported_otherwise_is_refused_before_anything_is_written(tmp_path, store, field, value):
    """The workdir would say what isn't so."""
    config = tiny_config(store).unlock()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(InputError, match=rf"config\.{field} is '?{value}'?, .*store was exported with .*; export again"):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_validation_takes_no_more_at_once_than_a_microbatch_and_is_the_same(tmp_path, rng, monkeypatch):
    opened = pairs.open_store(make_store(tmp_path / "store", rng, validation=3))
    found, sizes, put = [], [], sharding.put_filled
    monkeypatch.setattr(sharding, "put_filled", lambda mesh, *arrays: sizes.append(len(arrays[0])) or put(mesh, *arrays))
    for accumulate in (1, 8):  # 8 examples at once and one
        config, mesh = tiny_config(tmp_path / "store", accumulate=accumulate), sharding.make_mesh()
        decoder = train.make_decoder(config, opened)
        mask = mask_of(opened.layout)
        validate = validation.make_validate(config, opened.split("validation"), decoder, mesh, mask, opened.importance)
        found.append(validate(train.make_state(config, decoder, mesh).params))
    assert set(sizes[:2]) == {8} and set(sizes[2:]) == {1} and len(sizes) == 2 + 12
    assert found[0].keys() == found[1].keys() == {"validation_loss", *(f"validation_loss/task{i}" for i in (3, 4, 5))}
    np.testing.assert_allclose(list(found[0].values()), list(found[1].values()), rtol=1e-6)
    assert len(set(found[0].values())) == 4


def test_the_keep_policy_is_the_configs(tmp_path, store):
    config = tiny_config(store, steps=10, validate_every=1, keep_last=1, keep_every=4, tensorboard=True)
    train.train(config, pairs.open_store(store), tmp_path / "run")
    losses = {entry["step"]: entry["validation_loss"] for entry in read_log(tmp_path / "run")}
    expected = {4, 8, 10, min(losses, key=losses.get)}
    assert {int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()} == expected
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
