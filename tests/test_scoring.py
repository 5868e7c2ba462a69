"""What a miniature base answers, by every kind of scoring, and that lm-evaluation-harness says the same."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, run_module, small_base
from flax.traverse_util import flatten_dict, unflatten_dict

from dnd_jax import adapters, baselines, score
from dnd_jax.scoring import Model, choice, final_answer, kinds
from dnd_jax.sources import Row
from dnd_jax.types import InputError

SENTENCES = ["which one is it ? A: whale B: ant C: bear [A] [B] [C] True False", "seven #### 12 is the answer : [A]"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a base of a few thousand random parameters and its tokenizer."""
    from data_pipeline.tenants import make_base_tokenizer

    folder = tmp_path_factory.mktemp("base")
    tokenizer = make_base_tokenizer(SENTENCES)
    torch.manual_seed(0)
    small_base("qwen2", vocab_size=len(tokenizer), initializer_range=0.5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A LoRA folder for it that changes its answers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, lora_dropout=0.3, init_lora_weights=False,
                        target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder)
    return folder


def choice_rows(count=24):
    rng = np.random.default_rng(0)
    words = ["whale", "ant", "bear", "seven", "it"]
    listed = ["\n".join(map(": ".join, zip("ABC", rng.permutation(words)[:3], strict=True))) for _ in range(count)]
    return [Row(f"which one is it ?\n{lines}", f"[{rng.choice(list('ABC'))}]", "is it the answer" * (i % 2))
            for i, lines in enumerate(listed)]


def write(path, rows):
    path.write_text(json.dumps([{"prompt": row.prompt, "response": row.response, "system": row.system} for row in rows]))
    return path


# --- choice ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt,response,expected", [
    ("Which?\nA: an ant\nB: a bear", "[B]", ["[A]", "[B]"]),
    ("Which?\nA. an ant\nB. a bear\nC. a crow", "C", ["A", "B", "C"]),
    ("Which?\n(A) an ant\n(B) a bear", "(A)", ["(A)", "(B)"]),
    ("Which?choices: A: an ant, B: a bear, C: two, D: three", "[D]", ["[A]", "[B]", "[C]", "[D]"]),
    ("Which?\n1) an ant\n2) a bear", "2", ["1", "2"]),
    ("Which?\nA: an ant\nB: a bear", "a bear", ["an ant", "a bear"]),
    ("Plan A: wait.\nWhich?\nA: an ant\nB: a bear\nPlease choose from [A]/[B]/[C]/[D].", "[A]", ["[A]", "[B]"]),
])
def test_options_are_what_the_prompt_lists_as_the_response_is_written(prompt, response, expected):
    assert choice.options([Row(prompt, response)]) == [expected]


def test_options_are_else_the_responses_of_the_file_if_these_are_few():
    rows = [Row("Is it?", "[True]"), Row("Was it?", "[False]"), Row("Will it?", "[True]")]
    assert choice.options(rows) == [["[False]", "[True]"]] * 3
    with pytest.raises(InputError, match=r"sums.json: row 0 .* 30 distinct responses"):
        choice.options([Row(f"How much is {i} + 1?", str(i + 1)) for i in range(30)], "sums.json")


LETTERS, WORDS = ["[A]", "[B]", "[C]"], ["[True]", "[False]"]
INTERVALS = ["(1, 2]", "[1, 2)", "(1, 2)", "[1, 2]"]
NUMBERS, SIGNS = ["1", "2", "3", "4"], ["<", "=", ">"]


