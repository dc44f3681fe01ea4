"""Hashes of results, to see after a change of the kernels which bits it changed.

python -m tests.hashes write before.json      every operation x dtype x layout x shape x call
python -m tests.hashes compare before.json    the same again: which differ; exit code 1 if any does

Each instruction set of this machine runs in a process of its own. A file holds for the machine,
compiler and versions of libraries that it was written on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import fastnorm as fn
from fastnorm import _core
from fastnorm.operations import OPERATIONS, Operation

from .helpers import BF16, F16, F32, F64, channels_last, data

ROOT = Path(__file__).parent.parent

# Below and beyond the blocks and tiles of the kernels; each has 12 channels or columns, or more.
SHAPES = [
    (3, 12, 5, 7),
    (2, 24, 33, 35),
    (1, 12, 130, 131),
    (2, 16, 150, 151),
    (40, 12),
    (7, 768),
    (5, 5000),
    (3, 70_004),
]


def calls(
    op: Operation, x: Any, dy: Any, parameters: dict[str, Any]
) -> Iterator[tuple[str, list[Any]]]:
    """What is called, and all that it returns and updates, along every kind of loop."""
    mask = (np.arange(x.size) % 7 != 3).reshape(x.shape)  # leaves two values and more
    options: dict[str, dict[str, Any]] = {"": {}}
    if "activation" in op.features:
        options |= {name: {"activation": name} for name in ("relu", "gelu")}
    if "residual" in op.features:
        options |= {"residual": {"residual": dy}}
    if "where" in op.features:
        options |= {"where": {"where": mask}}
    for name, option in options.items():
        p = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in parameters.items()}
        found = getattr(fn, op.name)(x, **p, **option)
        yield name, [found, *(v for k, v in p.items() if k.startswith("running"))]
    if op.elementwise_backward:
        kept = {k: v for k, v in parameters.items() if k != "bias"}
        yield "backward", [getattr(fn, op.elementwise_backward)(dy, x, **kept)]
    if op.backward:
        _, *statistics = getattr(fn, op.name)(x, **parameters, return_stats=True)
        kept = {k: parameters[k] for k in op.backward_keywords if k in parameters}
        yield "backward", [getattr(fn, op.backward)(dy, x, *statistics, **kept), *statistics]


def hash_of(value: Any, into: Any = None) -> str:
    """Of the bytes of arrays, in lists of any depth, in their order; 16 digits."""
    into = into or hashlib.sha256()
    if isinstance(value, list | tuple):
        for one in value:
            hash_of(one, into)
    elif value is not None:
        into.update(np.ascontiguousarray(value).tobytes())
    return str(into.hexdigest()[:16])


def explore(backend: str) -> dict[str, str]:
    """The hash of each call's results, in this process."""
    found = {}
    layouts = {"channels-first": np.ascontiguousarray, "channels-last": channels_last}
    with fn.backend(backend):
        for op in OPERATIONS:
            for shape in SHAPES:
                if len(shape) < op.min_ndim or op.refuses(shape):
                    continue
                for dtype in (F32, F16, BF16, F64):
                    parameters = op.parameters(shape, dtype, np.random.default_rng(2))
                    for layout, arrange in layouts.items():
                        x = arrange(data(shape, dtype, 3.0))
                        dy = arrange(data(shape, dtype, 0.5, seed=1))
                        for name, values in calls(op, x, dy, parameters):
                            key = f"{op.label} {shape} {dtype.name} {layout} {name}".strip()
                            found[key] = hash_of(values)
    return found


def all_hashes(backends: list[str], levels: list[str]) -> dict[str, str]:
    """Of every backend and instruction set, each in a process of its own."""
    found = {}
    for backend in backends:
        for level in levels if backend == "cython" else levels[-1:]:
            run = subprocess.run(
                [sys.executable, "-m", "tests.hashes", "explore", backend],
                env=os.environ | {"FASTNORM_CPU": level},
                cwd=ROOT,
                check=True,
                stdout=subprocess.PIPE,
            )
            for name, value in json.loads(run.stdout).items():
                found[f"{backend} {level}: {name}"] = value
    return found


def main() -> int:
    """Write a file of hashes, or compare with one."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.hashes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=["write", "compare", "explore"])
    parser.add_argument("what", help="the file; with explore, a backend")
    parser.add_argument("--backend", action="append", help="cython (the default), numba or numpy")
    given = parser.parse_args()
    if given.action == "explore":
        print(json.dumps(explore(given.what)))
        return 0
    used = _core.level_used  # FASTNORM_CPU leaves out what is beyond it
    levels = list(_core.LEVELS[: _core.LEVELS.index(used) + 1]) if used in _core.LEVELS else [""]
    hashes = all_hashes(given.backend or ["cython"], levels)
    path = Path(given.what)
    if given.action == "write":
        path.write_text(json.dumps(hashes, indent=0), encoding="ascii")
        print(f"{len(hashes)} hashes in {path}")
        return 0
    before = json.loads(path.read_text(encoding="ascii"))
    differ = [name for name, value in before.items() if hashes.get(name, value) != value]
    missing, new = before.keys() - hashes.keys(), hashes.keys() - before.keys()
    print(*differ, sep="\n", end="\n" if differ else "")
    print(
        f"{len(before)} before: {len(differ)} differ, {len(missing)} are gone, {len(new)} are new"
    )
    return 1 if differ or missing else 0


if __name__ == "__main__":
    sys.exit(main())
