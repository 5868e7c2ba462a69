"""Benchmarks on decoders small enough for a test: their rows, and that what differs from PyTorch is not timed."""

import json
import os
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import ROOT, run_module, tiny_config

from dnd_jax import fourier_plan, pairs, train
from dnd_jax.decoder import HyperConvDecoder
from dnd_jax.types import InputError
from experiments.benchmarks import accelerator, decoder, input

TINY = {"tenants": ((4, 6, 8), (6, 5, 8)), "k11": ((3, 12, 14), (5, 12, 14))}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(decoder, "DECODERS", TINY)
    for name in ("AT_LEAST", "WARM"):
        monkeypatch.setattr(decoder, name, 0.0)


def test_without_options_every_size_is_measured():
    rows = set(decoder.rows_of(list(decoder.DECODERS), [5, 9, 11], [1, 16]))
    names = ("tenants", "small", "wide", "layer")
    assert rows == {(name, k, batch) for name in names for k in (5, 9, 11) for batch in (1, 16)} | {("k11", 11, 1)}


@pytest.mark.parametrize("name,k,whats", [("tenants", 5, ["forward", "step", "kept"]), ("k11", 11, ["forward", "step"])])
def test_rows_are_ratios_to_the_fastest_setting_in_float32(tiny, name, k, whats):
    rows = decoder.measure(name, k, 2, 1, 1, [False])
    assert [row["what"] for row in rows] == whats
    for row in rows:
        full = {setting: ms for setting, ms in row["ms"].items() if setting != "ours" and "bf16" not in setting}
        assert full[row["best"]] == min(full.values())
        assert row["ratio"] == pytest.approx(min(full.values()) / row["ms"]["ours"], 0.1)  # of rounded milliseconds
        assert set(full) == {"eager", "eager channels-last"} and 0 < row["error"] < 1e-5
        assert re.match(rf"{name} +k={k} +batch 2 +1 core +{row['what']}", decoder.report(row))


@pytest.mark.parametrize("what", ["forward", "step"])
def test_results_that_differ_from_pytorchs_are_not_timed(tiny, monkeypatch, what):
    ours = decoder.ours

    def changed(*args):
        calls = ours(*args)
        return calls | {what: lambda: jax.tree.map(lambda a: np.asarray(a) * (1 + 1e-4), calls[what]())}

    monkeypatch.setattr(decoder, "ours", changed)
    with pytest.raises(InputError, match="tenants, k=5: results differ from PyTorch's by 1"):
        decoder.measure("tenants", 5, 2, 1, 1, [False])


def test_a_row_that_fails_costs_no_other(monkeypatch, tmp_path, capsys):
    def run(command, env):
        options = dict(option[2:].split("=") for option in command if option.startswith("--"))
        assert options["taps"] == "9" and "hugetlb" in env["GLIBC_TUNABLES"]
        if options["only"] == "small" and options["cores"] == "1":
            return types.SimpleNamespace(returncode=-9)
        pathlib.Path(options["rows"]).write_text(json.dumps([{"decoder": options["only"], "cores": options["cores"]}]))
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(decoder.subprocess, "run", run)
    monkeypatch.setattr(decoder.accelerator, "in_own_process", lambda function: {"backend": "cpu"})
    monkeypatch.setattr(decoder.os, "sched_getaffinity", lambda process: {0, 1})
    path = tmp_path / "rows.json"
    args = types.SimpleNamespace(only=["small", "wide"], taps=["9"], batch=["1"], cores=["1", "2"], compile=False, repeats=1,
                                 json=str(path), rows=None)
    with pytest.raises(InputError, match=r"not measured, .*: small, k=9, batch 1, 1 cores$"):
        decoder.main(args)
    assert json.loads(path.read_text()) == [{"decoder": name, "cores": cores} for name, cores in
                                            (("wide", "1"), ("small", "2"), ("wide", "2"))]
    assert "adapter 67.2 ms" in capsys.readouterr().out


