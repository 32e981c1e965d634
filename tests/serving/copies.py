"""A worker whose rank 1 reads another copy of the checkpoint, as on another machine."""

from __future__ import annotations

import os
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker


class OtherCopy(CPUWorker):  # type: ignore[misc]
    """Loads from the folder that the environment names."""

    def load_model(self, *arguments: Any, **options: Any) -> None:
        """Load."""
        if self.rank == 1:
            self.model_config.model = os.environ["SPINFER_TEST_COPY"]
        super().load_model(*arguments, **options)
