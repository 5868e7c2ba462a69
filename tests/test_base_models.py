"""The base model: which files and commits make it another one, and that all its weights are there."""

import functools
import shutil

import pytest
import safetensors.numpy
import torch
from conftest import small_base
from transformers.utils.hub import cached_file

from dnd_jax import base_models, encoders
from dnd_jax.types import InputError


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    small_base("qwen2").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_base_is_another_one_with_another_tokenizer_or_template_and_none_without_all_weights(base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "copy")
    ours, copied = (base_models.identity(str(folder)) for folder in (base, copy))
    assert base_models.is_same(copied, ours)
    (base / "chat_template.jinja").write_text("{{ messages }}")
    assert not base_models.is_same(base_models.identity(str(base)), ours)
    assert base_models.is_same(base_models.identity(str(base)), {"name": "elsewhere", "sha256": ours["sha256"]})
    tensors = safetensors.numpy.load_file(base / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    safetensors.numpy.save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"base: its files lack 1 parameters of Qwen2ForCausalLM, such as model\.layers\.1"):
        base_models.load_base(str(base))


def test_the_weights_that_are_loaded_count(base):
    found = [base_models.identity(str(base))["sha256"]]
    (base / "training_args.bin").write_bytes(b"of a trainer")
    (base / "pytorch_model.bin").write_bytes(b"not loaded")
    assert base_models.identity(str(base))["sha256"] == found[0]
    (base / "model.safetensors").unlink()
    for weights in (b"weights", b"others"):
        (base / "pytorch_model.bin").write_bytes(weights)
        found.append(base_models.identity(str(base))["sha256"])
    assert len(set(found)) == 3


def test_hub_names_are_known_by_their_commit(tmp_path, monkeypatch):
    """As the hub's cache has it; nothing else in transformers says it any more."""
    commit = "a" * 40
    snapshot = tmp_path / "models--some--base" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--some--base" / "refs").mkdir()
    (tmp_path / "models--some--base" / "refs" / "main").write_text(commit)
    hub = "transformers.utils.hub.cached_file"
    monkeypatch.setattr(hub, functools.partial(cached_file, cache_dir=str(tmp_path), local_files_only=True))
    assert base_models.identity("some/base") == {"name": "some/base", "sha256": commit}
    assert encoders.identity({"name": "some/base"}) == f"commit {commit}" and encoders.identity({"name": "no/base"}) is None
    unknown, other = {"name": "some/base", "sha256": "None"}, {"name": "other", "sha256": commit}
    assert base_models.is_same(unknown, base_models.identity("some/base")) and base_models.is_same(other, other | {"name": "x"})
    assert not base_models.is_same(unknown, other)
