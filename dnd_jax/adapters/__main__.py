"""python -m dnd_jax.adapters check DIR: say what an adapter is; exit status 1 if it is unsound."""

from typing import Any

from dnd_jax import cli
from dnd_jax.adapters import check
from dnd_jax.types import InputError


def main(args: Any, *words: str) -> None:
    if len(words) != 2 or words[0] != "check":
        raise InputError(f"command line: {' '.join(words) or 'nothing'!r} given, expected 'check DIR'")
    print(check.explain(words[1]))


if __name__ == "__main__":
    cli.run(main, lambda: None, words=True)
