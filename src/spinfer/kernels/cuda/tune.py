"""Measuring, on this GPU, which way of multiplying with a weight is the fastest: `SPINFER_AUTOTUNE=1`.

The selection's choices are estimates, most of them of an H200. What is measured here is kept beside the compiled
kernels, for each kind of weight, and used from then on wherever it beats the choice by more than noise.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spinfer import env
from spinfer.errors import SpinferError
from spinfer.kernels.cuda.ahead import COMPILER
from spinfer.kernels.cuda.compile import source_digest, write_whole
from spinfer.kernels.cuda.configs import DeviceTraits
from spinfer.kernels.cuda.layout import ChunkGrid
from spinfer.kernels.cuda.passes import Run, run_of
from spinfer.kernels.cuda.runtime import device_traits
from spinfer.kernels.cuda.select import TUNED_TOKENS, alternatives, choose
from spinfer.kernels.cuda.sources import sources_of
from spinfer.kernels.cuda.timing import GraphTimer, cold_copies

_BETTER = 0.97
"""What a measurement must take, over the choice's, to be believed: medians of the same call differ by 1 to 2 %."""

_HOPELESS = 3.0
"""How much longer than the fastest a first trial may take; what takes longer is not measured. Of short calls a trial
measures how fast the host launches: with 1.5 ranges were left out in 17 of 384 cases of up to 32 tokens."""

_STEP = 20
"""Densities are told apart in so many steps: a model's layers differ by a percent or two."""


@dataclass(frozen=True)
class Kind:
    """Weights that are alike for the kernels.

    Attributes:
        shape: (M, K).
        density: nonzeros, in steps of 1 / _STEP.
        dtype: of values and x.
        ranges: by cost, as of `choose`.
        index: of the device.
        dense: whether they have a dense copy.
    """

    shape: tuple[int, int]
    density: int
    dtype: torch.dtype
    ranges: int
    index: int
    dense: bool

    @classmethod
    def of(
        cls, shape: tuple[int, int], nnz: int, dtype: torch.dtype, ranges: int, index: int, dense: bool = False
    ) -> Kind:
        """The kind of a weight with so many nonzeros."""
        return cls(shape, round(_STEP * nnz / (shape[0] * shape[1])), dtype, ranges, index, dense)

    @property
    def grid(self) -> ChunkGrid:
        """How such weights are cut."""
        return ChunkGrid.of(*self.shape)

    @property
    def nnz(self) -> int:
        """Nonzeros of a typical one."""
        return self.density * self.shape[0] * self.shape[1] // _STEP

    @property
    def path(self) -> Path:
        """Where its measurements are kept: another file for other kernels, another GPU, another CUDA."""
        properties = torch.cuda.get_device_properties(self.index)
        traits = device_traits(self.index)
        facts = [properties.name, *traits.capability, traits.sm_count, torch.version.cuda, str(self.dtype), self.ranges]
        facts += ["dense"] if self.dense else []
        key = hashlib.sha256(source_digest() + json.dumps([*facts, *self.shape, self.density]).encode()).hexdigest()
        name = f"tuned-{self.shape[0]}x{self.shape[1]}-{100 * self.density // _STEP}-{key[:32]}.json"
        return env.cache_directory() / name


_known: dict[Kind, Mapping[int, str]] = {}
_tried: set[Kind] = set()


def tuned(kind: Kind) -> Mapping[int, str]:
    """What is known to be faster than the selection's choices, as `choose` takes it."""
    if kind not in _known:
        _known[kind] = better(kind, _kept(kind.path), device_traits(kind.index))
    return _known[kind]


