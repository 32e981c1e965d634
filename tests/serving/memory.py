"""A worker that tells by how much a model makes its process grow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker


def anonymous_nbytes() -> int:
    """Resident memory but for files: of the checkpoint, the system keeps as many pages as it likes."""
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) << 10


class Weighed(CPUWorker):  # type: ignore[misc]
    """Remembers its memory before the model."""

    def load_model(self, *arguments: Any, **options: Any) -> None:
        """Load."""
        self.before = anonymous_nbytes()
        super().load_model(*arguments, **options)

    def grown_nbytes(self) -> int:
        """Resident bytes that came since, but for the KV cache."""
        return anonymous_nbytes() - self.before - sum(cache.nbytes for cache in self.model_runner.kv_caches)
