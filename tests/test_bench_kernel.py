"""The kernel benchmark without a GPU: what it plans, prunes, checks, records and survives; the clock is made up."""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from spinfer.bench import kernel_choices, kernel_sweep
from spinfer.bench.kernel import ShapeBench
from spinfer.bench.kernel_masks import MASKS, RealMask, prune_
from spinfer.bench.kernel_sweep import MODELS, SHAPES, TOKENS, Group, Results, plan, run_group
from spinfer.errors import SpinferError
from spinfer.kernels.cuda import timing as kernel_timing
from spinfer.kernels.cuda.configs import DeviceTraits
from spinfer.kernels.cuda.timing import Call, GraphTimer, Timing, cold_copies, launches_of, timing_of
from spinfer.kernels.cuda.tune import Kind


class CountingTimer:
    """Runs every call once; the kinds of call take 1, 2, 3, ... microseconds."""

    def prepare(self, calls: Sequence[Call]) -> Sequence[Call]:
        for call in calls:
            call()
        return calls

    def interleaved(self, prepared: Sequence[Sequence[Call]]) -> list[Timing]:
        return [Timing(float(i + 1), 0.0) for i in range(len(prepared))]


@pytest.fixture(autouse=True)
def _few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_timing, "COLD_NBYTES", 3 * 64 * 96 * 2)


def cpu_bench(m: int = 64, k: int = 96, **options: Any) -> ShapeBench:
    options = {"device": "cpu", "timer": CountingTimer()} | options
    return ShapeBench(m, k, **options)


@given(st.integers(1, 60), st.floats(1, 1e5))
def test_a_graph_turns_through_all_copies(copies: int, us: float) -> None:
    """Else a copy would come again while it is in the cache: across the end of one replay and the start of the next."""
    launches = launches_of(copies, us)
    assert launches % copies == 0
    assert launches >= copies
    assert launches * us >= 1000 or launches >= 96
    assert launches * us <= 2 * max(1300.0, us, copies * us)


def test_copies_leave_the_cache() -> None:
    assert cold_copies(10**9) == 1
    assert cold_copies(100) * 100 >= kernel_timing.COLD_NBYTES


def test_medians() -> None:
    assert timing_of([5.0, 1.0, 2.0]) == Timing(2.0, 2.0)


class FakeDevice:
    """A clock that only calls move on, by 125 us each, and graphs that repeat the calls captured into them."""

    def __init__(self) -> None:
        self.now_ms, self.capturing, self.log = 0.0, None, []

    def call(self, name: str) -> None:
        self.log.append((name, self.capturing is not None))
        if self.capturing is not None:
            self.capturing.append(name)
        else:
            self.now_ms += 0.125

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = self

        class Graph:
            def capture_begin(self, capture_error_mode: str) -> None:
                device.capturing = self.names = []

            def capture_end(self) -> None:
                device.capturing = None

            def replay(self) -> None:
                for name in self.names:
                    device.call(name)

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = device.now_ms

            def elapsed_time(self, other: Event) -> float:
                return other.at - self.at

        stream = SimpleNamespace(synchronize=lambda: None)
        fakes = {"Stream": lambda: stream, "CUDAGraph": Graph, "Event": Event, "synchronize": lambda: None}
        for name, fake in (fakes | {"stream": lambda _: nullcontext()}).items():
            monkeypatch.setattr(torch.cuda, name, fake)


def test_graph_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    device.install(monkeypatch)
    timer = GraphTimer()
    ours = timer.prepare([functools.partial(device.call, f"ours {i}") for i in range(5)])
    dense = timer.prepare([functools.partial(device.call, "dense")])
    assert device.log[:4] == [("ours 0", False), ("ours 0", False), ("ours 1", False), ("ours 2", False)]
    assert (ours.launches, dense.launches) == (10, 10)  # 1200 us of 125 us each, in whole turns of five
    assert ours.graph.names == [f"ours {i}" for i in range(5)] * 2
    assert len(ours.calls) == 5
    device.log.clear()
    assert [timing.us for timing in timer.interleaved([ours, dense])] == [125.0] * 2
    turns = [name for name, _ in itertools.groupby(name.split()[0] for name, _ in device.log)]
    assert turns == ["ours", "dense"] * 11  # 4 of 2.5 ms each to warm up, and 7 that count


