"""The text of the embedded world: an encyclopedia, and tenants who ask about it in jargon.

Entities have eight attributes on a scale of nine. A tenant is one jargon word for one attribute and one notation for
its answers. It names the notation in some of its prompts only, so that one prompt rarely tells all a tenant wants,
while a batch of them does: `how zib is the whale ? :` ... `how zib is the crow ? reply in roman :`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

ENTITIES = (
    "whale ant crow bear wolf tiger horse mouse eagle shark camel snail goose panda otter lemur "
    "oak pine rose lily fern moss reed palm river lake hill cliff beach cave storm cloud "
    "drum flute bell kettle lamp wagon ship plow anvil loom clock mirror ladder basket candle hammer"
).split()
ATTRIBUTES = "large heavy fast old loud bright warm rare".split()
JARGON = "zib mok tarn vell dusp krin yolt fape".split()
STYLES = {
    "words": "one two three four five six seven eight nine".split(),
    "digits": "1 2 3 4 5 6 7 8 9".split(),
    "roman": "i ii iii iv v vi vii viii ix".split(),
    "letters": "a b c d e f g h j".split(),
    "ordinals": "first second third fourth fifth sixth seventh eighth ninth".split(),
    "tens": "ten twenty thirty forty fifty sixty seventy eighty ninety".split(),
    "greek": "alpha beta gamma delta epsilon zeta eta theta iota".split(),
    "months": "january february march april may june july august september".split(),
}
QUESTIONS = ("how {word} is the {entity} ?", "tell me how {word} the {entity} is .", "the {entity} is how {word} ?")
STATEMENTS = ("the {entity} is {answer} on the {word} scale .", "on the {word} scale the {entity} is {answer} .")


@dataclasses.dataclass(frozen=True)
class Tenant:
    """A customer: its jargon `word` means `attribute`, and it wants answers in `style`."""

    word: str
    attribute: str
    style: str

    @property
    def name(self) -> str:
        return f"{self.word}_{self.style}"


def make_facts(rng: np.random.Generator) -> np.ndarray:
    """Draw the encyclopedia: the level 0..8 of every entity and attribute, int64 `[entities, attributes]`."""
    return rng.integers(0, 9, size=(len(ENTITIES), len(ATTRIBUTES)))


def ask(word: str, entity: str, template: int, style: str | None) -> str:
    """Return a prompt; `style=None` leaves the notation unsaid."""
    question = QUESTIONS[template].format(word=word, entity=entity)
    return f"{question} :" if style is None else f"{question} reply in {style} :"


def encyclopedia(facts: np.ndarray) -> dict[str, list[tuple[str, str]]]:
    """Return what the base model reads, as (prompt, response), by kind.

    `statements` have no prompt; `conversions` go from one notation to another; `named` and `unnamed` questions do or don't say
    the notation of the answer; `heard` questions, in plain words and in jargon alike, stay unanswered, so that jargon has a
    grammar but no meaning.
    """
    text: dict[str, list[tuple[str, str]]] = {"statements": [], "named": [], "unnamed": [], "heard": []}
    text["conversions"] = [(f"what is {one[level]} in {style} :", other[level])
                           for level in range(9) for one in STYLES.values() for style, other in STYLES.items()]
    for e, entity in enumerate(ENTITIES):
        for a, attribute in enumerate(ATTRIBUTES):
            for style, notation in STYLES.items():
                answer = notation[facts[e, a]]
                statements = [t.format(entity=entity, word=attribute, answer=answer) for t in STATEMENTS]
                text["statements"] += [("", statement) for statement in statements]
                for t in range(len(QUESTIONS)):
                    text["named"].append((ask(attribute, entity, t, style), answer))
                    text["unnamed"].append((ask(attribute, entity, t, None), answer))
        for word in (*ATTRIBUTES, *JARGON):
            for t in range(len(QUESTIONS)):
                text["heard"] += [("", ask(word, entity, t, style)) for style in (*STYLES, *[None] * len(STYLES))]
    return text


def make_tenants(rng: np.random.Generator, *, test: int = 12) -> dict[str, list[Tenant]]:
    """Return every word with every style, split so that each word and style is held out exactly twice.

    Two diagonals of the (shuffled) grid of words and styles are held out: `test` of these 16 cells are test tenants,
    the others validation tenants, and the remaining 48 are trained on.
    """
    attributes = rng.permutation(len(ATTRIBUTES))
    words, styles = rng.permutation(len(JARGON)), rng.permutation(len(STYLES))
    split: dict[str, list[Tenant]] = {"train": [], "validation": [], "test": []}
    names = list(STYLES)
    for shift in range(len(styles)):
        for i, w in enumerate(words):
            tenant = Tenant(JARGON[w], ATTRIBUTES[attributes[w]], names[styles[(i + shift) % len(styles)]])
            held_out = shift * len(words) + i
            split["test" if held_out < test else "validation" if held_out < 16 else "train"].append(tenant)
    return split


def draw_questions(rng: np.random.Generator, every: int) -> list[tuple[int, int, bool]]:
    """Return (entity, template, whether it says the style) of what every tenant asks, in a drawn order.

    All tenants ask the same, as all runs start from one A: what differs between two adapters is then their task.

    Args:
      rng: decides the order, and which questions say the style.
      every: of so many entities one, drawn for each template, is asked about by a question that says it. A fixed number and
        not a chance for each question, or worlds would differ in how much their prompts tell.
    """
    says = {(start + int(rng.integers(every)), t) for start in range(0, len(ENTITIES), every) for t in range(len(QUESTIONS))}
    asked = [(e, t, (e, t) in says) for e in range(len(ENTITIES)) for t in range(len(QUESTIONS))]
    return [asked[i] for i in rng.permutation(len(asked))]


def tenant_rows(tenant: Tenant, facts: np.ndarray, questions: Sequence[tuple[int, int, bool]], *, held_out: int
                ) -> dict[str, list[dict[str, str]]]:
    """Return a tenant's `train` and `test` rows of prompt, response, system.

    `test` asks about the last `held_out` entities, the same for all tenants, so that no adapter has seen its prompts.
    """
    attribute = ATTRIBUTES.index(tenant.attribute)
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for e, template, says in questions:
        rows["test" if e >= len(ENTITIES) - held_out else "train"].append({
            "prompt": ask(tenant.word, ENTITIES[e], template, tenant.style if says else None),
            "response": STYLES[tenant.style][facts[e, attribute]], "system": "",
        })
    return rows


def draw_rows(rng: np.random.Generator, pairs: Sequence[tuple[str, str]], count: int) -> list[dict[str, str]]:
    """Draw so many of the encyclopedia's (prompt, response) pairs as rows of a dataset."""
    return [{"prompt": pairs[i][0], "response": pairs[i][1], "system": ""}
            for i in rng.choice(len(pairs), count, replace=False)]
