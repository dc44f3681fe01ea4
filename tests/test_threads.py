"""Choices of backend and threads, how many threads there are, and many of Python's at once."""

from __future__ import annotations

import asyncio
import math
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from contextvars import copy_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import backends, limits, runtime
from fastnorm.operations import OPERATIONS
from fastnorm.workers import busy_processes

from .helpers import (
    BACKENDS,
    COMPILED,
    F16,
    F32,
    F64,
    assert_same_bits,
    call,
    channels_last,
    data,
    run_python,
)

SECONDS = float(os.environ.get("FASTNORM_STRESS_SECONDS", "5"))
LINUX = sys.platform.startswith("linux")

# --- Whose choice it is ---------------------------------------------------------------------------

# What is chosen: how, how it is asked for, and two choices that are not the process's.
CHOICES: dict[str, tuple[Callable[[Any], AbstractContextManager[None]], Any, Any, Any, Any]] = {
    "backend": (fn.backend, fn.get_backend, fn.set_backend, "numpy", BACKENDS[-2]),
    "threads": (fn.threads, fn.get_num_threads, fn.set_num_threads, 5, 7),
}
by_choice = pytest.mark.parametrize("what", CHOICES)


@pytest.fixture(autouse=True)
def _the_process_stays() -> Iterator[None]:
    backend, threads = fn.get_backend(), fn.get_num_threads()
    yield
    assert runtime._here.get() is None, "no choice is left behind"
    fn.set_backend(backend)
    fn.set_num_threads(threads)


