"""Random calls, in processes of their own: a crash is a failure that names the call."""

from __future__ import annotations

import inspect
import math
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings

import fastnorm as fn
from fastnorm import schedule
from fastnorm.arguments import ACTIVATIONS

from . import test_backward  # noqa: F401  has @given, which may not be met first within another
from .fuzz.__main__ import run
from .fuzz.cases import (
    BAD,
    BY_LABEL,
    FLOATS,
    INTEGERS,
    OTHER_OPERANDS,
    SIZES,
    TARGETS,
    Case,
    cases,
    draw,
)
from .fuzz.checks import judge
from .helpers import BACKENDS

# 3,000 in all, the same in every run. Numba's take a process that has compiled before.
SHARES = {"cython": 2000, "numba": 400, "numpy": 600}


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_calls(backend: str) -> None:
    outcome = run(SHARES[backend], backend, "", seed=20)
    assert not outcome.story, outcome.story
    assert outcome.examples == SHARES[backend]


def test_sizes_go_beyond_every_block() -> None:
    """Whatever length a kernel does something else at, there are cases on either side of it."""
    lengths = {
        size
        for name, size in vars(schedule).items()
        # bytes of the sums of all threads are no length, nor are parts of a cache
        if name.isupper() and isinstance(size, int)
        if not name.endswith("_SUM_BYTES") and "_PARTS" not in name
    }
    assert len(lengths) > 10
    assert not {n for n in lengths if not {n, n + 1} <= set(SIZES)}


# Public names that compute nothing from an array.
SETTINGS = {
    "backend", "explain", "get_backend", "get_num_threads", "nn", "set_backend", "set_num_threads",
    "show_config", "threads", "trim_memory",
}  # fmt: skip
WEIGHTS = {"shared", "per sample", "some axes", "full"}
LAYOUTS = {
    "F", "last", "swapped", "front", "step", "pad", "flip", "odd", "extra", "misaligned", "swap",
    "repeated", "windows", "locked",
}  # fmt: skip


def kinds_of(case: Case) -> Iterator[tuple[str, object]]:
    op, shape = BY_LABEL[case["op"]], case["shape"]
    yield "function", op.name.partition(".")[0]
    if case.get("backward"):
        yield "function", op.backward or op.elementwise_backward
    for name, value in case.items():
        if name.endswith("layout"):
            yield from (("layout", key) for key in value if key not in ("axis", "order"))
            yield "layout", value.get("order")
    if "odd" in case["layout"] and 1 in shape:
        yield "layout", "odd, on an axis of length 1"
    yield "dtype", case["dtype"]
    for name in ("where", "weight", "bias", "activation", "out", "running"):
        yield name, case.get(name)
    yield from (("bad", name) for name, _ in case["bad"])
    yield from (("elsewhere", operand) for operand, *_ in case["bad elsewhere"])
    yield from (("threads", n) for n in case["threads"])
    yield from (("longer than", n) for n in (0, 4096, 27_700, 65_536) if max(shape) > n)
    yield "larger than 2**20", math.prod(shape) > 1 << 20
    yield from (("size", n) for n in shape if n < 2)
    if "stranger" in case:
        yield "stranger", case["stranger"][0]
    yield from ((name, case.get(name)) for name in ("residual", "return_stats", "known"))
    if case["weight scale"] != 1.0:
        of = case.get("weight"), "some" if case["weight scale here and there"] else "all"
        yield "weight out of range", of


def test_every_kind_of_call_is_drawn() -> None:
    """Of 3,000 cases: each function and layout, and whatever else may be wrong with an argument."""
    choose = random.Random(20).choice
    drawn = Counter(kind for _ in range(3000) for kind in kinds_of(draw(choose, functions=True)))
    wanted = {
        "function": {name for name in fn.__all__ if name not in SETTINGS},
        "layout": {*LAYOUTS, "odd, on an axis of length 1"},
        "dtype": {*FLOATS, *INTEGERS},
        "where": {"full", "last axis", "some axes", "nothing", "everything"},
        "weight": {*WEIGHTS, None},
        "bias": {*WEIGHTS, None},
        "activation": {*ACTIVATIONS, "function"},
        "out": {*TARGETS, "own", None},
        "running": {None, "float32", "float64"},
        "bad": set(BAD),
        "elsewhere": set(OTHER_OPERANDS),
        "threads": {1, 2, 8},
        "longer than": {0, 4096, 27_700, 65_536},
        "larger than 2**20": {True},
        "size": {0, 1},
        "stranger": {"x", "weight", "bias", "residual", "dy"},
        "residual": {*FLOATS, "x", None},
        "return_stats": {True},
        "known": {True, False},
        "weight out of range": {(of, n) for of in WEIGHTS for n in ("some", "all")},
    }
    missing = {(name, kind) for name, some in wanted.items() for kind in some} - drawn.keys()
    assert not missing


@pytest.mark.skipif("cython" not in BACKENDS, reason="no compiled kernels")
def test_calls_are_also_answered_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some calls of each function, with `out` and without it, are; and some are described."""
    seen: Counter[tuple[str, bool, bool]] = Counter()
    masked: set[str] = set()

    def watch(name: str, cell: Any, place: int, where: int) -> None:
        find = cell.cell_contents

        def watched(call: tuple[Any, ...]) -> Any:
            found = find(call)
            seen[name, place >= 0 and call[place] is not None, found is not None] += 1
            if found is not None and where >= 0 and call[where] is not None:
                masked.add(name)
            return found

        monkeypatch.setattr(cell, "cell_contents", watched)

    wanted = set()
    for name in fn.__all__:
        function = getattr(fn, name)
        free = getattr(getattr(function, "__code__", None), "co_freevars", ())
        if "find" in free:
            names = list(inspect.signature(function).parameters)
            place = names.index("out") if "out" in names else -1
            where = names.index("where") if "where" in names else -1
            watch(name, function.__closure__[free.index("find")], place, where)
            outs = (False, True) if place >= 0 else (False,)
            wanted |= {(name, out, answered) for out in outs for answered in (False, True)}
    with fn.backend("cython"):
        for seed in range(2000):
            judge(draw(random.Random(seed).choice, largest=3000))
    assert len(wanted) > 40
    missing = wanted - seen.keys()
    assert not missing
    assert masked >= {"layer_norm", "rms_norm", "group_norm"}  # instance norm is group norm


@settings(max_examples=25)
@given(cases(largest=3000))
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "numba"])  # which would compile
def test_the_same_as_a_strategy(backend: str, case: Case) -> None:
    """Hypothesis draws such cases, too, and makes a failing one small."""
    with fn.backend(backend):
        judge(case)
