"""Fixtures, the hypothesis profile, and the rule that CI runs the tests against PyTorch."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

import fastnorm as fn

from .helpers import BACKENDS

# The same examples in every run, on machines of any speed.
settings.register_profile("fastnorm", derandomize=True, deadline=None, database=None)
settings.load_profile("fastnorm")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "each_cpu: runs again, in its own process, for every other instruction set built"
    )


def pytest_sessionstart() -> None:
    # Also for tests that would skip themselves, with pytest.importorskip.
    if os.environ.get("FASTNORM_REQUIRE_TORCH") and importlib.util.find_spec("torch") is None:
        raise pytest.UsageError("FASTNORM_REQUIRE_TORCH is set and PyTorch is not installed")


@pytest.fixture(scope="session")
def torch() -> Any:
    """PyTorch; without it the test is skipped, or with FASTNORM_REQUIRE_TORCH nothing runs."""
    return pytest.importorskip("torch")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend at hand, in use."""
    with fn.backend(request.param):
        yield request.param
