"""What the kernels keep from call to call, without a GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch._inductor import cudagraph_trees

from spinfer.kernels.cuda.runtime import Workspaces

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def test_one_pair_a_stream() -> None:
    workspaces = Workspaces()
    first, second = workspaces.get(CPU, 1, 100, 100), workspaces.get(CPU, 2, 100, 100)
    assert workspaces.get(CPU, 1, 100, 100)[1] is first[1]
    assert second[1] is not first[1]
    assert workspaces.get(CPU, 1, 2 << 20, 100)[0].numel() >= 2 << 20


def test_nothing_is_kept_of_the_stream_of_compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = SimpleNamespace(stream=SimpleNamespace(cuda_stream=2))
    monkeypatch.setattr(cudagraph_trees, "get_manager", lambda index, create_if_none_exists: manager)
    workspaces = Workspaces()
    first = workspaces.get(CPU, 2, 100, 100)
    first[1].fill_(1)
    second = workspaces.get(CPU, 2, 100, 100)
    assert second[1] is not first[1]
    assert not second[1].any()
    assert workspaces.get(CPU, 1, 100, 100)[1] is workspaces.get(CPU, 1, 100, 100)[1]


def test_threads_without_compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(index: int, create_if_none_exists: bool) -> None:
        raise AssertionError("as torch 2.11 does in a thread that has none")

    monkeypatch.setattr(cudagraph_trees, "get_manager", refuse)
    workspaces = Workspaces()
    with ThreadPoolExecutor(1) as thread:
        first, second = (thread.submit(workspaces.get, CPU, 1, 100, 100).result() for _ in range(2))
    assert second[1] is first[1]


def test_torch_still_has_the_manager_of_compiled_graphs() -> None:
    assert cudagraph_trees.get_manager(63, create_if_none_exists=False) is None
    assert "stream" in cudagraph_trees.CUDAGraphTreeManager.__init__.__code__.co_names
