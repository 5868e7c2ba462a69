"""Images of rows for a vision-language base of Qwen's kind. Imports torch, transformers and PIL lazily.

A picture is a run of image tokens in the prompt, one for each `merge_size`^2 patches, and its patches are a model input. The
processor's part for videos, which needs torchvision, is not loaded.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from dnd_jax.prompts import messages
from dnd_jax.sources import PLACE, Row
from dnd_jax.types import InputError


class Reader:
    """Turns the images of rows into tokens and model inputs; loads them when they are asked for, not before."""

    def __init__(self, base: str, tokenizer: Any):
        """Load the image processor of a base model.

        Raises:
          InputError: a base without vision, or without a chat template that says where images go.
        """
        from transformers import AutoConfig, AutoImageProcessor

        config = AutoConfig.from_pretrained(base)
        self.token = getattr(config, "image_token_id", None)
        if not hasattr(config, "vision_config") or self.token is None:
            raise InputError(f"{base}: takes text only (no vision_config with an image_token_id), but a row has images")
        if not tokenizer.chat_template:
            raise InputError(f"{base}: its tokenizer has no chat template, which says where the images of a row go")
        try:
            self._processor: Any = AutoImageProcessor.from_pretrained(base, backend="pil")
        except (OSError, ValueError) as error:
            raise InputError(f"{base}: no image processor: {str(error).splitlines()[0]}") from error
        self._tokenizer = tokenizer

    def prompt_ids(self, row: Row) -> list[int]:
        """Return the ids of a prompt through the chat template, every image as many tokens as it has merged patches.

        Raises:
          InputError: an image that can't be read, or another number of places in the text than of images.
        """
        ids = self._tokenizer.apply_chat_template(messages(row, content(row)), add_generation_prompt=True, return_dict=False)
        counts = [self._count(image) for image in row.images]
        if ids.count(self.token) != len(counts):
            raise InputError(f"the chat template gives {ids.count(self.token)} image tokens for {len(counts)} images: "
                             f"{row.prompt[:60]!r}")
        left = iter(counts)
        return [token for one in ids for token in [one] * (next(left) if one == self.token else 1)]

    def _count(self, image: Any) -> int:
        with opened(image) as found:
            width, height = found.size
        return self._processor.get_number_of_image_patches(height, width) // self._processor.merge_size**2

    def inputs(self, images: Sequence[Any]) -> dict[str, Any]:
        """Return tensors of images: their patches one after the other, and every image's grid `[time, height, width]`."""
        import torch

        pictures = []
        for image in images:
            with opened(image) as file:
                pictures.append(file.convert("RGB"))
        found = self._processor(pictures, return_tensors="np")
        return {name: torch.from_numpy(found[name]) for name in ("pixel_values", "image_grid_thw")}


def content(row: Row) -> list[dict[str, str]]:
    """Return a chat message's parts: text, and images where the prompt has their places, or before it if it has none."""
    texts = row.prompt.split(PLACE)
    if len(texts) == 1:
        return [*({"type": "image"} for _ in row.images), {"type": "text", "text": row.prompt}]
    if len(texts) - 1 != len(row.images):
        raise InputError(f"a prompt has {len(texts) - 1} places {PLACE} for {len(row.images)} images: {row.prompt[:60]!r}")
    parts = [{"type": "text", "text": texts[0]}]
    for text in texts[1:]:
        parts += [{"type": "image"}, {"type": "text", "text": text}]
    return [part for part in parts if part.get("text") != ""]


@contextlib.contextmanager
def opened(image: Any) -> Iterator[Any]:
    """Yield an image by PIL, of a path with its pixels still in the file, or as it was decoded.

    Raises:
      InputError: a path that can't be read as an image.
    """
    from PIL import Image

    if not isinstance(image, str):
        yield image
        return
    try:
        with Image.open(image) as found:
            yield found
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{image}: {error}") from error
