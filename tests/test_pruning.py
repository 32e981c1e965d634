"""Pruning one matrix: which weights go, what becomes of the others, and what each method gains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spinfer.errors import SpinferError
from spinfer.pruning import Pattern, inverse_factor, prune_magnitude_, prune_sparsegpt_, prune_wanda_
from spinfer.pruning.statistics import InputStatistics


def layer(rows: int = 96, columns: int = 256, tokens: int = 1024, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and inputs whose features differ in size and depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    scales = torch.rand(columns, generator=generator) * 3 + 0.05
    inputs = torch.randn(tokens, columns, generator=generator) @ (torch.eye(columns) + mixing) * scales
    return torch.randn(rows, columns, generator=generator), inputs


def hessian(inputs: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return inputs.to(dtype).t() @ inputs.to(dtype)


def output_error(pruned: Tensor, weight: Tensor, inputs: Tensor) -> float:
    """Squared error of the layer's output, relative."""
    exact = inputs.double() @ weight.double().t()
    return float((inputs.double() @ pruned.double().t() - exact).square().sum() / exact.square().sum())


def groups_of(weight: Tensor, pattern: Pattern) -> Tensor:
    """Nonzeros in each group of a pattern."""
    return (weight != 0).view(weight.shape[0], -1, pattern.group).sum(-1)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude_zeros_the_smallest(sparsity: float, dtype: torch.dtype) -> None:
    weight = torch.randn(40, 50).to(dtype)
    original = weight.clone()
    assert prune_magnitude_(weight, sparsity) is weight
    kept = weight != 0
    assert int((~kept).sum()) == int(sparsity * weight.numel())
    assert torch.equal(weight[kept], original[kept])
    if sparsity:
        assert original[~kept].abs().max() <= original[kept].abs().min()


def test_ties_still_give_the_exact_count() -> None:
    weight = torch.ones(10, 10)
    assert int((prune_magnitude_(weight, 0.37) == 0).sum()) == 37


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 2.0, float("nan")])
def test_sparsity_out_of_range(sparsity: float) -> None:
    weight, inputs = layer(4, 8)
    for prune in (
        lambda: prune_magnitude_(weight, sparsity),
        lambda: prune_wanda_(weight, torch.ones(8), sparsity),
        lambda: prune_sparsegpt_(weight, inverse_factor(hessian(inputs)), sparsity),
    ):
        with pytest.raises(SpinferError, match="sparsity"):
            prune()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_wanda_compares_within_rows(dtype: torch.dtype) -> None:
    weight, inputs = layer()
    weight = weight.to(dtype)
    original, norms = weight.clone(), inputs.norm(dim=0)
    prune_wanda_(weight, norms, 0.4)
    scores = original.float().abs() * norms
    for row in range(weight.shape[0]):
        gone = weight[row] == 0
        assert int(gone.sum()) == int(0.4 * weight.shape[1])
        assert scores[row][gone].max() <= scores[row][~gone].min()
    assert torch.equal(weight[weight != 0], original[weight != 0])


def exact_solution(weight: Tensor, mask: Tensor, inputs: Tensor, damping: float) -> Tensor:
    """The best weights with these zeros, row by row, in float64."""
    matrix = hessian(inputs, torch.float64)
    matrix += damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)
    solution = torch.zeros_like(weight, dtype=torch.float64)
    for row, kept in enumerate(~mask):
        target = matrix[kept] @ weight[row].double()
        solution[row, kept] = torch.linalg.solve(matrix[kept][:, kept], target)
    return solution


def test_sparsegpt_beats_the_others_and_nears_the_optimum_of_its_mask() -> None:
    weight, inputs = layer()
    pruned = prune_sparsegpt_(weight.clone(), inverse_factor(hessian(inputs)), 0.5)
    assert (pruned == 0).float().mean() == pytest.approx(0.5, abs=1e-3)
    mine = output_error(pruned, weight, inputs)
    wanda = output_error(prune_wanda_(weight.clone(), inputs.norm(dim=0), 0.5), weight, inputs)
    magnitude = output_error(prune_magnitude_(weight.clone(), 0.5), weight, inputs)
    optimum = output_error(exact_solution(weight, pruned == 0, inputs, 0.01), weight, inputs)
    # The weights left of a removed one are not updated any more, so the optimum of the mask is not reached.
    assert optimum < mine < 0.8 * wanda
    assert wanda < magnitude