@pytest.mark.parametrize("answer,found,expected", [
    ("[B]", LETTERS, "[B]"), ("B", LETTERS, "[B]"), ("B.", LETTERS, "[B]"), ("(C) because", LETTERS, "[C]"),
    ("The answer is B.", LETTERS, "[B]"), ("A bear, so I say \\boxed{C}", LETTERS, "[C]"), ("**Answer: C**", LETTERS, "[C]"),
    ("It must be [A], not that", LETTERS, "[A]"), ("A bear is big", LETTERS, None), ("A. or B. or both", LETTERS, "[A]"),
    ("either (A) or (B)", LETTERS, None), ("", LETTERS, None), ("D", LETTERS, None), ("b", LETTERS, None),
    ("The answer is A since it is cheaper than B.", LETTERS, "[A]"), ("A is correct, not B.", LETTERS, None),
    ("I think it's A rather than (B)", LETTERS, None), ("Both A and B", LETTERS, None),
    ("It is B because a bear is big", LETTERS, "[B]"),
    ("A bear is B", LETTERS, "[B]"), ("2.5", NUMBERS, None), ("12.3", NUMBERS, None), ("1,000", NUMBERS, None),
    ("There are 2 apples, so 3.", NUMBERS, "3"), ("It is 3.", NUMBERS, "3"),
    ("<", SIGNS, "<"), ("(=)", SIGNS, "="), ("", SIGNS, None), ("Polish", ["polish", "Polish"], "Polish"),
    ("it is polish", ["polish", "Polish"], "polish"),
    *((interval, INTERVALS, interval) for interval in INTERVALS), ("It is [1, 2).", INTERVALS, "[1, 2)"),
    ("3", ["3", "3!"], "3"), ("3!", ["3", "3!"], "3!"), ("The answer is -12.", ["12", "6"], None), ("-12", ["-12", "12"], "-12"),
    ("It is a triangle.", [*"abcde"], None), ("a", [*"abcde"], "a"), ("It is a.", [*"abcde"], "a"),
    ("The answer is not A.", LETTERS, None), ("It isn't true.", WORDS, None), ("The answer is B, not A.", LETTERS, "[B]"),
    ("true", WORDS, "[True]"), ("It is False.", WORDS, "[False]"), ("untrue", WORDS, None), ("it is true or false", WORDS, None),
])
def test_answers_are_parsed(answer, found, expected):
    assert choice.parse(answer, found) == expected


# --- final answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("response,answer,right,unparsable", [
    ("3 + 9 = <<3+9=12>>12\n#### 12", "3 and 9 make 12.", 1, 0),
    ("so many\n#### 1,200", "The answer is $1200.", 1, 0),
    ("#### 12", "#### 12\n\nHow much are 13?", 1, 0),
    ("#### 12", "\\boxed{12.0}", 1, 0),
    ("#### 18", "#### Step 2: Conclude\nTherefore \\boxed{18}.", 1, 0), ("#### 18", "#### Final Answer\n\n\\boxed{18}", 1, 0),
    ("#### 18", "#### 1. Compute\n9*2 = 18. So \\boxed{18}", 1, 0), ("\\boxed{18}", "\\boxed{9}, no:\n#### 18", 1, 0),
    *(("x\n#### 18", answer, 1, 0) for answer in (
        "#### 18.", "#### **18**", "#### **Answer: 18.**", "#### 18 dollars per day", "#### The answer is 18", "\\boxed{18.}",
        "\\boxed{18 miles per hour}", "#### Final Answer\nThe answer is 18.", "#### Step 3: Compute the total\nTotal = 18",
        "#### Answer\n\n**18**", "#### $18")),
    *((gold, "#### 18", 1, 0) for gold in ("#### 18.", "#### 18 dollars per day", "18 dollars", "18 kg")),
    ("#### 18", "The answer is 18.\nIt took us\n3 steps", 1, 0),
    ("#### 18000", "#### 18,000 dollars", 1, 0), ("#### 18", "#### 17 dollars", 0, 0), ("\\boxed{2x}", "\\boxed{2 x}", 1, 0),
    ("\\boxed{2}", "\\boxed{2 x}", 0, 0), ("\\boxed{3 pi}", "\\boxed{3}", 0, 0),
    ("#### 12", "It is 13.", 0, 0),
    ("#### 12", "I don't know.", 0, 1),
    ("thus \\boxed{\\frac{1}{2}}.", "we get $\\boxed{0.5}$", 1, 0),
    ("thus \\boxed{\\frac{\\sqrt{3}}{2}}.", "$\\frac{3}{2\\sqrt{3}}$", 1, 0),
    ("thus \\boxed{x^2+1}.", "\\boxed{1+x^2}", 1, 0),
    ("\\boxed{(3, \\frac{\\pi}{2})}", "\\boxed{\\left(3,\\frac{\\pi}{2}\\right)}", 1, 0),
    ("7", "seven is 7", 1, 0), ("\\boxed{east}", "\\boxed{\\text{East}}", 1, 0), ("\\boxed{east}", "\\boxed{seat}", 0, 0),
    ("\\boxed{\\text{even}}", "\\boxed{\\mbox{even}}", 1, 0), ("even", "\\boxed{\\operatorname{even}}", 1, 0),
    ("even", "\\boxed{\\sqrt{even}}", 0, 0),
    ("\\boxed{\\sqrt{abcd}}", "\\boxed{abcd}", 0, 0), ("#### blue", "blue", 1, 0), ("blue", "It may be.", 0, 1),
])
def test_final_answers_are_compared_as_mathematics(response, answer, right, unparsable):
    found = final_answer.correct([answer], [Row("?", response)])
    assert (found[0][0], found[1][0]) == (right, unparsable)


