"""Tables and plots of the kernel benchmark, from made-up results."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from spinfer.bench.kernel_report import PLOTS, Sweep, report, speedups_over_tokens, write
from spinfer.bench.kernel_targets import missed, target

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
LARGEST, SMALL = (28672, 8192), (4096, 4096)


def row(
    shape: tuple[int, int], n: int, sparsity: float, us: float, *, dense_us: float = 100.0, **more: Any
) -> dict[str, Any]:
    m, k = shape
    ideal = 2 * (1 - sparsity) * m * k + m * k / 8
    made = {"set": "grid", "m": m, "k": k, "n": n, "dtype": "float16", "mask": "random", "sparsity": sparsity}
    made |= {"density": 1 - sparsity, "us": us, "dense_us": dense_us, "speedup": dense_us / us, "error": 2e-4}
    return made | {"ideal_nbytes": ideal, "byte_limit": 2 * m * k / ideal} | more


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    rows = [
        row(shape, n, s, 40.0 + n, fp8_us=50.0)
        for shape, n, s in itertools.product((LARGEST, SMALL), (1, 16, 64, 512), (0.5, 0.6))
    ]
    rows.append(row((5120, 5120), 16, 0.6, 50.0, set="models"))
    rows.append(row((8192, 8192), 16, 0.6, 52.0, set="masks", mask="wanda", random_us=50.0))
    recorded = {
        "environment": {"device": H100, "driver": "580", "commit": "abc", "read_bandwidth": 3e12, "real_mask": None},
        "overheads": {
            "launch": {"kernel_us": 9.0},
            "repack": [{"m": 1, "k": 2, "sparsity": 0.6, "dense_nbytes": 4, "pack_ms": 0.5, "pack_gbps": 700.0}],
        },
        "errors": [],
        "results": rows,
    }
    path = tmp_path / "kernel.json"
    path.write_text(json.dumps(recorded))
    return Sweep(path)


def test_wrong_results_are_named_and_in_no_table(sweep: Sweep) -> None:
    recorded = json.loads(sweep.path.read_text())
    recorded["results"].append(row((8192, 8192), 64, 0.6, 9.9, error=0.04))
    sweep.path.write_text(json.dumps(recorded))
    found = Sweep(sweep.path)
    assert len(found.rows) == len(sweep.rows)
    text = report(found)
    assert "Wrong, and left out of all tables:** 8192 x 8192, float16, 60% zeros (random), N = 64" in text
    assert "9.9" not in text


def test_the_tables_say_what_the_results_say(sweep: Sweep) -> None:
    text = report(sweep)
    assert "driver 580, commit abc, read 3.00 TB/s." in text
    assert "largest relative error against float64: 2.00e-04" in text
    share = (2 * 0.4 + 0.125) * 28672 * 8192 / 3e12 / 41e-6
    assert f"| 41.0; 2.44; {share:.2f} |" in text
    assert "| 28672 x 8192 | 2.16x | 2.44x | 1.79x | 0.96x | 0.18x |" in text
    assert "| 8192 x 8192 | wanda | 60.0% | 16 | 52.0 | 1.040 | 1.92x |" in text
    assert "| 1 x 2, 60%: pack_gbps | 700 |" in text
    assert "| launch: kernel_us | 9 |" in text
    assert "| 28672 x 8192 | 2.16x | 1.22x | 0.89x | 0.48x | 0.09x |" in text  # FP8


def test_tokens_that_a_shape_lacks_stay_empty() -> None:
    rows = [row(LARGEST, 1, 0.6, 50.0), row(SMALL, 8, 0.6, 50.0)]
    table = speedups_over_tokens(rows, (1, 8, 16), "M x K").splitlines()
    assert table[0] == "| M x K | byte limit | N = 1 | N = 8 |"
    assert table[2:] == ["| 28672 x 8192 | 2.16x | 2.00x |  |", "| 4096 x 4096 | 2.16x |  | 2.00x |"]


@pytest.mark.parametrize(
    ("device", "shape", "sparsity", "n", "expected"),
    [
        (H100, LARGEST, 0.6, 8, 2.1),
        (H100, LARGEST, 0.6, 64, 1.7),
        (H100, LARGEST, 0.3, 16, 1.2),
        (H100, LARGEST, 0.3, 32, None),
        (H100, LARGEST, 0.6, 48, 0.98),
        (H100, LARGEST, 0.6, 2048, 0.98),
        (H100, (8192, 8192), 0.6, 128, 1.15),
        (H100, (8192, 8192), 0.4, 1, 1.2),
        (H100, SMALL, 0.3, 1, 1.0),
        (H100, (5120, 5120), 0.6, 1, 0.98),
        (H100, (5120, 512), 0.6, 1, None),
        (H200, LARGEST, 0.7, 16, 2.1),
        (H200, LARGEST, 0.7, 32, 0.98),
    ],
)
def test_targets(device: str, shape: tuple[int, int], sparsity: float, n: int, expected: float | None) -> None:
    assert target(device, row(shape, n, sparsity, 1.0)) == expected


def test_missed_targets_are_listed(sweep: Sweep) -> None:
    rows = [row(LARGEST, 1, 0.6, 50.0), row(LARGEST, 16, 0.6, 47.0), row((100, 100), 1, 0.6, 900.0)]
    wanted, short = missed(H100, rows)
    assert wanted == 2
    assert [(aim, found["n"]) for aim, found in short] == [(2.1, 1)]
    assert "| 28672 x 8192 | random | float16 | 60% | 64 | 1.70x | 0.96x |" in report(sweep)


def test_plots_name_the_results_that_they_show(sweep: Sweep) -> None:
    pytest.importorskip("matplotlib")
    write(sweep)
    assert sweep.path.with_suffix(".md").read_text() == report(sweep)
    first = {name: sweep.path.with_name(name).read_bytes() for name in PLOTS}
    for content in first.values():
        assert sweep.digest.encode() in content
        assert len(content) < 100_000
        texts = " ".join(ElementTree.fromstring(content).itertext())
        assert H100 in texts
        assert "byte limit" in texts
    write(sweep)
    assert first == {name: sweep.path.with_name(name).read_bytes() for name in PLOTS}


def test_without_a_read_bandwidth_there_is_no_share(sweep: Sweep) -> None:
    del sweep.environment["read_bandwidth"]
    assert sweep.plots() == ["speedup_sparsity.svg", "speedup_tokens.svg"]
    assert "| 41.0; 2.44 |" in report(sweep)
