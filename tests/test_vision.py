"""Vision and language: rows with images through a processor, by a miniature Qwen2.5-VL.

Without torchvision, transformers builds no processor of this model (its video part needs it), so the miniature's has none.
"""

import numpy as np
import pytest
import torch
import transformers
from conftest import small_base
from PIL import Image

from dnd_jax.scoring import Model, choice, kinds
from dnd_jax.sources import Row
from dnd_jax.types import InputError

MARKS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


class Processor(transformers.Qwen2_5_VLProcessor):
    """The model's own processor without videos."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = MARKS[:2]
        self.image_token_id, self.video_token_id = map(tokenizer.convert_tokens_to_ids, MARKS[:2])
        transformers.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from data_pipeline.tenants import make_base_tokenizer

    folder = tmp_path_factory.mktemp("base")
    tokenizer = make_base_tokenizer(["which colour is it ? A: red B: blue [A] [B]", "how many ? 1 2 3"])
    tokenizer.add_tokens(list(MARKS), special_tokens=True)
    torch.manual_seed(0)
    base = small_base("qwen2_5_vl", vocab_size=len(tokenizer), initializer_range=0.5)
    for mark, name in zip(MARKS, ("image", "video", "vision_start", "vision_end"), strict=True):
        setattr(base.config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(mark))
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found = Model(str(folder), None, 3, 4)
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=1024)
    found.__dict__["_processor"] = Processor(images, found.tokenizer)
    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Questions about pictures of several sizes in files and in memory, and one without."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)) for height, width in ((16, 24), (32, 16))]
    pictures[0].save(folder / "first.png")
    asked = "which colour is it ?\nA: red\nB: blue"
    return [Row(f"<image>{asked}", "[A]", images=(str(folder / "first.png"),)), Row(asked, "[B]", images=(pictures[1],)),
            Row(f"<image1>\n<image2>{asked}", "[B]", images=tuple(pictures)), Row(asked, "[A]"),
            Row("how many ?", "2", images=(pictures[1],))]


def test_answers_and_loglikelihoods_are_those_of_the_rows_alone(model, rows):
    options = choice.options(rows[:4])
    answers, together = model.answer(rows), model.loglikelihood(rows[:4], options)
    assert [model.answer([row])[0] for row in rows] == answers
    for row, found, values in zip(rows, options, together, strict=False):
        np.testing.assert_allclose(model.loglikelihood([row], [found])[0], values, atol=1e-4)


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
    scores = kinds.score("vision", model, rows, known=(), samples=1, temperature=1.0)
    assert scores.main.tolist() == [1, 0, 1, 0, 1] and scores.unparsable.tolist() == [0, 0, 0, 1, 0]


def test_a_missing_picture_is_named(model):
    with pytest.raises(InputError, match=r"nowhere\.png"):
        model.answer([Row("which ?", "[A]", images=("nowhere.png",))])
