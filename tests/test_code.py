"""pass@k against its definition, and programs put together from what models write."""

import itertools

import pytest

from dnd_jax.scoring import code
from dnd_jax.sources import Row
from dnd_jax.types import InputError


@pytest.mark.parametrize("samples,passed,k", [(5, 0, 1), (5, 2, 1), (5, 2, 3), (5, 4, 2), (6, 6, 6), (7, 3, 5)])
def test_pass_at_k_is_the_share_of_draws_with_a_success(samples, passed, k):
    draws = list(itertools.combinations([True] * passed + [False] * (samples - passed), k))
    assert code.pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_of_too_few_samples_is_refused():
    with pytest.raises(InputError, match="pass@10 of 5 samples"):
        code.pass_at_k(5, 1, 10)


PROMPT = 'import math\n\n\ndef helper(x):\n    return x\n\n\ndef root(x):\n'
PROMPT += '    """Return the square root.\n    >>> root(4)\n    2.0\n    """\n'
CHECK = "def check(candidate):\n    assert candidate(4) == 2\n    assert candidate(9) == 3"
ANSWERS = {  # answer: whether it passes
    "    return math.sqrt(x)\n\n\ndef test():\n    assert False": True,
    "    return math.sqrt(x)\n\nprint('an example'": True,
    "    return helper(x) ** 0.5": True,
    "    return x / 2\n": False,
    "Here you are:\n```python\ndef root(x):\n    return math.sqrt(x)\n```\nIt works by magic.": True,
    "```\ndef root(x):\n    return math.sqrt(x)": True,
    "```python\n    return math.sqrt(x)\n```": True,
    "def root(x):\n    return math.sqrt(x)": True,
    "The root of it is what you want.": False,
    "    import os\n    os._exit(0)": False,
    "    raise SystemExit(0)": False,
    "": False,
}


def test_answers_of_every_form_are_run_with_the_tests():
    rows = [Row(PROMPT, CHECK)] * len(ANSWERS)
    outcomes = code.run_all(rows, [[answer] for answer in ANSWERS])
    assert {answer: found[0].passed for answer, found in zip(ANSWERS, outcomes, strict=True)} == ANSWERS


def test_tests_may_be_plain_statements_and_need_a_function_to_check():
    row = Row("Write a function `double`.", "assert double(2) == 4")
    answers = ["```python\ndef double(x):\n    return 2 * x\n```", "def double(x): return x"]
    assert [outcome.passed for outcome in code.run_all([row], [answers])[0]] == [True, False]
    with pytest.raises(InputError, match="no function to call it with: 'Write a function"):
        code.program(Row("Write a function.", CHECK), "x = 1")
