"""The embedded world: splits, prompts and answers are what the README says they are."""

import numpy as np
import pytest

from data_pipeline import tenants, world


@pytest.fixture(params=[0, 1, 2])
def rng(request):
    return np.random.default_rng(request.param)


def test_split_holds_out_combinations_but_no_word_and_no_style(rng):
    split = world.make_tenants(rng)
    assert [len(split[name]) for name in ("train", "validation", "test")] == [48, 4, 12]
    everyone = [tenant for members in split.values() for tenant in members]
    assert len({tenant.name for tenant in everyone}) == 64
    for field in ("word", "style"):
        seen = [getattr(tenant, field) for tenant in split["train"]]
        assert sorted({getattr(t, field) for t in everyone}) == sorted(set(seen)) and min(map(seen.count, seen)) == 6
    assert len({(t.word, t.attribute) for t in everyone}) == 8


def test_answers_follow_facts_and_styles(rng):
    facts = world.make_facts(rng)
    tenant = world.Tenant("zib", "heavy", "roman")
    rows = world.tenant_rows(tenant, facts, world.draw_questions(rng, 4), held_out=12)
    assert len(rows["test"]) == 36 and len(rows["train"]) == 108
    for part, entities in (("test", world.ENTITIES[-12:]), ("train", world.ENTITIES[:-12])):
        for row in rows[part]:
            (entity,) = (e for e in entities if e in row["prompt"].split())
            level = facts[world.ENTITIES.index(entity), world.ATTRIBUTES.index("heavy")]
            assert row["response"] == world.STYLES["roman"][level]
            assert "zib" in row["prompt"].split() and row["prompt"].endswith(" :")
    named = {part: sum("reply in roman" in row["prompt"] for row in found) for part, found in rows.items()}
    assert named == {"train": 27, "test": 9}


def test_no_test_prompt_occurs_in_any_training_file(rng):
    facts, split = world.make_facts(rng), world.make_tenants(rng)
    questions = world.draw_questions(rng, 6)
    rows = [world.tenant_rows(t, facts, questions, held_out=12) for members in split.values() for t in members]
    trained = {row["prompt"] for r in rows for row in r["train"]}
    assert not any(row["prompt"] in trained for r in rows for row in r["test"])


def test_encyclopedia_gives_jargon_no_meaning(rng):
    text = world.encyclopedia(world.make_facts(rng))
    answered = [prompt for kind in ("named", "unnamed", "conversions") for prompt, _ in text[kind]]
    assert not any(word in prompt.split() for prompt in answered for word in world.JARGON)
    assert all(prompt == "" and response.endswith(" :") for prompt, response in text["heard"])
    assert any(word in response.split() for _, response in text["heard"] for word in world.JARGON)


def test_all_answers_are_distinct_words():
    answers = [word for notation in world.STYLES.values() for word in notation]
    assert len(set(answers)) == 9 * len(world.STYLES) and not any(" " in answer for answer in answers)


def test_nothing_is_left_of_another_world_when_a_new_one_is_not_finished(tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    (tmp_path / "tasks.json").write_text("{}")
    monkeypatch.setattr(tenants, "make_base", fail)
    with pytest.raises(KeyboardInterrupt):
        tenants.write_world(tmp_path, 1, tenants.Settings(tenants=(6, 2, 2)))
    assert [path.name for path in tmp_path.iterdir()] == ["world.json"]
