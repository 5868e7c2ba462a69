"""Input made ahead: in order, from any step on, errors where they belong, and no thread left behind."""

import threading
import time

import numpy as np
import pytest
from conftest import tiny_config

from dnd_jax import inputs, pairs, sharding


def input_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("input")]


def test_results_come_in_order_though_threads_finish_in_another():
    def make(step):
        time.sleep(0.02 if step % 3 == 0 else 0)
        return step

    with inputs.Prefetch(make, 5, 25, ahead=4) as made:
        assert list(made) == list(range(5, 25)) and made.wait_s > 0.02
    assert not input_threads()


def test_only_so_many_are_made_ahead():
    begun = []
    with inputs.Prefetch(lambda step: begun.append(step), 0, 100, ahead=3) as made:
        next(made)
        time.sleep(0.1)
        assert sorted(begun) == [0, 1, 2, 3]
    assert not input_threads()


def test_an_error_comes_up_at_its_step():
    def make(step):
        if step == 3:
            raise OSError("tokens.npy: gone")
        return step

    came = []
    with pytest.raises(OSError, match=r"tokens\.npy: gone"), inputs.Prefetch(make, 0, 10, ahead=8) as made:
        came.extend(made)
    assert came == [0, 1, 2] and not input_threads()


def test_batches_are_those_of_the_store_and_names_those_of_the_batch(store):
    config = tiny_config(store, batch_size=5)
    tasks = pairs.open_store(config.export.store).split("train")
    with inputs.Prefetch(inputs.make_read(config, tasks, sharding.make_mesh()), 3, 6, ahead=2) as batches:
        for step, made in zip(range(3, 6), batches, strict=True):
            condition, tokens = pairs.batch(tasks, config.seed, step, range(5), config.condition.prompts)
            np.testing.assert_array_equal(made[0], condition)
            np.testing.assert_array_equal(made[1], tokens)
            assert inputs.names(config, tasks, step) == {
                tasks[pairs.draw(tasks, config.seed, step, i, config.condition.prompts)[0]].name for i in range(5)}
