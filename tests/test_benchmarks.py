"""The benchmarks' table of cases, the peers' answers, the gate's verdicts, the report.

Nothing here measures. What is timed is made up, so that the verdicts can be known.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from itertools import chain, groupby, repeat
from typing import Any

import numpy as np
import pytest

from benchmarks import cases, ceiling, gate, instructions, report
from benchmarks import statistics as full_size
from fastnorm._bench import copying, peers, text, timing
from fastnorm._bench.cases import Case, data

from .helpers import ROOT, run_python

pytestmark = pytest.mark.slow

ALL = (*cases.CASES, *cases.OUT, *cases.CLIFF, *cases.GATE)

# --- Cases and peers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "table", [cases.CASES, cases.OUT, cases.THREADS, cases.CLIFF, cases.GATE, gate.names()]
)
def test_names_differ(table: Any) -> None:
    names = [str(case) for case in table]
    assert len(set(names)) == len(names)


def test_the_readme_shows_cases_of_the_table() -> None:
    assert set(cases.SHOWN) <= set(cases.CASES)


@pytest.mark.parametrize("case", dict.fromkeys(case.cut(8) for case in ALL), ids=str)
def test_fastnorm_is_called_rightly(case: Case) -> None:
    arrays = data(case)
    peers.checked("fastnorm", case, arrays, peers.reference(case, arrays))
    lies_last = arrays.x.strides[1] == arrays.x.itemsize < arrays.x.strides[-1]
    assert lies_last == case.channels_last


def test_sizes_go_up_by_doubling_from_64_kB_to_2_GB() -> None:
    sizes = sorted({case.bytes for case in cases.CLIFF})
    assert sizes == [2**power for power in range(16, 32)]


@pytest.mark.parametrize(
    "arguments", [("numpy", "torch", "onnxruntime"), ("--every", "7", "jax")], ids=" ".join
)
def test_peers_are_right(arguments: tuple[str, ...]) -> None:
    """In a process of their own, where their threads are in nobody's way."""
    ran = run_python("-m", "benchmarks.peers", *arguments, JAX_PLATFORMS="cpu")
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_wrong_peer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.CASES[0]
    arrays = data(case)
    exact = peers.reference(case, arrays)
    answers = [exact[0] * 1.001]
    for name in ("numpy", "fastnorm"):
        wrong = peers.Peer(lambda: answers, lambda found: found)
        monkeypatch.setitem(peers.PEERS, name, lambda *_, wrong=wrong: wrong)
    with pytest.raises(peers.Absent, match=r"numpy is off by 1\.0e-03"):
        peers.checked("numpy", case, arrays, exact)
    with pytest.raises(AssertionError, match="fastnorm is off"):
        peers.checked("fastnorm", case, arrays, exact)


def test_the_copy_copies() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 10_007), np.uint8)
    with ThreadPoolExecutor(2) as pool:
        for move in (*ceiling.moves(2), copying.in_parts(pool, 3)):
            for start, stop in ((0, 10_007), (1, 10_000), (3, 70), (5, 5)):
                part = slice(start, stop)
                for second, right in ((None, a), (b, a ^ b)):
                    y = np.zeros_like(a)
                    move(y[part], a[part], None if second is None else second[part])
                    assert (y[part] == right[part]).all()
                    assert y.sum(dtype=int) == right[part].sum(dtype=int)  # and nothing else


# --- Timing ---------------------------------------------------------------------------------------


def test_everyone_has_a_turn_in_every_round() -> None:
    orders = list(timing.turns("abc", 7))
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len({tuple(order) for order in orders}) > 3


def test_contenders_compete_in_turn() -> None:
    order: list[str] = []
    contenders = {n: timing.Contender(partial(order.append, n)) for n in "ab"}
    rounds: list[int] = []
    timing.compete(contenders, 4, 1e-4, lambda: rounds.append(len(order)))
    assert len(rounds) == 4
    assert all(len(c.medians) == 4 and c.seconds > 0 for c in contenders.values())
    assert "".join(n for n, _ in groupby(order)) == "abababab"


def test_the_first_calls_of_a_block_are_not_counted() -> None:
    pauses = chain([0.02], repeat(0.002))
    contender = timing.Contender(lambda: time.sleep(next(pauses)))
    contender.block(0.01)
    contender.block(0.01)
    assert 0.002 <= contender.least <= contender.seconds < 0.02
    assert len(contender.medians) == 2


# --- The gate -------------------------------------------------------------------------------------


def verdict(measured: dict[str, Any], stored: dict[str, float]) -> list[str]:
    """Of ratios that are the same in each try, or a list of one for each."""
    told = {k: iter(v) if isinstance(v, list) else repeat(v) for k, v in measured.items()}
    pairs = {name: ratios.__next__ for name, ratios in told.items()}
    return gate.judge(pairs, stored, say=lambda text: None, pause=0)


