"""Frozen text encoders: prompts to conditions, one hidden state per token. Imports torch lazily.

The hidden states of padding are part of a condition, as published. The same prompt gives the same condition whatever its
batch, because every batch has the same shape.
"""

import abc
import inspect
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError

from dnd_jax import cli, files
from dnd_jax.base_models import complete, hub_commit
from dnd_jax.types import InputError

LOADED = (".json", ".jinja", ".model", ".txt", ".safetensors", ".bin")
NUMBER = re.compile(r"-?\d*\.?\d+(e-?\d+)?")


class Encoder(Protocol):
    """Prompts to a condition, float16 `[P, L, C]`.

    Attributes:
      length: of the prompts, in tokens; what a prompt has beyond it is not read.
    """

    length: int

    @property
    def width(self) -> int:
        """Channels C of a condition."""
        ...

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Return each prompt's tokens, also beyond `length`."""
        ...

    def __call__(self, prompts: Sequence[str]) -> Float[np.ndarray, "P L C"]: ...


def make(settings: Mapping[str, Any]) -> Encoder:
    """Make the encoder of a config or checkpoint: `kind` (by default a sentence encoder), `name`, `length`, and its options."""
    kind, options = check(settings)
    return KINDS[kind](**options)


def check(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return kind and options of an encoder; raise InputError at an unknown kind, and at options that it doesn't take."""
    options = dict(settings)
    kind = options.pop("kind", "sentence")
    if kind not in KINDS:
        raise InputError(f"config.encoder.kind is {kind!r}, expected one of {sorted(KINDS)}")
    known = inspect.signature(KINDS[kind]).parameters
    missing = [name for name, field in known.items() if field.default is field.empty and name not in options]
    if missing or (unknown := sorted(options.keys() - known)):
        raise InputError(f"config.encoder: {f'{missing} are missing' if missing else f'{unknown} are unknown'} "
                         f"for kind {kind!r}, which takes {', '.join(known)}")
    if not isinstance(options["length"], int) or options["length"] < 1:
        raise InputError(f"config.encoder.length is {options['length']!r}, expected a number of positions, at least 1")
    return kind, options


def identity(settings: Mapping[str, Any]) -> str | None:
    """Return a hash of an encoder's files, or of a hub repository `commit` and its own, None where that can't be told.

    Of a folder count weights, words and settings in the formats that are loaded, and no hidden files.
    """
    path = pathlib.Path(settings["name"])
    if path.is_file():
        return files.sha256_file(path)
    if path.is_dir():
        found = {str(p.relative_to(path)): p for p in sorted(path.rglob("*")) if p.is_file() and p.suffix in LOADED}
        return files.sha256_text("".join(f"{name}\0{files.sha256_file(p)}\n" for name, p in found.items()
                                         if not name.startswith(".") and "/." not in name))
    name = settings["name"]  # sentence-transformers adds the name of its own organisation
    commit = hub_commit(name) or (hub_commit(f"sentence-transformers/{name}") if "/" not in name else None)
    return f"commit {commit}" if commit else None


def of_decoder(about: Mapping[str, Any]) -> Encoder:
    """Make the encoder of the conditions that a decoder was trained on, from what its checkpoint says.

    Prints a warning if the hub has another commit now, which may have changed the repository's README only.

    Raises:
      InputError: its files are others by now, or its width.
    """
    settings = about["encoder"]
    encoder = make(settings)
    if (width := about["features"][0][-1]) != encoder.width:
        raise InputError(f"encoder {settings['name']}: has {encoder.width} channels, the decoder takes {width}")
    check_same(about)
    return encoder


def describe_cut(encoder: Encoder, texts: Sequence[str]) -> str:
    """Return how many texts an encoder cuts, in words; empty if none."""
    cut = sum(count > encoder.length for count in encoder.count_tokens(texts))
    return f"{cut} of {len(texts)} texts have more than the encoder's {encoder.length} tokens, and are cut there" if cut else ""


def check_same(about: Mapping[str, Any]) -> None:
    """Raise InputError if the files of a decoder's encoder have changed since; another commit on the hub is only said."""
    name, known, found = about["encoder"]["name"], about["encoder_sha256"], identity(about["encoder"])
    if None in (known, found) or found == known:
        return
    if not str(found).startswith("commit "):
        raise InputError(f"encoder {name}: its files have sha256 {str(found)[:12]}..., those of the decoder's conditions had "
                         f"{str(known)[:12]}...")
    cli.say(f"warning: encoder {name} is of {found}, that of the decoder's conditions was {known}")


class _Transformer(abc.ABC):
    """What the encoders from transformers share: batches of one shape, on the best device, as float16."""

    batch_size = 64

    def __init__(self, name: str, length: int, mask_padding: bool = False, pooled: bool = False):
        """Load.

        Args:
          name: folder or hub name.
          length: positions L; prompts are padded and cut to it.
          mask_padding: put zeros where a prompt has ended. Beyond the paper.
          pooled: mean over the positions of a prompt, `[P, 1, C]`. Beyond the paper.
        """
        import torch
        from huggingface_hub.errors import StrictDataclassError

        self.name, self.length, self.mask_padding, self.pooled = name, length, mask_padding, pooled
        try:
            model, self._tokenizer = self._load(name)
        except InputError:
            raise
        except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
            raise InputError(f"encoder {name}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model: Any = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    @abc.abstractmethod
    def _load(self, name: str) -> tuple[Any, Any]:
        """Return the model and its tokenizer."""

    def _hidden(self, ids: Any, mask: Any) -> Any:
        return self._model(input_ids=ids, attention_mask=mask).last_hidden_state

    @property
    def width(self) -> int:
        return self._model.config.hidden_size

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._tokenizer(list(prompts), verbose=False).input_ids]

    def __call__(self, prompts: Sequence[str]) -> Float[np.ndarray, "P L C"]:
        return np.concatenate([self._encode(prompts[i : i + self.batch_size])
                               for i in range(0, len(prompts), self.batch_size)])

    def _encode(self, prompts: Sequence[str]) -> np.ndarray:
        import torch

        filled = [*prompts, *[""] * (self.batch_size - len(prompts))]
        inputs = self._tokenizer(filled, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt",
                                 padding_side="right").to(self._model.device)
        with torch.inference_mode():
            hidden = self._hidden(inputs.input_ids, inputs.attention_mask)
        weights = inputs.attention_mask[..., None].to(hidden.dtype)
        if self.mask_padding:
            hidden = hidden * weights
        if self.pooled:
            hidden = (hidden * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1)
        half = hidden[: len(prompts)].to(torch.float16)
        if not torch.isfinite(half).all():
            raise InputError(f"encoder {self.name}: a hidden state is {float(hidden.abs().max()):.3g}, float16 ends at 65504")
        return half.cpu().numpy()


class SentenceEncoder(_Transformer):
    """A sentence-transformers folder or hub name, such as `all-MiniLM-L12-v2`, read token by token.

    A length beyond the model's positions must be a multiple of them: the padded prompt is cut into windows, each encoded on its
    own, and they are laid end to end.
    """

    def _load(self, name: str) -> tuple[Any, Any]:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(name, device="cpu")
        first: Any = model[0]
        if not hasattr(first, "auto_model"):
            raise InputError(f"encoder {name}: begins with {type(first).__name__}, expected a transformer with a state per token")
        self._window = _positions(first.auto_model) or self.length
        if self.length > self._window and self.length % self._window:
            raise InputError(f"encoder {name}: length is {self.length}, expected at most {self._window} or a multiple of it")
        self.batch_size = max(1, self.batch_size // -(-self.length // self._window))  # as many windows at once as prompts
        tokenizer: Any = model.tokenizer
        tokenizer.model_max_length = max(self.length, self._window)  # longer prompts are cut here, not there
        return first.auto_model, tokenizer

    def _hidden(self, ids: Any, mask: Any) -> Any:
        if self.length <= self._window:
            return super()._hidden(ids, mask)
        batch, windows = len(ids), self.length // self._window
        ids, mask = (x.reshape(batch * windows, self._window) for x in (ids, mask))
        return super()._hidden(ids, mask).reshape(batch, self.length, -1)


def _positions(model: Any) -> int | None:
    """Return how many tokens a model has positions for, if that is limited; RoBERTa's kind leaves the first ones unused."""
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    if table is None or table.padding_idx is None:
        return getattr(model.config, "max_position_embeddings", None)
    return table.num_embeddings - table.padding_idx - 1


class T5Encoder(_Transformer):
    """The encoder half of a T5 model, such as `t5-base`."""

    def _load(self, name: str) -> tuple[Any, Any]:
        from transformers import AutoTokenizer, T5EncoderModel

        model: Any = T5EncoderModel.from_pretrained(name, output_loading_info=True)
        return complete(model, f"encoder {name}"), AutoTokenizer.from_pretrained(name)


class CausalEncoder(_Transformer):
    """Hidden states of a decoder-only model after the layer of index `layer`, such as `Qwen2.5-7B-Instruct` after 14."""

    def __init__(self, name: str, length: int, layer: int, mask_padding: bool = False, pooled: bool = False):
        self.layer = layer
        super().__init__(name, length, mask_padding, pooled)
        if not 0 <= layer < self._model.config.num_hidden_layers:
            raise InputError(f"encoder {name}: layer is {layer}, the model has {self._model.config.num_hidden_layers}")

    def _load(self, name: str) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer

        model = AutoModel.from_pretrained(name, dtype="auto", output_loading_info=True)
        return complete(model, f"encoder {name}"), AutoTokenizer.from_pretrained(name)

    def _hidden(self, ids: Any, mask: Any) -> Any:
        return self._model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[self.layer + 1]


class GloveEncoder:
    """Word vectors from a text file of `word value value ...` lines: ones for unknown words, zeros for padding.

    Words are runs of letters and digits and single other signs, in lower case.
    """

    def __init__(self, name: str, length: int):
        self.length = length
        path = pathlib.Path(name)
        self._vectors: dict[str, np.ndarray] = {}
        for number, line in enumerate(files.read_lines(path), 1):
            if not line:
                continue
            word, *values = line.rstrip().rsplit(" ", self.width if self._vectors else -1)  # some words have spaces
            expected = self.width if self._vectors else max(1, len(values))
            if len(values) != expected or (NUMBER.fullmatch(word.rpartition(" ")[2]) and " " in word):
                raise InputError(f"{path}: line {number} has {len(line.split(' ')) - 1} values, expected {expected}")
            try:
                self._vectors[word] = np.array(values, np.float32)
            except ValueError as error:
                raise InputError(f"{path}: line {number}: {error}") from error
            if not (np.abs(self._vectors[word]) <= np.finfo(np.float16).max).all():
                raise InputError(f"{path}: line {number}: a value of {word!r} isn't finite in float16, which ends at 65504")
        if not self._vectors:
            raise InputError(f"{path}: holds no vectors")

    @property
    def width(self) -> int:
        return len(next(iter(self._vectors.values())))

    def __call__(self, prompts: Sequence[str]) -> Float[np.ndarray, "P L C"]:
        condition = np.zeros((len(prompts), self.length, self.width), np.float16)
        unknown = np.ones(self.width, np.float32)
        for i, prompt in enumerate(prompts):
            for j, word in enumerate(self._words(prompt)[: self.length]):
                condition[i, j] = self._vectors.get(word, unknown)
        return condition

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        return [len(self._words(prompt)) for prompt in prompts]

    def _words(self, prompt: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", prompt.lower())


KINDS: dict[str, Callable[..., Encoder]] = {
    "sentence": SentenceEncoder, "t5": T5Encoder, "causal_lm": CausalEncoder, "glove": GloveEncoder,
}
