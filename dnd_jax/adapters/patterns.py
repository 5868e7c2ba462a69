"""The patterns in an adapter's config: what they match, as PEFT has it, and not for much longer than a fraction of a second."""

import functools
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

import regex

from dnd_jax.types import InputError

SECONDS = 0.3  # of this thread, for all of a config's patterns on all of its modules; a stranger's may take exponential time
SECONDS_EACH = 5e-5  # beside these, for each module: of experts there are tens of thousands
MAX_COMPARISONS = 2_000_000  # of plain names with modules; EVA writes one for each module
MAX_CHARACTERS = 5_000  # compiling takes up to 0.1 ms for each
PLAIN = re.compile(r"[\w.]+")
FIELDS = ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules")


def matches(pattern: str, name: str, seconds: float = SECONDS) -> bool:
    """Return whether the whole name matches a pattern from a config; raise InputError if that can't be said in time."""
    try:
        return _compile(pattern).fullmatch(name, timeout=max(seconds, 1e-6)) is not None
    except TimeoutError as error:
        raise InputError(f"pattern {pattern[:80]!r}: timed out, all have {SECONDS} seconds and {SECONDS_EACH} for each module"
                         ) from error


def value_of(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Return the value of the first pattern that a name ends with, counted from a dot, or the default."""
    return next((value for pattern, value in (patterns or {}).items() if _ends_with(name, pattern)), default)


def check(config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise InputError if a pattern of a config is malformed, or if all of them take too long on all names."""
    names = list(names)
    end = time.thread_time() + SECONDS + SECONDS_EACH * len(names)
    for field in FIELDS:
        value = config.get(field)
        listed = value if isinstance(value, dict) else [value] if isinstance(value, str) else []
        slow = [pattern for pattern in listed if not _is_plain(pattern)]
        if (length := sum(map(len, slow))) > MAX_CHARACTERS:
            raise InputError(f"the config's {field} holds patterns of {length} characters, at most {MAX_CHARACTERS}")
        if (count := len(listed) * len(names)) > MAX_COMPARISONS:
            raise InputError(f"the config's {field} holds {len(listed)} patterns for {len(names)} modules, {count} comparisons, "
                             f"at most {MAX_COMPARISONS}")
        for pattern in slow:
            try:
                for name in names:
                    _ends_with(name, pattern, end - time.thread_time())
            except InputError as error:
                raise InputError(f"the config's {field}: {error}") from error
            if time.thread_time() > end:
                raise InputError(f"the config's {field}: timed out, {len(slow)} patterns on {len(names)} modules")


def _ends_with(name: str, pattern: str, seconds: float = SECONDS) -> bool:
    if not _is_plain(pattern):
        return matches(rf"(.*\.)?({pattern})", name, seconds)
    if not name.endswith(pattern.rpartition(".")[2]):
        return False  # hundreds of names must be quick
    start = len(name) - len(pattern)  # of a plain name dots stand for any character
    return start >= 0 and name[start - 1 : start] in ("", ".") and all(
        p in (".", c) for p, c in zip(pattern, name[start:], strict=True))


@functools.lru_cache(maxsize=100_000)
def _is_plain(pattern: str) -> bool:
    return PLAIN.fullmatch(pattern) is not None


@functools.lru_cache(maxsize=256)
def _compile(pattern: str) -> regex.Pattern[str]:
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError) as error:
        raise InputError(f"pattern {pattern[:80]!r}: {error}") from error