def test_sparsegpt_removes_one_weight_as_the_optimal_brain_surgeon_does() -> None:
    """With one column to prune, its first, the update has a closed form: w - w_0 / C_00 C[0], with C = H^-1."""
    weight, inputs = layer(rows=1, columns=64)
    weight[0, 0] = 1e-6  # the cheapest of all
    inverse = torch.linalg.inv(
        hessian(inputs, torch.float64)
        + 0.01 * hessian(inputs, torch.float64).diagonal().mean() * torch.eye(64, dtype=torch.float64)
    )
    expected = weight.double() - weight[0, 0].double() / inverse[0, 0] * inverse[0]
    expected[0, 0] = 0
    pruned = prune_sparsegpt_(weight.double(), inverse_factor(hessian(inputs, torch.float64)), 1 / 64)
    assert int((pruned == 0).sum()) == 1
    assert torch.allclose(pruned, expected, rtol=1e-9, atol=1e-15)


def test_sparsegpt_in_float32_agrees_with_float64() -> None:
    weight, inputs = layer()
    single = prune_sparsegpt_(weight.clone(), inverse_factor(hessian(inputs)), 0.5)
    double = prune_sparsegpt_(weight.double(), inverse_factor(hessian(inputs, torch.float64)), 0.5)
    same = (single == 0) == (double == 0)
    assert same.float().mean() > 0.999
    assert output_error(single, weight, inputs) == pytest.approx(output_error(double, weight, inputs), rel=1e-3)


@pytest.mark.parametrize("columns", [64, 100, 300])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_sparsegpt_of_any_width(columns: int, sparsity: float) -> None:
    weight, inputs = layer(rows=40, columns=columns)
    pruned = prune_sparsegpt_(weight.clone(), inverse_factor(hessian(inputs)), sparsity)
    widths = [min(128, columns - begin) for begin in range(0, columns, 128)]
    assert int((pruned == 0).sum()) == sum(int(sparsity * 40 * width) for width in widths)
    if not sparsity:
        assert torch.equal(pruned, weight)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8)])
def test_patterns_hold_in_every_group(pattern: Pattern) -> None:
    weight, inputs = layer()
    factor = inverse_factor(hessian(inputs))
    results = {
        "magnitude": prune_magnitude_(weight.clone(), pattern.sparsity, pattern),
        "wanda": prune_wanda_(weight.clone(), inputs.norm(dim=0), pattern.sparsity, pattern),
        "sparsegpt": prune_sparsegpt_(weight.clone(), factor, pattern.sparsity, pattern),
    }
    for name, pruned in results.items():
        assert (groups_of(pruned, pattern) == pattern.kept).all(), name
    errors = {name: output_error(pruned, weight, inputs) for name, pruned in results.items()}
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


def test_a_pattern_keeps_the_largest_of_each_group() -> None:
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.0, 0.0, 5.0, -6.0]])
    pruned = prune_magnitude_(weight, 0.5, Pattern(2, 4))
    assert pruned.tolist() == [[0.0, -4.0, 3.0, 0.0, 0.0, 0.0, 5.0, -6.0]]


def test_a_pattern_that_does_not_fit() -> None:
    weight, inputs = layer(4, 30)
    factor = inverse_factor(hessian(inputs))
    for prune in (
        lambda: prune_magnitude_(weight, 0.5, Pattern(2, 4)),
        lambda: prune_wanda_(weight, torch.ones(30), 0.5, Pattern(2, 4)),
        lambda: prune_sparsegpt_(weight, factor, 0.5, Pattern(2, 4)),
    ):
        with pytest.raises(SpinferError, match="no multiple of 4"):
            prune()


@pytest.mark.parametrize("text", ["2", "2:", "2:2", "0:4", "4:2", "a:b", "-1:4", "2:4:8"])
def test_malformed_patterns(text: str) -> None:
    with pytest.raises(SpinferError, match="N:M"):
        Pattern.parse(text)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("already", [0.3, 0.7])
def test_zeros_that_are_there_stay_and_count(method: str, already: float) -> None:
    weight, inputs = layer()
    generator = torch.Generator().manual_seed(5)
    zeros = torch.rand(weight.shape, generator=generator) < already
    weight[zeros] = 0
    pruned = prune(method, weight.clone(), inputs, 0.5)
    assert (pruned[zeros] == 0).all()
    assert float((pruned == 0).float().mean()) == pytest.approx(max(0.5, already), abs=0.02)
    patterned = prune(method, weight.clone(), inputs, 0.5, Pattern(2, 4))
    assert (patterned[zeros] == 0).all()
    assert (groups_of(patterned, Pattern(2, 4)) <= 2).all()


def test_sparsegpt_may_change_a_weight_that_happens_to_be_zero() -> None:
    """As it may change one that is nearly zero."""
    weight, inputs = layer()
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(6)) < 0.008] = 0
    nearly = weight.masked_fill(weight == 0, 1e-30)
    expected = prune("sparsegpt", nearly, inputs, 0.5)
    assert torch.equal(prune("sparsegpt", weight, inputs, 0.5), expected)


def prune(method: str, weight: Tensor, inputs: Tensor, sparsity: float, pattern: Pattern | None = None) -> Tensor:
    if method == "magnitude":
        return prune_magnitude_(weight, sparsity, pattern)
    if method == "wanda":
        return prune_wanda_(weight, inputs.norm(dim=0), sparsity, pattern)
    return prune_sparsegpt_(weight, inverse_factor(hessian(inputs)), sparsity, pattern)


