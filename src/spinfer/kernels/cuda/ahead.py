"""Compiling kernels in the background, before a call has to wait for them.

A model needs some 70, a second or more of one core each, and only the first process on a machine compiles them.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterable

from spinfer.kernels.cuda.compile import KernelSource, cubin, is_cached

_MOST_AT_ONCE = 8
"""Compilers; each takes some 0.2 GB."""


class BackgroundCompiler:
    """Brings kernels into the disk cache, in the order in which they are submitted.

    What does not compile is left to the call that needs it, which tells why. Threads are daemons, because a process
    would not end before an executor has worked its queue off.
    """

    def __init__(self) -> None:
        self._waiting: deque[KernelSource] = deque()
        self._submitted: set[KernelSource] = set()
        self._threads = 0
        self._changed = threading.Condition()

    def submit(self, sources: Iterable[KernelSource]) -> None:
        """Compile what of these is new and not in the cache; returns at once."""
        with self._changed:
            new = [source for source in sources if source not in self._submitted]
            self._submitted.update(new)
            self._waiting.extend(source for source in new if not is_cached(source))
            most = min(_MOST_AT_ONCE, max(1, (os.cpu_count() or 1) // 2), len(self._waiting))
            while self._threads < most:
                self._threads += 1
                threading.Thread(target=self._work, name="spinfer-compile", daemon=True).start()

    def wait(self) -> None:
        """Until nothing is left to compile."""
        with self._changed:
            self._changed.wait_for(lambda: self._threads == 0)

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._threads -= 1
                    self._changed.notify_all()
                    return
                source = self._waiting.popleft()
            kept = False
            with contextlib.suppress(Exception):
                cubin(source)
                kept = is_cached(source)
            if not kept:  # nor would what follows
                with self._changed:
                    self._waiting.clear()


COMPILER = BackgroundCompiler()
"""Of this process."""
