"""Run random calls in processes of their own; of one that fails, make it small and say it.

python -m tests.fuzz                        20,000 for each backend and instruction set
python -m tests.fuzz --examples 500 --backend numba --seed 7
python -m tests.fuzz --repeat '{"op": ...}'  one of them again, as a failure prints it
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
LEVELS = ("x86-64-v2", "x86-64-v3", "x86-64-v4")
WITHOUT_END = 600.0  # seconds that one example may take, Numba's compiler with it

Case = dict[str, Any]


@dataclass
class Outcome:
    """What became of a run: how many examples, and where one failed, its story."""

    backend: str
    cpu: str
    examples: int
    story: str = ""


# --- In the process that calls ----------------------------------------------------------------


def examine(cases: list[Case], backend: str) -> None:
    """Judge cases one after another."""
    import fastnorm as fn

    from .checks import judge

    with fn.backend(backend):
        for case in cases:
            judge(case)


def explore(examples: int, seed: int, backend: str, log: Path) -> None:
    """Draw cases and judge them; each is written down before, as it may end the process."""
    import fastnorm as fn

    from .cases import draw
    from .checks import judge

    # Numba compiles for each dtype; NumPy's backend takes 100 ns for a number.
    options: dict[str, Any] = {"functions": find_spec("numba") is not None}
    if backend == "numba":
        options["dtypes"] = ("float32", "float64")
    if backend == "numpy":
        options["largest"] = 30_000
    choose = random.Random(seed).choice
    with log.open("w", encoding="ascii") as notes, fn.backend(backend):
        for _ in range(examples):
            case = draw(choose, **options)
            notes.write(json.dumps(case) + "\n")
            notes.flush()
            judge(case)


# --- In the process that watches ------------------------------------------------------------------


def child(*arguments: str, cpu: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """Another Python on this tree, for an instruction set, whose threads wait without spinning."""
    ours = ("FASTNORM_", "OMP_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    environment |= {"OMP_WAIT_POLICY": "passive", "MALLOC_PERTURB_": "165"}
    environment |= {"FASTNORM_CPU": cpu} if cpu else {}
    command = [sys.executable, "-m", "tests.fuzz", *arguments]
    try:
        return subprocess.run(
            command, env=environment, cwd=ROOT, timeout=timeout, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired as late:
        return subprocess.CompletedProcess(command, -1, "", f"no end after {late.timeout:.0f} s")


def fails(cases: list[Case], backend: str, cpu: str) -> str:
    """How these cases end in a process of their own; empty if well."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cases.jsonl"
        path.write_text("".join(json.dumps(c) + "\n" for c in cases), encoding="ascii")
        done = child("--repeat", str(path), "--backend", backend, cpu=cpu, timeout=WITHOUT_END)
    return ending(done)