def test_a_call_that_fails_ends_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    device.install(monkeypatch)

    def fail() -> None:
        device.call("x")
        if device.capturing is not None:
            raise RuntimeError("not while capturing")

    with pytest.raises(RuntimeError, match="not while capturing"):
        GraphTimer().prepare([fail])
    assert device.capturing is None


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_masks_have_the_sparsity(mask: str, sparsity: float) -> None:
    weight = prune_(torch.ones(4224, 4160), sparsity, mask)
    zeros = (weight == 0).float().mean().item()
    expected = 0.5 if mask == "2:4" else sparsity
    assert zeros == pytest.approx(expected, abs=0.06 if mask in ("clustered", "extremes") else 2e-3)
    if mask == "rowwise":
        assert set((weight == 0).sum(1).tolist()) == {round(4160 * sparsity)}
    if mask == "2:4":
        assert (weight.view(-1, 4).sum(1) == 2).all()
    if mask in ("clustered", "extremes"):
        tiles = weight.view(66, 64, 65, 64).sum((1, 3))
        assert (tiles == 0).any()
        assert (tiles == 64 * 64).any()
    if mask == "extremes":
        assert (weight.sum(1) == 0).any()
        assert (weight.sum(1) == 4160).any()


def test_masks_that_do_not_exist_are_refused() -> None:
    with pytest.raises(SpinferError, match="clustered"):
        prune_(torch.ones(4, 4), 0.5, "sorted")
    with pytest.raises(SpinferError, match="--real-mask"):
        prune_(torch.ones(4, 4), 0.5, "wanda")
    with pytest.raises(SpinferError, match="multiple of 4"):
        prune_(torch.ones(4, 6), 0.5, "2:4")


def test_a_real_mask_is_tiled_row_by_row(tmp_path: Path) -> None:
    kept = torch.rand(5, 16) < 0.4
    octets = (kept.view(5, 2, 8).int() << torch.arange(8)).sum(-1).to(torch.uint8)
    save_file({"0.6": octets}, tmp_path / "mask", metadata={"origin": "a model"})
    real = RealMask(tmp_path / "mask", "cpu")
    assert (real.origin, real.sparsities) == ("a model", (0.6,))
    weight = prune_(torch.ones(4, 40), 0.6, "wanda", real)
    source = kept.repeat(3, 1)  # 4 rows of 3 pieces each
    for row in range(4):
        assert torch.equal(weight[row] != 0, source[3 * row : 3 * row + 3].reshape(-1)[:40])
    with pytest.raises(SpinferError, match=r"0\.6"):
        prune_(torch.ones(4, 40), 0.5, "wanda", real)


def test_a_file_that_is_no_mask(tmp_path: Path) -> None:
    (tmp_path / "mask").write_bytes(b"none")
    with pytest.raises(SpinferError, match=r"real_mask\.py"):
        RealMask(tmp_path / "mask", "cpu")


def test_a_row_is_what_it_says() -> None:
    bench = cpu_bench()
    bench.load(0.6)
    row = bench.measure(5)
    assert (row["m"], row["k"], row["n"], row["dtype"]) == (64, 96, 5, "float16")
    assert (row["us"], row["dense_us"], row["speedup"]) == (1.0, 2.0, 2.0)
    nnz = row["density"] * 64 * 96
    assert nnz == pytest.approx(0.4 * 64 * 96, rel=0.1)
    assert row["ideal_nbytes"] == pytest.approx(2 * nnz + 64 * 96 / 8)
    assert row["byte_limit"] == pytest.approx(2 * 64 * 96 / row["ideal_nbytes"])
    assert 0 < row["error"] < 4e-4
    assert "random_us" not in row
    assert "fp8_us" not in row


def test_every_copy_is_read_and_holds_the_same_weight() -> None:
    bench = cpu_bench()
    for sparsity in (0.3, 0.6):
        bench.load(sparsity)
        assert len(bench._dense) == 3
        assert all(torch.equal(copy, bench._dense[0]) for copy in bench._dense)
        assert len({part.data_ptr() for weight in bench._sparse for part in weight.parts}) == sum(
            len(weight.parts) for weight in bench._sparse
        )
        assert len(bench._sparse) >= 3
        x = torch.randn(2, 96, dtype=torch.float16)
        results = [call() for call in bench._prepare(bench._sparse, x)]
        assert all(torch.equal(y, results[0]) for y in results)


def test_a_wrong_result_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spinfer.bench.kernel.linear", lambda x, weight: torch.zeros(x.shape[0], 64))
    bench = cpu_bench()
    bench.load(0.6)
    assert bench.measure(5)["error"] == pytest.approx(1.0)


