"""PEFT folders: read, write, and what is refused."""

import concurrent.futures
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from conftest import run_module, write_adapter
from flax.traverse_util import flatten_dict

from dnd_jax import adapters
from dnd_jax.adapters import __main__ as command
from dnd_jax.adapters import check, tensor_files


def test_tree_is_the_modules_nested(tmp_path, rng):
    tensors = write_adapter(tmp_path, rng)
    tree, spec = adapters.read(tmp_path)
    found = tree["model"]["layers"]["1"]["self_attn"]["q_proj"]["lora_A"]
    np.testing.assert_array_equal(found, tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"])
    assert spec.config["r"] == 2 and len(flatten_dict(tree)) == len(tensors)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_folder_round_trip_is_bit_for_bit(tmp_path, rng, dtype):
    tensors = write_adapter(tmp_path / "in", rng, dtype=dtype)
    adapters.write(tmp_path / "out", *adapters.read(tmp_path / "in"))
    back = safetensors.numpy.load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        assert back[key].dtype == value.dtype
        np.testing.assert_array_equal(back[key].view(np.uint8), value.view(np.uint8))
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("in", "out")]
    assert configs[1] == {**configs[0], "target_modules": ["q_proj", "v_proj"]}


def rewrite(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize("change,message", [
    (lambda t: t.pop(f"{KEY}A.weight"), r"q_proj\.lora_A\.weight is missing"),
    (lambda t: t.update({f"{KEY}B.weight": np.ones((8, 3), np.float32)}), r"\[8, 3\] of rank 3, the config says 2"),
    (lambda t: t.update({f"{KEY}B.weight": np.full((8, 2), np.nan, np.float32)}), "not finite"),
    (lambda t: t.update({f"{KEY}A.weight": np.full((2, 8), np.inf, ml_dtypes.bfloat16)}), "not finite"),
    (lambda t: t.update({"model.layers.0.extra": np.ones(2, np.float32)}), "dotted names, after"),
])
def test_broken_tensors_are_named(tmp_path, rng, change, message):
    write_adapter(tmp_path, rng)
    rewrite(tmp_path, change)
    with pytest.raises(adapters.InputError, match=message) as error:
        adapters.read(tmp_path)
    assert "adapter_model.safetensors" in str(error.value)


@pytest.mark.parametrize("text,message", [
    ("{", "not JSON"), ('{"peft_type": "IA3"}', "'IA3', expected 'LORA'"), ("[]", r"'\[\]', expected 'LORA'"),
])
def test_broken_configs_are_named(tmp_path, rng, text, message):
    write_adapter(tmp_path, rng)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(adapters.InputError, match=message):
        adapters.read(tmp_path)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(adapters.InputError, match=r"nowhere/adapter_config\.json"):
        adapters.read(tmp_path / "nowhere")


def test_write_refuses_another_tree_and_leaves_nothing(tmp_path, rng):
    write_adapter(tmp_path / "in", rng)
    tree, spec = adapters.read(tmp_path / "in")
    tree["model"]["layers"]["0"]["self_attn"]["q_proj"]["lora_A"] = np.ones((2, 9), np.float32)
    with pytest.raises(adapters.InputError, match=r"\[2, 9\], expected \[2, 8\]"):
        adapters.write(tmp_path / "out", tree, spec)
    tree["model"]["layers"]["0"]["self_attn"]["q_proj"]["lora_A"] = np.full((2, 8), np.nan, np.float32)
    with pytest.raises(adapters.InputError, match="not finite"):
        adapters.write(tmp_path / "out", tree, spec)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_addressed_folders_have_their_hash_for_a_name_and_are_written_once(tmp_path, rng):
    write_adapter(tmp_path / "in", rng)
    tree, spec = adapters.read(tmp_path / "in")
    first = adapters.write_addressed(tmp_path / "out", tree, spec, "a card")
    assert first.name == adapters.content_hash(first) and (first / "README.md").read_text() == "a card"
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    assert adapters.write_addressed(tmp_path / "out", tree, spec, "another card") == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before
    tree["model"]["layers"]["0"]["self_attn"]["q_proj"]["lora_A"] += 1
    assert adapters.write_addressed(tmp_path / "out", tree, spec) != first
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_damaged_addressed_folder_is_named(tmp_path, rng):
    write_adapter(tmp_path / "in", rng)
    folder = adapters.write_addressed(tmp_path / "out", *adapters.read(tmp_path / "in"))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(adapters.InputError, match=f"{folder.name}: its content has hash"):
        adapters.write_addressed(tmp_path / "out", *adapters.read(tmp_path / "in"))
    (folder / "adapter_config.json").write_text((tmp_path / "in" / "adapter_config.json").read_text())
    with pytest.raises(adapters.InputError, match=f"its content has hash .*, the folder's name says {folder.name}"):
        check.explain(folder)


def test_threads_that_write_at_once_publish_what_their_names_say(tmp_path, rng):
    """As a server does that makes adapters for several tenants."""
    write_adapter(tmp_path / "in", rng)
    tree, spec = adapters.read(tmp_path / "in")

    def write(number):
        return adapters.write_addressed(tmp_path / "out", jax.tree.map(lambda x: x + number % 6, tree), spec)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        folders = [*pool.map(write, range(60))]
    assert len(set(folders)) == 6 == len(list((tmp_path / "out").iterdir()))
    assert all(adapters.content_hash(folder) == folder.name for folder in folders)


def test_nothing_that_lies_beside_an_adapter_is_lost(tmp_path, rng):
    write_adapter(tmp_path / "checkpoint-500", rng)
    (tmp_path / "checkpoint-500" / "optimizer.pt").write_bytes(b"days of work")
    tree, spec = adapters.read(tmp_path / "checkpoint-500")
    with pytest.raises(adapters.InputError, match=r"checkpoint-500: is there .* holds optimizer\.pt, which isn't written here"):
        adapters.write(tmp_path / "checkpoint-500", tree, spec)
    (tmp_path / "checkpoint-500" / "optimizer.pt").unlink()
    adapters.write(tmp_path / "checkpoint-500", tree, spec)


def test_check_command_explains_or_fails(tmp_path, rng):
    write_adapter(tmp_path / "adapter", rng, rank=3)
    done = run_module("dnd_jax.adapters", "check", tmp_path / "adapter")
    for part in ("rank 3, scale 1.33333", "4 in 2 layers: q_proj, v_proj", "nothing beside A and B", "yes: every tensor",
                 "rank 3 (it takes 1, 8,", "SGLang      takes it", "portable profile"):
        assert part in done.stdout, done.stdout
    (tmp_path / "adapter" / "adapter_config.json").write_text("[]")
    done = run_module("dnd_jax.adapters", "check", tmp_path / "adapter", check=False)
    assert done.returncode == 1 and "adapter_config.json: peft_type is" in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(adapters.InputError, match="command line: 'chekc DIR' given"):
        command.main(None, "chekc", "DIR")


def test_a_cast_that_overflows_is_refused(tmp_path, rng):
    write_adapter(tmp_path / "in", rng, dtype=np.float16)
    tree, spec = adapters.read(tmp_path / "in")
    tree["model"]["layers"]["0"]["self_attn"]["q_proj"]["lora_A"] = np.full((2, 8), 1e6, np.float32)
    with pytest.raises(adapters.InputError, match=r"q_proj\.lora_A\.weight: holds a value that is not finite"):
        adapters.write(tmp_path / "out", tree, spec)


def test_every_dtype_is_read(tmp_path, rng):
    dtypes = (np.bool_, np.uint8, np.int8, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn, np.int16, np.uint16, np.float16,
              ml_dtypes.bfloat16, np.int32, np.uint32, np.float32, np.float64, np.int64, np.uint64)
    tensors = {f"{name}.é.{i}": rng.normal(size=(i + 1, 3)).astype(dtype) for i, dtype in enumerate(dtypes) for name in "ba"}
    tensors["scalar"] = np.array(3, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "file")
    with tensor_files.TensorFile(tmp_path / "file") as file:
        back = file.read()
    assert all(back[key].dtype == value.dtype and np.array_equal(back[key], value) for key, value in tensors.items())
