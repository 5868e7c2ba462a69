"""Broken and hostile adapter folders: each gives one clear error, in a second and in 200 MB at most."""

import json
import os
import pathlib
import pickle
import struct
import time

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from conftest import write_adapter

from dnd_jax import adapters

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"
TOKENS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
ENTRY = {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]}


def header(text, data=b""):
    """Replace the tensor file by a header (JSON value or bytes) and data."""
    def change(folder):
        raw = text if isinstance(text, bytes) else json.dumps(text).encode()
        (folder / TENSORS).write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return change


def entry(**fields):
    return header({A: ENTRY | fields}, bytes(64))


def raw(edit):
    """Edit the bytes of the tensor file."""
    return lambda folder: (folder / TENSORS).write_bytes(edit((folder / TENSORS).read_bytes()))


def tensors(edit):
    """Edit the tensors by key, in place."""
    def change(folder):
        found = safetensors.numpy.load_file(folder / TENSORS)
        edit(found)
        safetensors.numpy.save_file(found, folder / TENSORS)
    return change


def config(text=None, **fields):
    """Replace the config by bytes, or some of its fields."""
    def change(folder):
        path = folder / CONFIG
        path.write_bytes(text if text is not None else json.dumps(json.loads(path.read_text()) | fields).encode())
    return change


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


def moved_out(name, target):
    """Move a file out of the folder and link to it."""
    def change(folder):
        (folder / name).rename(folder.parent / "outside")
        (folder / name).symlink_to(target or folder.parent / "outside")
    return change


def pickled(folder):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(folder.parent / "ran"),)

    (folder / TENSORS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))


def pipe(folder):
    (folder / TENSORS).unlink()
    os.mkfifo(folder / TENSORS)


def directory(folder):
    (folder / TENSORS).unlink()
    (folder / TENSORS).mkdir()


def itself(name):
    """Make a file a link to itself."""
    return lambda folder: [(folder / name).unlink(), (folder / name).symlink_to(name)]


