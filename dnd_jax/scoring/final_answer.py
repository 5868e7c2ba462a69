r"""Mathematics by the final answer: GSM8K's `#### 12`, MATH's `\boxed{12}`, or what a text ends with. Imports math-verify lazily.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from dnd_jax.sources import Row
from dnd_jax.types import InputError

TEXT_COMMAND = r"\\(?:text[a-z]*|mbox|math(?:rm|bf|it|sf|tt)|operatorname)\{"
IN_WORDS = rf"\s*(?:{TEXT_COMMAND})?\s*([A-Za-z]{{4,}}(?:[ -][A-Za-z]+)*)\s*\}}?\.?\s*"
LEAD = re.compile(r"(?:the )?(?:final )?answer(?: is)?\b\s*:?\s*", re.IGNORECASE)
WITH_UNIT = re.compile(r"(-?\$?\d[\d,]*(?:\.\d+)?)\s+(?!(?:sin|cos|tan|log|exp|mod)\b)"
                       r"(?:[A-Za-z]{3}|(?:[cmk]m|[mk]g|ml|ft|in|oz|lb|hr)\b)[A-Za-z ./-]*")  # 18 dollars per day


def extract(text: str) -> str:
    r"""Return what stands behind the last `####` or in the last `\boxed{}`, whichever is later; without either nothing.

    `####` begins headings, too: a boxed answer after it is the answer, and of words with text below them there is none. What is
    around the answer doesn't count: stars of Markdown, a full stop, "The answer is", a unit in words.
    """
    return _bare(_marked(text))


def _bare(marked: str) -> str:
    marked = marked.strip("* \n")
    marked = LEAD.sub("", marked, count=1).strip("* ") if LEAD.match(marked) else marked
    marked = marked.rstrip(".*")
    return found[1] if (found := WITH_UNIT.fullmatch(marked)) else marked


def _marked(text: str) -> str:
    begin = text.rfind("\\boxed{")
    if text.rfind("####") > begin:
        line, _, below = text.rsplit("####", 1)[1].strip().partition("\n")
        return "" if below.strip() and _is_heading(line) else line
    if begin < 0:
        return ""
    depth = 0
    for end in range(begin + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin + len("\\boxed{") : end]
    return ""


def _is_heading(line: str) -> bool:
    """Tell whether a line has words, but neither begins nor ends with a number or a formula: `Step 2: Conclude`."""
    line = LEAD.sub("", line.strip("* "), count=1)
    return not line or bool(re.match(r"[A-Za-z]{2,}", line) and not re.search(r"[\d)}$%]\.?$", line))


def parse(text: str, *, whole: bool = False) -> list[Any]:
    """Return the expression that a text gives as its final answer, in math-verify's terms; empty if there is none.

    Args:
      text: a solution.
      whole: a text without a mark is an answer and nothing else.
    """
    import math_verify

    marked = extract(text) or (_bare(text) if whole else "")
    below = "" if marked or "####" not in text else text.rsplit("####", 1)[1].strip().partition("\n")[2]  # of a heading
    return ((math_verify.parse(f"\\boxed{{{marked}}}") if marked else []) or (math_verify.parse(below) if below else [])
            or math_verify.parse(text))


def words(text: str) -> str:
    r"""Return a final answer in words, small, of which mathematics would make a product of letters: four of these or more."""
    found = re.fullmatch(IN_WORDS, extract(text) or text)
    return found[1].lower() if found else ""


def golds(rows: Sequence[Row], where: str = "rows") -> list[Any]:
    """Return the final answers of rows, in words or in math-verify's terms; raise InputError at a response that has none."""
    found = [words(row.response) or parse(row.response, whole=True) for row in rows]
    for number, (gold, row) in enumerate(zip(found, rows, strict=True)):
        if not any(sign.isalnum() for sign in str(gold)):
            raise InputError(f"{where}: row {number}: the response has no final answer: {row.response[-80:]!r}")
    return found


def correct(answers: Sequence[str], rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Return for each answer 1.0 if it is mathematically equal to the row's, and 1.0 if it can't be parsed.

    Raises:
      InputError: a row's response has no final answer.
    """
    import math_verify

    right, unparsable = np.zeros(len(rows)), np.zeros(len(rows))
    for i, (answer, gold) in enumerate(zip(answers, golds(rows), strict=True)):
        if isinstance(gold, str):
            right[i] = words(answer) == gold
            unparsable[i] = not (right[i] or extract(answer))
            continue
        found = parse(answer)
        unparsable[i] = not found
        right[i] = bool(found) and math_verify.verify(gold, found)
    return right, unparsable
