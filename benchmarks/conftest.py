"""How pytest-benchmark is used here: `compare` runs contenders in turn and keeps their figures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from fastnorm._bench import machine
from fastnorm._bench.rows import Row, row
from fastnorm._bench.timing import BLOCK, ROUNDS, Contender, turns

from . import native
from .report import describe

LINE = pytest.StashKey[str]()
BUSY = pytest.StashKey[float | None]()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Progress(config))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore"))  # the peers' are not this project's
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


def pytest_sessionstart(session: pytest.Session) -> None:
    if not session.config.option.collectonly:
        session.config.stash[BUSY] = machine.busy()


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info.clear()  # it holds the machine's name
    machine_info.update(machine.facts())
    machine_info.update(compiler=native.version(), busy=config.stash[BUSY])


# --- Contenders in turn ---------------------------------------------------------------------------


class Clock:
    """What pytest-benchmark reads as time: it goes on by the median of a block, in seconds a call.

    So pytest-benchmark's own statistics are of calls, too, whose number in a block differs.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., Row]:
    """Run contenders in turn, the first of them as pytest-benchmark's target; keep a row."""

    def run(
        kind: str,
        case: Any,
        contenders: dict[str, Contender],
        *,
        rounds: int = ROUNDS,
        seconds: float = BLOCK,
        **more: Any,
    ) -> Row:
        own, *others = contenders
        orders = turns(others, rounds)

        def peers() -> None:
            for name in next(orders):
                contenders[name].block(seconds)

        def target() -> None:
            CLOCK.now += contenders[own].block(seconds)

        benchmark.group = kind
        benchmark.pedantic(target, setup=peers, rounds=rounds)
        figures = row(kind, str(case), contenders, **more)
        benchmark.extra_info.update(figures)
        request.config.stash[LINE] = describe(figures)
        return figures

    return run


# --- Progress -------------------------------------------------------------------------------------


class Progress:
    """A bar on a terminal, otherwise a line for each case."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.done = self.total = 0
        self.bar: Any = None

    def _terminal(self) -> Any:
        """What is printed inside is not captured."""
        return self.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled()

    @staticmethod
    def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
        passed = report.when == "call" and report.passed
        return ("passed", "", "") if passed else None  # instead of a dot

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.total = len(session.items)
        with self._terminal():
            if not sys.stderr.isatty() or self.config.option.collectonly:
                return
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=self.total, unit="case", dynamic_ncols=True)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.done += 1
        line = self.config.stash.get(LINE, nodeid.rpartition("::")[2])
        self.config.stash[LINE] = ""
        with self._terminal():
            if self.bar is not None:
                self.bar.write(line, file=sys.stderr)
                self.bar.update()
            else:
                print(f"[{self.done}/{self.total}] {line}", flush=True)

    def pytest_sessionfinish(self) -> None:
        if self.bar is not None:
            with self._terminal():
                self.bar.close()
