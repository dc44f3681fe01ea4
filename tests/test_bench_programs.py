"""The programs of benchmarks/ that keep a page for each machine, on figures that are made up."""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cores, kept, layouts, load, models, shares, threads
from fastnorm._bench.cases import Case
from fastnorm.machine import MODELS, Machine
from fastnorm.runtime import on_machine

from .helpers import COMPILED

compiled = pytest.mark.skipif(not COMPILED, reason="the compiled kernels are timed")

LAYER = "layer_norm (normalized_shape)"


def facts(busy: float | None) -> dict[str, Any]:
    return {
        "processor": "Imaginary M9 (family 1, model 2)",
        "cores": 2,
        "threads": 2,
        "caches": {},
        "instruction set": "x86-64-v3",
        "system": "Linux x86_64",
        "python": "3.11",
        "versions": {},
        "date": "2026-11-28",
        "busy": busy,
    }


# --- What is kept ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("busy", "arguments", "written"),
    [
        (3.0, [], True),
        (None, [], True),
        (80.0, [], False),
        (80.0, ["--force"], True),
        (3.0, ["--short"], False),
    ],
)
def test_figures_of_a_busy_machine_are_not_kept(
    busy: float | None,
    arguments: list[str],
    written: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(kept, "RESULTS", tmp_path)
    given = kept.parser("some", "Some.").parse_args(arguments)
    rows = [{"case": "one", "seconds": 0.123456}]
    kept.keep("some", facts(busy), rows, ["a line"], given)
    out, err = capsys.readouterr()
    assert out.endswith("\na line\n")
    assert ("the machine was busy" in err) == (not written and "--short" not in arguments)
    names = {path.name for path in tmp_path.iterdir()}
    expected = {f"imaginary-m9-family-1-model-2-some.{kind}" for kind in ("md", "json")}
    assert names == (expected if written else set())
    if written:
        kept_there = json.loads((tmp_path / min(expected)).read_text(encoding="utf-8"))
        assert kept_there["rows"] == [{"case": "one", "seconds": 0.1235}]


# --- Models ---------------------------------------------------------------------------------------


@compiled
def test_models_that_decide_the_same_are_not_timed() -> None:
    with on_machine(Machine(l1=32 << 10, l2=1 << 20, l3=32 << 20, cores=2)):
        same = models.measured(Case(LAYER, (8, 768)), 1, 1e-4)
        assert same["seconds"] is None
        assert same["ratios"] == dict.fromkeys(MODELS, 1.0)
        row = models.measured(Case(LAYER, (1500, 1024)), 1, 1e-4)  # 6 MB
    assert list(row["otherwise"]) == ["laptop"]
    assert "non_temporal" in row["otherwise"]["laptop"]
    assert row["ratios"]["laptop"] != 1.0
    assert row["ratios"]["zen5"] == 1.0
    page = "\n".join(models.lines([row, same]))
    assert f"| {row['case']} | " in page
    assert "| 1 other cases |" in page
    assert page.count(" = ") == 1 + 4 + 5


def test_layouts_and_masks_are_timed_against_the_plain_call() -> None:
    for of, cases in (("first", layouts.layouts()), ("none", layouts.masks())):
        case, calls = next(iter(cases))
        assert of in calls
        one, found = layouts.ratios(calls, of, 1, 1e-4)
        assert one > 0
        assert set(found) == set(calls) - {of}
        row = {"case": case, "of": of, "seconds": 1.0, "ratios": dict.fromkeys(found, 1.5)}
        page = "\n".join(layouts.table([row], 1.4))
        assert page.count("**1.50**") == 3 * len(found)


def test_a_page_marks_what_costs_too_much() -> None:
    ratios = dict.fromkeys(MODELS, 1.0) | {"zen5": 1.5}
    row = {"case": "one", "seconds": 1.0, "otherwise": {"zen5": ["path"]}, "ratios": ratios}
    assert "| one | 1 s | **1.50** | = | = | = | = |" in models.lines([row])


# --- Threads --------------------------------------------------------------------------------------


def test_sizes_of_every_function() -> None:
    sizes = list(threads.sizes())
    assert sizes[0] == 1 << 10
    assert sizes[-1] == 64 << 20
    assert all(1.1 < b / a < 2.1 for a, b in pairwise(sizes))
    for of in threads.FUNCTIONS.values():
        for size in sizes:
            assert 0.5 < of(size).bytes / size <= 1


def test_a_curve_of_threads() -> None:
    rows = [
        {"asked": size, **threads.measured(name, of(size), 2, 1, 1e-4)}
        for size in (1024, 65536)
        for name, of in threads.FUNCTIONS.items()
    ]
    rows[0]["ratio"] = 1.5
    assert all(row["ratio"] > 0 for row in rows)
    page = threads.lines(rows, 2)
    assert any(line.startswith("| 1 kB | **1.50** | ") for line in page)
    assert page[-1].startswith("| at most | **1.50** | ")


# --- Load -----------------------------------------------------------------------------------------


def test_a_table_has_a_column_for_each_rival() -> None:
    forward, backward = load.CASES[0], load.CASES[5]
    assert backward.backward
    times = {"one thread": 4e-6, "two threads": 2e-6, "torch": 8e-6}
    rows = [
        {"load": 1, "case": str(forward), "times": times | {"onnxruntime": 6e-6}},
        {"load": 1, "case": str(backward), "times": times},
    ]
    head, _, first, second, means = load.table(rows)
    assert head.endswith("| two over one | torch over two | onnxruntime over two |")
    assert first.endswith("| 4 µs | 2 µs | 0.50 | 4.00 | 3.00 |")
    assert second.endswith("| 4 µs | 2 µs | 0.50 | 4.00 |  |")
    assert means == "| 1 | geometric mean | | | **0.50** | **4.00** | **3.00** |"


def test_contenders_beside_busy_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "RIVALS", ())
    found = load.mean_times(load.contenders(Case(LAYER, (8, 64))), 1e-3)
    assert set(found) == {"one thread", "two threads"}
    assert min(found.values()) > 0