def elsewhere(f: Callable[[], Any]) -> Any:
    """What a function returns in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(f).result(60)


@by_choice
def test_two_threads_whose_blocks_overlap(what: str) -> None:
    choose, get, _, one, two = CHOICES[what]
    before = get()
    turns = [threading.Event() for _ in range(4)]
    seen: list[Any] = []

    def first() -> None:
        with choose(one):
            turns[0].set()
            assert turns[1].wait(60)
            seen.append(get())
        seen.append(get())
        turns[2].set()

    def second() -> None:
        assert turns[0].wait(60)
        with choose(two):
            turns[1].set()
            assert turns[2].wait(60)
            seen.append(get())
        seen.append(get())

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(first), pool.submit(second)]:
            assert turns[0].wait(60)
            assert get() == before
            future.result(60)
    assert seen == [one, before, two, before]
    assert get() == before
    assert elsewhere(get) == before


@by_choice
def test_tasks_take_a_choice_over_and_keep_their_own(what: str) -> None:
    choose, get, _, one, two = CHOICES[what]
    before = get()

    async def own(value: Any) -> list[Any]:
        seen = [get()]
        with choose(value):
            for _ in range(5):
                await asyncio.sleep(0)
                seen.append(get())
        return [*seen, get()]

    async def main() -> None:
        both = await asyncio.gather(own(one), own(two))
        assert both == [[before, *[value] * 5, before] for value in (one, two)]
        assert get() == before
        with choose(one):
            inside = asyncio.ensure_future(own(two))  # goes on after the block
            assert await asyncio.to_thread(get) == one
        assert await inside == [one, *[two] * 5, one]
        assert get() == before

    asyncio.run(main())


@by_choice
def test_generators_end_in_any_order(what: str) -> None:
    choose, get, _, one, two = CHOICES[what]
    before = get()

    def inside() -> Iterator[Any]:
        with choose(one):
            yield get()

    first, second = inside(), inside()
    assert next(first) == one
    with choose(two):
        assert next(second) == one
        first.close()
        assert get() == one, "that of the second, which has not ended"
        second.close()
        assert get() == two
        third = inside()
        next(third)
    assert get() == one
    elsewhere(third.close)  # does nothing there
    assert elsewhere(get) == before
    copy_context().run(lambda: None)
    runtime._choose(())  # the third was closed where its choice is not
    assert get() == before


@by_choice
def test_an_async_generator_that_another_task_closes(what: str) -> None:
    choose, get, _, one, _ = CHOICES[what]

    async def inside() -> Any:
        with choose(one):
            while True:
                yield get()

    async def main() -> None:
        generator = inside()
        assert await asyncio.create_task(generator.__anext__()) == one
        await generator.aclose()  # in another context, without an error

    asyncio.run(main())


@by_choice
def test_blocks_nest_and_end_with_errors(what: str) -> None:
    choose, get, _, one, two = CHOICES[what]
    before = get()
    with pytest.raises(ZeroDivisionError), choose(one), choose(two):
        1 / (get() != two)
    assert get() == before
    with ExitStack() as stack:
        stack.enter_context(choose(one))
        with pytest.raises(ValueError, match="-1"), choose(-1):
            pass
        assert get() == one

    @choose(two)
    def decorated() -> Any:
        return get()

    assert [decorated(), decorated(), get()] == [two, two, before]


@by_choice
def test_copies_of_a_context_and_pools(what: str) -> None:
    choose, get, _, one, two = CHOICES[what]
    before = get()
    context = copy_context()
    block = choose(one)
    context.run(block.__enter__)
    assert get() == before
    assert context.run(get) == one
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(get).result(60) == before
        assert pool.submit(context.run, get).result(60) == one
        with choose(two):
            assert pool.submit(get).result(60) == before
            assert pool.submit(copy_context().run, get).result(60) == two
    context.run(block.__exit__, None, None, None)
    assert context.run(get) == before


@by_choice
def test_the_process_may_change_inside_a_block(what: str) -> None:
    choose, get, change, one, two = CHOICES[what]
    with choose(one):
        change(two)
        assert get() == one
        assert elsewhere(get) == two
    assert get() == two


def test_both_choices_together() -> None:
    with fn.backend("numpy"):
        with fn.threads(5):
            assert (fn.get_backend(), fn.get_num_threads()) == ("numpy", 5)
        assert fn.get_backend() == "numpy"
    with fn.threads(5), runtime.serial():
        assert fn.get_num_threads() == 5
        assert runtime.kernel_threads() == 1
        assert elsewhere(runtime.kernel_threads) != 1 or runtime._threads == 1


@pytest.mark.skipif(not COMPILED, reason="cached calls are the compiled kernels'")
def test_cached_calls_ask_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def spy(name: str, function: Callable[[Any], None]) -> Callable[[Any], None]:
        def carry_out(p: Any) -> None:
            asked.append(name)
            function(p)

        return carry_out

    for name, module in backends.at_hand.items():
        for way in ("forward", "backward"):
            monkeypatch.setattr(module, way, spy(name, getattr(module, way)))
    x = data((4, 50))
    fn.set_backend("cython")
    _, mean, rstd = fn.layer_norm(x, 50, return_stats=True)

    def both() -> list[str]:
        asked.clear()
        fn.layer_norm(x, 50)
        fn.layer_norm_backward(x, x, mean, rstd, 50)
        return list(asked)

    both()
    assert both() == [], "both are answered from the cache"
    with fn.backend("numpy"):
        assert both() == ["numpy"] * 2
        assert elsewhere(both) == []
        with fn.backend("cython"):
            assert both() == []
    with fn.threads(3):
        assert both() == []
    fn.set_backend("numpy")
    assert both() == ["numpy"] * 2
    with fn.backend("cython"):
        assert both() == []
        assert elsewhere(both) == ["numpy"] * 2


# --- How many threads -----------------------------------------------------------------------------

# Prints how many threads more there are after calls in a thread of their own, the second of which
# is answered from the cache where there is one. What one call has started serves all others.
STARTED = """
import os, threading, time
import numpy as np, fastnorm as fn
x = np.ones((4000, 500), np.float32)
def threads():
    counts = []
    for _ in range(10):  # without those that are ending
        counts.append(len(os.listdir("/proc/self/task")))
        time.sleep(0.01)
    return min(counts)
def started(f):
    counts, done = [], threading.Event()
    def run():
        before = threads()
        f()
        counts.append(threads() - before)
        done.set()
        threading.Event().wait()  # or the threads of this one end, some time
    threading.Thread(target=run, daemon=True).start()
    assert done.wait(60)
    return counts[0]
def twice(n=None):
    if n is None:
        fn.layer_norm(x, 500), fn.layer_norm(x, 500)
    else:
        with fn.threads(n):
            fn.layer_norm(x, 500), fn.layer_norm(x, 500)