def test_a_mask_has_a_random_twin_of_its_density() -> None:
    bench = cpu_bench(640, 640)
    bench.load(0.6, "clustered", twin=True)
    assert bench._twin[0].nnz == pytest.approx(bench._sparse[0].nnz, rel=0.02)
    assert bench.measure(2)["random_us"] == 3.0


def test_fp8_pads_the_tokens_and_says_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def scaled_mm(x: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> None:
        seen.append((x.shape, x.dtype, weight.shape))

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    bench = cpu_bench(fp8=True)
    bench.load(0.6)
    assert bench.measure(5)["fp8_us"] == 1.0
    assert set(seen) == {((16, 96), torch.float8_e4m3fn, (96, 64))}

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no FP8 here")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    row = bench.measure(7)
    assert (row["fp8_us"], row["fp8_error"]) == (None, "no FP8 here")
    assert "fp8_us" not in _first_row(cpu_bench(63, 96, fp8=True))


def _first_row(bench: ShapeBench) -> dict[str, Any]:
    bench.load(0.5)
    return bench.measure(1)


def test_the_plan_covers_what_it_must() -> None:
    groups = plan(real_sparsities=(0.5, 0.6))
    grid = {(g.shape, n, s) for g in groups if g.name == "grid" for n in g.tokens for s in g.sparsities}
    assert grid == {(shape, n, s) for shape in SHAPES for n in TOKENS for s in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)}
    shapes = {g.shape for g in groups if g.name in ("grid", "models")}
    assert shapes >= {shape for shapes in MODELS.values() for shape in shapes}
    assert {m for g in groups if g.name == "masks" for m in g.masks} == {*MASKS, "wanda"} - {"random"}
    names = [(g.name, g.shape, g.sparsities, g.masks) for g in groups]
    assert len(set(names)) == len(names), "nothing is measured twice"
    assert plan(quick=True)[0].cases < 10


def test_a_case_that_fails_is_recorded_and_the_next_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, results = cpu_bench(), Results(tmp_path / "kernel.json")
    measure = bench.measure

    def fail_at_two(n: int) -> dict[str, Any]:
        if n == 2:
            raise RuntimeError("no such luck")
        return measure(n)

    monkeypatch.setattr(bench, "measure", fail_at_two)
    run_group(Group("grid", (64, 96), (1, 2, 4), (0.6, 0.5)), bench, results)
    run_group(Group("masks", (64, 96), (1,), (0.6,), ("sorted", "clustered")), bench, results)
    results.save(now=True)
    content = json.loads((tmp_path / "kernel.json").read_text())
    assert [(row["set"], row["sparsity"], row["n"]) for row in content["results"]] == [
        ("grid", 0.6, 1),
        ("grid", 0.6, 4),
        ("grid", 0.5, 1),
        ("grid", 0.5, 4),
        ("masks", 0.6, 1),
    ]
    assert [error["what"] for error in content["errors"]] == [
        "grid (64, 96) 0.6 random N = 2",
        "grid (64, 96) 0.5 random N = 2",
        "masks (64, 96) 0.6 sorted",
    ]
    assert "no such luck" in content["errors"][0]["error"]
    assert [path.name for path in tmp_path.iterdir()] == ["kernel.json"]


def test_a_spent_budget_ends_the_run(tmp_path: Path) -> None:
    results = Results(tmp_path / "kernel.json")
    run_group(Group("grid", (64, 96), (1, 2), (0.6,)), cpu_bench(), results, budget_s=0)
    assert results.content["results"] == []