@compiled
def test_shares_of_a_copy_by_size_and_load() -> None:
    rows = [{"load": load} | row for load in (0, 1) for row in shares.measured(16, 1e-3)]
    assert [row["function"] for row in rows] == ["layer_norm", "group_norm"] * 2
    assert all(row["bytes"] == 1 << 16 and min(row["times"].values()) > 0 for row in rows)
    rows[0]["times"] = {"copy": 3e-6, "fastnorm": 2e-6}
    head, _, group, layer = shares.table(rows)
    assert head == "| bytes of x | function | quiet | 1 busy |"
    assert group.startswith("| 64 kB | group_norm | ")
    assert layer.startswith("| 64 kB | layer_norm | 1.50 | ")


# --- Many cores -----------------------------------------------------------------------------------

# A core that takes 1 µs for a call, then 0.1 ns a byte in L2, 0.2 ns in the last cache and 0.4 ns
# beyond, of memory that gives two cores 1.5 times as much as one.
CURVE = {
    1 << i: 1e-6 + (1e-10 if i < 20 else 2e-10 if i < 24 else 4e-10) * (1 << i)
    for i in range(4, 28)
}
FACTS = cores.Facts({"layer": CURVE}, 10e9, 15e9, 2, 2e-6, 1 << 20, 32 << 20)


def shared(size: int, units: int = 1 << 20, merged: int = 0, most: int = 0) -> cores.Work:
    return cores.Work(size, units, most, merged, False, 2)


def test_one_thread_is_as_measured() -> None:
    for size in (1 << 10, 1 << 20, 1 << 26):
        assert cores.predicted(FACTS, "layer", shared(size), 1) == pytest.approx(CURVE[size])
        alone = shared(size, most=1)
        assert cores.predicted(FACTS, "layer", alone, 64) == pytest.approx(CURVE[size])
    assert CURVE[1 << 10] < FACTS.alone("layer", 1500) < CURVE[1 << 11]


@pytest.mark.parametrize(
    ("work", "threads", "expected"),
    [
        (shared(1 << 19), 2, 1e-6 + (1 << 18) * 1e-10 + 2e-6),  # each half in its own L2
        (shared(1 << 22), 2, 1e-6 + (1 << 21) * 2e-10 + 2e-6),  # in the cache that they share
        (shared(1 << 22), 8, 1e-6 + (1 << 19) * 1e-10 + 6e-6),  # eighths in L2 again
        (shared(1 << 26), 2, 1e-6 + (1 << 26) * 4e-10 / 1.5 + 2e-6),  # what memory gives two
        (
            shared(1 << 19, units=3),
            2,
            1e-6 + (1 << 20) / 3 * 1e-10 + 2e-6,
        ),  # one takes two of three
        (shared(1 << 19, units=1), 8, CURVE[1 << 19]),
        (shared(1 << 19, merged=10_000), 2, 1e-6 + (1 << 18) * 1e-10 + 3e-6),
    ],
)
def test_what_threads_gain(work: cores.Work, threads: int, expected: float) -> None:
    assert cores.predicted(FACTS, "layer", work, threads) == pytest.approx(expected, rel=0.02)


def test_a_curve_never_falls() -> None:
    assert cores.steadied({4: 3.0, 1: 1.0, 2: 9.0, 3: 2.0}) == {1: 1.0, 2: 2.0, 3: 2.0, 4: 3.0}


def test_sockets_give_what_they_have() -> None:
    by_all, by_one = (cores.socket(FACTS, 2, one) for one in (False, True))
    assert by_all(1) == by_one(1) == FACTS.copy_one
    assert by_one(64) == by_all(64) == cores.SOCKET_BYTES
    assert (by_one(128), by_all(128)) == (cores.SOCKET_BYTES, 2 * cores.SOCKET_BYTES)


@compiled
def test_schedules_say_what_is_shared() -> None:
    with on_machine(Machine(l2=1 << 20, l3=32 << 20)):
        small, large = (cores.work(threads.layer(size)) for size in (1 << 14, 1 << 24))
        back = cores.work(threads.backward(1 << 24))
    assert (small.max_threads, small.arrays) == (1, 2)
    assert (large.max_threads, large.units, large.bytes) == (0, 1 << 14, 1 << 24)
    assert large.non_temporal
    assert not small.non_temporal
    assert back.arrays == 3
    assert back.merged == 16 * back.units * 256


@compiled
def test_a_page_of_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "COPIED", 1 << 16)
    monkeypatch.setattr(cores, "EXAMPLES", {"layer, 1 MB": ("layer", 1 << 20)})
    facts = cores.measured(1, 1e-5, sizes=(1 << 10, 1 << 14))
    assert facts.copy_one > 0
    checked = cores.checks(facts, 1, 1e-5, (1 << 13,))
    assert {row["function"] for row in checked} == set(threads.FUNCTIONS)
    checked[0] |= {"measured": 1e-6, "predicted": 1.5e-6}
    ahead = cores.forecast(facts)
    page = cores.lines(facts, checked, ahead)
    assert any(line.endswith("| 1 µs | 1.5 µs | **50%** |") for line in page)
    assert "Computed, not measured" in "\n".join(page)
    assert all(row["faster"]["1"] == 1.0 for row in ahead)


def test_programs_say_what_they_do(capsys: pytest.CaptureFixture[str]) -> None:
    parser = kept.parser("models", models.__doc__)
    assert isinstance(parser, argparse.ArgumentParser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "--short" in capsys.readouterr().out
