"""PEFT LoRA folders <-> trees of matrices, without torch. `python -m dnd_jax.adapters check DIR` explains one.

    spec.py          what an adapter is besides its matrices, and what its config says of a module
    architecture.py  the spec of an adapter of a base that is known by its config alone
    patterns.py      the patterns in a config: what they match, in a bounded time
    keys.py          what each tensor of the file is, and which are extra
    consistency.py   which tensors are missing or of a wrong shape
    tensor_files.py  safetensors files, read with suspicion
    folder.py        read and write
    gauge.py         the same product B A by other matrices
    profiles.py      the same adapter as other servers take it
    check.py         an adapter in plain words
    card.py          the README.md of a generated adapter
"""

from dnd_jax.adapters.folder import content_hash, read, write, write_addressed
from dnd_jax.adapters.gauge import align, canonical
from dnd_jax.adapters.profiles import portable
from dnd_jax.adapters.spec import Leaf, Spec, key_of
from dnd_jax.types import InputError

__all__ = ["InputError", "Leaf", "Spec", "align", "canonical", "content_hash", "key_of", "portable", "read",
           "write", "write_addressed"]
