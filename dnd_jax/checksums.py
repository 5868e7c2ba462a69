"""Hashes of a folder's files, in a file of it: bytes that changed later are noticed before they are used.

    folder/sha256.json      {"state/manifest.ocdbt": "5f70bf18...", ...}
"""

import pathlib

from dnd_jax import files
from dnd_jax.types import InputError

NAME = "sha256.json"


def write(folder: pathlib.Path) -> None:
    """Record every file below a folder, hidden ones excepted."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files.write_json(folder / NAME, {
        name: files.sha256_file(path) for name, path in found.items() if name != NAME and not path.name.startswith(".")})


def fault(folder: pathlib.Path, below: str = "") -> str | None:
    """Return what is wrong with the files whose names start with `below`: missing or changed since they were recorded.

    A folder without a record, whose writer was killed before it made one, has no fault that could be known.
    """
    try:
        known = files.read_json(folder / NAME) if (folder / NAME).exists() else {}
        for name, expected in known.items():
            if name.startswith(below) and (found := files.sha256_file(folder / name)) != expected:
                return f"{name}: sha256 is {found[:12]}..., {NAME} says {str(expected)[:12]}..."
    except (InputError, AttributeError, TypeError) as error:
        return f"{NAME}: {error}"
    except OSError as error:
        return f"{name}: {error.strerror}, {NAME} lists it"
    return None