"""

on_linux = pytest.mark.skipif(not (LINUX and COMPILED), reason="threads are counted on Linux")


def started(program: str, **environment: str) -> list[int]:
    run = run_python("-c", STARTED + program, **environment)
    assert run.returncode == 0, run.stderr
    return [int(word) for word in run.stdout.split()]


@on_linux
def test_as_many_threads_as_asked_for() -> None:
    program = """
fn.set_num_threads(1)
print(started(twice))
with fn.threads(2):
    print(started(twice))  # a thread's own choice is the process's
print(*[started(lambda: twice(n)) for n in (1, 2, 4, 3)])
fn.set_num_threads(6)
print(started(twice), started(lambda: twice(3)))
"""
    assert started(program) == [0, 0, 0, 1, 2, 0, 2, 0]


@on_linux
def test_absurd_numbers_of_threads() -> None:
    program = """
for n in (100_000, 2**31 - 1, 2**31, 2**63, 10**30):
    fn.set_num_threads(n)
    assert fn.get_num_threads() == n
    print(started(twice))
    with fn.threads(n):
        assert fn.get_num_threads() == n
    print(started(lambda: twice(n)))
"""
    most = max(64, os.cpu_count() or 1)
    assert started(program) == [most - 1] + [0] * 9


@on_linux
def test_limits_of_threadpoolctl() -> None:
    program = """
from threadpoolctl import threadpool_limits
fn.set_num_threads(4)
def limited(n):
    with threadpool_limits(n, user_api="openmp"):  # BLAS would start threads of its own
        print(fn.get_num_threads())
        twice()
        if n == 1:
            twice(2)
print(started(lambda: limited(1)), started(lambda: limited(3)), started(twice))
"""
    pytest.importorskip("threadpoolctl")
    assert started(program) == [1, 3, 0, 2, 1]


@on_linux
@pytest.mark.parametrize("first", ["fastnorm", "threadpoolctl"])
def test_threadpoolctl_sees_the_threads(first: str) -> None:
    """Whichever is imported first; and a limit leaves nothing behind, of whatever is in it."""
    pytest.importorskip("threadpoolctl")
    program = (
        f"import {first}; import threadpoolctl as t, fastnorm as fn; fn.set_num_threads(3)"
        """
seen = [lib["num_threads"] for lib in t.threadpool_info() if lib["internal_api"] == "fastnorm"]
with t.threadpool_limits(2):
    seen.append(fn.get_num_threads())
    with fn.threads(7):
        seen.append(fn.get_num_threads())
    with t.threadpool_limits(1, user_api="openmp"):
        seen.append(fn.get_num_threads())
    with t.threadpool_limits(50):
        seen.append(fn.get_num_threads())
    seen.append(fn.get_num_threads())
seen.append(fn.get_num_threads())
fn.set_num_threads(5)
print(*seen, fn.get_num_threads())
"""
    )
    run = run_python("-c", program)
    assert run.stdout.split() == list("32213235"), run.stderr


@on_linux
def test_what_limits_of_threadpoolctl_leave_behind() -> None:
    """Nothing that `set_num_threads` does not undo; to ask for the module is not to import it."""
    pytest.importorskip("threadpoolctl")
    program = """
import importlib, importlib.util, sys, fastnorm as fn
fn.set_num_threads(2)
assert importlib.util.find_spec("threadpoolctl") is not None
importlib.reload(fn.threadpools)
finders = len(sys.meta_path)
from threadpoolctl import threadpool_limits as limits
assert len(sys.meta_path) == finders - 1
seen = []
with limits(1):
    seen.append(fn.get_num_threads())
with limits(2):
    fn.set_num_threads(8)
    seen.append(fn.get_num_threads())
fn.set_num_threads(9)
seen.append(fn.get_num_threads())
with limits(1):
    fn.set_num_threads(4)
    with limits(8):
        seen.append(fn.get_num_threads())
