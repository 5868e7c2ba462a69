"""Hashes of a folder's files, in a file of it: bytes that changed later are noticed before they are used.

    folder/sha256.json      {"state/manifest.ocdbt": "5f70bf18...", ...}
"""

import json
import pathlib

from dnd_jax import files

NAME = "sha256.json"


def write(folder: pathlib.Path) -> None:
    """Record every file below a folder, hidden ones excepted."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files.write_json(folder / NAME, {
        name: files.sha256_file(path) for name, path in found.items() if name != NAME and not path.name.startswith(".")})


def renew(folder: pathlib.Path, name: str) -> None:
    """Record one file anew, in a folder that has a record."""
    if (folder / NAME).exists():
        known = json.loads((folder / NAME).read_bytes())
        files.write_json(folder / NAME, known | {name: files.sha256_file(folder / name)})


def digest(folder: pathlib.Path, without: str) -> str | None:
    """Return one hash of what a folder's record says of all files but one; None without a record."""
    if not (folder / NAME).exists():
        return None
    known = files.read_json(folder / NAME)
    return files.sha256_text(json.dumps(sorted(item for item in known.items() if item[0] != without)))


def fault(folder: pathlib.Path, below: str = "") -> str | None:
    """Return what is wrong with the files whose names start with `below`: missing or changed since they were recorded.

    A folder without a record, whose writer was killed before it made one, has no fault that could be known.

    Raises:
      OSError: a file that is there and can't be read, which says nothing about its bytes.
    """
    try:
        known = json.loads((folder / NAME).read_bytes())
        wanted = {name: str(expected) for name, expected in known.items() if name.startswith(below)}
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError) as error:
        return f"{NAME}: not a JSON object of hashes: {error}"
    for name, expected in wanted.items():
        try:
            found = files.sha256_file(folder / name)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
            return f"{name}: no such file, {NAME} lists it"
        if found != expected:
            return f"{name}: sha256 is {found[:12]}..., {NAME} says {expected[:12]}..."
    return None
