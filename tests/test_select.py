"""The selection function: pure, within its budgets, and total over any architecture's shapes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spinfer.errors import FormatError
from spinfer.kernels.select import Problem, select
from support import DTYPES

BUDGET = {"cpu": 1 << 20, "cuda": 64 << 20}


@pytest.mark.parametrize(
    ("out_features", "in_features", "dtype", "device_type", "group_rows"),
    [
        (4096, 4096, torch.float16, "cpu", 2),  # 512 KiB a row of GroupTiles
        (4096, 4096, torch.float32, "cpu", 1),
        (14336, 4096, torch.float16, "cpu", 2),
        (4096, 14336, torch.float16, "cpu", 1),  # one row is over the budget: it is the least there is
        (576, 576, torch.bfloat16, "cpu", 9),  # all of it
        (1, 1, torch.float16, "cpu", 1),
        (4096, 4096, torch.float16, "cuda", 64),
        (28672, 8192, torch.float16, "cuda", 64),
        (100, 1 << 30, torch.float16, "cuda", 1),
    ],
)
def test_table(out_features: int, in_features: int, dtype: torch.dtype, device_type: str, group_rows: int) -> None:
    problem = Problem(1, out_features, in_features, nnz=0, dtype=dtype, device_type=device_type)
    assert select(problem).group_rows == group_rows


problems = st.builds(
    Problem,
    tokens=st.integers(1, 1 << 16),
    out_features=st.integers(1, 1 << 18),
    in_features=st.integers(1, 1 << 18),
    nnz=st.just(0),
    dtype=st.sampled_from(DTYPES),
    device_type=st.sampled_from(["cpu", "cuda"]),
)


@given(problems)
def test_within_the_budget_and_as_large_as_it_allows(problem: Problem) -> None:
    rows = select(problem).group_rows
    total = -(-problem.out_features // 64)
    row_nbytes = 64 * (-(-problem.in_features // 64) * 64) * problem.dtype.itemsize
    budget = BUDGET[problem.device_type]
    assert 1 <= rows <= total
    assert rows == 1 or rows * row_nbytes <= budget
    assert rows == total or (rows + 1) * row_nbytes > budget


@given(problems, st.integers(1, 1 << 16))
def test_pure_and_independent_of_the_batch(problem: Problem, tokens: int) -> None:
    """Panels change no result, but a batch-dependent choice would make one sequence's logits depend on its batch."""
    assert (
        select(problem) == select(dataclasses.replace(problem)) == select(dataclasses.replace(problem, tokens=tokens))
    )


def test_frozen() -> None:
    problem = Problem(1, 64, 64, nnz=0, dtype=torch.float16, device_type="cpu")
    for frozen in (problem, select(problem)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, dataclasses.fields(frozen)[0].name, 2)


def test_refuses_an_empty_matrix() -> None:
    with pytest.raises(FormatError, match="at least 1"):
        select(Problem(1, 0, 64, nnz=0, dtype=torch.float16, device_type="cpu"))