def test_dead_inputs() -> None:
    """Wanda takes their weights first, SparseGPT all of them; neither minds."""
    weight, inputs = layer()
    dead = torch.zeros(weight.shape[1], dtype=torch.bool)
    dead[::5] = True
    inputs[:, dead] = 0
    factor = inverse_factor(hessian(inputs))
    assert torch.equal(factor.dead, dead)
    wanda = prune_wanda_(weight.clone(), inputs.norm(dim=0), 0.5)
    sparsegpt = prune_sparsegpt_(weight.clone(), factor, 0.5)
    for pruned in (wanda, sparsegpt):
        assert (pruned[:, dead] == 0).all()
        assert float((pruned == 0).float().mean()) == pytest.approx(0.5, abs=1e-2)
    assert output_error(sparsegpt, weight, inputs) < output_error(wanda, weight, inputs)


def test_an_input_that_is_always_zero_everywhere() -> None:
    weight = torch.randn(8, 16)
    factor = inverse_factor(torch.zeros(16, 16))
    assert factor.dead.all()
    assert (prune_sparsegpt_(weight, factor, 0.5) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32])
def test_half_precision_hessians_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(SpinferError, match="sum it in float32"):
        inverse_factor(torch.eye(4).to(dtype))


def test_half_precision_inputs_are_summed_in_float32() -> None:
    inputs = torch.full((4096, 8), 300.0, dtype=torch.float16)  # 4096 * 300^2 is far beyond float16
    for wanted in (True, False):
        statistics = InputStatistics(8, torch.device("cpu"), hessian=wanted)
        statistics.add(inputs[:1000].view(10, 100, 8))
        statistics.add(inputs[1000:])
        assert statistics.tokens == 4096
        assert statistics.norms.tolist() == pytest.approx([300.0 * 64] * 8, rel=1e-4)
    assert statistics.hessian is None


def test_the_inverse_factor_against_float64() -> None:
    _, inputs = layer()
    exact = hessian(inputs, torch.float64)
    exact += 0.01 * exact.diagonal().mean() * torch.eye(len(exact), dtype=torch.float64)
    factor = inverse_factor(hessian(inputs))
    upper = factor.upper.double()
    assert factor.damping == 0.01
    assert torch.equal(upper, upper.triu())
    inverse = torch.linalg.inv(exact)
    assert (upper.t() @ upper - inverse).norm() < 1e-4 * inverse.norm()


def test_more_damping_where_it_is_needed() -> None:
    """A matrix that is not positive definite until a tenth of its mean diagonal is added."""
    matrix = torch.eye(32)
    matrix[0, 1] = matrix[1, 0] = 1.05
    assert inverse_factor(matrix.clone()).damping == pytest.approx(0.1)
    matrix[0, 1] = matrix[1, 0] = 1.5
    assert inverse_factor(matrix.clone()).damping == pytest.approx(1.0)


def test_no_factor_at_all() -> None:
    matrix = torch.eye(32)
    matrix[0, 1] = matrix[1, 0] = 3.0
    with pytest.raises(SpinferError, match="more varied text, or prune this Linear by wanda"):
        inverse_factor(matrix)


def test_fewer_tokens_than_inputs() -> None:
    """The Hessian is singular; damping makes it solvable."""
    weight, inputs = layer(tokens=20)
    pruned = prune_sparsegpt_(weight.clone(), inverse_factor(hessian(inputs)), 0.5)
    assert output_error(pruned, weight, inputs) < output_error(prune_magnitude_(weight.clone(), 0.5), weight, inputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(value: float) -> None:
    _, inputs = layer()
    inputs[3, 7] = value
    with pytest.raises(SpinferError, match="NaN or infinity"):
        inverse_factor(hessian(inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_keep_their_type(dtype: torch.dtype) -> None:
    weight, inputs = layer()
    half = weight.to(dtype)
    pruned = prune_sparsegpt_(half.clone(), inverse_factor(hessian(inputs)), 0.5)
    assert pruned.dtype == dtype
    assert output_error(pruned, half, inputs) == pytest.approx(
        output_error(prune_sparsegpt_(half.float(), inverse_factor(hessian(inputs)), 0.5), half, inputs), rel=0.02
    )


def test_views_are_pruned_in_place() -> None:
    """An expert is a slice of a larger tensor."""
    weight, inputs = layer()
    stack = torch.stack([weight, weight + 1, weight])
    prune_sparsegpt_(stack[1], inverse_factor(hessian(inputs)), 0.5)
    assert torch.equal(stack[0], weight)
    assert torch.equal(stack[2], weight)
    assert float((stack[1] == 0).float().mean()) == 0.5
