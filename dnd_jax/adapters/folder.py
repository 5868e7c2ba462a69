"""A PEFT LoRA folder <-> (tree, spec).

The tree holds what a decoder generates, the matrices A `[r, in]` and B `[out, r]` of every adapted linear layer:

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight
        <->  tree["model"]["layers"]["3"]["self_attn"]["q_proj"]["lora_A"]

The spec holds all the rest of the folder, so that writing gives back the same tensors and an equal config.
"""

import concurrent.futures
import functools
import json
import pathlib
import re
from typing import Any

import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from dnd_jax import files, folders
from dnd_jax.adapters import keys
from dnd_jax.adapters.spec import PREFIX, Leaf, Spec, check_config, key_of
from dnd_jax.adapters.tensor_files import TensorFile, check_finite, check_values, open_regular
from dnd_jax.types import InputError, Tree

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MAX_CONFIG_BYTES = 4 * 2**20
MAX_CONFIG_VALUES = 100_000


def read(folder: files.PathLike) -> tuple[Tree, Spec]:
    """Read a PEFT LoRA folder.

    Returns:
      The tree of A and B matrices in the dtypes of the file, and the spec.

    Raises:
      InputError: a missing or malformed file, one outside the folder, an adapter that isn't LoRA, a tensor that is missing,
        extra, of a wrong shape or not finite; the message names file and key.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    path = folder / TENSORS
    if not path.exists() and (folder / PICKLE).exists():
        raise InputError(f"{folder / PICKLE}: a pickle, which can run any code, is never loaded; save the adapter as {TENSORS}")
    _check_inside(path, folder)
    with TensorFile(path) as file:
        try:
            kinds = keys.check_keys(file.shapes, config)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        tensors = file.read()
    flat, carried = {}, {}
    for key, value in tensors.items():
        if kinds[key] == keys.MATRIX and value.dtype.kind in "biu":
            raise InputError(f"{path}: {key} is of {value.dtype.name}, expected floating point numbers")
        if kinds[key] == keys.MATRIX and value.ndim == 2:
            flat[key.removeprefix(PREFIX).removesuffix(".weight").replace(".", "/")] = value
        else:
            carried[key] = value
    return unflatten_dict(flat, sep="/"), Spec(config, {p: Leaf(v.shape, _name(v.dtype)) for p, v in flat.items()}, carried)


@functools.cache
def _name(dtype: np.dtype) -> str:
    return dtype.name  # NumPy works it out anew each time, which for hundreds of matrices takes a millisecond


def read_config(folder: files.PathLike) -> dict[str, Any]:
    """Return a folder's `adapter_config.json`, checked; raises InputError that names the file."""
    path = pathlib.Path(folder) / CONFIG
    _check_inside(path, pathlib.Path(folder))
    with open_regular(path) as file:
        text = file.read(MAX_CONFIG_BYTES + 1)
    if len(text) > MAX_CONFIG_BYTES:
        raise InputError(f"{path}: more than {MAX_CONFIG_BYTES} bytes")
    check_values(text, MAX_CONFIG_VALUES, str(path))
    try:
        config = json.loads(text, object_pairs_hook=files.unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {str(error)[:200]}") from error
    try:
        check_config(config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return config


def write(folder: files.PathLike, tree: Tree, spec: Spec) -> None:
    """Write a PEFT LoRA folder that `read` gives back as it is; the tree is cast to the spec's dtypes.

    Replaces an adapter, but nothing beside one, as a trainer's checkpoint has it.

    Raises:
      InputError: a tree whose paths or shapes are not the spec's, a value that isn't finite, or a folder that holds something
        else; nothing is written.
    """
    tensors = _tensors(tree, spec, str(folder))
    with folders.atomic_folder(folder, CONFIG, f"{re.escape(TENSORS)}|README.md") as temporary:
        _write_files(temporary, tensors, spec, str(folder))


def write_addressed(root: files.PathLike, tree: Tree, spec: Spec, card: str | None = None) -> pathlib.Path:
    """Write to `root/<hash of config and tensors>` and return that folder; one that is there already is left as it is.

    Args:
      root: folder of adapters.
      tree: as for `write`.
      spec: as for `write`.
      card: text of the folder's README.md; not part of the hash.
    """
    root = pathlib.Path(root)
    tensors = _tensors(tree, spec, str(root))
    with folders.temporary_folder(root / "adapter") as temporary:
        _write_files(temporary, tensors, spec, str(root))
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")
        final = root / content_hash(temporary)
        folders.publish_new(temporary, final)
    if content_hash(final) != final.name:
        raise InputError(f"{final}: its content has hash {content_hash(final)}; move it away")
    return final


def content_hash(folder: files.PathLike) -> str:
    """Return 16 hexadecimal digits of the SHA-256 over names and bytes of a folder's config and tensors."""
    return files.sha256_files(pathlib.Path(folder) / name for name in (CONFIG, TENSORS))[:16]


def _tensors(tree: Tree, spec: Spec, where: str) -> dict[str, np.ndarray]:
    """Return all tensors of the file by key, in their dtypes."""
    flat = flatten_dict(tree, sep="/")
    keys.check_matches(flat, spec, where)
    tensors = dict(spec.carried)
    with np.errstate(over="ignore"):  # what overflows is found by the check for finite values
        for path, leaf in spec.leaves.items():
            tensors[key_of(path)] = np.ascontiguousarray(np.asarray(flat[path]).astype(leaf.dtype, copy=False))
    return tensors


def _write_files(folder: pathlib.Path, tensors: dict[str, np.ndarray], spec: Spec, where: str) -> None:
    """Write config and tensors; raise InputError, after writing, if a value isn't finite."""
    sets = {k: sorted(v) for k, v in spec.config.items() if k in ("target_modules", "exclude_modules") and isinstance(v, list)}
    (folder / CONFIG).write_text(json.dumps(spec.config | sets, indent=2, sort_keys=True), encoding="utf-8")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # values are checked while the disk is at work
        checks = [pool.submit(check_finite, value, f"{where}: {key}") for key, value in tensors.items()]
        safetensors.numpy.save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        files.sync(folder / TENSORS)
    for check in checks:
        check.result()


def _check_inside(path: pathlib.Path, folder: pathlib.Path) -> None:
    """Raise InputError at a link that leaves the folder, except to the blobs of the hub cache that the folder lies in."""
    try:
        real, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # the latter at links in a circle
        raise InputError(f"{path}: {error}") from error
    allowed = [home] + ([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])
    if not any(real.is_relative_to(place) for place in allowed):
        raise InputError(f"{path}: links to {real}, outside the folder")
