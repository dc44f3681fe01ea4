"""Fixtures, the hypothesis profile, and the rule that in CI no test skips for want of a library."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

import fastnorm as fn

from .helpers import BACKENDS, REQUIRED

# The same examples in every run, on machines of any speed.
settings.register_profile("fastnorm", derandomize=True, deadline=None, database=None)
settings.load_profile("fastnorm")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "each_cpu: runs again, in its own process, for every other instruction set built"
    )


def pytest_sessionstart() -> None:
    # Also for tests that would skip themselves, with pytest.importorskip.
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise pytest.UsageError(f"FASTNORM_REQUIRE asks for {missing}, not installed here")


@pytest.fixture(scope="session")
def torch() -> Any:
    """PyTorch; without it the test is skipped, or where FASTNORM_REQUIRE has it nothing runs."""
    return pytest.importorskip("torch")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend at hand, in use."""
    with fn.backend(request.param):
        yield request.param