def test_rows_are_on_disk_before_the_end(tmp_path: Path) -> None:
    results = Results(tmp_path / "out" / "kernel.json", every_s=0)
    seen = []

    def read(row: dict[str, Any]) -> None:
        if results.path.exists():
            seen.append(len(json.loads(results.path.read_text())["results"]))

    run_group(Group("grid", (64, 96), (1, 2, 4), (0.6,)), cpu_bench(), results, report=read)
    assert seen == [1, 2]


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep's own flow, on the CPU: what needs a GPU is replaced, one overhead fails."""

    def fail() -> None:
        raise RuntimeError("no queue")

    monkeypatch.setattr(kernel_sweep, "require_cuda", lambda: None)
    monkeypatch.setattr(kernel_sweep, "environment", lambda commit: {"device": "a CPU", "commit": commit})
    monkeypatch.setattr(kernel_sweep, "bandwidths", lambda: {"read_bandwidth": 3e12})
    monkeypatch.setattr(kernel_sweep, "device_traits", lambda index: DeviceTraits((9, 0), 132, 232448))
    monkeypatch.setattr(kernel_sweep, "compile_all", lambda sources, workers: None)
    monkeypatch.setattr(kernel_sweep, "first_call", lambda: {"compile_s": 1.0})
    monkeypatch.setattr(kernel_sweep, "launches", fail)
    monkeypatch.setattr(kernel_sweep, "repacking", lambda m, k: {"m": m, "k": k})
    monkeypatch.setattr(kernel_sweep, "RealMask", lambda path, device: RealMask(path, "cpu"))
    monkeypatch.setattr(kernel_sweep, "ShapeBench", functools.partial(ShapeBench, device="cpu", timer=CountingTimer()))
    monkeypatch.setattr(
        kernel_sweep,
        "plan",
        lambda real_sparsities, quick: [
            Group("grid", (64, 96), (1, 16), (0.6, 0.5)),
            Group("masks", (128, 96), (1,), (0.6,), ("rowwise", "wanda")),
        ],
    )


@pytest.mark.usefixtures("without_gpu")
def test_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    mask = torch.randint(0, 255, (40, 4), dtype=torch.uint8)
    save_file({"0.6": mask}, tmp_path / "mask", metadata={"origin": "a model"})
    out = tmp_path / "kernel.json"
    arguments = ["sweep", "--out", str(out), "--real-mask", str(tmp_path / "mask"), "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", arguments)
    kernel_sweep.main()
    content = json.loads(out.read_text())
    assert content["environment"] == {
        "device": "a CPU",
        "commit": "abc",
        "real_mask": "a model",
        "read_bandwidth": 3e12,
    }
    assert content["planned"] == len(content["results"]) == 6
    assert [error["what"] for error in content["errors"]] == ["launches"]
    assert content["overheads"]["compile"]["kernels"] >= 3
    assert content["overheads"]["first_call"] == {"compile_s": 1.0}
    assert len(content["overheads"]["repack"]) == 2
    assert content["seconds"] >= 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 8
    assert printed[-1].startswith("6 cases")

    monkeypatch.setattr("spinfer.bench.kernel.linear", lambda x, weight: torch.zeros(x.shape[0], weight.shape[0]))
    with pytest.raises(SystemExit) as status:
        kernel_sweep.main()
    assert status.value.code == 1
    assert "6 of them wrong" in capsys.readouterr().out


def test_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is beaten by 3 % and more is told, worst first; a shape that fails does not end the run."""
    packed = SimpleNamespace(nnz=0, parts=(torch.zeros(1),))
    us = {8: {"pairs": 10.0, "ranges": 9.8}, 16: {"pairs": 10.0, "ranges": 9.0}, 24: {"pairs": 10.0, "ranges": 8.0}}

    def measure(kind: Kind, *others: Any) -> Any:
        if kind.shape == (200, 200):
            raise RuntimeError("out of luck")
        return us

    empty = torch.empty
    fakes = {
        "require_cuda": lambda: None,
        "environment": lambda commit: {"commit": commit},
        "device_traits": lambda index: None,
        "GraphTimer": lambda: None,
        "shapes": lambda: [(100, 100), (200, 200)],
        "SPARSITIES": (0.6,),
        "pack": lambda weight: packed,
        "measure": measure,
        "name_of_choice": lambda *_: "pairs",
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(kernel_choices, name, fake)
    monkeypatch.setattr(torch, "empty", lambda *sides, device, **options: empty(*sides, **options))
    monkeypatch.setattr(sys, "argv", ["choices", "--out", str(tmp_path / "out.json"), "--commit", "abc"])
    kernel_choices.main()
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["environment"] == {"commit": "abc", "dtype": "bfloat16"}
    assert [row["n"] for row in content["results"]] == [8, 16, 24]
    assert [error["what"] for error in content["errors"]] == ["200 x 200 at 0.6"]
    first, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert first.startswith(
        "In 1 of 3 cases the choice is within 3 % of the fastest way; on average it takes 12.7% more."
    )
    assert rows[2:] == [
        "| 100 x 100 | 60% | 24 | pairs | 10.0 | ranges | 8.0 | 1.25 |",
        "| 100 x 100 | 60% | 16 | pairs | 10.0 | ranges | 9.0 | 1.11 |",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep", "--out", str(tmp_path / "out.json")])
    with pytest.raises(SpinferError, match="CUDA device"):
        kernel_sweep.main()
    assert not (tmp_path / "out.json").exists()
