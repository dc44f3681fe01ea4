"""The Numba backend and Cython's: `python -m benchmarks.backends [words of a case]`.

Public functions against themselves, on one backend and on the other. Then a user's activation fused
into the norm and the two calls it stands for, and the cost of a process's first call.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numba
import numpy as np

import fastnorm as fn
from fastnorm._bench.cases import Case, Data, arguments, data, gradient_arguments
from fastnorm._bench.timing import ROUNDS, Contender, compete

from .cases import CASES

BACKENDS = ("cython", "numba")


def caller(case: Case, arrays: Data) -> Callable[[], Any]:
    """A call of the public function of a case."""
    if case.backward:
        function, given, options = gradient_arguments(case, arrays)
        return partial(getattr(fn, function), *given, **options)
    return partial(getattr(fn, case.operation.name), arrays.x, **arguments(case, arrays))


def compare(contenders: dict[str, Contender], rounds: int = ROUNDS) -> float:
    """The second's speed over the first's."""
    for contender in contenders.values():
        with contender.around():
            contender.call()
    compete(contenders, rounds)
    first, second = contenders.values()
    return first.seconds / second.seconds


def kernels(words: list[str]) -> None:
    ratios = []
    print(f"| {'case':58} | Cython, µs | Numba, µs | share of the speed |")
    print(f"| {'-' * 58} | ---------- | --------- | ------------------ |")
    for case in CASES:
        if not all(word in str(case) for word in words):
            continue
        arrays = data(case)
        call = caller(case, arrays)
        contenders = {name: Contender(call, partial(fn.backend, name)) for name in BACKENDS}
        ratios.append(compare(contenders))
        slow, fast = (contenders[name].seconds * 1e6 for name in BACKENDS)
        print(f"| {case!s:58} | {slow:10.1f} | {fast:9.1f} | {ratios[-1]:18.2f} |", flush=True)
    if ratios:
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        print(f"\n{len(ratios)} cases: geometric mean {mean:.2f}, least {min(ratios):.2f}\n")


@numba.njit
def hardswish(v: Any) -> Any:
    """An activation that fastnorm does not have (arXiv:1905.02244)."""
    return v * min(max(v + np.float32(3), np.float32(0)), np.float32(6)) / np.float32(6)


@numba.njit
def softsign(v: Any) -> Any:
    """And one with a division."""
    return v / (np.float32(1) + abs(v))


def fused() -> None:
    """A ufunc is how a user applies a function of one number to an array."""
    for f in (hardswish, softsign):
        ufunc = numba.vectorize(["float32(float32)"])(f.py_func)
        for shape in ((8, 256, 32, 32), (2, 320, 64, 64), (4, 256, 128, 128)):
            x = np.random.default_rng(0).standard_normal(shape, np.float32)
            w, b = np.random.default_rng(1).standard_normal((2, shape[1]), np.float32)
            two = Contender(lambda x=x, w=w, b=b, u=ufunc: u(fn.group_norm(x, 32, w, b)))
            one = Contender(lambda x=x, w=w, b=b, f=f: fn.group_norm(x, 32, w, b, activation=f))
            ratio = compare({"two calls": two, "one call": one})
            name = f"group_norm {'x'.join(map(str, shape))} + {f.__name__}"
            two_calls, one_call = (c.seconds * 1e6 for c in (two, one))
            print(f"{name}: two calls {two_calls:.0f} µs, one {one_call:.0f} µs, {ratio:.2f} times")


FIRST = """
import fastnorm as fn, numpy as np
fn.set_backend("numba")
fn.group_norm(np.ones((2, 64, 8, 8), np.float32), 32)
"""


def first_call() -> None:
    """Import and first call in a process of its own, the kernels being on disk."""
    times = []
    for _ in range(8):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", FIRST], check=True)
        times.append(time.perf_counter() - start)
    print(f"import and first call, kernels on disk: {statistics.median(times[1:]):.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="of the cases' names; all cases without")
    parser.add_argument("--part", choices=("kernels", "fused", "first"), help="only this part")
    options = parser.parse_args()
    if options.part in (None, "kernels"):
        kernels(options.words)
    if options.part in (None, "fused"):
        fused()
    if options.part in (None, "first"):
        first_call()


if __name__ == "__main__":
    main()