def sparse(folder):
    """Make a sound adapter of 128 GiB that takes no room on the disk."""
    end = 1 << 37
    raw = json.dumps({A: {"dtype": "F32", "shape": [2, end // 8], "data_offsets": [0, end]},
                      B: {"dtype": "F32", "shape": [8, 2], "data_offsets": [end, end + 64]}}).encode()
    with open(folder / TENSORS, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end + 64)


def layers(count):
    """Write another adapter, of so many layers."""
    return lambda folder: write_adapter(folder, np.random.default_rng(0), layers=count)


def many(count):
    one = {"dtype": "F32", "shape": [1, 1]}
    return {f"{MODULE}{i}.lora_A.weight": one | {"data_offsets": [4 * i, 4 * i + 4]} for i in range(count)}


def put(key, value):
    return tensors(lambda t: t.update({key: value}))


def drop(*keys):
    return tensors(lambda t: [t.pop(key) for key in keys])


ONES = np.ones((8, 2), np.float32)
# name: (file that the message names, part of the message, change of a sound folder)
CASES = {
    # the tensor file
    "duplicate_keys": (TENSORS, "occurs twice", header(
        f'{{"{A}": {json.dumps(ENTRY)}, "{A}": {json.dumps(ENTRY)}}}'.encode(), bytes(64))),
    "overlap": (TENSORS, "begins at byte 32", header({A: ENTRY, B: ENTRY | {"data_offsets": [32, 96]}}, bytes(96))),
    "hole": (TENSORS, "begins at byte 72", header({A: ENTRY, B: ENTRY | {"data_offsets": [72, 136]}}, bytes(136))),
    "hole_at_start": (TENSORS, "begins at byte 8", header({A: ENTRY | {"data_offsets": [8, 72]}}, bytes(72))),
    "trailing_bytes": (TENSORS, "tensors end at byte", raw(lambda b: b + b"x")),
    "truncated_data": (TENSORS, "tensors end at byte", raw(lambda b: b[:-5])),
    "truncated_header": (TENSORS, "header of", raw(lambda b: b[:40])),
    "empty_file": (TENSORS, "header of", raw(lambda b: b"")),
    "seven_bytes": (TENSORS, "header of", raw(lambda b: b[:7])),
    "header_length_wraps": (TENSORS, "header of", raw(lambda b: b"\xff" * 8 + b[8:])),
    "oversized_header": (TENSORS, "at most 16777216", header(b"{" + b" " * 17_000_000 + b"}")),
    "header_not_json": (TENSORS, "not JSON", header(b"{what")),
    "header_not_utf8": (TENSORS, "not JSON", header(b'{"\xff": 1}')),
    "header_a_list": (TENSORS, "header is a list", header([1, 2])),
    "header_too_deep": (TENSORS, "not JSON", header(b"[" * 200_000)),
    "hundred_thousand_tensors": (TENSORS, "100000 tensors", header(many(100_000), bytes(400_000))),
    "forty_thousand_tensors": (TENSORS, "missing", header(many(40_000), bytes(160_000))),
    "millions_of_lists": (TENSORS, "10000002 values, at most", header(b'{"a":[' + b"[]," * 5_000_000 + b"1]}")),
    "millions_of_notes": (TENSORS, "values, at most", header(
        b'{"__metadata__":{' + b",".join(b'"%d":"1"' % i for i in range(1_000_000)) + b"}}")),
    "too_large": (TENSORS, "bytes, at most 34359738368", sparse),
    "endless_name": (TENSORS, "a name of 1000000 characters", header({"x" * 1_000_000: ENTRY}, bytes(64))),
    "zero_size": (TENSORS, "is empty", header({A: ENTRY | {"shape": [0, 8], "data_offsets": [0, 0]}})),
    "unknown_dtype": (TENSORS, "malformed entry", entry(dtype="F13")),
    "dtype_a_list": (TENSORS, "malformed entry", entry(dtype=[])),
    "no_dtype": (TENSORS, "malformed entry", header({A: {"shape": [2, 8], "data_offsets": [0, 64]}}, bytes(64))),
    "entry_a_number": (TENSORS, "malformed entry", header({A: 7}, bytes(64))),
    "offsets_as_text": (TENSORS, "is empty or not one", entry(data_offsets=["0", "64"])),
    "offsets_negative": (TENSORS, "is empty or not one", entry(data_offsets=[-64, 0])),
    "offsets_reversed": (TENSORS, "do not hold", entry(data_offsets=[64, 0])),
    "three_offsets": (TENSORS, "malformed entry", entry(data_offsets=[0, 32, 64])),
    "shape_too_large": (TENSORS, "do not hold", entry(shape=[2, 9])),
    "shape_overflows": (TENSORS, "is empty or not one", entry(shape=[1 << 62, 1 << 62])),
    "shape_negative": (TENSORS, "is empty or not one", entry(shape=[-2, -8])),
    "shape_a_number": (TENSORS, "malformed entry", entry(shape=16)),
    "shape_of_true": (TENSORS, "is empty or not one", entry(shape=[True, 16])),
    "too_many_axes": (TENSORS, "is empty or not one", entry(shape=[1] * 1000 + [16])),
    "nan": (TENSORS, "not finite", put(B, np.full((8, 2), np.nan, np.float32))),
    "infinity": (TENSORS, "not finite", put(B, np.full((8, 2), np.inf, np.float16))),
    "minus_infinity": (TENSORS, "not finite", put(B, np.full((8, 2), -np.inf, ml_dtypes.bfloat16))),
    "negative_nan": (TENSORS, "not finite", put(B, np.copysign(np.full((8, 2), np.nan), -1.0))),
    "nan_of_8_bits": (TENSORS, "not finite", put(B, np.full((8, 2), np.nan, ml_dtypes.float8_e4m3fn))),
    "integers": (TENSORS, "is of int32, expected floating", put(B, np.ones((8, 2), np.int32))),
    # keys and shapes
    "missing_a": (TENSORS, "lora_A.weight is missing, its partner", drop(A)),
    "missing_b": (TENSORS, "lora_B.weight is missing, its partner", drop(B)),
    "missing_pair": (TENSORS, "q_proj.lora_A.weight is missing, other layers", drop(A, B)),
    "no_tensors": (TENSORS, "holds no LoRA matrix", header({})),
    "extra_tensor": (TENSORS, "nothing in the config explains", put("base_model.model.model.extra", ONES)),
    "extra_module": (TENSORS, "not a target", both(
        put(A.replace("q_proj", "k_proj"), ONES.T), put(B.replace("q_proj", "k_proj"), ONES))),
    "wrong_prefix": (TENSORS, "dotted names, after", put(A.removeprefix("base_model."), ONES)),
    "slash_in_key": (TENSORS, "dotted names, after", put("base_model.model.../../etc/passwd.lora_A.weight", ONES)),
    "empty_name_in_key": (TENSORS, "dotted names, after", put("base_model.model..q_proj.lora_A.weight", ONES)),
    "matrix_in_matrix": (TENSORS, "inside a matrix", both(
        put(f"{MODULE}.lora_A.q_proj.lora_A.weight", ONES.T), put(f"{MODULE}.lora_A.q_proj.lora_B.weight", ONES))),
    "wrong_rank": (TENSORS, "of rank 3, the config says 2", put(B, np.ones((8, 3), np.float32))),
    "another_width": (TENSORS, "another width than", put(A, np.ones((2, 9), np.float32))),
    "excluded": (TENSORS, "v_proj: excluded, exclude_modules is", config(exclude_modules=["v_proj"])),
    "another_layer": (TENSORS, "of layer 1, layers_to_transform is [0]", config(layers_to_transform=[0])),
    "missing_pair_of_chosen_layers": (TENSORS, "q_proj.lora_A.weight is missing, other layers", both(
        drop(A, B), config(layers_to_transform=[0, 1], exclude_modules=["k_proj"]))),
    "too_deep": (TENSORS, "up to 24 dotted names", put("base_model.model." + "x." * 30 + "lora_A.weight", ONES)),
    "one_axis": (TENSORS, "expected two matrices", put(A, np.ones(16, np.float32))),
    "magnitude_without_dora": (TENSORS, "use_dora is not set", put(f"{MODULE}.lora_magnitude_vector", ONES[:, 0])),
    "dora_without_magnitude": (TENSORS, "lora_magnitude_vector is missing", config(use_dora=True)),
    "lora_bias_missing": (TENSORS, "lora_B.bias is missing", config(lora_bias=True)),
    "magnitude_too_long": (TENSORS, "expected a magnitude for each of 8", both(
        config(use_dora=True), tensors(lambda t: t.update({
            k.replace("lora_A.weight", "lora_magnitude_vector"): np.ones(9, np.float32) for k in list(t) if "lora_A" in k})))),
    "saved_module_missing": (TENSORS, "lm_head: in modules_to_save", config(modules_to_save=["lm_head"])),
    "trained_tokens_missing": (TENSORS, "trainable_tokens_delta is missing", config(trainable_token_indices=[1])),
    "trained_tokens_too_many": (TENSORS, "trainable_token_indices is [1]", both(
        config(trainable_token_indices=[1]), put(TOKENS, ONES))),
    # the config
    "config_missing": (CONFIG, "No such file", lambda folder: (folder / CONFIG).unlink()),
    "config_not_json": (CONFIG, "not JSON", config(b"{'r': 2}")),
    "config_not_utf8": (CONFIG, "not JSON", config(b'{"r": "\xff"}')),
    "config_too_deep": (CONFIG, "not JSON", config(b"[" * 50_000)),
    "config_too_long": (CONFIG, "more than 4194304 bytes", config(b" " * 5_000_000)),
    "config_of_many_lists": (CONFIG, "values, at most 100000", config(b'{"a":[' + b"[]," * 1_300_000 + b"1]}")),
    "config_long_number": (CONFIG, "not JSON", config(b'{"r": ' + b"9" * 100_000 + b"}")),
    "config_a_list": (CONFIG, "peft_type is '[]'", config(b"[]")),
    "config_keys_twice": (CONFIG, "'r' occurs twice", config(b'{"peft_type": "LORA", "r": 2, "r": 4}')),
    "peft_type_unknown": (CONFIG, "peft_type is 'IA3'", config(peft_type="IA3")),
    "peft_type_missing": (CONFIG, "peft_type is 'None'", config(peft_type=None)),
    "rank_zero": (CONFIG, "r is 0", config(r=0)),
    "rank_as_text": (CONFIG, "r is '2', expected a positive integer", config(r="2")),
    "alpha_nan": (CONFIG, "lora_alpha is nan", config(lora_alpha=float("nan"))),
    "alpha_missing": (CONFIG, "lora_alpha is None", config(lora_alpha=None)),
    "rank_pattern_a_list": (CONFIG, "rank_pattern is [1], expected an object", config(rank_pattern=[1])),
    "saved_modules_as_text": (CONFIG, "modules_to_save is 'lm_head', expected a list", config(modules_to_save="lm_head")),
    "targets_a_number": (CONFIG, "target_modules is 7", config(target_modules=7)),
    "pattern_malformed": (TENSORS, "pattern", config(rank_pattern={"(": 2})),
    "pattern_takes_for_ever": (TENSORS, "timed out", config(rank_pattern={"((\\w|.|[a-z])+\\.?)*\\W\\W": 2})),
    "target_takes_for_ever": (TENSORS, "timed out", config(target_modules="((\\w|.|[a-z])+\\.?)*\\W\\W")),
    "many_patterns": (TENSORS, "rank_pattern holds 90000 patterns for 600 modules, 54000000 comparisons, at most", both(
        layers(300), config(rank_pattern={f"a{i}": 2 for i in range(90_000)}))),
    "pattern_of_many_names": (TENSORS, "patterns of 60000 characters", config(target_modules="(a|b)*" * 10_000)),
    "patterns_that_take_for_ever_together": (TENSORS, "timed out", both(layers(300), config(
        rank_pattern={f"(\\w*\\.?)*{i}y": 2 for i in range(300)}))),
    "alpha_huge": (CONFIG, "a number of ordinary size", config(lora_alpha=10**400)),
    "saved_modules_without_name": (CONFIG, "modules_to_save is ['']", config(modules_to_save=[""])),
    "layers_as_text": (CONFIG, "layers_to_transform is '1'", config(layers_to_transform="1")),
    # the folder
    "tensors_missing": (TENSORS, "No such file", lambda folder: (folder / TENSORS).unlink()),
    "pickle": ("adapter_model.bin", "never loaded", pickled),
    "tensors_a_folder": (TENSORS, "not a regular file|Is a directory", directory),
    "tensors_a_pipe": (TENSORS, "not a regular file", pipe),
    "tensors_linked_outside": (TENSORS, "outside the folder", moved_out(TENSORS, None)),
    "config_linked_outside": (CONFIG, "outside the folder", moved_out(CONFIG, "../outside")),
    "config_links_to_itself": (CONFIG, "Symlink loop|symbolic links", itself(CONFIG)),
    "tensors_link_to_themselves": (TENSORS, "Symlink loop|symbolic links", itself(TENSORS)),
    "link_to_nowhere": (TENSORS, "outside the folder", lambda folder: [
        (folder / TENSORS).unlink(), (folder / TENSORS).symlink_to("../../nowhere")]),
}


def peak_mb():
    """Return the process's peak resident memory in MB since it was last reset."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


@pytest.mark.parametrize("name", CASES)
def test_broken_adapter_is_refused(tmp_path, rng, name):
    file, message, change = CASES[name]
    write_adapter(tmp_path / "adapter", rng)
    adapters.read(tmp_path / "adapter")
    change(tmp_path / "adapter")
    for _ in range(3):
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before, began = peak_mb(), time.process_time()
        with pytest.raises(ValueError, match=message.replace("[", r"\[")) as error:
            adapters.read(tmp_path / "adapter")
        seconds, grown = time.process_time() - began, peak_mb() - before
        if seconds < 1:  # else the machine may have been busy: once more
            break
    assert isinstance(error.value, adapters.InputError)
    assert str(tmp_path / "adapter" / file) in str(error.value) and len(str(error.value)) < 1000
    assert seconds < 1 and grown < 200, f"{seconds:.2f} s, {grown:.0f} MB"
    assert not (tmp_path / "ran").exists()


def test_hub_cache_links_are_followed(tmp_path, rng):
    """A snapshot in the hub's cache links to blobs beside it; that is the one place outside a folder that is trusted."""
    snapshot = tmp_path / "models--someone--adapter" / "snapshots" / "abc"
    write_adapter(snapshot, rng)
    blobs = tmp_path / "models--someone--adapter" / "blobs"
    blobs.mkdir()
    for name in (CONFIG, TENSORS):
        (snapshot / name).rename(blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert adapters.read(snapshot)[1].config["r"] == 2
