"""Rows and token ids: chat templates where there are any, and broken rows named."""

import json

import pytest
from conftest import small_base

from data_pipeline import fine_tuning
from dnd_jax import base_models, prompts
from dnd_jax.sources import Row
from dnd_jax.types import InputError


@pytest.fixture
def tokenizer():
    from data_pipeline.tenants import make_base_tokenizer

    return make_base_tokenizer(["how zib is the whale", "seven", "be brief"])


def test_plain_prompt_and_response(tokenizer):
    row = Row("how zib is", "seven")
    assert tokenizer.decode(prompts.prompt_ids(tokenizer, row)) == "how zib is"
    ids = prompts.response_ids(tokenizer, row)
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.decode(ids[:-1]) == "seven"
    assert tokenizer.decode(prompts.prompt_ids(tokenizer, Row("how", "x", "be brief"))) == "be brief\nhow"


def test_chat_template_is_used_where_there_is_one(tokenizer):
    tokenizer.chat_template = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
                               "{% if add_generation_prompt %}<assistant>{% endif %}")
    ids = prompts.prompt_ids(tokenizer, Row("how zib", "seven", "be brief"))
    assert tokenizer.decode(ids) == "<system>be brief<user>how zib<assistant>"
    assert tokenizer.decode(prompts.prompt_ids(tokenizer, Row("how zib", "seven"))) == "<user>how zib<assistant>"


def test_loss_is_on_the_response_only(tokenizer):
    rows = [Row("how zib is", "seven"), Row("the whale", "seven seven")]
    batch = fine_tuning.collate(fine_tuning.tokenise(tokenizer, rows, 64), tokenizer.eos_token_id)
    for i, row in enumerate(rows):
        kept = batch["labels"][i][batch["labels"][i] != -100].tolist()
        assert kept == prompts.response_ids(tokenizer, row)
        length = int(batch["attention_mask"][i].sum())
        assert length == len(prompts.prompt_ids(tokenizer, row)) + len(kept)
        assert batch["input_ids"][i, :length].tolist() == prompts.prompt_ids(tokenizer, row) + kept


@pytest.mark.parametrize("value,message", [
    ([], "non-empty"), ({"a": 1}, "non-empty"), ([{"prompt": "p"}], r"row 0 has no text in 'response'"),
    ([{"prompt": "p", "response": "r"}, {"prompt": " ", "response": "r"}], r"row 1 has no text in 'prompt'"),
])
def test_broken_rows_are_named(tmp_path, value, message):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(value))
    with pytest.raises(InputError, match=message):
        prompts.read_rows(path)


def test_read_prompts_takes_text_strings_and_rows(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\r\n\n two\u2028still two \n")
    (tmp_path / "b.json").write_text('["one", {"prompt": "two", "response": "?"}]')
    (tmp_path / "c.jsonl").write_text('"one"\n{"prompt": "two", "response": "secret"}\n')
    chat = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "?"}]}
    (tmp_path / "chats.json").write_text(json.dumps([chat, "two"]))
    (tmp_path / "alpaca.ndjson").write_text('{"instruction": "one", "output": "?"}\n{"instruction": "two", "output": "?"}\n')
    (tmp_path / "both.json").write_text(json.dumps([{"prompt": "one"} | chat, {"instruction": "two"}]))
    assert prompts.read_prompts(tmp_path / "both.json") == ["one", "two"]
    assert prompts.read_prompts(tmp_path / "chats.json") == prompts.read_prompts(tmp_path / "alpaca.ndjson") == ["one", "two"]
    assert prompts.read_prompts(tmp_path / "a.txt") == ["one", " two\u2028still two "]
    assert prompts.read_prompts(tmp_path / "b.json") == prompts.read_prompts(tmp_path / "c.jsonl") == ["one", "two"]


@pytest.mark.parametrize("text,message", [
    (r'["cut \ud83d"]', r"p\.json: 'cut .* holds half of a character"), ("[" * 100_000, r"p\.json: not JSON"),
    ("{}", "expected a list"), ('["p", 7]', "expected a list of strings or of rows with a 'prompt', found '7'"),
    ('["p", {"prompt": null}]', r"p\.json: row 1 has no text as its prompt: .*None"),
    ('[{"prompt": "p"}, {"question": "q"}]', r"no row has a column 'prompt' for the prompt, there are \['question'\]"),
    ('[{"text": "p"}]', r"p\.json: no row has a column 'prompt' for the prompt, there are \['text'\]")])
def test_prompts_that_no_encoder_takes_are_named(tmp_path, text, message):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(InputError, match=message):
        prompts.read_prompts(tmp_path / "p.json")


def test_a_base_that_was_half_downloaded_is_named(tmp_path):
    small_base("qwen2").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=f"{tmp_path}: no model: "):
        base_models.load_base(str(tmp_path))
