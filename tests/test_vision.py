"""Vision and language: a miniature Qwen2.5-VL is asked about images, as it was fine-tuned on them."""

import numpy as np
import pytest
from PIL import Image

from data_pipeline import fine_tuning
from dnd_jax.images import Reader
from dnd_jax.scoring import Model, choice, kinds
from dnd_jax.sources import Row
from dnd_jax.types import InputError

IMAGES = {"pixel_values", "image_grid_thw"}


@pytest.fixture(scope="module")
def model(vision_base):
    return Model(str(vision_base / "base"), None, 3, 4)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Questions about pictures of several sizes in files and in memory, and one without."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)) for height, width in ((16, 24), (32, 16))]
    pictures[0].save(folder / "first.png")
    asked = "which colour is it ?\nA: red\nB: blue"
    return [Row(f"<image>{asked}", "[A]", images=(str(folder / "first.png"),)), Row(asked, "[B]", images=(pictures[1],)),
            Row(f"<image>\n<image>{asked}", "[B]", images=tuple(pictures)), Row(asked, "[A]"),
            Row("how many ?", "2", images=(pictures[1],))]


def test_answers_and_loglikelihoods_are_those_of_the_rows_alone(model, rows):
    options = choice.options(rows[:4])
    answers, together = model.answer(rows), model.loglikelihood(rows[:4], options)
    assert [model.answer([row])[0] for row in rows] == answers
    for row, found, values in zip(rows, options, together, strict=False):
        np.testing.assert_allclose(model.loglikelihood([row], [found])[0], values, atol=1e-4)


def test_a_row_is_asked_as_it_is_fine_tuned_on(model, rows):
    reader = Reader(model.base, model.tokenizer)
    for row, question, example in zip(rows, model.questions(rows), fine_tuning.tokenise(model.tokenizer, rows, 999, reader),
                                      strict=True):
        learned = fine_tuning.collate([example], 0)
        count = len(question["input_ids"])
        assert example.ids[:count] == question["input_ids"] and set(example.labels[:count]) == {fine_tuning.IGNORED}
        assert example.labels[count] != fine_tuning.IGNORED
        assert set(question) == ({*IMAGES, "input_ids", "mm_token_type_ids"} if row.images else {"input_ids"})
        for key in question.keys() & IMAGES:
            np.testing.assert_array_equal(learned[key], question[key])
        if row.images:
            assert learned["mm_token_type_ids"][0, :count].tolist() == question["mm_token_type_ids"]


def test_the_picture_matters(model, rows):
    options = [["[A]", "[B]"]]
    seen, other, blind = (model.loglikelihood([Row(rows[1].prompt, "[A]", images=images)], options)[0]
                          for images in (rows[1].images, (Image.new("RGB", (16, 32), "red"),), ()))
    assert np.abs(seen - other).max() > 1e-3 and np.abs(seen - blind).max() > 1e-3


def test_solved_examples_with_pictures_come_before(model, rows):
    alone, shown = model.questions(rows[:1])[0], model.questions(rows[:1], [rows[1], rows[3]])[0]
    assert shown["input_ids"][-len(alone["input_ids"]) :] == alone["input_ids"]
    assert shown["image_grid_thw"].shape == (2, 3) and len(shown["mm_token_type_ids"]) == len(shown["input_ids"])


def test_choice_and_numbers_are_told_apart_by_the_row(model, rows, monkeypatch):
    monkeypatch.setattr(model, "answer", lambda asked, **how: ["[A]", "(A)", "B", "no idea", "it is 2.0"])
    scores = kinds.score("vision", model, rows, valid=(), samples=1, temperature=1.0)
    assert scores.main.tolist() == [1, 0, 1, 0, 1] and scores.unparsable.tolist() == [0, 0, 0, 1, 0]


def test_a_missing_picture_is_named(model):
    with pytest.raises(InputError, match=r"nowhere\.png"):
        model.answer([Row("which ?", "[A]", images=("nowhere.png",))])