def _kept(path: Path) -> dict[int, dict[str, float]]:
    """Microseconds by tokens and name; nothing where there is no file, or another than `tune` writes."""
    try:
        rows = json.loads(path.read_text())["us"]
        us = {int(tokens): {name: float(each) for name, each in row.items()} for tokens, row in rows.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    return {tokens: row for tokens, row in us.items() if tokens in TUNED_TOKENS}


def better(kind: Kind, us: Mapping[int, Mapping[str, float]], traits: DeviceTraits) -> dict[int, str]:
    """Names of the alternatives that take less than the choice, by more than noise.

    Args:
        kind: of weight.
        us: microseconds by tokens and name.
        traits: of the device.
    """
    found = {}
    for tokens, row in us.items():
        chosen = name_of_choice(kind, tokens, traits)
        best = min(row, key=row.__getitem__, default=chosen)
        if chosen in row and row[best] < _BETTER * row[chosen]:
            found[tokens] = best
    return found


def name_of_choice(kind: Kind, tokens: int, traits: DeviceTraits) -> str:
    """Which of the alternatives the selection takes by itself."""
    plan = choose(kind.grid, kind.nnz, tokens, True, traits, kind.ranges, kind.dense)
    every = alternatives(kind.grid, kind.nnz, tokens, traits, kind.ranges, kind.dense)
    return next(name for name, other in every.items() if other == plan)


def tune(kind: Kind, parts: tuple[Tensor, ...]) -> bool:
    """Measure a kind of weight, if that has not been done on this machine, and keep the result; says so on stderr.

    A GPU without the memory for it keeps the selection's choices, with a warning.

    Args:
        kind: of weight.
        parts: of one such weight.

    Returns:
        Whether it was measured now.
    """
    path = kind.path
    if kind in _tried or path.is_file():
        return False
    _tried.add(kind)
    began = time.monotonic()
    what = f"{kind.shape[0]} x {kind.shape[1]} at {100 - 100 * kind.density // _STEP} % zeros"
    print(f"spinfer: measuring kernels for {what} ...", file=sys.stderr, flush=True)
    try:
        with torch.cuda.device(kind.index):
            us = measure(kind, parts, TUNED_TOKENS, _timer(kind.index))
    except (SpinferError, torch.OutOfMemoryError) as error:
        warnings.warn(f"kernels for {what} were not measured ({error}); the built-in choices are used", stacklevel=2)
        return False
    finally:
        torch.cuda.empty_cache()
    write_whole(path, json.dumps({"device": torch.cuda.get_device_name(kind.index), "us": us}, indent=1).encode())
    _known[kind] = better(kind, us, device_traits(kind.index))
    print(
        f"spinfer: {what}: {len(us)} numbers of tokens in {time.monotonic() - began:.0f} s, "
        f"another kernel than chosen is faster for {len(_known[kind])}",
        file=sys.stderr,
        flush=True,
    )
    return True


@functools.cache
def _timer(index: int) -> GraphTimer:
    """One a device: cuBLAS keeps 64 MB for each stream that it has run on."""
    return GraphTimer()


def measure(
    kind: Kind, parts: tuple[Tensor, ...], tokens: Iterable[int], timer: GraphTimer
) -> dict[int, dict[str, float]]:
    """Microseconds of the choice and what comes near it, by tokens and name; cold caches, each behind a small kernel.

    Args:
        kind: of weight.
        parts: of one such weight.
        tokens: numbers of them to measure.
        timer: how.
    """
    traits, device = device_traits(kind.index), parts[0].device
    plans = {count: alternatives(kind.grid, kind.nnz, count, traits, kind.ranges, kind.dense) for count in tokens}
    COMPILER.submit(
        source
        for by_name in plans.values()
        for plan in by_name.values()
        for source in sources_of(kind.grid, plan, kind.dtype, traits.capability)
    )
    COMPILER.wait()
    nbytes = sum(part.nbytes for part in parts)
    copies = [parts, *(tuple(part.clone() for part in parts) for _ in range(cold_copies(nbytes) - 1))]
    before = torch.zeros(1, device=device)
    out_features, in_features = kind.shape
    found = {}
    for count, by_name in plans.items():
        x = torch.randn(count, in_features, dtype=kind.dtype, device=device)
        y = torch.empty(count, out_features, dtype=kind.dtype, device=device)

        def call(run: Run, copy: tuple[Tensor, ...], x: Tensor = x, y: Tensor = y) -> None:
            before.add_(1)
            run(x, x.shape[0], x.stride(0), copy, None, y)

        runs = {name: run_of(plan, kind.grid, kind.dtype, device) for name, plan in by_name.items()}
        prepared = {
            name: timer.prepare([functools.partial(call, run, copy) for copy in copies]) for name, run in runs.items()
        }
        limit = _HOPELESS * min(calls.trial_us for calls in prepared.values())
        chosen = name_of_choice(kind, count, traits)
        kept = {name: calls for name, calls in prepared.items() if name == chosen or calls.trial_us <= limit}
        timings = timer.interleaved(list(kept.values()))
        found[count] = {name: round(each.us, 2) for name, each in zip(kept, timings, strict=True)}
    return found
