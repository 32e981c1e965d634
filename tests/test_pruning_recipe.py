"""Recipes, allocation over the blocks, and the model card."""

from __future__ import annotations

import pytest
import torch

from spinfer.errors import SpinferError
from spinfer.pruning import Allocation, Method, Pattern, Recipe
from spinfer.pruning.allocation import outlier_share, owl_sparsities
from spinfer.pruning.card import pruned_card
from spinfer.pruning.report import BlockReport, MatrixReport, PruningReport


def test_defaults() -> None:
    recipe = Recipe.of()
    assert (recipe.method, recipe.sparsity, recipe.pattern, recipe.allocation) == (
        Method.SPARSEGPT,
        0.5,
        None,
        Allocation.UNIFORM,
    )


def test_a_pattern_says_the_sparsity() -> None:
    assert Recipe.of(pattern="1:4").sparsity == 0.75
    assert Recipe.of(pattern="2:4", sparsity=0.5).pattern == Pattern(2, 4)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"method": "obs"}, "method 'obs' is unknown; choose from magnitude, wanda, sparsegpt"),
        ({"allocation": "best"}, "allocation 'best' is unknown"),
        ({"sparsity": 1.0}, "0 <= sparsity < 1"),
        ({"sparsity": -0.5}, "0 <= sparsity < 1"),
        ({"sparsity": 50}, "0.5 for one half zeros"),
        ({"pattern": "2:4", "sparsity": 0.6}, "pattern 2:4 means sparsity 0.5"),
        ({"pattern": "2:4", "allocation": "owl"}, "fixes the sparsity of every block"),
    ],
)
def test_choices_that_cannot_be(choices: dict[str, object], message: str) -> None:
    with pytest.raises(SpinferError, match=message):
        Recipe.of(**choices)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "allocation", "needed"),
    [("magnitude", "uniform", False), ("magnitude", "owl", True), ("wanda", "uniform", True)],
)
def test_what_needs_calibration(method: str, allocation: str, needed: bool) -> None:
    assert Recipe.of(method=method, allocation=allocation).needs_calibration is needed


def test_outliers_are_counted_over_the_block() -> None:
    small, large = torch.ones(10, 10), torch.ones(10, 10)
    large[0, :5] = 1000
    mean = (195 + 5000) / 200
    assert outlier_share([small, large], 5.0) == 5 / 200
    assert outlier_share([small, large], 1000 / mean + 1) == 0


def test_owl_gives_outliers_room_and_keeps_the_whole() -> None:
    shares, weights = [0.01, 0.03, 0.02, 0.01], [100, 100, 100, 300]
    sparsities = owl_sparsities(shares, weights, 0.6)
    assert sparsities[1] < sparsities[2] < sparsities[0] == sparsities[3]
    assert max(sparsities) - min(sparsities) == pytest.approx(0.16)
    assert sum(s * w for s, w in zip(sparsities, weights, strict=True)) / sum(weights) == pytest.approx(0.6)


def test_owl_with_blocks_all_alike_is_uniform() -> None:
    assert owl_sparsities([0.02] * 5, [10] * 5, 0.7) == pytest.approx([0.7] * 5)


@pytest.mark.parametrize("sparsity", [0.01, 0.97])
def test_owl_where_there_is_no_room(sparsity: float) -> None:
    with pytest.raises(SpinferError, match="--allocation uniform"):
        owl_sparsities([0.0, 0.1, 0.5], [10, 10, 10], sparsity)


REPORT = PruningReport(
    Recipe.of().to_dict(),
    {"num_samples": 4},
    (BlockReport("model.layers.0", 0.5, (MatrixReport("model.layers.0.q", (2, 4), 1, 4, 64),), 0.25, 1.0),),
    {"lm_head": "output embedding"},
)


def test_the_card_keeps_the_original_and_its_metadata() -> None:
    card = pruned_card("tiny", REPORT, "---\nlicense: mit\ntags: [a]\n---\n\n# Tiny\n\nLimits.\n")
    assert card.startswith("---\nlicense: mit\ntags: [a]\n---\n# tiny, pruned with spinfer")
    assert card.endswith("\n# Tiny\n\nLimits.\n")
    assert '"method": "sparsegpt"' in card
    assert "50.00%" in card


@pytest.mark.parametrize("original", ["", "# Tiny\n", "---\nnever closed\n"])
def test_the_card_of_a_model_without_metadata(original: str) -> None:
    card = pruned_card("tiny", REPORT, original)
    assert card.startswith("---\nlibrary_name: transformers\n---\n# tiny")
    assert card.endswith(original)


def test_a_block_report_survives_json() -> None:
    block = REPORT.blocks[0]
    assert BlockReport.from_dict(block.to_dict()) == block
