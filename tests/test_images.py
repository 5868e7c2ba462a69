"""Fine-tuning on rows with images: a miniature of Qwen2.5-VL, its image processor and its chat template, on two pictures."""

import json

import ml_collections
import numpy as np
import pytest
import torch
from conftest import VISION_MARKS, small_base
from PIL import Image

from data_pipeline import collect, fine_tuning
from dnd_jax import adapters, images
from dnd_jax.sources import Row
from dnd_jax.types import InputError
from experiments.configs import tenants

PATCH = 4  # as small_base has it


@pytest.fixture(scope="module")
def model(vision_base):
    config = settings(vision_base, vision_base / "unused").collect
    return fine_tuning.load_model(str(vision_base / "base"), config, 0)[:2]


def settings(vision_base, out, **changes):
    config = tenants.get_config("smoke").unlock()
    config.base, config.tasks = str(vision_base / "base"), str(vision_base / "tasks.json")
    config.collect.update({"out": str(out), "batch_size": 3, "steps": 3, "checkpoints": 2, "multi_task_steps": 2,
                           "learning_rate": 1e-2} | changes)
    return ml_collections.FrozenConfigDict(config)


def row(vision_base, prompt, *names):
    return Row(prompt, "seven two", images=tuple(str(vision_base / f"{name}.png") for name in names))


def test_images_become_as_many_tokens_as_patches_and_labels_stay_on_the_response(vision_base, model):
    _, tokenizer = model
    reader = images.Reader(str(vision_base / "base"), tokenizer)
    rows = [row(vision_base, "how <image> and <image> is", "wide", "small"), row(vision_base, "what is this", "small"),
            Row("what is", "seven")]
    examples = fine_tuning.tokenise(tokenizer, rows, 64, reader)
    start, pad, end = tokenizer.convert_tokens_to_ids(list(VISION_MARKS))
    ids = examples[0].ids
    assert ids[ids.index(start) : ids.index(end) + 1] == [start, pad, pad, end] and ids.count(pad) == 3
    assert examples[1].ids.index(start) < examples[1].ids.index(tokenizer.convert_tokens_to_ids("what"))
    for example, given in zip(examples, rows, strict=True):
        said = [label for label in example.labels if label != fine_tuning.IGNORED]
        assert said == [*tokenizer(given.response).input_ids, tokenizer.eos_token_id] == example.ids[-len(said):]
    batch = fine_tuning.collate(examples, tokenizer.eos_token_id)
    assert batch["image_grid_thw"].tolist() == [[1, 2, 4], [1, 2, 2], [1, 2, 2]]
    assert batch["pixel_values"].shape == (8 + 4 + 4, 3 * 2 * PATCH**2) and batch["pixel_values"].dtype == torch.float32
    assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == pad)
    assert set(fine_tuning.collate(examples[2:], 0)) == {"input_ids", "attention_mask", "labels"}


def test_the_loss_sees_the_picture_and_its_gradient_is_that_of_single_rows(vision_base, model):
    peft_model, tokenizer = model
    reader = images.Reader(str(vision_base / "base"), tokenizer)
    rows = [row(vision_base, "what is this", "wide"), Row("what is that", "two"), row(vision_base, "what is this", "small")]
    examples = fine_tuning.tokenise(tokenizer, rows, 64, reader)
    tokens, found = sum(map(fine_tuning.learned, examples)), []
    for microbatches in ([examples], [[example] for example in examples]):
        peft_model.zero_grad()
        loss = fine_tuning.backward(peft_model, microbatches, tokens, tokenizer.eos_token_id).item()
        found.append((loss, [p.grad.clone() for p in peft_model.parameters() if p.requires_grad]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-6, rtol=1e-4)
    batch = fine_tuning.collate(examples[:1], 0)
    seen, black = peft_model(**batch).loss, peft_model(**batch | {"pixel_values": torch.zeros_like(batch["pixel_values"])}).loss
    assert abs((seen - black).item()) > 1e-5


def test_collect_of_rows_with_images(vision_base, tmp_path):
    rows = [{"conversations": [{"from": "human", "value": "<image>what is this"}, {"from": "gpt", "value": "seven"}],
             "images": [f"{name}.png"]} for name in ("wide", "small")] + [{"conversations": [
                 {"from": "human", "value": "what is that"}, {"from": "gpt", "value": "two"}]}]
    (vision_base / "rows.json").write_text(json.dumps(rows))
    (vision_base / "tasks.json").write_text(json.dumps({"pictures": {"split": "train", "train": "rows.json"}}))
    config = settings(vision_base, tmp_path)
    collect.collect_one(config, collect.plan_runs(config)[1])
    record = json.loads((tmp_path / "pictures" / "run.json").read_text())
    assert record["rows"] == 3 and np.isfinite(record["loss"]).all() and len(record["loss"]) == 5
    tree, _ = adapters.read(tmp_path / "pictures" / "step_5")
    assert np.abs(tree["model"]["language_model"]["layers"]["0"]["self_attn"]["q_proj"]["lora_B"]).max() > 0


def test_what_can_not_be_is_named(vision_base, model):
    _, tokenizer = model
    reader = images.Reader(str(vision_base / "base"), tokenizer)
    for given, message in ((row(vision_base, "<image> and <image>", "wide"), "has 2 places <image> for 1 images"),
                           (row(vision_base, "what", "broken"), r"broken\.png: cannot identify image file"),
                           (row(vision_base, "what", "nowhere"), r"nowhere\.png: .*No such file")):
        with pytest.raises(InputError, match=message):
            fine_tuning.tokenise(tokenizer, [given], 64, reader)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)).save(vision_base / "torn.png")
    begin, _, end = (vision_base / "torn.png").read_bytes().rpartition(b"IDAT")  # of several
    (vision_base / "torn.png").write_bytes(begin + b"\xff\xff\xff\xff" + end)
    with pytest.raises(InputError, match=r"torn\.png: broken PNG file"):
        reader.inputs([str(vision_base / "torn.png")])
    with pytest.raises(InputError, match=r"a row has images: 'what' with .*wide\.png"):
        fine_tuning.tokenise(tokenizer, [row(vision_base, "what", "wide")], 64)
    plain = (vision_base / "text")
    small_base("qwen2", vocab_size=len(tokenizer)).save_pretrained(plain)
    with pytest.raises(InputError, match=r"text: takes text only"):
        images.Reader(str(plain), tokenizer)
