"""Every variant of every experiment builds, and its decoder goes from its encoder's conditions to its base's tokens."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import pytest

from data_pipeline import collect
from dnd_jax import cli, tasks, workdirs
from dnd_jax.adapters.architecture import ALL_LINEAR
from dnd_jax.decoder import param_shapes
from experiments.benchmarks.overhead import make_decoder, size_of
from experiments.configs import own

FILES = ("common_sense", "coding", "math", "multimodal", "ablations")
VARIANTS = [(file, variant) for file in FILES for variant in importlib.import_module(f"experiments.configs.{file}").VARIANTS]


def get(file, variant):
    return importlib.import_module(f"experiments.configs.{file}").get_config(variant)


@pytest.mark.parametrize("file,variant", VARIANTS)
def test_decoder_fits_encoder_and_layout(file, variant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = get(file, variant)
    decoder, layout = make_decoder(config)
    condition = jax.ShapeDtypeStruct((1, *decoder.condition_shape), jnp.float32)
    assert condition.shape == (1, config.condition.prompts, config.encoder.length, config.model.condition_width)
    out = jax.eval_shape(decoder.apply, {"params": param_shapes(decoder)}, condition)
    assert out.shape == (1, *layout.shape)
    splits = {entry["split"] for entry in config.tasks.values()}
    assert splits == {"train", "test"} and len(read_names(config)) == len(config.tasks)
    assert cli.config_dict(config)["condition"]["prompts"] == config.condition.prompts


def read_names(config):
    """Return the tasks as the stages read them, from files that are there."""
    for entry in config.tasks.values():
        for part in ("train", "test"):
            pathlib.Path(entry[part]).parent.mkdir(exist_ok=True)
            pathlib.Path(entry[part]).touch()
    return {task.name for task in tasks.read_tasks(config.tasks)}


def test_experiments_on_one_base_share_adapters():
    """But the ablation that is one of mathematics."""
    configs = [get(*variant) for variant in VARIANTS
               if variant[0] in ("common_sense", "ablations") and variant[1] != "form-answer"]
    runs = [(config.base, config.collect.out, cli.config_dict(config.collect) | collect.FREE) for config in configs]
    assert len(runs) > 20 and all(run == runs[0] for run in runs)
    assert get("ablations", "form-answer").collect.out == get("math", "1.5b").collect.out


def test_the_config_to_copy_fits_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = own.get_config()
    changed = workdirs.differences(cli.config_dict(get("common_sense", "PIQA")), cli.config_dict(config))
    assert changed.keys() == {"tasks", "collect.out", "collect.multi_task_steps", "export.store", "train.steps",
                              "evaluate.unrelated", "evaluate.scoring", "evaluate.max_new_tokens"}
    decoder, layout = make_decoder(config)
    assert decoder.features[-1] == layout.shape
    for name in ("a.json", "b.json"):
        (tmp_path / name).touch()
    (tmp_path / "tasks.json").write_text('{"mine": {"split": "train", "train": "a.json", "test": "b.json"}}')
    (task,) = tasks.read_tasks(config.tasks)
    assert (task.name, task.train.place) == ("mine", "a.json")


# N, L, what it is shortened to, k, batch, steps, checkpoints, rows: the paper's table
PAPER = {
    ("common_sense", "ARC-c"): (128, 384, None, 9, 64, 4000, 50, 5000),
    ("common_sense", "OBQA"): (128, 384, None, 9, 64, 3000, 50, 5000),
    ("common_sense", "BoolQ"): (128, 384, None, 9, 64, 3000, 50, 5000),
    ("common_sense", "ARC-e"): (128, 384, None, 9, 64, 2000, 50, 5000),
    ("common_sense", "HellaSwag"): (128, 384, None, 9, 64, 2000, 50, 5000),
    ("common_sense", "WinoGrande"): (128, 384, None, 9, 64, 2000, 50, 5000),
    ("common_sense", "PIQA"): (128, 384, None, 9, 64, 1000, 50, 5000),
    ("coding", "1.5b"): (16, 26624, 1000, 11, 48, 2500, 80, 5000),
    ("coding", "7b"): (16, 26624, 1000, 11, 48, 5000, 100, 5000),
    ("math", "1.5b"): (32, 4608, 1000, 11, 128, 5000, 80, 10_000),
    ("math", "7b"): (16, 4608, 1000, 11, 48, 5000, 80, 10_000),
    ("multimodal", "3b"): (16, 1536, None, 11, 64, 5000, 100, 5000),
    ("ablations", "form-answer"): (32, 6144, 1000, 11, 128, 3000, 80, 10_000),
    ("ablations", "extractor-glove"): (128, 200, None, 9, 64, 3000, 50, 5000),
    ("ablations", "prompts-256"): (256, 384, None, 9, 64, 3000, 50, 5000),
    ("ablations", "prompts-512"): (512, 384, None, 9, 64, 3000, 50, 5000),
}


@pytest.mark.parametrize("file,variant", VARIANTS)
def test_settings_are_the_papers(file, variant):
    config = get(file, variant)
    c, t = config.collect, config.train
    expected = PAPER.get((file, variant), (128, 384, None, 9, 64, 3000, 50, 5000))
    assert (config.condition.prompts, config.encoder.length, config.decoder.shortened, config.decoder.kernel_size, t.batch_size,
            t.steps, c.checkpoints, c.max_rows) == expected
    assert (t.learning_rate, t.weight_decay, t.clip_norm, t.warmup_steps, t.condition_noise, t.token_noise) == (
        3e-5, 0.1, 1.0, 1, 1e-4, 1e-5)
    assert (c.rank, c.learning_rate, c.warmup_ratio, c.dtype, c.seed_per_task) == (
        8 if "0.5B" in config.base else 16, 1e-4, 0.01, "bfloat16", False)
    assert c.max_length == (4400 if c.max_rows == 10_000 else 2048) and set(c.target_modules) == set(ALL_LINEAR)


def test_all_experiments_of_the_paper_are_there():
    counts = {file: sum(1 for f, _ in VARIANTS if f == file) for file in FILES}
    assert counts == {"common_sense": 7, "coding": 2, "math": 2, "multimodal": 1, "ablations": 18}


def test_an_unknown_variant_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'ARC-x' is unknown, expected one of.*'ARC-c'"):
        get("common_sense", "ARC-x")


def test_every_docstring_says_command_hardware_and_what_to_expect():
    for file in FILES:
        text = pathlib.Path(importlib.import_module(f"experiments.configs.{file}").__file__).read_text().split('"""')[1]
        assert f"--config=experiments/configs/{file}.py" in text and "Hardware: an A100" in text and "Expected" in text


# billions of parameters and TFLOP per adapter of the published decoders
SIZES = {("common_sense", "ARC-c"): (1.11, 8.3), ("coding", "1.5b"): (1.72, 27.3), ("math", "1.5b"): (1.78, 37.9),
         ("multimodal", "3b"): (2.41, 28.9), ("coding", "7b"): (1.94, 52.8)}


def test_sizes_are_the_published_ones(capsys):
    rows = {}
    for file, variant in VARIANTS:
        decoder, layout = make_decoder(get(file, variant))
        found = size_of(decoder)
        rows[file, variant] = (found["parameters"] / 1e9, found["flop"] / 1e12, layout.shape)
    with capsys.disabled():
        print("\nexperiment                         parameters  TFLOP per adapter  tokens")
        for (file, variant), (size, work, shape) in rows.items():
            print(f"{file + ':' + variant:34s} {size:8.2f} G {work:18.1f}  {shape}")
    for key, (size, work) in SIZES.items():
        assert rows[key][0] == pytest.approx(size, rel=0.03) and rows[key][1] == pytest.approx(work, rel=0.1), key
