"""The audit names every defect that made published numbers meaningless, and is silent on sound data."""

from dnd_jax.audit import audit
from dnd_jax.prompts import Row


def test_sound_data_has_no_findings():
    found = audit({"a": [Row("p", "1"), Row("q", "2"), Row("r", "2"), Row("s", "2")]}, {"b": [Row("t", "1")]})
    assert found["findings"] == []
    assert found["tasks"]["a"] == {"rows": 4, "labels": 2, "majority": 0.75, "chance": 0.5, "prompts_trained_on": 0}


def test_one_label_overlap_and_duplicate_are_named():
    rows = [Row("p", "A"), Row("q", "A")]
    findings = audit({"piqa": rows, "copy": list(rows)}, {"train": [Row("q", "B")]})["findings"]
    assert any("piqa: every one of 2 responses is 'A'" in f for f in findings)
    assert any("piqa: 1 of 2 prompts occur in training, first 'q' in train" in f for f in findings)
    assert any("copy: the same rows as piqa" in f for f in findings)
