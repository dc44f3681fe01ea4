"""Run the attacks on fastnorm, and print one table: attack, inputs tried, faults found.

    python -m tests.trust             all of them, below a quarter of an hour on two cores
    python -m tests.trust --long      the same with forty times as many random calls: hours
    python -m tests.trust fuzz files  those whose names have one of these words

An attack is one line of `ATTACKS`: what it is called, what runs it, and how its inputs are counted.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from fastnorm import processor

ROOT = Path(__file__).parent.parent

# With --long, of threads on mixed shapes; from 20 on a million calls of tests/test_allocation.py.
STRESS_SECONDS = "30"

Counts = tuple[int, int]  # inputs tried, faults found


def tests_counted(output: str) -> Counts:
    """Of pytest: tests, of which those count as faults that failed or could not start."""
    counted = r"^.*\d+ (?:passed|failed|error).* in .*$"
    last = " ".join(re.findall(counted, output, re.MULTILINE)[-1:])
    number = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", last)}
    wrong = number.get("failed", 0) + number.get("error", 0)
    return number.get("passed", 0) + wrong, wrong


def examples_counted(output: str) -> Counts:
    """Of tests.fuzz: random calls, of which a run stops at the first that is wrong."""
    tried = sum(int(n) for n in re.findall(r"(\d+) examples", output))
    return tried, output.count("repeat ")


def programs_counted(output: str) -> Counts:
    """Of tests.stress: programs, of which each may be wrong once."""
    found = re.search(r"^(\d+) programs, .*: (\d+) faults$", output, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def both_counted(output: str) -> Counts:
    """Of tests.sanitize: random calls and tests."""
    (calls, wrong_calls), (ran, wrong) = examples_counted(output), tests_counted(output)
    return calls + ran, wrong_calls + wrong


@dataclass(frozen=True)
class Attack:
    """What is tried on fastnorm, and by what."""

    name: str
    command: tuple[str, ...]
    """What Python is called with."""
    count: Callable[[str], Counts] = tests_counted
    examples: int = 0
    """How many random calls it is told to make, where it makes any."""
    seconds: tuple[int, int] | None = None
    """How long it is told to go on, where it takes that: as a rule, and with --long."""


def tests(*choice: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-q", "-p", "no:cacheprovider", *choice)


ATTACKS: tuple[Attack, ...] = (
    Attack(
        "fuzz: random calls on fenced memory",
        ("-m", "tests.fuzz"),
        examples_counted,
        500,  # for each backend and instruction set
    ),
    Attack(
        "fuzz: on kernels with sanitizers and every bound checked",
        ("-m", "tests.sanitize", "--short"),
        both_counted,
        500,
    ),
    Attack(
        "bounds: numbers out of range, odd strides, wrong descriptions",
        tests("tests/test_bounds.py", "tests/test_numba_safety.py"),
    ),
    Attack("memory: fences, kept blocks", tests("tests/test_fences.py", "tests/test_memory.py")),
    Attack("threads", tests("tests/test_threads.py", "tests/test_determinism.py", "-k", "threads")),
    Attack("forks, signals, other processes", tests("tests/test_processes.py")),
    Attack(
        "threads, forks, signals and exits at once",
        ("-m", "tests.stress"),
        programs_counted,
        seconds=(30, 1200),
    ),
    Attack("no memory, and what is left of calls", tests("tests/test_allocation.py")),
    Attack(
        "bad numbers among good ones",
        tests("tests/test_features.py", "tests/test_backward.py", "-k", "bad_numbers"),
    ),
    Attack("numbers beyond every range", tests("tests/test_range.py")),
    Attack(
        "wrong arguments, arrays of other libraries, objects that lie",
        tests(
            "tests/test_errors.py",
            "tests/test_arguments.py",
            "tests/test_wrong_values.py",
            "tests/test_array_kinds.py",
            "tests/test_hostile.py",
        ),
    ),
    Attack("hostile files and command lines", tests("tests/test_files.py", "tests/test_cli.py")),
    Attack("what is installed, and by what", tests("tests/test_supply.py")),
    Attack("states of modules", tests("tests/test_modules_like_pytorch.py")),
    Attack(
        "peers' own cases: ONNX, PyTorch, SciPy, scikit-learn",
        tests(*(f"tests/test_peers_{peer}.py" for peer in ("onnx", "pytorch", "statistics"))),
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.trust",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="of the names of attacks")
    parser.add_argument("--long", action="store_true", help="20,000 random calls for each kind")
    given = parser.parse_args()
    words = given.words
    chosen = [a for a in ATTACKS if not words or any(word in a.name for word in words)]
    if not chosen:
        parser.error(f"no attack has {' or '.join(words)} in its name")
    print(f"{processor.name()}, {date.today().isoformat()}\n")
    width = max((len(a.name) for a in chosen), default=6)
    print(f"{'attack':{width}}  {'inputs':>8}  {'faults':>6}  {'s':>5}", flush=True)
    failed = 0
    for attack in chosen:
        began = time.monotonic()
        command = [sys.executable, *attack.command]
        if attack.examples:
            command += ["--examples", str(attack.examples * (40 if given.long else 1))]
        if attack.seconds:
            command += ["--seconds", str(attack.seconds[given.long])]
        done = subprocess.run(
            command,
            env=os.environ | ({"FASTNORM_STRESS_SECONDS": STRESS_SECONDS} if given.long else {}),
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        tried, faults = attack.count(done.stdout)
        # one that ended badly without a count, or tried nothing, is no good news
        broken = done.returncode != 0 or not tried
        faults = max(faults, int(broken))
        failed += bool(faults)
        took = time.monotonic() - began
        print(f"{attack.name:{width}}  {tried:8}  {faults:6}  {took:5.0f}", flush=True)
        if broken:
            # a crash is told at the beginning of what Python prints then, a failed test at the end
            print(done.stdout[-3000:], done.stderr[:3000], sep="\n", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
