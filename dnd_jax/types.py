"""Shape aliases and the one error for bad input.

Letters: B batch, N prompts, L token positions, C channels (the condition); T weight tokens of H rows and W columns;
K checkpoints of one task, P prompts of one task.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, PyTree

Condition = Float[jax.Array | np.ndarray, "B N L C"]
Tokens = Float[jax.Array | np.ndarray, "B T H W"]
Block = Float[jax.Array, "B N L C"]
TokenArray = Float[np.ndarray, "T H W"]
TokenMask = Bool[np.ndarray, "T H W"]
Tree = PyTree[np.ndarray]
Params = Mapping[str, Any]


class InputError(ValueError):
    """A file, config or argument that can't be used; its one-line message names the place and both values."""
