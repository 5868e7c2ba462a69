"""HumanEval-style scoring: several answers to each prompt are run with the row's tests, and pass@k estimated without bias."""

import ast
import builtins
import math
import re
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import joblib

from dnd_jax.scoring import sandbox
from dnd_jax.sources import Row
from dnd_jax.types import InputError

FENCE = re.compile(r"```(?:([\w+-]+)[^\n`]*|[ \t]*)\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
PYTHON = ("", "python", "py", "python3")
DEFINED = re.compile(r"^def\s+(\w+)\s*\(", re.MULTILINE)
CHECK = re.compile(r"^def\s+check\s*\(", re.MULTILINE)
START = re.compile(r"^(?:(?:async )?def \w|class \w|import \w|from [\w.]+ import\b|@\w|try:|\w+ *= *[^\s=])", re.MULTILINE)
FUTURE = re.compile(r"^from __future__ import .*\n?", re.MULTILINE)
DECORATORS = re.compile(r"(?:^@.*\n)+\Z", re.MULTILINE)
BEGIN = re.compile(r"^(?!\s|[)\]}]|(?:else|elif|except|finally)\b)", re.MULTILINE)  # of a statement on the outermost level
KEPT = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Try, ast.If)
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

    The answer continues the prompt, or defines the prompt's last function anew, maybe in a fenced block; then of the prompt count
    the imports, constants and helpers before that function, and of earlier blocks what the block lacks. The row's response is the
    tests: statements, or as in HumanEval a function `check`, which is called with the prompt's last function.
    """
    last = next(reversed([*DEFINED.finditer(row.prompt)]), None)
    code, earlier = _block(answer.replace("\r\n", "\n"), last and last[1])
    if last and last[1] in DEFINED.findall(textwrap.dedent(code)):
        given, code = _definitions(DECORATORS.sub("", row.prompt[: last.start()])), _python(textwrap.dedent(code))
        solution = "\n".join((given, _helpers(earlier, given, code), code))
        solution = "".join(FUTURE.findall(solution)) + FUTURE.sub("", solution)
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


def _block(answer: str, function: str | None) -> tuple[str, str]:
    """Return the fenced block of Python that defines a function, or any, or the first, and the blocks before it.

    Without blocks it is the answer itself.
    """
    blocks = [code.partition("```")[0] for language, code in FENCE.findall(answer) if language.lower() in PYTHON]
    wanted = [i for i, code in enumerate(blocks)
              if (names := DEFINED.findall(textwrap.dedent(code))) and function in (None, *names)]
    chosen = next(iter(wanted), 0)
    return (blocks[chosen], "\n".join(map(textwrap.dedent, blocks[:chosen]))) if blocks else (answer, "")


def _python(code: str) -> str:
    """Return code without the words before its first statement and after its last."""
    if _statements(code) is None and (found := START.search(code)):
        code = code[found.start() :]
    lines = code.split("\n")
    begun = ("\n".join(lines[:end]) for end in range(len(lines), 0, -1))
    return next((part for part in begun if DEFINED.search(part) and _statements(part) is not None), code)


def _definitions(text: str) -> str:
    """Return the imports, constants and helpers of a text, which may have words between them."""
    body = _statements(text)
    if body is None:
        starts = [found.start() for found in BEGIN.finditer(text)]
        whole = [start for before, start in zip([None, *starts], starts, strict=False) if before is None or text[before] != "@"]
        chunks = [text[start:end] for start, end in zip(whole, [*whole[1:], None], strict=False)]
        body = [statement for chunk in chunks for statement in _statements(chunk) or []]
    known, kept = set(dir(builtins)), list[ast.stmt]()
    for statement in body:
        value = statement.value if isinstance(statement, ast.Assign | ast.AnnAssign) else None
        if isinstance(statement, KEPT) or (value and ("*" in known or _used(value) <= known | _defined(value))):
            kept.append(statement)
            known |= _defined(statement)
    return ast.unparse(ast.Module(kept, []))


def _helpers(earlier: str, given: str, code: str) -> str:
    """Return what earlier blocks define if code uses any of it that neither it nor what is given defines, else nothing."""
    helpers = _definitions(earlier)
    used, known, helped = (ast.Module(_statements(text) or [], []) for text in (code, f"{given}\n{code}", helpers))
    return helpers if (_used(used) - _defined(known)) & _defined(helped) else ""


def _statements(text: str) -> list[ast.stmt] | None:
    try:
        return ast.parse(text).body
    except (SyntaxError, ValueError):
        return None


def _used(value: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(value) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def _defined(statement: ast.AST) -> set[str]:
    """Return the names that a statement defines, or those of an expression that it has for itself."""
    names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {(found.asname or found.name).partition(".")[0] for node in ast.walk(statement)
              if isinstance(node, ast.Import | ast.ImportFrom) for found in node.names}
    names |= {node.arg for node in ast.walk(statement) if isinstance(node, ast.arg)}
    named = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return names | {node.name for node in ast.walk(statement) if isinstance(node, named)}


def run_all(rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[list[sandbox.Outcome]]:
    """Return the outcome of every answer of every row, run side by side."""
    jobs = [program(row, answer) for row, found in zip(rows, answers, strict=True) for answer in found]
    with ThreadPoolExecutor(joblib.cpu_count()) as pool:  # of this job; with more programs at once some would be out of time
        outcomes = iter(list(pool.map(sandbox.run, jobs)))
    return [[next(outcomes) for _ in found] for found in answers]
