"""HumanEval-style scoring: several answers to each prompt are run with the row's tests, and pass@k estimated without bias."""

import ast
import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from dnd_jax.scoring import sandbox
from dnd_jax.sources import Row
from dnd_jax.types import InputError

FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
PYTHON = ("", "python", "py", "python3")
DEFINED = re.compile(r"^def\s+(\w+)\s*\(", re.MULTILINE)
CHECK = re.compile(r"^def\s+check\s*\(", re.MULTILINE)
START = re.compile(r"^(?:(?:async )?def \w|class \w|import \w|from [\w.]+ import\b|@\w)", re.MULTILINE)
STOP = re.compile(r"\n(?=[^\s)\]}])|<\|")  # a continuation ends where a line isn't indented any more


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Return the probability that of k answers drawn from `samples` without replacement one passes: 1 - C(n-c,k)/C(n,k).

    Source: Chen et al. 2021, Evaluating Large Language Models Trained on Code, equation 1.
    """
    if not 0 <= passed <= samples or not 1 <= k <= samples:
        raise InputError(f"pass@{k} of {samples} samples, {passed} of them passed, isn't defined")
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def program(row: Row, answer: str) -> str:
    """Return the program that tests an answer: solution, then tests.

    The answer continues the prompt, or defines the prompt's last function anew, maybe in a fenced block; then of the prompt
    counts what stands before that function. The row's response is the tests: statements, or as in HumanEval a function `check`,
    which is called with the prompt's last function.
    """
    last = next(reversed([*DEFINED.finditer(row.prompt)]), None)
    code = _block(answer, last and last[1])
    if last and last[1] in DEFINED.findall(code):
        solution = f"{_code_at_end(row.prompt[: last.start()])}\n{_from_first_statement(code)}"
    else:
        solution = row.prompt + STOP.split(code, maxsplit=1)[0] if last else code
    call = f"check({last[1]})" if last and CHECK.search(row.response) else ""
    return "\n\n".join(part for part in (solution, row.response, call) if part)


def check_rows(rows: Sequence[Row], where: str) -> None:
    """Raise InputError at a row whose response is no Python, or defines a `check` that its prompt has no function for."""
    for number, row in enumerate(rows):
        try:
            ast.parse(row.response)
        except (SyntaxError, ValueError) as error:
            raise InputError(f"{where}: row {number}: the response is to be tests in Python: {error}: {row.response[:60]!r}"
                             ) from error
        if CHECK.search(row.response) and not DEFINED.search(row.prompt):
            raise InputError(f"{where}: row {number}: tests define `check`, and the prompt no function to call it with: "
                             f"{row.prompt[:80]!r}")


def _block(answer: str, function: str | None) -> str:
    """Return the fenced block of Python that defines a function, or any, or the first; without blocks the answer itself."""
    blocks = [code for language, code in FENCE.findall(answer) if language.lower() in PYTHON]
    wanted = [code for code in blocks if (names := DEFINED.findall(code)) and function in (None, *names)]
    return next(iter([*wanted, *blocks]), answer)


def _from_first_statement(code: str) -> str:
    found = START.search(code)
    return code[found.start() :] if found else code


def _code_at_end(text: str) -> str:
    """Return the longest end of a text, in whole lines, that is statements: helpers, constants and imports after a question."""
    ends = (text[line.start() :] for line in re.finditer("^", text, re.MULTILINE))
    return next((end for end in ends if _is_code(end)), "")


def _is_code(text: str) -> bool:
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError):
        return False
    return not any(isinstance(s, ast.Expr) and not isinstance(s.value, ast.Constant | ast.Call) for s in statements)


def run_all(rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[list[sandbox.Outcome]]:
    """Return the outcome of every answer of every row, run side by side."""
    jobs = [program(row, answer) for row, found in zip(rows, answers, strict=True) for answer in found]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = iter(list(pool.map(sandbox.run, jobs)))
    return [[next(outcomes) for _ in found] for found in answers]
