"""The audit names every defect that made published numbers meaningless, and is silent on sound data."""

import json

from conftest import run_module

from dnd_jax.audit import audit
from dnd_jax.sources import Row


def test_sound_data_has_no_findings():
    found = audit({"a": [Row("p", "1"), Row("q", "2"), Row("r", "2"), Row("s", "2")]}, {"b": [Row("t", "1")]})
    assert found["findings"] == []
    assert found["tasks"]["a"] == {"rows": 4, "labels": 2, "majority": 0.75, "chance": 0.5,
                                   "distribution": {"2": 0.75, "1": 0.25}, "prompts_trained_on": 0}


def test_chance_is_among_the_options_that_a_prompt_lists():
    """A few rows of ARC have numbers for labels, and some sets have an option that is never right."""
    letters = [Row(f"Which {i}?\nA. one\nB. two\nC. three\nD. four", "ABC"[i % 3]) for i in range(12)]
    numbers = [Row(f"Which {i}?\n1. one\n2. two\n3. three\n4. four", "123"[i % 3]) for i in range(12, 15)]
    assert audit({"a": letters + numbers}, {})["tasks"]["a"]["chance"] == 0.25


def test_one_label_overlap_and_duplicate_are_named():
    rows = [Row("p", "A"), Row("q", "A\n")]
    findings = audit({"piqa": rows, "copy": list(rows)}, {"train": [Row("q", "B")]})["findings"]
    assert any("piqa: every one of 2 responses is 'A'" in f for f in findings)
    assert any("piqa: 1 of 2 prompts occur in training, first 'q' in train" in f for f in findings)
    assert any("copy: the same rows as piqa" in f for f in findings)


def test_a_copy_of_training_rows_is_named_whatever_task_or_white_space_it_has():
    rows = [Row("p", "A"), Row("q", "B")]
    found = audit({"held": [Row("r", "A")]}, {"support": rows, "held": [Row("p ", "A"), Row("q", "B")]})["findings"]
    assert found == ["held, training rows: the same rows as support"]
    assert "1 of 1 prompts occur in training" in audit({"held": [Row("\tq", "B")]}, {"support": rows})["findings"][0]


def test_empty_fields_and_repeated_rows_are_counted():
    findings = audit({"a": [Row("p", ""), Row("", "x"), Row("q", "y"), Row("q", "y")]}, {})["findings"]
    assert findings == ["a: 1 of 4 rows have no prompt", "a: 1 of 4 rows have no response", "a: 1 of 4 rows repeat another"]


def test_thirteen_shared_words_are_an_overlap_and_twelve_are_not():
    words = [f"word{i}" for i in range(13)]
    rows = {"a": [Row("Before, " + " ".join(words) + "!", "1"), Row("q", "2")]}
    assert "1 of 2 prompts share 13" in audit(rows, {"t": [Row(" ".join(words), "x")]}, ngram=13)["findings"][0]
    assert audit(rows, {"t": [Row(" ".join(words[:12]), "x")]}, ngram=13)["findings"] == []


def test_free_text_has_no_majority():
    found = audit({"a": [Row(f"p{i}", f"r{i}") for i in range(30)]}, {})
    assert "majority" not in found["tasks"]["a"] and found["findings"] == []


def test_the_right_option_always_in_one_place_is_named_whatever_its_text():
    rows = [Row(f"Goal {i} ?\nA. use thing {i}\nB. use other {i}", f"use thing {i}") for i in range(50)]
    found = audit({"piqa": rows}, {})
    assert found["findings"] == ["piqa: every one of 50 responses is 'A'"] and found["tasks"]["piqa"]["labels"] == 1
    fair = audit({"piqa": [*rows[:25], *(Row(row.prompt, row.prompt.rpartition("B. ")[2]) for row in rows[25:])]}, {})
    assert fair["findings"] == [] and fair["tasks"]["piqa"]["distribution"] == {"A": 0.5, "B": 0.5}


def test_the_same_question_about_another_picture_is_another():
    rows = [Row("what ?", "A", images=("a.png",)), Row("what ?", "B", images=("b.png",))]
    assert audit({"a": rows}, {"t": [Row("what ?", "A", images=("c.png",))]})["findings"] == []
    assert len(audit({"a": rows}, {"t": rows[:1]})["findings"]) == 1


def test_command_prints_facts_and_fails_on_findings(tmp_path):
    rows = [{"prompt": f"question {i}", "response": "AB"[i % 2]} for i in range(10)]
    for name, content in (("good_test", rows), ("good_train", [{"prompt": "another", "response": "A"}]),
                          ("piqa_test", [row | {"response": "A"} for row in rows])):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    sound = run_module("data_pipeline.datasets", "audit", "good_test.json", "good_train.json", cwd=tmp_path)
    assert "50.0%" in sound.stdout and "A 50%, B 50%" in sound.stdout and "finding" not in sound.stdout
    done = run_module("data_pipeline.datasets", "audit", "good_test.json", "piqa_test.json", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "finding: piqa_test.json: every one of 10 responses is 'A'" in done.stdout
    missing = run_module("data_pipeline.datasets", "audit", "nowhere.json", cwd=tmp_path, check=False)
    assert missing.returncode == 1 and missing.stderr.startswith("error: nowhere.json")
