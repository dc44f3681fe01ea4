"""Build the kernels with sanitizers and with every bound checked, and let tests run on them.

python -m tests.sanitize          its widest instruction set: 2,000 random calls and the table
python -m tests.sanitize --all    every instruction set that this processor has
python -m tests.sanitize --examples 300 --short   what CI runs: below 4 minutes with the build

AddressSanitizer ends the process at an access outside an array of the C library's memory or of the
stack, UndefinedBehaviorSanitizer at an overflow or a misaligned access, and `_core/check.h` at one
that leaves what a kernel was given, or a piece of its scratch memory. gcc on Linux only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from fastnorm import _core

ROOT = Path(__file__).parent.parent
TREE = ROOT / "build" / "sanitized"
SANITIZERS = "address,undefined"
# The numerical table: every operation, dtype and layout of fastnorm/operations.py.
TABLE = ("tests/test_accuracy.py", "tests/test_features.py", "tests/test_backward.py")
SHORT = ("tests/test_bounds.py",)


def build(levels: list[str]) -> None:
    """Install the package outside the tree, with its kernels for these instruction sets."""
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q"),
            *("--no-deps", "--upgrade", "--target", str(TREE), str(ROOT)),
        ],
        env=os.environ
        | {
            "FASTNORM_CHECK": "1",
            "FASTNORM_SANITIZE": SANITIZERS,
            "FASTNORM_BUILD_KERNELS": "1",
            "FASTNORM_BUILD_CPU": ",".join(levels),
        },
        check=True,
    )


def environment(level: str) -> dict[str, str]:
    """That of a Python whose processes, and theirs, take the sanitized package."""
    libraries = [
        subprocess.run(
            ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        # Python frees little at its end; a failed allocation is NumPy's to report
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": f"{TREE}{os.pathsep}{ROOT}",
        "FASTNORM_CPU": level,
    }


def main() -> int:
    """Build and run; 0 if nothing was found."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.sanitize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--examples", type=int, default=2000, help="random calls")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="every instruction set")
    parser.add_argument("--short", action="store_true", help="without the numerical table")
    given = parser.parse_args()
    widest = _core.level_found
    if widest not in _core.LEVELS:
        raise SystemExit(f"the sanitized build is for x86-64, and this processor is {widest!r}")
    levels = list(_core.LEVELS[: _core.LEVELS.index(widest) + 1]) if given.all else [widest]
    began = time.monotonic()
    build(levels)
    print(f"built for {', '.join(levels)} with {SANITIZERS}: {time.monotonic() - began:.0f} s")
    failed = 0
    for level in levels:
        python = [sys.executable, "-m"]
        fuzz = ["tests.fuzz", "--backend", "cython", "--cpu", level, "--seed", str(given.seed)]
        # pytest, too, puts the folder of the tests behind those it was given, not before them
        table = ["pytest", "-q", "-o", f"pythonpath={TREE} {ROOT}", "--import-mode=append"]
        for command in (
            [sys.executable, "-c", WHICH.format(tree=str(TREE))],
            [*python, *fuzz, "--examples", str(given.examples)],
            [*python, *table, *(SHORT if given.short else SHORT + TABLE)],
        ):
            failed |= subprocess.run(command, env=environment(level), cwd=ROOT).returncode
    print("faults were found" if failed else "no fault was found")
    return 1 if failed else 0


# The processes must not take the package of the tree.
WHICH = """
import fastnorm
from fastnorm import _core
assert fastnorm.__file__.startswith({tree!r}), fastnorm.__file__
assert _core.kernels.is_checked(), "not a checking build"
"""

if __name__ == "__main__":
    sys.exit(main())
