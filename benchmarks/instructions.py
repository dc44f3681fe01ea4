"""The gate without noise: instructions counted by valgrind, at x86-64-v3, on one thread.

`python -m benchmarks.instructions` counts those of the gate's cases and compares with the stored
counts; `--update` stores them. It sees a kernel that does more, not one that waits more: a missed
cache costs no instruction.

Another compiler, or another Cython, makes other code, so the counts are compared only where both
are those they were stored with. Without valgrind there is nothing to do but say so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from fastnorm._bench.cases import data
from fastnorm._bench.peers import fastnorm

from . import native
from .cases import GATE

STORED = Path(__file__).with_name("instructions.json")
LEVEL = "x86-64-v3"  # valgrind knows no AVX-512
NOTHING = "nothing"
CALLS = 4
LIMIT = 1.05


def inside() -> None:
    """What runs under valgrind: each case a few times, between two marks."""
    marks = native.load("marks", LEVEL)
    if marks is None:
        raise SystemExit("valgrind's header callgrind.h, or a C compiler, is missing")

    def counted(name: str, call: Callable[[], Any], calls: int) -> None:
        call()
        call()  # the first ones prepare what is kept
        marks.begin()
        # results at several addresses: numbers before the first whole cache line cost more
        held = [call() for _ in range(calls)]
        marks.end(name.encode())
        held.clear()

    counted(NOTHING, int, 0)  # what the marks and the loop themselves take
    for case in GATE:
        counted(str(case), fastnorm(case, data(case)).call, CALLS)


def count() -> dict[str, int]:
    """Instructions of a call, by case."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no"]
        command += [f"--callgrind-out-file={folder}/counted", sys.executable]
        command += ["-m", "benchmarks.instructions", "--inside"]
        fixed = {"FASTNORM_CPU": LEVEL, "FASTNORM_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        ran = subprocess.run(command, env=os.environ | fixed, capture_output=True, text=True)
        if ran.returncode:
            raise SystemExit(ran.stderr)
        found = {}
        for part in Path(folder).glob("counted.*"):
            text = part.read_text(encoding="utf-8")
            name = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
            total = re.search(r"^(?:totals|summary): (\d+)$", text, re.MULTILINE)
            if name and total:
                found[name[1]] = int(total[1])
    return {str(case): (found[str(case)] - found[NOTHING]) // CALLS for case in GATE}


def built_with() -> str:
    """The C compiler and the Cython of the kernels."""
    kernels = import_module(f"fastnorm._core._kernels_{LEVEL.removeprefix('x86-64-')}")
    cython = type(kernels.run_pass).__module__  # "_cython_3_3_1": its functions' type says so
    return f"{native.version()}, {cython.strip('_').replace('_', ' ', 1).replace('_', '.')}"


def judge(counts: dict[str, int], stored: dict[str, int]) -> list[str]:
    """The names of those that need more instructions than stored, or that only one side knows."""
    failed = sorted(counts.keys() ^ stored.keys())
    for name in (name for name in counts if name in stored):
        share = counts[name] / stored[name]
        print(f"{share:6.3f}  {counts[name]:12,}  {name}" + ("  more" if share > LIMIT else ""))
        if share > LIMIT:
            failed.append(name)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__)
    parser.add_argument("--update", action="store_true", help="store what is counted now")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside()
        return 0
    if shutil.which("valgrind") is None:
        print("valgrind is not installed: no instructions counted")
        return 0
    built = built_with()
    if options.update:
        text = json.dumps({"built with": built, "instructions": count()}, indent=1)
        STORED.write_text(text + "\n", encoding="utf-8")
        return 0
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    if stored["built with"] != built:
        print(f"stored with {stored['built with']}, and this is {built}: not compared")
        return 0
    failed = judge(count(), stored["instructions"])
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