@pytest.mark.parametrize("response", ["\\boxed{}", "#### ", "?", "\\boxed{!}"])
def test_a_response_without_final_answer_is_named(response):
    with pytest.raises(InputError, match="row 0: the response has no final answer"):
        final_answer.correct(["1"], [Row("?", response)])


# --- the model -------------------------------------------------------------------------------------------------------


def test_loglikelihoods_are_the_sums_over_tokens_whatever_the_batch(base):
    rows = choice_rows(5)
    options = [[*found, "seven is the answer"] for found in choice.options(rows)]
    model = Model(str(base), None, 3, 4)
    together = model.loglikelihood(rows, options)
    for row, found, values in zip(rows, options, together, strict=True):
        ids = model.questions([row])[0]["input_ids"]
        for option, value in zip(found, values, strict=True):
            continued = ids + model.tokenizer(option, add_special_tokens=False).input_ids
            with torch.no_grad():
                chances = model.model(torch.tensor([continued])).logits[0].double().log_softmax(-1)
            expected = sum(chances[i - 1, continued[i]].item() for i in range(len(ids), len(continued)))
            assert value == pytest.approx(expected, abs=1e-4)


def test_samples_differ_and_are_the_same_again(base):
    model = Model(str(base), None, 2, 6)
    rows = choice_rows(3)
    found = model.sample(rows, 4, 1.0, seed=1)
    assert [len(answers) for answers in found] == [4, 4, 4] and len({a for answers in found for a in answers}) > 3
    assert model.sample(rows, 4, 1.0, seed=1) == found != model.sample(rows, 4, 1.0, seed=2)
    assert {a.strip() for a in model.sample(rows, 4, 1e-3)[0]} == {model.answer(rows)[0]}


def test_a_base_own_settings_of_generation_do_not_count(base, tmp_path):
    """Qwen's bases penalise repetitions, those of the prompt's words too; only where they end an answer is theirs."""
    shutil.copytree(base, tmp_path / "base")
    path = tmp_path / "base" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 3.0, "top_k": 1, "temperature": 0.1}))
    rows = choice_rows()
    plain, other = (Model(str(folder), None, 8, 6) for folder in (base, tmp_path / "base"))
    assert plain.answer(rows) == other.answer(rows)
    assert plain.sample(rows[:3], 4, 1.0) == other.sample(rows[:3], 4, 1.0)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": list(range(plain.model.config.vocab_size))}))
    short, long = Model(str(tmp_path / "base"), None, 8, 6).answer(rows), plain.answer(rows)
    assert all(b.startswith(a) for a, b in zip(short, long, strict=True)) and short != long
    for name in ("config.json", "generation_config.json"):  # adapters end answers as the tokenizer does, whatever these say
        path = tmp_path / "base" / name
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token_id"}))
    ending = Model(str(tmp_path / "base"), None, 8, 6)
    assert ending.model.generation_config.eos_token_id == [ending.tokenizer.eos_token_id]


