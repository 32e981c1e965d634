"""N:M patterns: how many of every few weights of a row may stay."""

from __future__ import annotations

from dataclasses import dataclass

from spinfer.errors import SpinferError


@dataclass(frozen=True)
class Pattern:
    """At most `kept` nonzeros in every `group` consecutive weights of a row (2:4 is what sparse Tensor Cores take).

    Attributes:
        kept: N, at least 1.
        group: M, more than N.
    """

    kept: int
    group: int

    def __post_init__(self) -> None:
        if not 0 < self.kept < self.group:
            raise SpinferError(f"pattern {self} keeps {self.kept} of {self.group}; expected N:M with 0 < N < M")

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read `N:M`.

        Raises:
            SpinferError: anything else.
        """
        kept, colon, group = text.partition(":")
        if not (colon and kept.isdecimal() and group.isdecimal()):
            raise SpinferError(f"pattern {text!r} is not of the form N:M, as in 2:4")
        return cls(int(kept), int(group))

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"

    @property
    def sparsity(self) -> float:
        """Share of zeros that it asks for."""
        return 1 - self.kept / self.group
