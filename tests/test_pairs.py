"""The pair store: samples are pure functions of their place, and damage is named."""

import json

import numpy as np
import pytest

from dnd_jax import pairs
from dnd_jax.types import InputError


def test_samples_depend_on_seed_step_and_index_only(store):
    tasks = pairs.open_store(store).split("train")
    whole = pairs.batch(tasks, 0, 7, range(6), 4)
    again = pairs.sample(pairs.open_store(store).split("train"), 0, 7, 3, 4)
    np.testing.assert_array_equal(whole[0][3], again[0])
    np.testing.assert_array_equal(whole[1][3], again[1])
    others = [pairs.batch(tasks, *place, range(6), 4)[0] for place in ((1, 7), (0, 8))]
    assert all(not np.array_equal(whole[0], other) for other in others)


def test_sample_pairs_prompts_and_tokens_of_one_training_task(store):
    opened = pairs.open_store(store)
    tasks, seen = opened.split("train"), set()
    for index in range(40):
        condition, tokens = pairs.sample(tasks, 0, 0, index, 4)
        number = pairs.draw(tasks, 0, 0, index, 4)[0]
        assert any(np.array_equal(tokens, k, equal_nan=True) for k in tasks[number].tokens)
        assert all(any(np.array_equal(c, p) for p in tasks[number].condition) for c in condition)
        assert len({c.tobytes() for c in condition}) == 4
        seen.add(tasks[number].name)
    assert seen == {"task0", "task1", "task2"}


def test_fewer_prompts_than_asked_are_all_taken_then_repeated():
    drawn = pairs.draw_prompts(np.random.default_rng(0), 3, 8)
    assert sorted(drawn[:3]) == [0, 1, 2] and list(drawn[3:6]) == list(drawn[:3]) and len(drawn) == 8


def test_another_format_is_refused(store):
    path = store / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))
    with pytest.raises(InputError, match=r"manifest\.json: format is 0, expected 3"):
        pairs.open_store(store)


def test_a_changed_file_is_refused_with_both_hashes(store):
    path = store / "tasks" / "task1" / "tokens.npy"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"task1/tokens\.npy: sha256 is \w{64}, the manifest says \w{64}"):
        pairs.open_store(store)


def test_a_missing_file_or_store_is_named(store, tmp_path):
    (store / "tasks" / "task0" / "prompts.json").unlink()
    with pytest.raises(InputError, match=r"task0/prompts\.json: missing"):
        pairs.open_store(store)
    with pytest.raises(InputError, match=r"nowhere/manifest\.json"):
        pairs.open_store(tmp_path / "nowhere")
