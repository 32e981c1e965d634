"""Models of how boxes of x are shared on Hopper: which numbers of boxes are safe.

In csrc/matmul_wide_sm90.cu warps along k share them. Boxes are filled in turn, and group g of warps takes the fills g,
g + groups, ...; it gives a box back when it has its next one. A barrier tells by one bit of its phase whether a fill
has landed, so a group that waits for a box whose fill before has not landed either takes the phase before that for its
own.

In csrc/matmul_sm90.cu a box is for a whole chunk, and what tells that it has landed, or is free, are barriers of the
weight's slot of that chunk. Slots are reused too, so those barriers must not be two phases on when they are looked at.
"""

from __future__ import annotations

import heapq
import itertools
import random

import pytest

from spinfer.kernels.cuda.configs import DeviceTraits
from spinfer.kernels.cuda.layout import ChunkGrid
from spinfer.kernels.cuda.select import wide_choice

FILLS = 96
H100 = DeviceTraits((9, 0), 132, 232448)


class Events:
    """What happens when, in one run."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self._events: list[tuple[float, int, str, int]] = []
        self._numbers = itertools.count()

    def later(self, delay: float, what: str, which: int) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._numbers), what, which))

    def next(self) -> tuple[str, int] | None:
        """What happens next, and to which; None when nothing will."""
        if not self._events:
            return None
        self.now, _, what, which = heapq.heappop(self._events)
        return what, which


class Boxes(Events):
    """One run; copies take 0.7 us, some of them much longer, and a block 0.5 us."""

    def __init__(self, boxes: int, groups: int, seed: int) -> None:
        super().__init__(seed)
        self.boxes = boxes
        self.landed, self.given_back = [0] * boxes, [0] * boxes
        self.next_fill, self.wrong = 0, 0
        self.fill_of = list(range(groups))  # that each group works on or waits for
        self.busy = [False] * groups
        self.held: list[int | None] = [None] * groups

    def fill(self) -> None:
        while self.next_fill < FILLS and self.given_back[self.next_fill % self.boxes] >= self.next_fill // self.boxes:
            late = self.random.expovariate(0.7) if self.random.random() < 0.2 else 0.0
            self.later(0.7 + late, "landed", self.next_fill % self.boxes)
            self.next_fill += 1

    def start(self, group: int) -> None:
        fill = self.fill_of[group]
        box, phase = fill % self.boxes, fill // self.boxes
        if self.busy[group] or fill >= FILLS or self.landed[box] % 2 == phase % 2:
            return
        self.wrong += self.landed[box] <= phase
        self.busy[group] = True
        held, self.held[group] = self.held[group], fill
        if held is not None:
            self.later(0.1, "given back", held % self.boxes)
        self.later(0.5, "done", group)

    def run(self) -> tuple[int, bool]:
        """How many blocks were multiplied with what had not landed; whether all were."""
        groups = range(len(self.busy))
        self.fill()
        while True:
            for group in groups:
                self.start(group)
            event = self.next()
            if event is None:
                return self.wrong, all(fill >= FILLS for fill in self.fill_of)
            what, which = event
            if what == "landed":
                self.landed[which] += 1
            elif what == "given back":
                self.given_back[which] += 1
                self.fill()
            else:
                self.busy[which] = False
                self.fill_of[which] += len(self.busy)


def outcomes(boxes: int, groups: int) -> list[tuple[int, bool]]:
    return [Boxes(boxes, groups, seed).run() for seed in range(40)]


@pytest.mark.parametrize("tokens", [48, 64, 80, 128, 176, 256, 288, 320])
@pytest.mark.parametrize("density", [0.2, 0.4, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("rows", [4096, 8192])
def test_the_number_chosen_is_safe(rows: int, density: float, tokens: int) -> None:
    grid = ChunkGrid.of(rows, 8192)
    config = wide_choice(grid, int(density * rows * 8192), tokens, H100)
    groups = config.warps * config.bands // (2 * grid.blocks_m)
    assert outcomes(config.boxes, groups) == [(0, True)] * 40


@pytest.mark.parametrize("groups", [2, 4])
def test_a_box_each_is_too_few(groups: int) -> None:
    assert not any(finished for _, finished in outcomes(groups, groups))


@pytest.mark.parametrize(("boxes", "groups"), [(5, 4), (7, 4), (10, 4), (5, 2), (9, 2)])
def test_a_number_that_groups_do_not_divide_is_unsafe(boxes: int, groups: int) -> None:
    assert any(wrong for wrong, _ in outcomes(boxes, groups))


SLOTS, WARPS, CHUNKS = 8, 3, 64


class ChunkBoxes(Events):
    """One run; filling takes its turn after a while, copies 0.7 us, a chunk 0.5 us of each warp, some much longer."""

    def __init__(self, boxes: int, seed: int) -> None:
        super().__init__(seed)
        self.boxes = boxes
        self.landed, self.given_back = [0] * SLOTS, [0] * SLOTS
        self.arrived = [0] * CHUNKS  # warps that have given a chunk back
        self.next_fill, self.wrong = 0, 0
        self.chunk_of, self.busy = [0] * WARPS, [False] * WARPS
        self.filling = False

    def later(self, delay: float, what: str, which: int) -> None:
        super().later(delay + (self.random.expovariate(0.3) if self.random.random() < 0.2 else 0.0), what, which)

    def fill(self) -> None:
        if self.filling or self.next_fill == CHUNKS:
            return
        before = self.next_fill - self.boxes
        if before >= 0:
            given_back, phase = self.given_back[before % SLOTS], before // SLOTS
            if given_back % 2 == phase % 2:
                return
            self.wrong += given_back <= phase
        self.filling = True
        self.later(0.1, "filled", self.next_fill)

    def give_back(self, chunk: int) -> None:
        self.arrived[chunk] += 1
        self.given_back[chunk % SLOTS] += self.arrived[chunk] == WARPS

    def start(self, warp: int) -> None:
        chunk = self.chunk_of[warp]
        if self.busy[warp] or chunk == CHUNKS:
            return
        landed, phase = self.landed[chunk % SLOTS], chunk // SLOTS
        if landed % 2 == phase % 2:
            return
        self.wrong += landed <= phase
        self.busy[warp] = True
        self.later(0.5, "multiplied", warp)

    def run(self) -> tuple[int, bool]:
        """How often what had not landed, or was not free, was taken for it; whether all chunks were multiplied."""
        while True:
            for warp in range(WARPS):
                self.start(warp)
            self.fill()
            event = self.next()
            if event is None:
                return self.wrong, all(chunk == CHUNKS for chunk in self.chunk_of)
            what, which = event
            if what == "filled":
                self.filling = False
                self.next_fill += 1
                self.later(0.7, "landed", which)
            elif what == "landed":
                self.landed[which % SLOTS] += 1
            else:
                self.busy[which] = False
                self.give_back(self.chunk_of[which])
                self.chunk_of[which] += 1


def chunk_outcomes(boxes: int) -> list[tuple[int, bool]]:
    return [ChunkBoxes(boxes, seed).run() for seed in range(40)]


@pytest.mark.parametrize("boxes", range(1, SLOTS + 1))
def test_as_many_boxes_as_slots_are_safe(boxes: int) -> None:
    assert chunk_outcomes(boxes) == [(0, True)] * 40


def test_twice_as_many_boxes_as_slots_are_unsafe() -> None:
    assert any(wrong or not finished for wrong, finished in chunk_outcomes(2 * SLOTS))
