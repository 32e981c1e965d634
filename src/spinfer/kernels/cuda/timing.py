"""Times of GPU calls: replays of CUDA graphs over cold weights, several kinds of call in turn, medians."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

COLD_NBYTES = 240 << 20
"""Copies of a weight that calls rotate over: several times the L2 of any current GPU (50 MB on an H100)."""

_GRAPH_US = 1200.0
"""Length of a graph, about: the gap between two graphs is a few microseconds."""

_MOST_LAUNCHES = 96
_TRIAL_CALLS = 3
_LONG_GRAPH_US = 4000.0
_REPLAYS, _REPLAYS_OF_LONG = 7, 5

_WARM_UP_US = 10_000.0
"""Replays before those that count. While a weight is made the GPU waits for the host and its clocks come down: with one
replay of each the first case after that was up to 10 % slow on an H200."""

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call.

    Attributes:
        us: median over replays.
        spread: slowest replay less the fastest, over the median.
    """

    us: float
    spread: float


class Timer(Protocol):
    """How calls are timed: `GraphTimer`, or a stand-in where there is no GPU."""

    def prepare(self, calls: Sequence[Call]) -> Any:
        """Make calls ready to be timed; they differ only in which copy of the weight they read, and run in turn."""

    def interleaved(self, prepared: Sequence[Any]) -> list[Timing]:
        """Time what `prepare` returned, in turn."""


def cold_copies(nbytes: int) -> int:
    """How many copies of a weight to rotate over, so that each has left the L2 when it is read again."""
    return max(1, -(-COLD_NBYTES // nbytes))


def launches_of(copies: int, us: float) -> int:
    """Calls in one graph: whole turns through the copies, and about `_GRAPH_US` long if a call takes `us`."""
    wanted = min(_MOST_LAUNCHES, max(1, math.ceil(_GRAPH_US / us)))
    return -(-wanted // copies) * copies


@dataclass(frozen=True)
class CapturedCalls:
    """A graph of `launches` calls that takes about `us` microseconds.

    It holds the calls: a graph does not keep alive what it reads and writes.
    """

    graph: torch.cuda.CUDAGraph
    launches: int
    us: float
    calls: tuple[Call, ...]

    @property
    def trial_us(self) -> float:
        """About what one call takes."""
        return self.us / self.launches


class GraphTimer:
    """Times CUDA graphs on the current device."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def prepare(self, calls: Sequence[Call]) -> CapturedCalls:
        """Warm up and capture."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            calls[0]()
            start, end = _events()
            self._stream.synchronize()
            start.record()
            for i in range(_TRIAL_CALLS):
                calls[i % len(calls)]()
            end.record()
            self._stream.synchronize()
            us = start.elapsed_time(end) * 1e3 / _TRIAL_CALLS
            launches = launches_of(len(calls), us)
            # Not torch.cuda.graph: that empties the allocator's cache at each capture, which costs more than a cell.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for i in range(launches):
                    calls[i % len(calls)]()
            finally:
                graph.capture_end()
        return CapturedCalls(graph, launches, us * launches, tuple(calls))

    def interleaved(self, prepared: Sequence[CapturedCalls]) -> list[Timing]:
        """Replay in turn, at first to warm up; the queue stays full, so that no replay waits for the host."""
        longest = max(calls.us for calls in prepared)
        replays = _REPLAYS_OF_LONG if longest > _LONG_GRAPH_US else _REPLAYS
        events = [[_events() for _ in range(replays)] for _ in prepared]
        for _ in range(math.ceil(_WARM_UP_US / sum(calls.us for calls in prepared))):
            for calls in prepared:
                calls.graph.replay()
        for replay in range(replays):
            for calls, pairs in zip(prepared, events, strict=True):
                start, end = pairs[replay]
                start.record()
                calls.graph.replay()
                end.record()
        torch.cuda.synchronize()
        return [
            timing_of([start.elapsed_time(end) * 1e3 / calls.launches for start, end in pairs])
            for calls, pairs in zip(prepared, events, strict=True)
        ]


def timing_of(us: Sequence[float]) -> Timing:
    """Median and spread of the replays of one kind of call."""
    median = statistics.median(us)
    return Timing(median, (max(us) - min(us)) / median)


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
