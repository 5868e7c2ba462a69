"""How answers are scored: see `evaluate`."""

from dnd_jax.scoring.model import Model, exact_match, greedy

__all__ = ["Model", "exact_match", "greedy"]
