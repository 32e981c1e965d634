"""Measuring which kernels are the fastest, and using it; no GPU: times are made up."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spinfer.kernels.cuda import backend, tune
from spinfer.kernels.cuda import compile as kernel_compile
from spinfer.kernels.cuda.configs import DeviceTraits
from spinfer.kernels.cuda.layout import LAYOUT, ChunkGrid
from spinfer.kernels.cuda.select import TUNED_TOKENS, Fused, alternatives, choose
from spinfer.kernels.cuda.timing import Timing
from spinfer.kernels.packed import PackedWeight, WeightSpec

HOPPER = DeviceTraits((9, 0), 132, 232448)
SHAPE = (4096, 4096)
KIND = tune.Kind.of(SHAPE, round(0.41 * 4096 * 4096), torch.bfloat16, 0, 0)
PARTS = (torch.zeros(1 << 20, dtype=torch.uint8), torch.zeros(4))


class Clock:
    """In place of the GPU: what each plan takes.

    Attributes:
        us: (tokens, name of the alternative) -> microseconds; 10 where nothing is said.
        measured: what was timed until the end.
    """

    def __init__(self) -> None:
        self.us: dict[tuple[int, str], float] = {}
        self.measured: list[tuple[int, str]] = []
        self.error: Exception | None = None

    def prepare(self, calls: Sequence[Callable[[], Any]]) -> Any:
        if self.error is not None:
            raise self.error
        run = calls[0].args[0]  # type: ignore[attr-defined]
        return SimpleNamespace(case=run.case, trial_us=self.us.get(run.case, 10.0))

    def interleaved(self, prepared: Sequence[Any]) -> list[Timing]:
        self.measured += [each.case for each in prepared]
        return [Timing(each.trial_us, 0.0) for each in prepared]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Clock:
    clock = Clock()
    cases = {
        plan: (tokens, name)
        for tokens in TUNED_TOKENS
        for name, plan in alternatives(KIND.grid, KIND.nnz, tokens, HOPPER).items()
        if isinstance(plan, Fused)
    }

    def run_of(plan: Any, *others: Any) -> Any:
        return SimpleNamespace(case=cases.get(plan, (0, type(plan).__name__)))

    properties = SimpleNamespace(name="a GPU")
    monkeypatch.setenv("SPINFER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: properties.name)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(tune, "device_traits", lambda index: HOPPER)
    monkeypatch.setattr(tune, "run_of", run_of)
    monkeypatch.setattr(tune, "_timer", lambda index: clock)
    monkeypatch.setattr(tune, "COMPILER", SimpleNamespace(submit=list, wait=lambda: None))
    monkeypatch.setattr(tune, "cold_copies", lambda nbytes: 2)
    another_process(monkeypatch)
    return clock


def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_known", {})
    monkeypatch.setattr(tune, "_tried", set())


def chosen(tokens: int, kind: tune.Kind = KIND) -> str:
    return tune.name_of_choice(kind, tokens, HOPPER)


def test_only_what_is_clearly_faster_replaces_a_choice(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    assert chosen(8) == chosen(16) == "pairs"
    clock.us = {(8, "ranges"): 9.6, (16, "ranges"): 9.8, (24, "ranges"): 31.0}
    assert tune.tuned(KIND) == {}
    assert tune.tune(KIND, PARTS)
    assert tune.tuned(KIND) == {8: "ranges"}
    assert (16, "ranges") in clock.measured
    assert (24, "ranges") not in clock.measured, "hopeless"
    assert "4096 x 4096 at 60 % zeros" in capsys.readouterr().err


def test_a_dense_copy_is_one_of_the_ways(clock: Clock) -> None:
    kind = tune.Kind.of(SHAPE, KIND.nnz, torch.bfloat16, 0, 0, dense=True)
    assert chosen(16, kind) == "pairs"
    assert chosen(48, kind) == "dense"
    clock.us = {(0, "Dense"): 5.0}
    tune.tune(kind, PARTS)
    assert tune.tuned(kind)[16] == "dense"
    assert 48 not in tune.tuned(kind)


def test_a_choice_is_measured_however_slow(clock: Clock) -> None:
    clock.us = {(8, "pairs"): 40.0}
    tune.tune(KIND, PARTS)
    assert tune.tuned(KIND)[8] == "ranges"


def test_measured_once_a_machine(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    clock.us = {(8, "ranges"): 9.0}
    assert tune.tune(KIND, PARTS)
    clock.measured.clear()
    assert not tune.tune(KIND, PARTS)
    another_process(monkeypatch)
    assert tune.tuned(KIND) == {8: "ranges"}
    assert not tune.tune(KIND, PARTS)
    assert clock.measured == []
    alike = tune.Kind.of(SHAPE, round(0.39 * 4096 * 4096), torch.bfloat16, 0, 0)
    assert not tune.tune(alike, PARTS)
    for other in (
        tune.Kind.of(SHAPE, round(0.5 * 4096 * 4096), torch.bfloat16, 0, 0),
        tune.Kind.of(SHAPE, KIND.nnz, torch.float16, 0, 0),
        tune.Kind.of((4096, 4100), KIND.nnz, torch.bfloat16, 0, 0),
        tune.Kind.of(SHAPE, KIND.nnz, torch.bfloat16, 0, 0, dense=True),
    ):
        assert tune.tuned(other) == {}
        assert tune.tune(other, PARTS)
    torch.cuda.get_device_properties(0).name = "another GPU"
    another_process(monkeypatch)
    assert tune.tuned(KIND) == {}


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"[]", b"{}", b'{"us": 3}', b'{"us": {"8": 3}}', b'{"us": {"8": {"ranges": "fast"}}}']
    + [json.dumps({"us": {tokens: {"ranges": 1, "pairs": 9}}}).encode() for tokens in ("-8", "0", "9", "1e3", "x")]
    + [b'{"us": {"8": {"no such kernel": 1, "pairs": 9}}}', b'{"us": {"8": {}}}'],
)
def test_a_damaged_file_changes_nothing(content: bytes, clock: Clock) -> None:
    KIND.path.parent.mkdir(parents=True)
    KIND.path.write_bytes(content)
    grid = ChunkGrid.of(*SHAPE)
    plan = choose(grid, KIND.nnz, 8, True, HOPPER, tuned=tune.tuned(KIND))
    assert plan == choose(grid, KIND.nnz, 8, True, HOPPER)


def test_a_gpu_that_is_full_keeps_the_choices(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    clock.error = torch.OutOfMemoryError("no memory")
    with pytest.warns(UserWarning, match=r"were not measured \(no memory\)"):
        assert not tune.tune(KIND, PARTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not tune.tune(KIND, PARTS), "once a process is enough"
    assert tune.tuned(KIND) == {}
    clock.error = None
    another_process(monkeypatch)
    assert tune.tune(KIND, PARTS)


def test_what_cannot_be_kept_is_used_all_the_same(clock: Clock, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file")
    kernel_compile._warn_uncached.cache_clear()
    clock.us = {(8, "ranges"): 9.0}
    with pytest.warns(UserWarning, match="SPINFER_CACHE_DIR"):
        assert tune.tune(KIND, PARTS)
    assert tune.tuned(KIND) == {8: "ranges"}


@pytest.mark.parametrize(("setting", "measures"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_loading_measures_if_asked_to(
    setting: str | None, measures: bool, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    if setting is None:
        monkeypatch.delenv("SPINFER_AUTOTUNE", raising=False)
    else:
        monkeypatch.setenv("SPINFER_AUTOTUNE", setting)
    compiled: list[Any] = []
    monkeypatch.setattr(backend, "_compile_ahead", lambda *key: compiled.append(key))
    weight = PackedWeight(WeightSpec(LAYOUT, SHAPE, KIND.nnz, torch.bfloat16), PARTS)
    monkeypatch.setattr(PackedWeight, "device", torch.device("cuda", 0))
    backend.CudaBackend().prepare(weight)
    assert bool(clock.measured) == measures
    assert compiled == [(SHAPE, weight.spec.rounded_nnz, torch.bfloat16, 0, 0, False)]
