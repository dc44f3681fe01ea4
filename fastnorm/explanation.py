"""How a call would be carried out: what `schedule` decides, in words, without running a kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import fastnorm as fn
from fastnorm._bench import cases
from fastnorm._files.names import CannotUse
from fastnorm.backends import recorder
from fastnorm.calls import case_of_text
from fastnorm.machine import MEASURED, Machine
from fastnorm.schedule import BackwardSchedule, ForwardSchedule, non_temporal_from

_WIDTH = 10  # of the names at the beginning of lines


def explain(
    call: str | Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    here: Machine,
    threads: int,
) -> list[Explanation]:
    """The passes over memory of a call."""
    asked = _asked_of_text(call) if isinstance(call, str) else _asked_of(call, args, kwargs)
    return [describe(each, here, threads) for each in asked]


def to_text(passes: list[Explanation], here: Machine) -> str:
    """What is printed."""
    caches = ", ".join(f"{name} {_bytes(size)}" for name, size in here.caches.items())
    of = f" for {here.l3_cores} cores" if here.l3 and here.l3_cores > 1 else ""
    blocks = [[("machine", f"{caches or 'no caches told'}{of}")]]
    for i, each in enumerate(passes, 1):
        first = [("pass", f"{i} of {len(passes)}")] if len(passes) > 1 else []
        blocks.append([*first, *each.lines])
    if not passes:
        blocks.append([("passes", "none: no kernel is asked")])
    return "\n".join(f"{name:{_WIDTH}}{text}" for block in blocks for name, text in block)


# --- What is asked --------------------------------------------------------------------------------


def _asked_of_text(text: str) -> list[recorder.Asked]:
    try:
        case = case_of_text(text)
    except CannotUse as error:
        raise ValueError(str(error)) from None
    data = cases.data(case, cases.blank)
    with np.errstate(all="ignore"), recorder.recording() as asked:
        if case.backward:
            name, args, kwargs = cases.gradient_arguments(case, data)
            asked.clear()
            getattr(fn, name)(*args, **kwargs)
        else:
            getattr(fn, case.operation.name)(data.x, **cases.arguments(case, data))
        return list(asked)


def _asked_of(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[recorder.Asked]:
    args, kwargs = tuple(map(_stand_in, args)), {k: _stand_in(v) for k, v in kwargs.items()}
    with np.errstate(all="ignore"), recorder.recording() as asked:
        function(*args, **kwargs)
        return list(asked)


def _stand_in(value: Any) -> Any:
    """An array that lies as another does, in memory of its own that nobody has touched."""
    if type(value) is not np.ndarray or not value.size:
        return value
    reach = [(n - 1) * step for n, step in zip(value.shape, value.strides)]
    before = -sum(r for r in reach if r < 0)
    size = before + sum(r for r in reach if r > 0) + value.itemsize
    return np.ndarray(value.shape, value.dtype, np.zeros(size, np.uint8), before, value.strides)


# --- In words -------------------------------------------------------------------------------------

_PATHS = {
    "rows": "each row from its sums to its result in one loop",
    "gathered": "short planes that lie apart are copied together first",
    "pipelined": "tiles of short groups: the sums of one while the one before is applied",
    "items": "moments of blocks, merged; then the step",
}
_PATHS_BACK = {
    "rows": "rows four at a time, from their sums to dx and the weights' gradients",
    "groups": "groups of planes, from their sums to dx",
    "items": "one after the other, from the sums to dx while they are in cache",
    "sweeps": "the sums of all, then dx of all: few large groups, or weights too many to keep",
}
_SHARING = {
    "alone": "so small that waking a second thread costs more",
    "static": "the same share each time: each finds its own in its cache",
    "dynamic": "take turns",
    "split": "few groups: all take splits of each",
}


@dataclass(frozen=True, slots=True)
class Explanation:
    """One pass: what a program may want of it, and lines for people."""

    facts: dict[str, Any]
    lines: list[tuple[str, str]]


def describe(asked: recorder.Asked, here: Machine, threads: int) -> Explanation:
    """One pass in words."""
    found = asked.schedule(here)
    sharing, used = found.sharing(threads), found.threads(threads)
    moved = _moved(asked, found, here, used)
    one = "the only one" if threads == 1 else _SHARING[sharing]
    stores = "non-temporal" if found.non_temporal else "usual"
    paths = _PATHS_BACK if asked.backward else _PATHS
    facts = {
        "backward": asked.backward,
        "path": found.path,
        "threads": used,
        "sharing": sharing,
        "stores": stores,
        "bytes": moved.bytes,
        "share of a copy": round(moved.share, 2),
        "numeric blocking": {
            name: getattr(found.blocking, name) for name in found.blocking.__dataclass_fields__
        },
    }
    lines = [
        ("walk", _walk(asked)),
        ("path", f"{found.path}: {paths[found.path]}"),
        ("tiles", _tiles(asked, found)),
        ("threads", f"{used}: {one}"),
        ("stores", f"{stores}: {_why_stores(asked, found, here)}"),
        ("numbers", _numbers(asked, found)),
        ("bytes", f"{moved.text}"),
        ("of a copy", f"{moved.share:.0%} at most: {moved.why}"),
    ]
    return Explanation(facts, lines)


def _bytes(n: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if n < 1024:
            return f"{n:.3g} {unit}" if n < 100 else f"{n:.0f} {unit}"
        n /= 1024
    return f"{n:.3g} GB"


def _walk(asked: recorder.Asked) -> str:
    a, b, p, s, c = asked.layout.dims
    if asked.layout.columns:
        together = f", {n} of them share a statistic" if (n := asked.layout.neighbours) > 1 else ""
        return f"strided: {a * b} times {p * s} rows of {c} columns{together}"
    planes = f"{p} runs of {s}" if p > 1 else f"{s}"
    return f"contiguous: {_number(a * b, 'group')} of {planes} elements"


def _number(n: int, what: str) -> str:
    """One row, or several rows."""
    return f"{n} {what}{'s' if n != 1 else ''}"


def _tiles(asked: recorder.Asked, found: ForwardSchedule | BackwardSchedule) -> str:
    what = "column" if asked.layout.columns else "group"
    if isinstance(found, BackwardSchedule):
        fixed = found.blocking
        items = _number(fixed.owners * fixed.sharers, "item")
        parts = f" in {_number(fixed.parts, 'part')}" if fixed.parts > 1 else ""
        shared = f", {fixed.sharers} share a weight{parts}" if fixed.sharers > 1 else ""
        segments = f", {fixed.segments} segments each" if fixed.segments > 1 else ""
        return f"{items} of {_number(fixed.width, what)}{shared}{segments}"
    unit = "rows" if asked.layout.columns else "elements"
    block = min(found.blocking.block, found.blocking.length)
    splits = f", {found.blocking.splits} splits each" if found.blocking.splits > 1 else ""
    items = f"{_number(found.items, 'item')} of {_number(found.width, what)}"
    return f"{items}, in blocks of {block} {unit}{splits}"


def _why_stores(
    asked: recorder.Asked, found: ForwardSchedule | BackwardSchedule, here: Machine
) -> str:
    x, last = _bytes(found.bytes), _bytes(here.last_cache)
    told = "" if here.last_cache == here.l3 else ", as is assumed"
    direct = (
        found.bf16_direct if isinstance(found, BackwardSchedule) else found.blocking.bf16_direct
    )
    if direct and not found.non_temporal:
        return f"x of {x} is converted on the way, which takes longer than memory"
    where = asked.layout.columns, asked.backward
    if any(name.startswith("non_temporal") for name in here.measured):
        least = non_temporal_from(here, *where)
        if least != non_temporal_from(here.with_measured(dict.fromkeys(MEASURED, 0)), *where):
            return f"x is {x}; non-temporal ones pay from {_bytes(least)} on, as measured"
    if found.non_temporal:
        return f"x of {x} goes through a last cache of {last}{told} with the result"
    return f"x is {x}, the last cache {last}{told}"


def _numbers(asked: recorder.Asked, found: ForwardSchedule | BackwardSchedule) -> str:
    types = dict(asked.dtypes)
    x = types["x"].name
    if "y" not in types and not asked.backward:
        native = x in ("float32", "float64") and "mask" not in types
        return f"{x}, {'in place' if native else 'through tiles'}"
    if isinstance(found, BackwardSchedule):
        direct = found.bf16_direct or x in ("float32", "float64")
        return f"{x}, {'in place' if direct else 'converted in tiles'}"
    if found.blocking.bf16_direct:
        return f"{x}, converted on the way"
    if found.direct or found.direct_non_temporal:
        return f"{x}, in place"
    return f"{x}, through tiles"


# --- Bytes ----------------------------------------------------------------------------------------

_READ = ("x", "dy", "residual", "addend", "mask")
_WRITTEN = ("y", "total", "dx")


@dataclass(frozen=True, slots=True)
class _Moved:
    """What goes between memory and the cores."""

    bytes: int
    share: float
    text: str
    why: str


def _moved(
    asked: recorder.Asked,
    found: ForwardSchedule | BackwardSchedule,
    here: Machine,
    threads: int,
) -> _Moved:
    """Bytes of arrays of x's size: read once or twice, and stored."""
    elements = found.bytes // dict(asked.dtypes)["x"].itemsize
    sizes = {name: elements * dtype.itemsize for name, dtype in asked.dtypes}
    read = sum(sizes[name] for name in _READ if name in sizes)
    written = sum(sizes[name] for name in _WRITTEN if name in sizes)
    fits = read + written <= here.last_cache
    again = 0
    if _is_read_twice(asked, found, here, threads) and not fits:
        again = read if asked.backward else sizes["x"]
    fetched = 0 if found.non_temporal or fits else written
    moved = read + again + written + fetched
    reasons = []
    if fits:
        reasons.append("all of it stays in the last cache")
    else:
        once = "what is read stays in a core's caches until it is applied"
        reasons.append("x is read twice, groups do not stay in cache" if again else once)
        if fetched:
            reasons.append("lines are fetched before they are stored to")
    parts = f"{_bytes(read)} read"
    parts += f", {_bytes(again)} read again" if again else ""
    parts += f", {_bytes(written)} stored" if written else ""
    parts += f", {_bytes(fetched)} fetched for stores" if fetched else ""
    return _Moved(moved, (read + written) / max(moved, 1), parts, "; ".join(reasons))


def _is_read_twice(
    asked: recorder.Asked, found: ForwardSchedule | BackwardSchedule, here: Machine, threads: int
) -> bool:
    """Whether a group has left the caches of its core when its moments are known."""
    if asked.options.get("given") or not asked.options.get("training", True):
        return False
    if "y" not in dict(asked.dtypes) and not asked.backward:
        return False
    arrays = 2 if asked.backward else 1  # x and dy
    width = found.blocking.width if isinstance(found, BackwardSchedule) else found.width
    item = width * found.blocking.length * dict(asked.dtypes)["x"].itemsize
    if found.sharing(threads) == "split":
        item = found.bytes // threads
    return item * arrays > here.near_cache