def test_one_adapter_after_another_whatever_their_configs(base, adapter):
    """Mean products of one adapter have its rank and another scale; two adapters with biases can't be in a model at once."""
    tree, spec = adapters.read(adapter)
    rows, flat = choice_rows(4), flatten_dict(tree, sep="/")
    model = Model(str(base), spec, 8, 4)
    model.use(tree, spec)
    own = np.stack(model.loglikelihood(rows, choice.options(rows)))
    for copies in (1, 2):
        product, wide = baselines.mean_product([flat] * copies, spec)
        model.use(unflatten_dict(product, sep="/"), wide)
        np.testing.assert_allclose(np.stack(model.loglikelihood(rows, choice.options(rows))), own, atol=1e-4)
    biased = dataclasses.replace(spec, config={**spec.config, "bias": "lora_only"})
    for scale in (1, 2):
        model.use(tree, dataclasses.replace(biased, config={**biased.config, "lora_alpha": scale * spec.config["lora_alpha"]}))
        again = np.stack(model.loglikelihood(rows, choice.options(rows)))
        assert np.allclose(again, own, atol=1e-4) == (scale == 1)


def test_code_is_sampled_run_and_counted(base):
    class Fixed(Model):
        """A model that writes what it is told, since a miniature can't write programs."""

        def sample(self, rows, samples, temperature, **ask):
            return [["    return 2 * x", "    return x", "    return ("][:samples]] * len(rows)

    rows = [Row("def double(x):\n", "assert double(4) == 8"), Row("def same(x):\n", "assert same(0) == 1")]
    scores = kinds.score("code", Fixed(str(base), None, 2, 4), rows, valid=(), samples=3, temperature=1.0)
    assert list(scores.metrics) == ["pass@1"]
    np.testing.assert_allclose(scores.main, [1 / 3, 0])
    np.testing.assert_allclose(scores.unparsable, [1 / 3, 1 / 3])


# --- the command -----------------------------------------------------------------------------------------------------


def test_command_scores_base_and_adapter(base, adapter, tmp_path):
    rows = choice_rows()
    write(tmp_path / "animals.json", rows)
    command = ["dnd_jax.evaluate", f"--base={base}", "--data=animals.json", "--scoring=choice", "--max_new_tokens=4"]
    done = run_module(*command, f"--adapter={adapter}", "--out=scores.json", cwd=tmp_path)
    result = json.loads((tmp_path / "scores.json").read_text())
    assert result["n"] == len(rows) and result["metrics"].keys() == {"choice", "loglikelihood"} and "unparsable" in done.stdout
    tree, spec = adapters.read(adapter)
    model = Model(str(base), spec, 7, 4)
    model.use(tree, spec)
    assert score.summary("choice", model, rows, 1, 1.0)["metrics"] == result["metrics"]
    plain = model.loglikelihood(rows, choice.options(rows), adapter=False)
    alone = Model(str(base), None, 32, 4).loglikelihood(rows, choice.options(rows))
    np.testing.assert_allclose(np.stack(plain), np.stack(alone), atol=1e-4)
    assert np.abs(np.stack(model.loglikelihood(rows, choice.options(rows))) - np.stack(plain)).max() > 0.1


def arguments(base, data, **options):
    """Return parsed flags of the command."""
    usual = {"scoring": "exact", "adapter": None, "out": None, "lm_eval": None, "batch_size": 8, "max_new_tokens": 4,
             "samples": 1, "temperature": 1.0}
    return types.SimpleNamespace(base=str(base), data=str(data), **(usual | options))


def test_a_word_of_the_task_is_parsable_whatever_white_space_its_response_has(base):
    class Fixed(Model):
        def answer(self, rows, **ask):
            return ["blue", "grey"]

    model, rows = Fixed(str(base), None, 2, 4), [Row("a", "blue\n")] * 2
    scores = kinds.score("exact", model, rows, valid={"blue\n"}, samples=1, temperature=1.0)
    assert (scores.main.tolist(), scores.unparsable.tolist()) == ([1, 0], [0, 1])


