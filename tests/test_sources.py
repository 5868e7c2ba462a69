"""Rows from every form that users have them in, and what is said of broken ones."""

import dataclasses
import json
import math

import datasets
import ml_collections
import pytest
from conftest import run_module

from dnd_jax import sources
from dnd_jax.prompts import read_rows
from dnd_jax.sources import Row, Source
from dnd_jax.tasks import read_tasks
from dnd_jax.types import InputError

CHAT = [{"from": "system", "value": "s"}, {"from": "human", "value": "p"}, {"from": "gpt", "value": "r"},
        {"from": "human", "value": "more"}, {"from": "gpt", "value": "?"}]
MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "p"}]},
            {"role": "assistant", "content": "r"}]


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    """Work in a folder of its own, with the library's cache in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder, name, value):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.mark.parametrize("name,value", [
    ("a.json", [{"prompt": "p", "response": "r", "system": "s"}]),
    ("a.jsonl", '{"prompt": "p", "response": "r", "system": "s"}\n\n'),
    ("a.json", [{"instruction": "p", "output": "r", "system": "s"}]),
    ("a.json", [{"conversations": CHAT}]),
    ("a.jsonl", json.dumps({"messages": MESSAGES})),
])
def test_files_whose_columns_are_found_out(tmp_path, name, value):
    write(tmp_path, name, value)
    assert sources.read(name) == [Row("p", "r", "s")]


@pytest.mark.parametrize("entry,row", [
    ({"ms_hub_url": "elsewhere", "columns": {"prompt": "q", "query": "more", "response": "a", "system": "c"}},
     {"q": "p", "more": "second", "a": 0, "c": "s"}),
    ({"formatting": "sharegpt", "columns": {"messages": "talk", "system": "c"},
      "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "guest", "assistant_tag": "host"}},
     {"talk": [{"who": "guest", "says": "p\nsecond"}, {"who": "host", "says": 0}], "c": "s"}),
])
def test_registry_and_entry_in_a_config_are_read_alike(tmp_path, entry, row):
    write(tmp_path, "data/rows.json", [row, row])
    write(tmp_path, "data/dataset_info.json", {"mine": entry | {"file_name": "rows.json", "num_samples": 1}})
    config = ml_collections.ConfigDict()
    config.tasks = {"t": {"split": "test", "train": {"registry": "data/dataset_info.json", "name": "mine"},
                          "test": entry | {"file_name": "data/rows.json"}}}
    for tasks in (config.tasks, ml_collections.FrozenConfigDict(config).tasks):
        (task,) = read_tasks(tasks)
        assert read_rows(task.train) == [Row("p\nsecond", "0", "s")] and read_rows(task.test) == [Row("p\nsecond", "0", "s")] * 2


def test_images_of_chats_are_carried_along(tmp_path):
    talk = [{"from": "human", "value": "<image>what ?"}, {"from": "gpt", "value": "r"}]
    write(tmp_path, "data/rows.json", [{"conversations": talk, "images": ["a.png", "b.png"]}, {"conversations": talk}])
    plain = Row("<image>what ?", "r")
    assert sources.read("data/rows.json") == [dataclasses.replace(plain, images=("data/a.png", "data/b.png")), plain]


def test_image_parts_of_chats_are_those_of_the_first_exchange(tmp_path):
    """Where no column holds them, their text is taken alone."""
    asked = [{"type": "text", "text": "look:"}, {"type": "image"}, {"type": "text", "text": "what ?"}]
    first = [{"role": "user", "content": asked}, {"role": "assistant", "content": "r"}]
    rows = [{"messages": first * 2, "images": ["a.png", "b.png"]}, {"messages": first}]
    write(tmp_path, "data/rows.json", rows)
    assert sources.read("data/rows.json") == [Row("look:<image>what ?", "r", images=("data/a.png",)), Row("look:what ?", "r")]
    said = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": [{"type": "text", "text": "r"}]}]
    write(tmp_path, "data/rows.json", [{"messages": said, "images": ["a.png"]}, {"messages": said + first, "images": ["a.png"]},
                                       {"messages": first[:1] + first, "images": ["a.png", "b.png"]}])
    assert sources.read("data/rows.json") == [
        Row("what ?", "r", images=("data/a.png",)), Row("what ?", "r"),
        Row("look:<image>what ?", "r", images=("data/a.png", "data/b.png"))]  # refused when it is asked, as two for one place
    write(tmp_path, "data/rows.json", [{"messages": first[:1] + first, "images": ["a.png"]}])
    with pytest.raises(InputError, match=r"rows\.json: row 0: 2 images up to its first answer, 1 in their column"):
        sources.read("data/rows.json")


def test_who_speaks_after_the_first_exchange_does_not_matter(tmp_path):
    write(tmp_path, "a.json", [{"conversations": [*CHAT, {"from": "observation", "value": "42"}]}])
    assert sources.read("a.json") == [Row("p", "r", "s")]


def test_every_source_has_a_key_of_its_own():
    found = (Source("a.json"), Source("a.json", num_samples=1), Source("a.json", columns={"prompt": "q"}))
    assert len({source.key for source in found}) == 3 and found[0].key == "a.json"


def test_an_object_in_a_column_is_text_as_it_is(tmp_path):
    write(tmp_path, "a.json", [{"prompt": "p", "response": {"a": 1}}])
    assert sources.read("a.json") == [Row("p", "{'a': 1}")]


@pytest.mark.parametrize("row,message", [
    ({"prompt": "p", "response": ["a", "b"]}, r"a\.json: row 0: response is \"\['a', 'b'\]\", expected a text"),
    ({"messages": [{"role": "user", "content": ["a", {"type": "image"}]}]}, r"a\.json: row 0: a turn is .* expected a text"),
    ({"prompt": "p", "response": "r", "images": [{"path": "x.png"}]}, r"a\.json: row 0: an image is .*x\.png"),
    ({"prompt": "p", "response": "r", "images": 5}, r"a\.json: row 0: an image is '5', expected a path or an image"),
])
def test_lists_that_are_no_text_and_images_that_are_none_are_refused(tmp_path, row, message):
    write(tmp_path, "a.json", [row])
    with pytest.raises(InputError, match=message):
        sources.read("a.json")


def test_an_empty_cell_of_a_table_is_no_text(tmp_path):
    write(tmp_path, "a.json", [{"prompt": "p", "response": "r", "system": math.nan}])
    assert sources.read("a.json") == [Row("p", "r")]
    write(tmp_path, "a.json", [{"prompt": "p", "response": math.nan}])
    with pytest.raises(InputError, match="row 0 has no text in 'response'"):
        read_rows("a.json")
    write(tmp_path, "a.json", [{"prompt": "p", "response": "r", "system": "\ud800"}])
    with pytest.raises(InputError, match=r"row 0: .* holds half of a character"):
        read_rows("a.json")


@pytest.mark.parametrize("entry,message", [
    ({"file_name": "a.json", "split": "train[80%:]"}, r"a\.json: subset is None and split is 'train\[80%:\]'"),
    ({"file_name": "a.json", "subset": "one"}, r"a\.json: subset is 'one' and split is None"),
    ({"ms_hub_url": "x"}, "task: names no source, expected 'file_name' or 'hf_hub_url'")])
def test_what_a_file_does_not_have_is_refused(tmp_path, entry, message):
    """Read as if it had it, a model would be tested on what it was trained on."""
    write(tmp_path, "a.json", [{"prompt": "p", "response": "r"}])
    with pytest.raises(InputError, match=message):
        sources.parse(entry, tmp_path, "task")


def save(folder, name):
    rows = {"question": ["p", "q", "kept back"], "answer": [1, 0, -1]}
    features = datasets.Features({"question": datasets.Value("string"), "answer": datasets.ClassLabel(names=["no", "yes"])})
    train = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": train, "small": train.select([1])}).save_to_disk(folder / name)
    train.save_to_disk(folder / f"{name}-single")


COLUMNS = {"columns": {"prompt": "question", "response": "answer"}}


def test_saved_folders_and_their_splits(tmp_path):
    save(tmp_path, "arrow")
    rows = [Row("p", "yes"), Row("q", "no"), Row("kept back", "")]
    for entry, expected in ((COLUMNS | {"file_name": "arrow"}, rows), (COLUMNS | {"file_name": "arrow-single"}, rows),
                            (COLUMNS | {"file_name": "arrow", "split": "small"}, rows[1:2])):
        assert sources.read(sources.parse(entry, tmp_path, "task")) == expected
    with pytest.raises(InputError, match="row 2 has no text in 'response'"):
        read_rows(sources.parse(COLUMNS | {"file_name": "arrow"}, tmp_path, "task"))
    with pytest.raises(InputError, match=r"arrow/test: has no split 'test', only \['small', 'train'\]"):
        sources.read(sources.parse(COLUMNS | {"file_name": "arrow", "split": "test"}, tmp_path, "task"))
    with pytest.raises(InputError, match=r"arrow-single/test: has no split 'test', only 'train'"):
        sources.read(sources.parse(COLUMNS | {"file_name": "arrow-single", "split": "test"}, tmp_path, "task"))
    assert sources.read(sources.parse(COLUMNS | {"file_name": "arrow-single", "split": "train"}, tmp_path, "task")) == rows


def test_names_of_the_hub_are_read_without_network_or_refused(tmp_path):
    for name in ("one", "two"):
        write(tmp_path, f"some/set/{name}/train.jsonl", json.dumps({"question": "p", "answer": name}))
    write(tmp_path, "some/set/README.md", "---\nconfigs:\n- config_name: one\n  data_files: one/*.jsonl\n"
                                          "- config_name: two\n  data_files: two/*.jsonl\n---\n")
    source = sources.parse(COLUMNS | {"hf_hub_url": "some/set", "subset": "two"}, tmp_path, "task")
    assert str(source) == "some/set/two" and read_rows(source) == [Row("p", "two")]
    assert source.sha256() == source.sha256() != sources.parse(
        COLUMNS | {"hf_hub_url": "some/set", "subset": "one"}, tmp_path, "task").sha256()
    with pytest.raises(InputError, match="nobody/nothing: "):
        sources.read(sources.Source("nobody/nothing", hub=True))


def test_hash_is_of_the_file_or_of_what_is_taken_from_it(tmp_path):
    write(tmp_path, "a.json", [{"prompt": "p", "response": "r", "other": "o"}])
    plain, *others = (sources.parse(value, tmp_path, "task") for value in (
        "a.json", {"file_name": "a.json", "columns": {"prompt": "p", "response": "r"}},
        {"file_name": "a.json", "columns": {"prompt": "prompt", "response": "other"}}))
    assert plain.sha256() == sources.files.sha256_file("a.json") and str(plain) == str(tmp_path / "a.json")
    with pytest.raises(InputError, match="no row has a column 'p' for the prompt"):
        others[0].sha256()
    assert others[1].sha256() != plain.sha256()
    unknown = sources.parse({"file_name": "a.json", "columns": {"prompt": "prompt", "system": "sytem"}}, tmp_path, "task")
    with pytest.raises(InputError, match="no row has a column 'sytem' for the system"):
        sources.read(unknown)


@pytest.mark.parametrize("turns,expected", [
    ([("gpt", "Hello!"), ("human", "2+2?"), ("gpt", "4"), ("human", "3+3?"), ("gpt", "6")], Row("2+2?", "4")),
    ([("human", "2+2?"), ("human", "or rather 1+1?"), ("gpt", "2")], Row("or rather 1+1?", "2")),
    ([("system", "Be brief."), ("human", "2+2?"), ("gpt", "4")], Row("2+2?", "4", "Be brief.")),
])
def test_an_answer_goes_with_the_question_before_it(tmp_path, turns, expected):
    write(tmp_path, "a.json", [{"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}])
    assert sources.read("a.json") == [expected]


def test_lines_end_where_json_lines_do(tmp_path):
    rows = [{"prompt": "one\u2028line\x85", "response": "r\x0c"}, {"prompt": "two", "response": "s"}]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    assert sources.read(tmp_path / "a.jsonl") == [Row("one\u2028line\x85", "r\x0c"), Row("two", "s")]


@pytest.mark.parametrize("listed,message", [
    ([], r"tasks\.json: expected tasks by name, found '\[\]'"), ({}, "expected tasks by name"),
    ({"a": "x.json"}, "a: expected 'split'"), ({"a": ""}, "a: expected 'split'"),
    ({"a": {"split": "train", "train": "a.json", "tests": "a.json"}}, r"found \['tests'\]"),
    *(({name: {"split": "train", "train": "a.json"}}, "a task's name is that of folders")
      for name in ("", "a/b", "../evil", ".hidden", "multi_task", "multi_task-1")),
])
def test_tasks_that_are_none_are_named(tmp_path, listed, message):
    write(tmp_path, "a.json", [])
    write(tmp_path, "tasks.json", listed)
    with pytest.raises(InputError, match=message):
        read_tasks(tmp_path / "tasks.json")


def test_a_key_that_occurs_twice_is_refused(tmp_path):
    (tmp_path / "tasks.json").write_text('{"a": {"split": "train"}, "a": {"split": "test"}}')
    with pytest.raises(InputError, match=r"tasks\.json: not JSON: 'a' occurs twice"):
        read_tasks(tmp_path / "tasks.json")


@pytest.mark.parametrize("name,value,message", [
    ("a.json", [], "non-empty list"), ("a.json", {"a": 1}, "non-empty list"),
    ("a.json", [{"question": "p"}], r"no row has a column 'prompt' for the prompt, there are \['question'\]"),
    ("a.jsonl", '{"prompt": "p"}\n{', "line 2: not JSON"),
    ("a.json", [{"conversations": [{"from": "dog"}]}], "row 0: a turn is"),
    ("a.json", [{"conversations": ["woof"]}], "row 0: a turn is 'woof' of None"),
    ("folder/a.json", [], "folder: "), ("b.json", [], "a.json: No such file"),
])
def test_broken_files_are_named(tmp_path, name, value, message):
    write(tmp_path, name, value)
    with pytest.raises(InputError, match=message):
        sources.read("folder" if "/" in name else "a.json" if message.startswith("a.json") else name)


@pytest.mark.parametrize("value,message", [
    ("nowhere.json", r"nowhere\.json is not there"), ({"file_name": "a.json", "colums": {}}, r"\['colums'\] are unknown"),
    ({"file_name": "a.json", "num_samples": -1}, "num_samples is -1, expected a number of rows"),
    ({"file_name": "a.json", "columns": {"history": "h"}}, r"\['history'\] are unknown"), (3, "a source is '3'"),
    ({"registry": "info.json", "name": "b"}, r"info\.json has no dataset 'b', only \['a'\]"),
    ({"registry": "info.json", "name": "a"}, r"info\.json: a: .*x\.json is not there"),
    ({"registry": "a.json", "name": "b"}, r"a\.json has no dataset 'b', only a list"),
    ({"registry": 5, "name": "b"}, "registry is '5' and name 'b', expected two texts"),
    ({"registry": "info.json", "name": ["a"]}, "expected two texts"),
    ({"registry": "circle.json", "name": "a"}, r"circle\.json: a: refers to another registry"),
    ({"file_name": "a.json", "columns": ["prompt"]}, r"columns is \"\['prompt'\]\", expected names by their use"),
    ({"file_name": "a.json", "columns": {"prompt": 1}}, "columns is .*expected names by their use"),
    ({"file_name": "a.json", "tags": "user_tag"}, "tags is 'user_tag', expected names by their use"),
    ({"file_name": 7}, "file_name is '7', expected a text"),
    ({"hf_hub_url": "a/b", "subset": 3}, "subset is '3', expected a text"),
    ({"file_name": "a.json", "num_samples": "9"}, "num_samples is '9', expected a number"),
    ({"file_name": "a.json", "num_samples": True}, "num_samples is True, expected a number of rows"),
])
def test_sources_that_name_nothing_are_refused(tmp_path, value, message):
    write(tmp_path, "a.json", [])
    write(tmp_path, "info.json", {"a": {"file_name": "x.json"}})
    write(tmp_path, "circle.json", {"a": {"registry": "circle.json", "name": "a"}})
    with pytest.raises(InputError, match=message):
        sources.parse(value, tmp_path, "config.tasks: t")


def test_audit_of_a_config_knows_what_is_tested(tmp_path):
    rows = [{"q": f"question {i}", "a": "AB"[i % 2]} for i in range(10)]
    write(tmp_path, "a.json", rows)
    write(tmp_path, "b.json", [{"q": "question 3", "a": "B"}, {"q": "another", "a": "A"}])
    write(tmp_path, "c.json", [{"q": "another", "a": "A"}, {"q": "a third", "a": "B"}])
    write(tmp_path, "config.py", f"""
import ml_collections
def get_config():
    columns = {{"columns": {{"prompt": "q", "response": "a"}}}}
    a, b, c = ({{"file_name": name, **columns}} for name in ("a.json", "b.json", "c.json"))
    return ml_collections.ConfigDict({{"tasks": {{"one": {{"split": "train", "train": a}},
                                                 "two": {{"split": "test", "train": c, "test": b}}}}}})
# {len(rows)} rows
""")
    done = run_module("data_pipeline.datasets", "audit", "--config=config.py", cwd=tmp_path, check=False)
    assert done.returncode == 1 and "one train" in done.stdout, done.stderr
    assert "finding: two test: 2 of 2 prompts occur in training, first 'question 3' in one train" in done.stdout  # one in its own
