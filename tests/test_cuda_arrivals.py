"""A model of how CTAs on Hopper agree who adds up the sums of a strip (csrc/arrivals.cuh).

Each CTA has a range of consecutive chunks. Three of its warps matter: one copies x, some chunks ahead, and tells of the
end of a segment; one asks whether this CTA is the last to come; one stands for all that multiply. Who goes on when is
random, and only some CTAs run at a time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

Warp = Iterator[Callable[[], bool]]
"""What a warp waits for, one thing after another."""


class Launch:
    """One launch of `ranges` ranges over strips of `chunks_k` chunks, `at_once` of them running."""

    def __init__(
        self, strips: int, chunks_k: int, ranges: int, ahead: int, seed: int, first_adds: bool = False
    ) -> None:
        self.chunks_k, self.ahead, self.first_adds = chunks_k, ahead, first_adds
        self.random = random.Random(seed)
        each, extra = divmod(strips * chunks_k, ranges)
        starts = [i * each + min(i, extra) for i in range(ranges + 1)]
        self.ranges = [range(starts[i], starts[i + 1]) for i in range(ranges)]
        self.come, self.left = [0] * strips, [0] * strips
        self.written: list[list[int]] = [[] for _ in range(strips)]  # times that each strip's y was

    def sharers(self, strip: int) -> int:
        own = range(strip * self.chunks_k, (strip + 1) * self.chunks_k)
        return sum(r.start < own.stop and own.start < r.stop for r in self.ranges)

    def cta(self, index: int) -> list[Warp]:
        chunks = self.ranges[index]
        strips = range(chunks[0] // self.chunks_k, chunks[-1] // self.chunks_k + 1)
        partial = [s for s in dict.fromkeys((strips[0], strips[-1])) if self.sharers(s) > 1]
        ends = {min((s + 1) * self.chunks_k, chunks.stop) - 1: s for s in strips}
        multiplied = [0]
        comes, answer, has_left = set(), {}, set()

        def copies() -> Warp:
            for i, chunk in enumerate(chunks):
                yield lambda i=i: multiplied[0] > i - self.ahead
                if ends.get(chunk) in partial:
                    comes.add(ends[chunk])

        def asks() -> Warp:
            for strip in partial:
                yield lambda strip=strip: strip in comes
                others = self.sharers(strip) - 1
                last = self.come[strip] == (0 if self.first_adds else others)
                self.come[strip] += 1
                if last:
                    yield lambda strip=strip, others=others: self.left[strip] == others
                    self.come[strip] = self.left[strip] = 0
                answer[strip] = last
                if not last:
                    yield lambda strip=strip: strip in has_left
                    self.left[strip] += 1

        def multiplies() -> Warp:
            for chunk in chunks:
                yield lambda: True
                multiplied[0] += 1
                if (strip := ends.get(chunk)) is None:
                    continue
                if strip in partial:
                    yield lambda strip=strip: strip in answer
                    if not answer[strip]:
                        has_left.add(strip)
                        continue
                self.written[strip].append(index)

        return [copies(), asks(), multiplies()]

    def run(self, at_once: int) -> bool:
        """Whether all CTAs came to their end."""
        waiting = list(range(len(self.ranges)))
        running: list[list[tuple[Warp, Callable[[], bool]]]] = []
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append([(warp, lambda: True) for warp in self.cta(waiting.pop(0))])
            ready = [(cta, i) for cta in running for i, (_, may) in enumerate(cta) if may()]
            if not ready:
                return False
            cta, i = self.random.choice(ready)
            warp, _ = cta.pop(i)
            if (may := next(warp, None)) is not None:
                cta.append((warp, may))
            running = [cta for cta in running if cta]
        return True


@pytest.mark.parametrize("at_once", [1, 3, 40])
@pytest.mark.parametrize(("strips", "chunks_k", "ranges"), [(9, 1, 4), (7, 3, 5), (5, 3, 13), (3, 8, 24), (1, 11, 5)])
def test_each_strip_is_written_once(strips: int, chunks_k: int, ranges: int, at_once: int) -> None:
    for seed in range(20):
        launch = Launch(strips, chunks_k, ranges, 1 + seed % 4, seed)
        assert launch.run(at_once)
        assert [len(times) for times in launch.written] == [1] * strips
        assert not any(launch.come)
        assert not any(launch.left)


def test_the_first_to_come_could_wait_for_ever() -> None:
    """For CTAs that do not run yet, so that it must be the last that adds up."""
    assert not Launch(5, 3, 13, 2, 0, first_adds=True).run(1)
