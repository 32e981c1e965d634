"""A model of how warps along k share boxes of x in csrc/matmul_wide_sm90.cu: which numbers of boxes are safe.

Boxes are filled in turn, and group g of warps takes the fills g, g + groups, ...; it gives a box back when it has its
next one. A barrier tells by one bit of its phase whether a fill has landed, so a group that waits for a box whose fill
before has not landed either takes the phase before that for its own.
"""

from __future__ import annotations

import heapq
import itertools
import random

import pytest

from spinfer.kernels.cuda.layout import ChunkGrid
from spinfer.kernels.cuda.select import DeviceTraits, wide_config

FILLS = 96
H100 = DeviceTraits((9, 0), 132, 232448)


class Boxes:
    """One run; copies take 0.7 us, some of them much longer, and a block 0.5 us."""

    def __init__(self, boxes: int, groups: int, seed: int) -> None:
        self.boxes, self.random = boxes, random.Random(seed)
        self.landed, self.given_back = [0] * boxes, [0] * boxes
        self.next_fill, self.wrong, self.now = 0, 0, 0.0
        self.fill_of = list(range(groups))  # that each group works on or waits for
        self.busy = [False] * groups
        self.held: list[int | None] = [None] * groups
        self._events: list[tuple[float, int, str, int]] = []
        self._numbers = itertools.count()

    def later(self, delay: float, what: str, which: int) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._numbers), what, which))

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
            if not self._events:
                return self.wrong, all(fill >= FILLS for fill in self.fill_of)
            self.now, _, what, which = heapq.heappop(self._events)
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


@pytest.mark.parametrize("tokens", [48, 64, 96, 128])
@pytest.mark.parametrize("density", [0.2, 0.4, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("rows", [4096, 8192])
def test_the_number_chosen_is_safe(rows: int, density: float, tokens: int) -> None:
    grid = ChunkGrid.of(rows, 8192)
    config = wide_config(grid, int(density * rows * 8192), tokens, H100)
    groups = config.warps * config.bands // (2 * grid.blocks_m)
    assert outcomes(config.boxes, groups) == [(0, True)] * 40


@pytest.mark.parametrize("groups", [2, 4])
def test_a_box_each_is_too_few(groups: int) -> None:
    assert not any(finished for _, finished in outcomes(groups, groups))


@pytest.mark.parametrize(("boxes", "groups"), [(5, 4), (7, 4), (10, 4), (5, 2), (9, 2)])
def test_a_number_that_groups_do_not_divide_is_unsafe(boxes: int, groups: int) -> None:
    assert any(wrong for wrong, _ in outcomes(boxes, groups))