def test_the_gate_passes_what_is_as_stored() -> None:
    assert verdict({"a": 1.0, "b": 2.2, "c": 1.0}, {"a": 1.0, "b": 2.0, "c": 4.0}) == []


def test_the_gate_fails_what_is_half_as_slow_again() -> None:
    assert verdict({"a": 1.5, "b": 2.0}, {"a": 1.0, "b": 2.0}) == ["a"]


def test_the_gate_tries_again() -> None:
    noisy = [1.5] * (gate.TRIES - 1) + [1.1]
    assert verdict({"a": noisy}, {"a": 1.0}) == []
    assert verdict({"a": [1.5] * gate.TRIES + [1.0]}, {"a": 1.0}) == ["a"]


def test_the_gate_does_not_trust_a_slow_yardstick() -> None:
    assert verdict({"a": [0.01, *[1.5] * (gate.TRIES - 1)]}, {"a": 1.0}) == ["a"]
    assert verdict({"a": 0.5}, {"a": 1.0}) == []  # after all tries it is good news


def test_the_gate_is_wider_on_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "processor", lambda: "another")
    assert gate.limit() == gate.ELSEWHERE
    pairs = {"a": lambda: 1.5, "b": lambda: 0.2, "c": lambda: 1.1 * gate.ELSEWHERE}
    stored = dict.fromkeys(pairs, 1.0)
    quiet: Any = {"say": lambda text: None, "pause": 0}
    assert gate.judge(pairs, stored, limit=gate.limit(), **quiet) == ["c"]


def test_the_gate_fails_what_is_not_stored_and_what_is_no_case() -> None:
    assert verdict({"a": 1.0, "new": 1.0}, {"a": 1.0}) == ["new"]
    assert verdict({"a": 1.0}, {"a": 1.0, "old": 1.0}) == ["old"]


def test_the_stored_files_hold_every_case() -> None:
    stored = gate.load()
    assert sorted(stored) == list(gate.LEVELS)
    for ratios in stored.values():
        assert ratios.keys() == gate.names().keys()
    counts = json.loads(instructions.STORED.read_text(encoding="utf-8"))["instructions"]
    assert counts.keys() == {str(case) for case in cases.GATE}


def test_a_processor_is_measured_with_what_it_has() -> None:
    stored = ["x86-64-v2", "x86-64-v3"]
    assert gate.chosen("x86-64-v4", stored) == stored
    assert gate.chosen("x86-64-v2", stored) == ["x86-64-v2"]
    assert gate.chosen("plain", stored) == []


def test_a_call_can_be_slowed_on_purpose() -> None:
    start = time.perf_counter()
    gate.slowed(lambda: time.sleep(0.03), 2.0)()  # after five to see how long it takes
    assert time.perf_counter() - start >= 7 * 0.03
    calls: list[None] = []
    slow = gate.slowed(lambda: calls.append(None), 1.5)
    calls.clear()
    for _ in range(10):
        slow()
    assert len(calls) == 15


def test_more_instructions_fail(capsys: pytest.CaptureFixture[str]) -> None:
    assert instructions.judge({"a": 104, "b": 106}, {"a": 100, "b": 100}) == ["b"]
    assert instructions.judge({"a": 1, "new": 1}, {"a": 1, "old": 1}) == ["new", "old"]
    capsys.readouterr()


# --- The report -----------------------------------------------------------------------------------

MACHINE = {
    "processor": "Imaginary 3000",
    "cores": 2,
    "threads": 2,
    "caches": {"L1": 32768, "L3": 2**25},
    "instruction set": "x86-64-v3",
    "system": "Linux x86_64",
    "python": "3.11.0",
    "versions": {"numpy": "2.0", "torch": None},
    "compiler": None,
    "date": "2026-01-01",
}


def speed(kind: str, case: str, **ratios: float) -> dict[str, Any]:
    return {
        "kind": kind,
        "case": case,
        "seconds": {"fastnorm": 2e-3, "copy": 1e-3} | {k: 2e-3 * v for k, v in ratios.items()},
        "spread": {},
        "ratios": ratios,
        "bytes": 2_000_000,
        "absent": {"jax": "jax is not installed"},
        "small": case.endswith("8x768"),
        "gigabytes_per_second": 1.0,
        "share_of_copy": 0.5,
    }


def cliff(function: str, name: str, share: float) -> dict[str, Any]:
    return speed("cliff", name) | {"function": function, "share_of_copy": share}


