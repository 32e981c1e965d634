"""Tensor-parallel ranks: processes on the CPU that talk over gloo, as vLLM's workers do."""

from __future__ import annotations

import functools
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

TIMEOUT_S = 120
"""A rank that takes longer hangs."""


@functools.cache
def _ranks(size: int) -> list[ProcessPoolExecutor]:
    """Processes that stay, since importing vLLM takes each ten seconds."""
    rendezvous = f"file://{Path(tempfile.mkdtemp()) / 'rendezvous'}"
    context = multiprocessing.get_context("spawn")
    return [ProcessPoolExecutor(1, context, _join, (rank, size, rendezvous)) for rank in range(size)]


def _join(rank: int, size: int, rendezvous: str) -> None:
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_DIST_IDENT": Path(rendezvous).parent.name}
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    torch.set_num_threads(1)
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(size, rank, rendezvous, rank, "gloo")
        initialize_model_parallel(size)


def _run(job: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        try:
            return job(*arguments)
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def on_ranks(size: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `job(rank, *arguments)` returns on each of `size` ranks, or the exception that it raised there, as text.

    Raises:
        TimeoutError: a rank hangs.
    """
    futures = [ranks.submit(_run, job, (rank, *arguments)) for rank, ranks in enumerate(_ranks(size))]
    return [future.result(TIMEOUT_S) for future in futures]