fn.set_num_threads(7)
print(*seen, fn.get_num_threads())
"""
    run = run_python("-c", program)
    assert run.stdout.split() == list("18947"), run.stderr


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "numpy"])
def test_numba_heeds_a_limit_too(name: str) -> None:
    """Whatever computes asks `_kernel_threads`."""
    limited = pytest.importorskip("threadpoolctl").threadpool_limits
    if not COMPILED:
        pytest.skip("threadpoolctl finds threads by the library that they are in")
    with fn.backend(name), fn.threads(4), limited(1, user_api="openmp"):
        assert runtime.kernel_threads() == fn.get_num_threads() == 1


@pytest.mark.slow
@pytest.mark.skipif(not COMPILED, reason="Numba's threads are not ours")
def test_nobody_waits_for_a_thread_that_has_not_begun() -> None:
    """Beside programs that keep all processors busy two threads take about as long as one.

    Means, as a wait of some milliseconds is what is looked for. OpenMP's threads took 3 to 15 times
    as long; the limit leaves room for what the system does meanwhile.
    """
    x = data((1024, 768), F32)

    def mean_time(threads: int) -> float:
        with fn.backend("cython"), fn.threads(threads):
            fn.layer_norm(x, 768)
            calls, start = 0, time.perf_counter()
            while (passed := time.perf_counter() - start) < 0.1:
                fn.layer_norm(x, 768)
                calls += 1
        return passed / calls

    with busy_processes(limits.processors()):
        found = []
        for _ in range(4):
            times = [(mean_time(1), mean_time(2)) for _ in range(6)]
            one, two = (sum(column) for column in zip(*times, strict=True))
            found.append(two / one)
            if found[-1] < 2:
                return
    pytest.fail(f"two threads take {found} times as long as one")


HERE = limits.processors()


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"OMP_NUM_THREADS": value}, HERE)
        for value in ("²", "٣", "", " ", "-4", "0", "4.5", "many", "99999999999", "9" * 5000, ",2")
    ]
    + [
        ({"OMP_NUM_THREADS": " 4 , 2"}, 4),
        ({"OMP_NUM_THREADS": "2147483647"}, 2**31 - 1),
        ({"FASTNORM_NUM_THREADS": "99999999999"}, 99999999999),
        ({"FASTNORM_NUM_THREADS": " 3 ", "OMP_NUM_THREADS": "²"}, 3),
        ({"FASTNORM_NUM_THREADS": ""}, HERE),
    ],
)
def test_numbers_in_the_environment(
    environment: dict[str, str], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FASTNORM_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert runtime._default_threads() == threads


@pytest.mark.parametrize("value", ["²", "0", "-1", "4,2", "2.0", "many", "9" * 5000])
def test_bad_numbers_of_fastnorms_own_are_errors(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTNORM_NUM_THREADS", value)
    with pytest.raises(ValueError, match=r"FASTNORM_NUM_THREADS=.*1 or more"):
        runtime._default_threads()


def test_an_import_survives_bad_numbers() -> None:
    show = "import fastnorm as fn, numpy as np; fn.layer_norm(np.ones((999, 999)), 999); "
    show += "print(fn.get_num_threads())"
    for value in ("99999999999", "²"):
        run = run_python("-c", show, OMP_NUM_THREADS=value)
        assert run.stdout.strip() == str(HERE), run.stderr


# --- Quotas ---------------------------------------------------------------------------------------


def root_of(folder: Path, groups: str, files: dict[str, str]) -> Path:
    """A system whose process is in these control groups, with these files in their folders."""
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="ascii")
    return folder


V1 = "7:blkio:/\n3:cpuset:/a\n2:cpu,cpuacct:/a/b\n4:memory:/a/b\n0::/"


@pytest.mark.parametrize(
    ("groups", "files", "count"),
    [
        ("0::/", {}, 64),
        ("0::/", {"sys/fs/cgroup/cpu.max": "max 100000"}, 64),
        ("0::/", {"sys/fs/cgroup/cpu.max": "150000 100000"}, 2),
        ("0::/", {"sys/fs/cgroup/cpu.max": "1000 100000"}, 1),
        ("0::/", {"sys/fs/cgroup/cpu.max": "9900000 100000"}, 64),
        ("0::/", {"sys/fs/cgroup/cpu.max": "nonsense"}, 64),
        ("0::/", {"sys/fs/cgroup/cpu.max": "1000 0"}, 64),
        ("", {"sys/fs/cgroup/cpu.max": "300000 100000"}, 64),
        # the tightest of those around, also where only the outermost is seen
        (
            "0::/a/b",
            {"sys/fs/cgroup/a/cpu.max": "300000 100000", "sys/fs/cgroup/a/b/cpu.max": "max 100000"},
            3,
        ),
        ("0::/../../elsewhere", {"sys/fs/cgroup/cpu.max": "500000 100000"}, 5),
        (
            V1,
            {
                "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_quota_us": "250000",
                "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            3,
        ),
        (
            V1,
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            1,
        ),
    ],
)
def test_a_quota_of_processor_time(
    groups: str, files: dict[str, str], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert limits.processors(root_of(tmp_path, groups, files)) == count


def test_the_affinity_holds_beside_a_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    root = root_of(tmp_path, "0::/", {"sys/fs/cgroup/cpu.max": "800000 100000"})
    assert limits.processors(root) == 1
    assert limits.processors(tmp_path / "nothing") == 1


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/", {"sys/fs/cgroup/memory.max": "max"}, None),
        ("0::/", {"sys/fs/cgroup/memory.max": str(1 << 60)}, None),
        ("0::/", {"sys/fs/cgroup/memory.max": "500000000"}, 500_000_000),
        ("0::/a", {"sys/fs/cgroup/a/memory.high": "400000000"}, 400_000_000),
        (V1, {"sys/fs/cgroup/memory/a/memory.limit_in_bytes": "300000000"}, 300_000_000),
        (V1, {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}, None),
    ],
)
def test_a_limit_of_memory(
    groups: str, files: dict[str, str], limit: int | None, tmp_path: Path
) -> None:
    found = limits.memory_limit(root_of(tmp_path, groups, files))
    assert (found and found[0]) == limit
    if found:
        assert found[1].parent == found[2].parent == tmp_path / Path(next(iter(files))).parent


# --- Many of Python's threads ---------------------------------------------------------------------


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls of every norm on small, middling and large arrays, in two orders and three types."""
    rng = np.random.default_rng(5)
    for op in OPERATIONS:
        for shape in [(3, 8, 5, 6), (4, 16, 40, 41), (2, 4, 160, 161)]:
            for dtype in (F16, F32, F64):
                for layout in (np.ascontiguousarray, channels_last):
                    x = layout(data(shape, dtype, 3.0))
                    p = op.parameters(shape, dtype, rng)
                    name = f"{op.label} {shape} {dtype} {layout.__name__}"
                    yield name, lambda op=op, x=x, p=p: call(op, x, p)
    for shape in [(7, 30), (300, 500)]:
        x = data(shape, F32, 3.0)
        yield f"moments {shape}", lambda x=x: fn.moments(x, 1)
        yield f"standardize {shape}", lambda x=x: fn.standardize(x)