def test_an_adapter_of_another_base_is_refused(base, adapter):
    tree, spec = adapters.read(adapter)
    model = Model(str(base), spec, 2, 4)
    flat = flatten_dict(tree)
    moved = {("model", "other", *path[1:]): value for path, value in flat.items()}
    wide = {path: np.pad(value, ((0, 0), (0, 1))) if path[-1] == "lora_A" else value for path, value in flat.items()}
    for changed, said in ((moved, "of its tensors have no place there, first .*other"), (wide, "size mismatch")):
        with pytest.raises(InputError, match=f"{base}: the adapter is none of this base's: .*{said}"):
            model.use(unflatten_dict(changed), spec)
    config = {**spec.config, "target_modules": ["nowhere"]}
    with pytest.raises(InputError, match=f"{base}: the adapter is none of this base's: .*nowhere"):
        Model(str(base), dataclasses.replace(spec, config=config), 2, 4)


@pytest.mark.parametrize("options,message", [
    ({"scoring": "guess"}, "scoring is 'guess'"), ({"lm_eval": "out", "adapter": "a"}, "--adapter and --out are of scoring"),
    ({"lm_eval": "out", "scoring": "code"}, "--scoring=code can't be exported"),
    ({"adapter": "none"}, "none"),
])
def test_command_names_what_is_wrong(base, tmp_path, options, message):
    data = write(tmp_path / "rows.json", choice_rows(2))
    with pytest.raises(InputError, match=message):
        score.main(arguments(base, data, **options))
    with pytest.raises(InputError, match=r"missing\.json"):
        score.main(arguments(base, tmp_path / "missing.json", **options | {"scoring": "exact"}))


def test_a_task_folder_replaces_no_other(base, tmp_path):
    (tmp_path / "chapter.tex").write_text("mine")
    data = write(tmp_path / "rows.json", choice_rows(2))
    with pytest.raises(InputError, match=f"{tmp_path}: is there"):
        score.main(arguments(base, data, scoring="choice", lm_eval=str(tmp_path)))
    assert (tmp_path / "chapter.tex").read_text() == "mine"


HARNESS = """
import json, sys
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, *folders = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
model = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(base), batch_size=8, max_length=256)
manager = TaskManager(include_path=folders, include_defaults=False)
found = lm_eval.simple_evaluate(model=model, tasks=sorted(manager.all_tasks), task_manager=manager, bootstrap_iters=0)
print(json.dumps({task: {k.split(",")[0]: v for k, v in values.items() if isinstance(v, float)}
                  for task, values in found["results"].items()}))
"""


def test_lm_evaluation_harness_gives_the_same_accuracy(base, adapter, tmp_path):
    tree, spec = adapters.read(adapter)
    model = Model(str(base), spec, 8, 4)
    model.use(tree, spec)
    animals = choice_rows()
    asked = [Row(row.prompt, "?", row.system) for row in animals]
    said = model.answer(asked)
    sets = {"animals": ("choice", animals),
            "words": ("exact", [Row(row.prompt, answer if i % 3 and answer else "x", row.system)
                                for i, (row, answer) in enumerate(zip(asked, said, strict=True))]),
            "numbers": ("final_answer", [Row(r.prompt, "#### 12", r.system) for r in asked])}
    ours = {}
    for name, (kind, rows) in sets.items():
        score.main(arguments(base, write(tmp_path / f"{name}.json", rows), scoring=kind, lm_eval=tmp_path / "tasks" / name))
        ours[name] = score.summary(kind, model, rows, 1, 1.0)
    done = subprocess.run([sys.executable, "-c", HARNESS, base, adapter, *(f"tasks/{name}" for name in sets)], cwd=tmp_path,
                          capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout.strip().splitlines()[-1])
    metrics = ours["animals"]["metrics"]
    assert theirs["animals_loglikelihood"]["acc"] == pytest.approx(metrics["loglikelihood"]) and 0 < metrics["loglikelihood"] < 1
    assert theirs["animals_choice"]["choice"] == pytest.approx(metrics["choice"])
    assert theirs["animals_choice"]["unparsable"] == pytest.approx(ours["animals"]["unparsable"])
    exact = theirs["words_exact"]["exact"]
    assert exact == pytest.approx(ours["words"]["metrics"]["exact_match"]) and exact > 0.2
    assert theirs["numbers_final_answer"]["final_answer"] == pytest.approx(ours["numbers"]["metrics"]["final_answer"])
