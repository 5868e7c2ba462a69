"""Choice: which options a row has, which of them an answer names.

The options are written as the row's response is written, so that they can continue the prompt:
  - the prompt lists labels ("A: ...", "B. ...", "(C) ..." or "1) ...", on lines of their own or after "choices:") and the
    response is one of them, maybe in brackets: "[B]" gives "[A]", "[B]", "[C]", "[D]";
  - the prompt lists them and the response is the text behind one: all the texts;
  - otherwise the distinct responses of the whole file, at most twenty: "[True]", "[False]".
"""

import re
from collections.abc import Sequence

import numpy as np

from dnd_jax.sources import Row
from dnd_jax.types import InputError

FEW_LABELS = 20  # with more distinct responses a set isn't one of choice
LABEL = r"\(?([A-Z]|[1-9])[.:)]"
LISTED = re.compile(rf"(?:^|(?<=[,;:\n]))[ \t]*{LABEL}[ \t]*(\S.*?)[ \t]*(?=$|\n|[,;.] *{LABEL} )", re.MULTILINE)
BARE = "()[]{}<>.:;,!\"'`* \n"
ARTICLE = r"(?<![Aa](?= (?!(?:is|was|or|and|because|since|as|but|not|rather|instead|than)\b)[a-z]))"


def options(rows: Sequence[Row], where: str = "rows") -> list[list[str]]:
    """Return the options of every row, of which its response is one.

    Raises:
      InputError: a row whose prompt lists no options that its response is one of, where the responses are too many to be them.
    """
    responses = sorted({row.response.strip() for row in rows})
    found = [listed(row) for row in rows]
    for number, (row, own) in enumerate(zip(rows, found, strict=True)):
        if not own and not 2 <= len(responses) <= FEW_LABELS:
            raise InputError(f"{where}: row {number} lists no options that its response {row.response[:40]!r} is one of, and "
                             f"{len(responses)} distinct responses, expected 2 to {FEW_LABELS}, aren't options either")
    return [own or responses for own in found]


def listed(row: Row) -> list[str]:
    """Return the options that a prompt lists, in the form of the response; none if the response isn't one of them."""
    found = list_of(row.prompt)
    response = row.response.strip()
    bare = response.strip(BARE)
    if bare in found:
        return [response.replace(bare, label) for label in found]
    return list(found.values()) if response in found.values() else []


def list_of(prompt: str) -> dict[str, str]:
    """Return a prompt's options by label: its longest run of consecutive labels from A or 1, the last of equals."""
    runs: list[dict[str, str]] = [{}]
    for label, text, _ in LISTED.findall(prompt):
        if label in "A1":
            runs.append({label: text})
        elif runs[-1] and ord(label) == ord(list(runs[-1])[-1]) + 1:
            runs[-1][label] = text
    return max(reversed(runs), key=len) if max(map(len, runs)) > 1 else {}


def parse(answer: str, found: Sequence[str]) -> str | None:
    """Return the one of a row's options that an answer names, or None where it names none or several.

    In this order: the answer is an option; it says "answer is" or boxes one; it begins with one; it has one in brackets, if
    options are words; it has one anywhere. Brackets, quotes and full stops around an option don't count, nor does case where
    options differ without it and are longer than a letter. An "A" before a small letter is an article, "A is" excepted. Where
    only what an answer says freely is left, one that it denies ("not A") makes it name none.
    """
    if answer.strip() in found:
        return answer.strip()
    names = {option.strip(BARE) or option.strip(): option for option in found}
    if len(names) < len(found):  # as of intervals, which brackets alone tell apart
        names = {option.strip(): option for option in found}
    small = len({_fold(name) for name in names}) == len(names)
    exact = {_fold(name) if small else name: option for name, option in names.items()}
    text = answer.strip(BARE) or answer.strip()
    if (text := _fold(text) if small else text) in exact:
        return exact[text]
    one = "|".join(re.escape(name) if len(name) == 1 or not small else f"(?i:{re.escape(name)})"
                   for name in sorted(names, key=len, reverse=True))
    word = rf"(?<!\d[.,])(?<![-\u2212](?=\d))({one})(?!\w|[.,]\d)"
    alone = rf"{word}(?=$|[.:;,!)\]}}\n\"'*`])" if all(len(name) == 1 for name in names) else word
    letters = all(len(name) == 1 and name.isalpha() for name in names)
    opening = r"[\s({\[\"'*]*"
    patterns = [rf"(?i:answer(?: is)?:?|boxed){opening}{word}", rf"\A{opening}{alone}",
                rf"(?<!\w){word}{ARTICLE}" if letters else rf"[\[(]({one})[\])]", rf"(?<!\w){alone}"]
    for number, pattern in enumerate(patterns):
        if number == 2 and re.search(rf"(?:\bnot|n't) {opening}{word}", answer):
            return None
        said = {_fold(name) if small else name for name in re.findall(pattern, answer)}
        if len(said) == 1:
            return exact[said.pop()]
        if said:
            return None
    return None


def _fold(name: str) -> str:
    return name if len(name) == 1 else name.lower()


def by_answer(answers: Sequence[str], found: Sequence[Sequence[str]], rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Return for each greedy answer 1.0 if it names the row's response, and 1.0 if it can't be parsed."""
    parsed = [parse(answer, listed) for answer, listed in zip(answers, found, strict=True)]
    right = [float(option == row.response.strip()) for option, row in zip(parsed, rows, strict=True)]
    return np.array(right), np.array([float(option is None) for option in parsed])


def by_loglikelihood(values: Sequence[np.ndarray], found: Sequence[Sequence[str]], rows: Sequence[Row]) -> np.ndarray:
    """Return 1.0 for each row whose response is the likeliest option, the first of equals."""
    return np.array([float(listed[int(np.argmax(v))] == row.response.strip())
                     for v, listed, row in zip(values, found, rows, strict=True)])
