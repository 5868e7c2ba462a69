"""Frozen text encoders: prompts to conditions, the last hidden state of every token. Imports torch lazily."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from dnd_jax.types import InputError


class SentenceEncoder:
    """A sentence-transformers folder or hub name, such as `all-MiniLM-L12-v2`, read token by token.

    Prompts are padded and cut to `length` positions; the hidden states of padding are part of the condition, as
    published. The same prompt gives the same condition whatever its batch, because every batch has the same shape.
    """

    batch_size = 64

    def __init__(self, name: str, length: int):
        import torch
        from sentence_transformers import SentenceTransformer

        try:
            model = SentenceTransformer(name, device="cuda" if torch.cuda.is_available() else "cpu")
        except (OSError, ValueError) as error:
            raise InputError(f"encoder {name}: {str(error).splitlines()[0]}") from error
        self.name, self.length = name, length
        first: Any = model[0]
        self._transformer: Any = first.auto_model.eval()
        self._tokenizer: Any = model.tokenizer
        limit = self._transformer.config.max_position_embeddings
        if length > limit:
            raise InputError(f"encoder {name}: length is {length}, the model has {limit} positions")

    @property
    def width(self) -> int:
        """Channels C of a condition."""
        return self._transformer.config.hidden_size

    def __call__(self, prompts: Sequence[str]) -> Float[np.ndarray, "P L C"]:
        """Encode prompts to float16 `[P, length, width]`."""
        return np.concatenate([self._encode(prompts[i : i + self.batch_size])
                               for i in range(0, len(prompts), self.batch_size)])

    def _encode(self, prompts: Sequence[str]) -> np.ndarray:
        import torch

        filled = [*prompts, *[""] * (self.batch_size - len(prompts))]
        inputs = self._tokenizer(filled, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt")
        with torch.inference_mode():
            hidden = self._transformer(**inputs.to(self._transformer.device)).last_hidden_state
        return hidden[: len(prompts)].to(torch.float16).cpu().numpy()
