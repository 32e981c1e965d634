"""Which Linears are compressed: module names against patterns."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

from spinfer.errors import CheckpointError

REGEX_PREFIX = "re:"


def _compile(pattern: str) -> re.Pattern[str]:
    if not pattern.startswith(REGEX_PREFIX):
        return re.compile(fnmatch.translate(pattern))
    try:
        return re.compile(pattern.removeprefix(REGEX_PREFIX))
    except re.error as error:
        raise CheckpointError(f"pattern {pattern!r} is not a regular expression: {error}") from error


class Selection:
    """Include and ignore patterns: shell-style (`*.mlp.*`), or `re:` and a regular expression that must match whole."""

    def __init__(self, names: Iterable[str], include: Sequence[str], ignore: Sequence[str]) -> None:
        """Compile the patterns; `names` are all that a pattern may be meant for.

        Raises:
            CheckpointError: a malformed pattern, or one that matches no name (most likely a slip).
        """
        self._include = {pattern: _compile(pattern) for pattern in include}
        self._ignore = {pattern: _compile(pattern) for pattern in ignore}
        known = list(names)
        for pattern, compiled in {**self._include, **self._ignore}.items():
            if not any(compiled.fullmatch(name) for name in known):
                examples = ", ".join(known[:3])
                raise CheckpointError(
                    f"pattern {pattern!r} matches no Linear of the model; its names are {examples}, …"
                )

    def refusal(self, name: str) -> str | None:
        """Why the patterns leave a module dense, or None where they do not."""
        for pattern, compiled in self._ignore.items():
            if compiled.fullmatch(name):
                return f"ignored by pattern {pattern!r}"
        if self._include and not any(compiled.fullmatch(name) for compiled in self._include.values()):
            return "not among the included patterns"
        return None