def ending(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode == 0:
        return ""
    lines = [n for n in done.stderr.strip().splitlines() if not n.startswith("Extension modules")]
    if done.returncode == 1:
        return "\n".join(lines[-12:])
    return "\n".join([f"the process ended with {done.returncode}", *lines[:40]])


def run(examples: int, backend: str, cpu: str, seed: int, tries: int = 60) -> Outcome:
    """So many examples; the first that fails is made smaller, `tries` times at most."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        arguments = ["--explore", str(log), "--examples", str(examples), "--seed", str(seed)]
        done = child(
            *arguments, "--backend", backend, cpu=cpu, timeout=WITHOUT_END + 0.5 * examples
        )
        text = log.read_text(encoding="ascii") if log.exists() else ""
    cases = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    outcome = Outcome(backend, cpu, len(cases))
    if done.returncode == 0:
        return outcome
    story = ending(done)
    if not cases:
        outcome.story = story
        return outcome
    # what one case has broken may end the process in a later one
    for last in (1, 2, 4, 16, 64):
        found = cases[-last:]
        if again := fails(found, backend, cpu):
            story = again
            break
    else:
        outcome.story = (
            f"{story}\nnot alone, nor after the 63 before it; repeat all with\n"
            f"    make fuzz SEED={seed} EXAMPLES={examples} BACKEND={backend} CPU={cpu}"
        )
        return outcome
    found, story = smaller(found, story, backend, cpu, tries)
    what = f"'{json.dumps(found[0])}'"
    if len(found) > 1:
        kept = Path(tempfile.mkdtemp(prefix="fastnorm-fuzz-")) / "cases.jsonl"
        kept.write_text("".join(json.dumps(c) + "\n" for c in found), encoding="ascii")
        what = str(kept)
    setting = f"FASTNORM_CPU={cpu} " if cpu else ""
    command = f"{setting}python -m tests.fuzz --backend {backend} --repeat {what}"
    outcome.story = f"{story}\n\nrepeat it with\n    {command}"
    return outcome


# --- Making a failure small -----------------------------------------------------------------------

KEPT = ("op", "shape", "dtype", "seed", "threads", "known", "layout", "values", "bad", "eps")
PLAIN: Case = {
    "values": "normal", "bad": [], "layout": {}, "known": False, "threads": [1, 1, 1], "past": [],
    "eps": 1e-5,
}  # fmt: skip
RESET: Case = {"weight scale": 1.0, "groups": 0, "channel_axis": 1}


def simpler(case: Case) -> Iterator[Case]:
    """Cases with one thing less."""
    for key, value in PLAIN.items():
        if case[key] != value:
            yield case | {key: value}
    for key in case:
        if key in KEPT:
            continue
        empty: Any = {} if "layout" in key else RESET.get(key)
        if case[key] not in (empty, 0, False) and key not in ("trailing", "axis", "shift"):
            yield case | {key: empty}
    for key, value in case.items():
        if isinstance(value, dict) and len(value) > 1:
            for part in value:
                yield case | {key: {k: v for k, v in value.items() if k != part}}
    for at in range(len(case["bad"])):
        yield case | {"bad": case["bad"][:at] + case["bad"][at + 1 :]}
    for at, n in enumerate(case["shape"]):
        for less in dict.fromkeys((1, 2, n // 16, n // 2, n - n // 4, n - 1)):
            if 0 < less < n:
                yield case | {"shape": [*case["shape"][:at], less, *case["shape"][at + 1 :]]}


def kind(story: str) -> str:
    """What sort of failure it is: an exception's name, or how the process ended."""
    if story.startswith("the process ended"):
        return story.splitlines()[0]
    return story.splitlines()[-1].split(":")[0]


def smaller(
    cases: list[Case], story: str, backend: str, cpu: str, tries: int
) -> tuple[list[Case], str]:
    """As simple a list of cases as is found that fails in this way."""
    for at in range(len(cases) - 2, -1, -1):
        if tries > 0 and (again := fails(cases[:at] + cases[at + 1 :], backend, cpu)):
            cases, story = cases[:at] + cases[at + 1 :], again
        tries -= 1
    better = True
    while better and tries > 0 and len(cases) == 1:
        better = False
        for less in simpler(cases[0]):
            tries -= 1
            if tries < 0:
                break
            again = fails([less], backend, cpu)
            if again and kind(again) == kind(story):
                cases, story, better = [less], again, True
                break
    return cases, story


# --- The command ----------------------------------------------------------------------------------


def settings_of(backends: list[str], cpus: list[str]) -> list[tuple[str, str]]:
    """(backend, instruction set): the compiled kernels in every one that runs here."""
    import fastnorm as fn

    config = fn.show_config("dicts")
    at_hand = config["backends"]["at hand"]
    used = config["cpu"]["instruction set used"]
    known = LEVELS[: LEVELS.index(used) + 1] if used in LEVELS else ("",)
    pairs = []
    for backend in backends or (["cython"] if cpus else at_hand):
        if backend not in at_hand:
            raise SystemExit(f"no backend {backend!r} here: there are {', '.join(at_hand)}")
        if cpus and backend != "cython":
            raise SystemExit(f"--cpu chooses among Cython's kernels, and {backend!r} has none")
        if beyond := [cpu for cpu in cpus if cpu not in known]:
            raise SystemExit(f"no kernels for {beyond[0]} here: there are {', '.join(known)}")
        every = (cpus or known[::-1]) if backend == "cython" else [""]
        pairs += [(backend, cpu) for cpu in every]
    return pairs


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--examples", type=int, default=20_000, help="for each backend and CPU")
    parser.add_argument("--backend", action="append", default=[])
    parser.add_argument("--cpu", action="append", default=[], choices=LEVELS)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--repeat", metavar="CASE", help="a case, or a file with one a line")
    parser.add_argument("--explore", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if (given.repeat or given.explore) and "asan" not in os.environ.get("LD_PRELOAD", ""):
        faulthandler.enable()
    if given.repeat:
        path = None if given.repeat.startswith("{") else Path(given.repeat)
        lines = path.read_text(encoding="ascii").splitlines() if path else [given.repeat]
        examine([json.loads(line) for line in lines], (given.backend or ["auto"])[0])
        return 0
    seed = random.SystemRandom().randrange(2**32) if given.seed is None else given.seed
    if given.explore:
        explore(given.examples, seed, given.backend[0], given.explore)
        return 0
    print(f"seed {seed}")
    failed = 0
    for backend, cpu in settings_of(given.backend, given.cpu):
        began = time.monotonic()
        outcome = run(given.examples, backend, cpu, seed)
        took = time.monotonic() - began
        print(f"{backend:8}{cpu or '-':11}{outcome.examples:8} examples {took:7.0f} s", flush=True)
        if outcome.story:
            failed += 1
            print(outcome.story, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
