"""What of the vLLM plugin can be tested without vLLM; tests/serving has the rest."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest

from spinfer.errors import SpinferError
from spinfer.integrations.vllm.versions import check_version


@pytest.mark.parametrize("version", ["0.26.0", "0.30.1", "0.32.0", "0.32.1+cpu", "0.29.0rc2.dev5"])
def test_tested_versions(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.25.1", "0.33.0", "1.0.0", "dev", ""])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(SpinferError, match=r"with vLLM 0\.26 to 0\.32, but vLLM .* is installed"):
        check_version(version)


def test_the_entry_point_is_light() -> None:
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    register = next(point for point in points if point.name == "spinfer").load()
    assert register.__module__ == "spinfer.integrations.vllm"
    assert "vllm" not in sys.modules
