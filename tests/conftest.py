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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="a choice of the tests that takes below 90 seconds"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests first: one process begins with them, and others take over the rest meanwhile.

    With --quick, leave out what is slow, and all but one case of each test.
    """
    if not config.getoption("--quick"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        compiles = any(isinstance(value, str) and value == "numba" for value in values)
        if item.get_closest_marker("slow") is None and not compiles:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {found[len(found) // 2] for found in cases.values()}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "each_cpu: runs again, in its own process, for every other instruction set built"
    )
    config.addinivalue_line("markers", "slow: takes seconds; begun first, and left out by --quick")


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