@pytest.mark.slow
def test_sixteen_threads_get_what_one_gets() -> None:
    """Of mixed functions, shapes and backends, each of its own threads, all bits as alone."""
    every = list(calls())
    names = [name for name in BACKENDS if name != "numpy"]
    rng = random.Random(0)
    # beyond a few seconds every call there is
    chosen = every if SECONDS >= 20 else rng.sample(every, 60)
    right = {}
    for name in names:
        with fn.backend(name), fn.threads(1):
            for label, f in chosen:
                right[name, label] = f()
    stop = time.monotonic() + SECONDS
    counts = [0] * 16

    def run(i: int) -> None:
        mine = random.Random(i)
        while counts[i] < 3 or time.monotonic() < stop:
            label, f = mine.choice(chosen)
            name, threads = mine.choice(names), mine.choice((1, 2, 3))
            with fn.backend(name), fn.threads(threads):
                found = f()
                assert (fn.get_backend(), fn.get_num_threads()) == (name, threads)
            expected = right[name, label]
            for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (found, expected))):
                assert_same_bits(np.asarray(a), np.asarray(b))
            counts[i] += 1

    before = fn.get_backend(), fn.get_num_threads()
    with ThreadPoolExecutor(16) as pool:
        for future in [pool.submit(run, i) for i in range(16)]:
            future.result(SECONDS + 240)
    assert (fn.get_backend(), fn.get_num_threads()) == before
    assert math.prod(counts) > 0
