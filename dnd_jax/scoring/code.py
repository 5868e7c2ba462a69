"""HumanEval-style scoring: several answers to each prompt are run with the row's tests, and pass@k estimated without bias."""

import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from dnd_jax.scoring import sandbox
from dnd_jax.sources import Row
from dnd_jax.types import InputError

FENCE = re.compile(r"```(?:python|py)?[^\S\n]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
DEFINED = re.compile(r"^def\s+(\w+)\s*\(", re.MULTILINE)
CHECK = re.compile(r"^def\s+check\s*\(", re.MULTILINE)
START = re.compile(r"^(?:def|class|import|from|@)", re.MULTILINE)
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
    only the imports count. The row's response is the tests: statements, or as in HumanEval a function `check`, which is called
    with the prompt's last function.
    """
    fenced = FENCE.search(answer)
    code = fenced.group(1) if fenced else answer
    names = DEFINED.findall(row.prompt)
    if names and names[-1] in DEFINED.findall(code):
        imports = [line for line in row.prompt.splitlines() if line.startswith(("import ", "from "))]
        solution = "\n".join([*imports, _from_first_statement(code)])
    else:
        solution = row.prompt + STOP.split(code, maxsplit=1)[0] if names else code
    call = ""
    if CHECK.search(row.response):
        if not names:
            raise InputError(f"tests define `check`, and the prompt no function to call it with: {row.prompt[:80]!r}")
        call = f"check({names[-1]})"
    return "\n\n".join(part for part in (solution, row.response, call) if part)


def _from_first_statement(code: str) -> str:
    found = START.search(code)
    return code[found.start() :] if found else code


def run_all(rows: Sequence[Row], answers: Sequence[Sequence[str]], *, seconds: float = 5.0) -> list[list[sandbox.Outcome]]:
    """Return the outcome of every answer of every row, run side by side."""
    jobs = [program(row, answer) for row, found in zip(rows, answers, strict=True) for answer in found]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = iter(list(pool.map(lambda job: sandbox.run(job, seconds=seconds), jobs)))
    return [[next(outcomes) for _ in found] for found in answers]
