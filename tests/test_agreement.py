"""What runs must have in common, and what generated adapters carry of theirs."""

import json

import numpy as np
import pytest
from conftest import write_adapter
from ml_collections import ConfigDict

from data_pipeline import agreement
from data_pipeline.export import condition_texts
from dnd_jax import adapters
from dnd_jax.sources import Row

MAGNITUDE = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"


def spec_of(folder, rng, **settings):
    write_adapter(folder, rng, **settings)
    return adapters.read(folder)[1]


@pytest.mark.parametrize("init,way_out", [
    ("pissa", "path_initial_model_for_weight_conversion"), ("pissa_niter_16", "path_initial_model_for_weight_conversion"),
    ("olora", "path_initial_model_for_weight_conversion"), ("corda", "path_initial_model_for_weight_conversion"),
    ("loftq", "init_lora_weights=True"), ("lora_ga", "init_lora_weights=True"),
])
def test_runs_that_altered_the_base_are_refused_with_the_way_out(tmp_path, rng, init, way_out):
    spec = spec_of(tmp_path / "run", rng, init_lora_weights=init)
    with pytest.raises(adapters.InputError, match=f"run7: {init} altered the base model's weights.*{way_out}"):
        agreement.refuse_altered_base(spec, "run7")


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_other_initialisations_leave_the_base_alone(tmp_path, rng, init):
    agreement.refuse_altered_base(spec_of(tmp_path / "run", rng, init_lora_weights=init), "run")


def test_every_disagreement_is_named_with_both_values(tmp_path, rng):
    first = spec_of(tmp_path / "first", rng)
    other = spec_of(tmp_path / "other", rng, rank=3, lora_alpha=7, task_type="another", base_model_name_or_path="moved",
                    lora_dropout=0.5)
    found = agreement.disagreements(first, other, "run7", "run0")
    text = "; ".join(found)
    for part in ("run7: r is 3, run0 has 2", "lora_alpha is 7, run0 has 4",
                 "task_type is 'another', run0 has 'CAUSAL_LM'",
                 "run7: model/layers/1/self_attn/v_proj/lora_B is Leaf(shape=(4, 3)"):
        assert part in text
    assert "lora_dropout" not in text and len(found) == 3 + 8
    with pytest.raises(adapters.InputError, match=r"r is 3.*lora_B is"):
        agreement.raise_all(found)
    assert agreement.disagreements(first, spec_of(tmp_path / "same", rng), "run7", "run0") == []


def carrying(config, **tensors):
    return adapters.Spec({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config, {}, tensors)


def test_magnitudes_become_their_mean_and_equal_tensors_stay(rng):
    runs = {name: carrying({"use_dora": True}, **{MAGNITUDE: np.full(8, value, np.float32)})
            for name, value in (("a", 1), ("b", 3))}
    parts, averaged = agreement.default_parts(runs)
    np.testing.assert_array_equal(parts[MAGNITUDE], np.full(8, 2, np.float32))
    assert averaged == ["DoRA magnitude"]
    assert agreement.default_parts({"a": runs["a"], "b": runs["a"]})[1] == []


def test_a_full_module_that_differs_is_refused(rng):
    key = "base_model.model.lm_head.weight"
    runs = {name: carrying({"modules_to_save": ["lm_head"]}, **{key: np.full((4, 2), value, np.float32)})
            for name, value in (("a", 1), ("b", 3))}
    with pytest.raises(adapters.InputError, match=r"b: base_model\.model\.lm_head\.weight is not the same as in a; no decoder"):
        agreement.default_parts(runs)


def test_other_initial_seeds_are_refused_unless_a_gauge_is_chosen():
    seeds = {"a": 0, "b": 0, "c": 5}
    assert agreement.check_initial_seeds(seeds, "align") == []
    (text,) = agreement.check_initial_seeds(seeds, "none")
    assert text.startswith("c: its A started from seed 5, that of a from 0") and "export.gauge" in text


def test_config_order_of_targets_does_not_matter(tmp_path, rng):
    first = spec_of(tmp_path / "first", rng)
    path = tmp_path / "first" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"target_modules": config["target_modules"][::-1]}))
    assert agreement.disagreements(first, adapters.read(tmp_path / "first")[1], "b", "a") == []


@pytest.mark.parametrize("form,expected", [
    ("prompt", ["p0", "p1"]), ("prompt+answer", ["p0\nr0", "p1\nr1"]), ("answer", ["r0", "r1"]),
])
def test_forms_of_conditions(form, expected):
    rows = [Row(f"p{i}", f"r{i}") for i in range(3)]
    assert condition_texts(rows, ConfigDict({"form": form, "pool": 2})) == expected


def test_mixed_conditions_have_a_fifth_of_their_answers():
    rows = [Row(f"p{i}", "answer") for i in range(1000)]
    texts = condition_texts(rows, ConfigDict({"form": "mix", "pool": None}))
    assert 150 < sum("answer" in text for text in texts) < 250 and texts == condition_texts(
        rows, ConfigDict({"form": "mix", "pool": None}))
