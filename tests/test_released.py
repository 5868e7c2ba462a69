"""A released decoder becomes a workdir that generates, and goes back; files that aren't one are refused."""

import concurrent.futures
import pickle
import re

import jax
import numpy as np
import pytest
import torch
from conftest import SMOKE, run_module
from flax.traverse_util import flatten_dict

from dnd_jax import adapters, checkpoints, generate, pairs, released, tokens
from dnd_jax.decoder import decoder_of
from dnd_jax.types import InputError
from experiments.configs import tenants


def test_a_released_decoder_generates_and_goes_back(smoke, tmp_path, monkeypatch):
    root = smoke / "build" / "tenants-smoke"
    store = pairs.open_store(root / "store")
    config = tenants.get_config("smoke")
    decoder, n = decoder_of(config, *store.tasks[0].condition.shape[1:], store.layout.shape), config.condition.prompts
    condition = store.split("test")[0].condition[:n].astype(np.float32)
    params = decoder.init(jax.random.key(3), condition[None])["params"]
    state = {name: torch.tensor(value) for name, value in released.params_to_torch(params).items()}
    torch.save(state | {"criterion_weight": torch.ones(3)}, tmp_path / "theirs.pth")

    run_module("dnd_jax.released", SMOKE, f"--checkpoint={tmp_path}/theirs.pth", f"--out={tmp_path}/workdir", cwd=smoke)
    _, ours, about, _ = checkpoints.load_best(tmp_path / "workdir" / "checkpoints")
    assert about["features"][-1] == list(store.layout.shape)
    expected = decoder.apply({"params": params}, condition[None])
    np.testing.assert_array_equal(decoder.apply({"params": ours}, condition[None]), expected)

    (tmp_path / "prompts.txt").write_text("\n".join(store.split("test")[0].prompts[:n]))
    done = run_module("dnd_jax.generate", f"--workdir={tmp_path}/workdir", f"--prompts={tmp_path}/prompts.txt",
                      f"--out={tmp_path}/adapter", cwd=smoke)
    assert "checkpoint 0" in done.stdout
    _, spec = adapters.read(tmp_path / "adapter")
    assert spec.leaves == store.spec.leaves and tokens.plan(spec) == store.layout
    as_collected = ("base_model_name_or_path", "task_type", "r", "lora_alpha", "peft_type")
    assert [spec.config[key] for key in as_collected] == [store.spec.config[key] for key in as_collected]

    run_module("dnd_jax.released", f"--workdir={tmp_path}/workdir", f"--checkpoint={tmp_path}/back.pth", cwd=smoke)
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == state.keys() and all(torch.equal(back[name], value) for name, value in state.items())

    monkeypatch.chdir(smoke)
    with pytest.raises(InputError, match=r"state dict: layers_0/bias has shape \(2, 2\) there, .* in this decoder; use"):
        released.import_checkpoint(config, released.params_to_torch(params) | {
            "model.decoder.module_list.0.linear1.bias": np.ones((2, 2))}, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_decoder_with_the_long_prompts_projection_goes_both_ways(tmp_path):
    """The projection's matrices have other shapes than the decoder's kernels, and lie beside it in the file."""
    config = tenants.get_config("smoke").unlock()
    config.model = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24,
                    "num_hidden_layers": 2, "condition_width": 6}
    config.decoder = {"blocks": ((4, 4, 6),), "kernel_size": 3, "shortened": 5}
    config.encoder.length, config.condition.prompts = 14, 3
    layout = tokens.plan(released.spec_of_model(config.model, 2, config.collect.target_modules))
    decoder = decoder_of(config, 14, 6, layout.shape)
    condition = np.random.default_rng(0).normal(size=(1, *decoder.condition_shape)).astype(np.float32)
    params = decoder.init(jax.random.key(0), condition)["params"]
    state = released.params_to_torch(params)
    assert state["down_proj.weight"].shape == (5, 14) and state["gate_proj.bias"].shape == (5,)
    torch.save({"state_dict": {name: torch.tensor(value) for name, value in state.items()}}, tmp_path / "theirs.pth")
    released.import_checkpoint(config, released.read_state(tmp_path / "theirs.pth", 10**8), tmp_path / "workdir")
    with pytest.raises(InputError, match="workdir: holds checkpoints; import into another"):
        released.import_checkpoint(config, state, tmp_path / "workdir")
    generator = generate.Generator(tmp_path / "workdir")
    ours = flatten_dict(generator(condition[0]), sep="/")
    expected = flatten_dict(tokens.decode(np.asarray(decoder.apply({"params": params}, condition)[0]), layout), sep="/")
    for path, value in expected.items():
        np.testing.assert_allclose(ours[path], value, rtol=1e-5, atol=1e-5 * np.abs(value).max())
    _, best, _, _ = checkpoints.load_best(tmp_path / "workdir/checkpoints")
    released.write_state(tmp_path / "back.pth", released.params_to_torch(best))
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == state.keys() and all(np.array_equal(back[name], value) for name, value in state.items())


class Bomb:
    def __reduce__(self):
        return open, ("ran", "w")


def test_files_that_are_no_state_dict_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = torch.ones(1)
    cases = {
        "large": (b"x" * 200, "200 bytes, at most 100"), "list": ([one], "holds a list, expected a state dict"),
        "bomb": (pickle.dumps(Bomb()), "doesn't take it as a state dict: .*Weights only"),
        "nan": ({"a": one * torch.nan}, r"nan\.pth: a: holds a value"),
        "terabytes": ({"a": one.expand(10**12)}, "can't allocate memory"),
    }

    def refused(case):
        name, (content, _) = case
        if isinstance(content, bytes):
            (tmp_path / f"{name}.pth").write_bytes(content)
        else:
            torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(InputError) as error:
            released.read_state(tmp_path / f"{name}.pth", 100 if name == "large" else 10**6)
        return str(error.value)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # each starts a process
        for (name, (_, message)), text in zip(cases.items(), pool.map(refused, cases.items()), strict=True):
            assert f"{name}.pth: " in text and re.search(message, text), text
    with pytest.raises(InputError, match=r"nowhere\.pth: No such file"):
        released.read_state("nowhere.pth", 100)
    assert not (tmp_path / "ran").exists()