def test_floors_are_those_of_the_direct_convolution():
    lines = accelerator.floors().splitlines()
    assert "790 TFLOP/s" in lines[0] and [line.split()[0] for line in lines[1:]] == list(accelerator.CONFIGS)
    assert "53.1 TFLOP" in lines[4] and "adapter 67.2 ms" in lines[4]


def small(_):
    return HyperConvDecoder(((4, 6, 8), (6, 5, 8)), 5, dtype=jnp.bfloat16)


def test_an_accelerators_rows_say_what_is_theirs(monkeypatch):
    monkeypatch.setattr(accelerator, "decoder_of", small)
    monkeypatch.setattr(accelerator, "PEAK", {"cpu": 0.1})
    adapter, step = (accelerator.measure_ours("0.5b", what) for what in ("adapter", "step_batch_1"))
    for row in (adapter, step):
        assert row["device"] == "cpu" and row["ms"] > 0 and row["tflops_over_peak"] == pytest.approx(row["tflops"] / 0.1)
    assert 0 < adapter["peak_gb"] < step["peak_gb"] < 0.1
    assert 2 < (step["tflops"] * step["ms"]) / (adapter["tflops"] * adapter["ms"]) < 8
    failed = {"failed": "this PyTorch sees no CUDA device"}
    assert accelerator.measure_torch("0.5b", "adapter", "eager") == failed or torch.cuda.is_available()
    found = accelerator.errors()
    assert list(found) == ["float32", "tensorfloat32", "bfloat16", "bfloat16 inputs"]
    assert 0 < found["float32"] < 1e-6 and 1e-4 < found["bfloat16 inputs"] < 3e-2


@pytest.mark.parametrize("step", [False, True])
def test_operations_are_counted_in_loops_too(monkeypatch, step):
    """XLA's own count agrees where there is no loop, and has each loop's body but once."""
    decoder = HyperConvDecoder(((4, 12, 16), (16, 12, 16), (16, 9, 12)), 7)
    x = jnp.ones((1, *decoder.condition_shape))
    variables = jax.jit(decoder.init)(jax.random.key(0), x)

    def count():
        jax.clear_caches()
        fourier_plan.make_plan.cache_clear()
        call = jax.grad(lambda v, x: jnp.square(decoder.apply(v, x)).mean()) if step else decoder.apply
        return accelerator.flop_of(call, variables, x), jax.jit(call).lower(variables, x).cost_analysis()["flops"]

    whole, by_xla = count()
    assert 0.9 * by_xla < whole < by_xla
    monkeypatch.setattr(fourier_plan, "MEMORY", 1 << 12)  # chunks, which are a loop
    in_loops, by_xla = count()
    fourier_plan.make_plan.cache_clear()
    assert in_loops == pytest.approx(whole, 0.02) and by_xla < 0.7 * whole


def test_a_measurement_that_fails_is_a_row_and_costs_no_other():
    assert accelerator.in_own_process(os._exit, 1)["failed"].startswith("A process in the process pool was terminated")
    assert accelerator.in_own_process(int, "x") == {"failed": "invalid literal for int() with base 10: 'x'"}
    assert accelerator.in_own_process(accelerator.backend) == {"backend": jax.default_backend()}


def test_input_and_step_are_measured_apart_and_together(store):
    config, opened = tiny_config(store), pairs.open_store(store)
    found = input.measure(config, train.make_decoder(config, opened), opened.split("train"), 3)
    sample = 4 * 5 * 4 * 2 + opened.tasks[0].tokens[0].nbytes
    assert found["bytes"] == sample and 0 <= found["waited"] <= 1 and min(found["input"], found["step"], found["both"]) > 0


@pytest.mark.parametrize("flag,said", [("--only=large", "--only: ['large'] is none of"),
                                       ("--only=7b", "--only=['7b']"),
                                       ("--batch=4", "--only="), ("--only=k11 --taps=9", "--only=['k11'] --taps=['9']")])
def test_what_is_none_of_the_rows_is_refused(flag, said):
    done = run_module("experiments.benchmarks.decoder", *flag.split(), cwd=ROOT, check=False)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {said}") and not done.stdout
