"""How answers are scored.

    kinds.py         what is asked and what counts, by kind of scoring
    model.py         a base with an adapter: greedy answers, samples, log-likelihoods
    choice.py, final_answer.py, code.py    what an answer says, and whether it is right
    sandbox.py       runs generated code, in `dnd_jax.jail`
    harness.py       the same as tasks of lm-evaluation-harness
"""

from dnd_jax.scoring.model import Model, exact_match, greedy

__all__ = ["Model", "exact_match", "greedy"]
