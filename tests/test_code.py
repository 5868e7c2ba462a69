"""pass@k against its definition, and programs put together from what models write."""

import itertools

import pytest

from dnd_jax.scoring import code, kinds
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


@pytest.mark.parametrize("row,message", [
    (Row("Write a function.", CHECK), "row 1: tests define `check`, and the prompt no function to call it with: 'Write a"),
    (Row("def f():\n", "is four"), "row 1: the response is to be tests in Python: .*'is four'")])
def test_rows_whose_tests_can_not_run_are_named_before_a_model_is_asked(row, message):
    with pytest.raises(InputError, match=f"rows.json: {message}"):
        kinds.check_rows("code", [Row(PROMPT, CHECK), row], "rows.json")


SOLUTION = "def answer(x):\n    return [helper(n) + MOD for n in x]"
CONTEXTS = {  # what stands in a prompt before its last function
    "helpers and constants": "MOD = 10\n\n\ndef helper(x):\n    y = x\n\n    return y\n\n\n",
    "imports of several lines": "from typing import (\n    List,\n)\nMOD = len([List]) + 9\nhelper = int\n\n",
    "words": "Count from 1 to n and add ten.\nfrom 1 to n and returns the sums\n\nMOD = 10\nhelper = int\n",
    "one word": "Solve\n\nMOD = 10\nhelper = int\n",
    "words between": "import math\nMOD = int(math.sqrt(100))\n\nAdd ten:\n>>> answer([1])\n\nhelper = int\nDifficulty: easy\n",
    "comprehensions": "from math import *\nMOD = [i for i in range(20)][int(sqrt(100))]\nhelper = lambda x: x\n",
    "an example": "MOD = 10\nhelper = int\nassert answer([1]) == [11]\nanswer([2])\n",
    "equations": "Let y = x + 1 be even, where\nn = m + k\nn = n + 1\n\nMOD: int = 10\nhelper = int\n",
    "decorated": "from functools import cache\n\nMOD = 10\n@cache\ndef helper(x):\n    return x\n\n\nthen\n@cache\n",
}
FENCES = [
    "{}", "```python3\n{}\n```", "```python\n{}```", "```python\n{}\n``` This works since it adds.",
    "Sure! Here: ```python\n{}\n```", "```\r\n{}\r\n```\r\n",
    "```bash\npip install it\n```\nThen:\n```python\n{}\n```\n```text\n[11]\n```",
    "It calls ```helper``` first:\n```python title='a'\n{}\n```", "From the text I take:\nfrom here on\n\n{}",
    "First:\n```python\nprint(answer([1]))\n```\nwith\n```py\n{}\n```"]


WHOLE = {  # answers that define the function with what it needs
    "a constant": "```python\nMOD = 10**9 + 7\n\ndef f(x):\n    return 2 * x % MOD\n```",
    "a table": "TABLE = {i: 2 * i for i in range(10)}\ndef f(x):\n    return TABLE[x]",
    "a table after words": "Here it is:\nTABLE = {i: 2 * i for i in range(10)}\ndef f(x):\n    return TABLE[x]",
    "an import that may fail": "```\ntry:\n    import nothing\nexcept ImportError:\n    n = 2\ndef f(x):\n    return n * x\n```",
    "a future import": "```python\nfrom __future__ import annotations\n\ndef f(x: Any) -> Any:\n    return twice(x)\n```",
    "an indented fence": "1. So:\n   ```python\n   def f(x):\n       return 2 * x\n   ```",
    "words after it": "def f(x):\n    return 2 * x\n\nThis doubles x, since it's what was asked.\nf(3) is 6.",
    "a helper in the block before": ("```python\ndef g(x):\n    return 2 * x\nprint(f(1))\n```\nand\n"
                                     "```python\ndef f(x):\n    return g(x)\n```"),
}


@pytest.mark.parametrize("form", WHOLE)
def test_what_an_answer_defines_beside_the_function_counts(form):
    row = Row('from typing import Any\n\ndef twice(x):\n    return 2 * x\n\ndef f(x: int) -> int:\n    """Double."""\n',
              "def check(candidate):\n    assert candidate(3) == 6\n")
    (outcome,) = code.run_all([row], [[WHOLE[form]]])[0]
    assert outcome.passed, (outcome.reason, code.program(row, WHOLE[form]))


def test_a_prompt_of_indented_words_has_no_context():
    row = Row("  Add ten, please:\n    like this\ndef answer(x):\n", "assert answer(1) == 11")
    assert code.run_all([row], [["def answer(x):\n    return x + 10"]])[0][0].passed


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("fence", FENCES)
def test_what_stands_before_the_function_counts_and_only_the_block_with_it(context, fence):
    row = Row(CONTEXTS[context] + 'def answer(x):\n    """Add ten."""\n', "assert answer([1, 2]) == [11, 12]")
    (outcome,) = code.run_all([row], [[fence.format(SOLUTION)]])[0]
    assert outcome.passed, (outcome.reason, code.program(row, fence.format(SOLUTION)))

