"""Which weights get a dense copy; no GPU: what decodes is a stand-in."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spinfer.errors import SpinferError
from spinfer.kernels.cuda import copies
from spinfer.kernels.cuda.copies import DenseCopies
from spinfer.kernels.cuda.layout import has_dense_copy, ranges_in

CHUNKS, OFFSETS, RANGES = torch.zeros(256, dtype=torch.uint8), torch.zeros(2), torch.zeros(133)
MIB = 2**-10  # GiB


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "RowDecoder", lambda *key: lambda chunks, offsets, out: out.fill_(3))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))


def add(made: DenseCopies, *parts: Tensor, shape: tuple[int, int] = (512, 1024)) -> tuple[Tensor, ...]:
    """A weight whose copy takes one MiB."""
    return made.add(parts or (CHUNKS, OFFSETS), shape, torch.float16)


def want(monkeypatch: pytest.MonkeyPatch, gib: Any) -> None:
    monkeypatch.setenv("SPINFER_DENSE_COPIES_GIB", str(gib))


@pytest.mark.parametrize("setting", [None, "", "0", "0.0"])
def test_none_unless_wanted(setting: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPINFER_DENSE_COPIES_GIB", raising=False)
    if setting is not None:
        want(monkeypatch, setting)
    assert add(DenseCopies()) == (CHUNKS, OFFSETS)


@pytest.mark.parametrize("setting", ["all", "-1", "nan", "inf", "16GiB"])
def test_what_is_no_amount_is_refused(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want(monkeypatch, setting)
    with pytest.raises(SpinferError, match=f"SPINFER_DENSE_COPIES_GIB is '{setting}'; set it to GiB"):
        add(DenseCopies())


def test_a_copy_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    want(monkeypatch, MIB)
    *others, dense = add(DenseCopies(), CHUNKS, OFFSETS, RANGES)
    assert [id(part) for part in others] == [id(part) for part in (CHUNKS, OFFSETS, RANGES)]
    assert dense.shape == (512, 1024)
    assert dense.dtype == torch.float16
    assert dense.eq(3).all()
    assert has_dense_copy((*others, dense))
    assert not has_dense_copy(tuple(others))
    for parts in ((*others, dense), tuple(others)):
        assert ranges_in(parts) == 132
    assert ranges_in((CHUNKS, OFFSETS)) == ranges_in((CHUNKS, OFFSETS, dense)) == 0


def test_as_many_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    want(monkeypatch, 2.5 * MIB)
    made = DenseCopies()
    held = [add(made) for _ in range(3)]
    assert [has_dense_copy(parts) for parts in held] == [True, True, False]
    assert has_dense_copy(add(made, shape=(256, 1024))), "a smaller one still fits"
    parameter = nn.Parameter(held[1][-1], requires_grad=False)  # as a layer holds it
    del held[1:]
    assert not has_dense_copy(add(made)), "it is still alive"
    del parameter
    assert has_dense_copy(add(made))


@pytest.mark.parametrize("shape", [(512, 1023), (511, 1024), (1, 1)])
def test_sides_that_are_slow_get_none(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    want(monkeypatch, 1)
    assert not has_dense_copy(add(DenseCopies(), shape=shape))


def test_a_full_gpu_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*shape: Any, **options: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    want(monkeypatch, 1)
    made = DenseCopies()
    with monkeypatch.context() as full:
        full.setattr(torch, "empty", empty)
        with pytest.raises(SpinferError, match="copy of a weight of 512 x 1024; set SPINFER_DENSE_COPIES_GIB to less"):
            add(made)
    assert has_dense_copy(add(made))