RESULTS = {
    "machine": MACHINE,
    "rows": [
        speed("forward", "layer_norm 8x768", torch=4.0, numpy=9.0),
        speed("forward", "layer_norm 4096x768", torch=2.0, numpy=0.5),
        speed("forward", "layer_norm 7x7", torch=8.0, numpy=9.0),
        speed("backward", "layer_norm 4096x768 backward", torch=1.5),
        speed("out", "layer_norm 8192x4096 out="),
        cliff("layer_norm", "layer_norm 16x1024", 0.5),
        cliff("group_norm", "group_norm 1x64x16x16", 0.9),
        cliff("layer_norm", "layer_norm 32x1024", 0.4),
        {
            "kind": "import",
            "case": "import fastnorm",
            "seconds": {"fastnorm": 0.12, "import numpy": 0.1},
            "spread": {},
            "ratios": {"import numpy": 0.1 / 0.12},
        },
    ],
}


def measured(what: str, results: dict[str, Any] = RESULTS) -> float | None:
    (demand,) = [demand for demand in report.DEMANDS if demand.what == what]
    return demand.measured(results["rows"])


def test_the_report_shows_every_row_and_marks_the_losing_ones() -> None:
    page = report.render(RESULTS)
    assert "| ▼ layer_norm 4096x768 | 2 ms | 1.0 | 0.50 | 2.00 | – | **0.50** |" in page
    assert "| layer_norm 8x768 | 2 ms | 1.0 | 0.50 | 4.00 | – | 9.00 |" in page
    assert page.count("▼ l") == 1
    assert "jax: jax is not installed" in page
    for row in RESULTS["rows"]:
        assert row["case"] in page
    assert "Imaginary 3000, 2 cores" in page


def test_the_summary_has_what_was_asked() -> None:
    assert measured("forward, geometric mean, PyTorch") == pytest.approx(4.0)
    assert measured("forward, least, any peer") == 0.5
    assert measured("calls up to 8x768, least, PyTorch") == 4.0
    assert measured("size doubled, highest rise over the copy") == pytest.approx(1.25)
    assert measured("import over import numpy") == pytest.approx(1.2)
    assert measured("all threads over one, in cache, least") is None
    page = report.summary(RESULTS["rows"])
    assert "| forward, least, any peer | ≥ 1.0 | 0.50 | **no** |" in page
    assert "| import over import numpy | ≤ 1.25 | 1.20 | yes |" in page
    assert "| all threads over one, in cache, least | ≥ 1.7 | – | not measured |" in page


def test_the_readme_keeps_its_markers() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    once = report.insert(readme, report.compact(RESULTS, "benchmarks/results/x.md"))
    assert report.insert(once, "") == report.insert(readme, "")
    assert once.count(report.BEGIN) == once.count(report.END) == 1
    table = once[once.index(report.BEGIN) : once.index(report.END)]
    assert "| layer_norm 8x768 |" in table  # shown always
    assert "| ▼ layer_norm 4096x768 |" in table  # and what is lost
    assert "layer_norm 7x7" not in table
    assert "in 1," in table
    with pytest.raises(SystemExit, match="markers"):
        report.insert("no markers", "")


def test_results_survive_being_written(tmp_path: Any) -> None:
    path = tmp_path / "results.json"
    path.write_text(report.dump(RESULTS), encoding="utf-8")
    again = report.load(path)
    assert report.render(again) == report.render(RESULTS)
    benchmarks = [{"extra_info": row} for row in RESULTS["rows"]] + [{"extra_info": {}}]
    path.write_text(json.dumps({"machine_info": MACHINE, "benchmarks": benchmarks}))
    assert report.load(path) == again


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1.5, "1.5 s"),
        (0.0123, "12.3 ms"),
        (123.4e-6, "123 µs"),
        (9.999e-6, "10 µs"),
        (5e-8, "50 ns"),
    ],
)
def test_seconds(value: float, words: str) -> None:
    assert text.seconds(value) == words


# --- Statistics at full size ----------------------------------------------------------------------


def test_what_statistics_are_held_against_is_exact() -> None:
    x = np.random.default_rng(0).normal(1e6, 1.0, 2500).astype(np.float32)
    numbers = [Fraction(float(v)) for v in x]
    mean = sum(numbers) / len(numbers)
    var = sum((v - mean) ** 2 for v in numbers) / len(numbers)
    for found, right in zip(full_size.exact(x), (mean, var)):
        assert abs(Fraction(float(found)) / right - 1) < 1e-15
    chunk = full_size.chunk({None: {"chunk-location": (1, 0)}})
    assert chunk.shape == (full_size.ROWS, 1024)
    np.testing.assert_array_equal(chunk[-full_size.PERIOD :], full_size.rows_of(1))
