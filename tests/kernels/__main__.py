"""Builds programs that call the kernels, or their threads, without Python, and runs them.

python -m tests.kernels x86-64-v3    for an instruction set, or "plain": the compiler's own
python -m tests.kernels aarch64      with a cross compiler, under an emulator
python -m tests.kernels threads      the threads alone, and they and kernels with ThreadSanitizer
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
CORE = HERE.parent.parent / "fastnorm/_core"
# As setup.py has them. -O1 is enough for what is checked, and takes a quarter of the time.
FLAGS = ["-std=c11", "-O1", "-fno-fast-math", "-ffp-contract=off", "-pthread", "-DFN_CHECKED=1"]
WIDE = {"x86-64-v4": ["-mprefer-vector-width=512"]}

COMPILER = shlex.split(os.environ.get("CC", "cc"))
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"

SANITIZER = ["-fsanitize=thread", "-g1"]
# What runs on threads, how it is built, and what it is told; the sanitizer follows no forks.
THREADS: dict[str, tuple[str, list[str], list[str]]] = {
    "threads": ("check_pool.c", [], []),
    "without the system's futex": ("check_pool.c", ["-DFN_NO_FUTEX"], []),
    "with ThreadSanitizer": ("check_pool.c", SANITIZER, ["no forks"]),
    "with it, without futex": ("check_pool.c", [*SANITIZER, "-DFN_NO_FUTEX"], ["no forks"]),
    "kernels with ThreadSanitizer": ("check_kernels.c", SANITIZER, ["short"]),
}


def build_and_run(build: list[str], source: str, run: list[str], options: list[str]) -> int:
    """What the program of a source file returns."""
    with tempfile.TemporaryDirectory() as folder:
        from .cases import write  # and with it fastnorm

        write(Path(folder))
        program = str(Path(folder, "program"))
        headers = [f"-I{CORE}", f"-I{folder}"]
        built = subprocess.run([*build, *headers, str(HERE / source), "-lm", "-o", program])
        return built.returncode or subprocess.run([*run, program, *options]).returncode


def runs_with(flags: list[str]) -> bool:
    """Whether programs that are built with these flags run here: a sanitizer may be missing, or not
    know where the system's kernel puts memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        program, source = Path(folder, "probe"), Path(folder, "probe.c")
        source.write_text("int main(void) { return 0; }", encoding="utf-8")
        built = subprocess.run([*COMPILER, *flags, source, "-o", program], capture_output=True)
        return (
            not built.returncode and not subprocess.run([program], capture_output=True).returncode
        )


def check_threads() -> int:
    failed = 0
    for name, (source, flags, options) in THREADS.items():
        if not runs_with(flags):
            print(f"{name}: no such program runs here")
            continue
        print(name, end=": ", flush=True)
        failed |= build_and_run([*COMPILER, *FLAGS, *flags], source, [], options)
    return failed


def main(what: str) -> int:
    if what == "threads":
        return check_threads()
    if what == "aarch64":
        build = [CROSS_COMPILER, *FLAGS, "-static"]
        return build_and_run(build, "check_kernels.c", [EMULATOR], ["short"])
    march = [] if what == "plain" else [f"-march={what}"]
    build = [*COMPILER, *FLAGS, *march, *WIDE.get(what, [])]
    return build_and_run(build, "check_kernels.c", [], [])


def can_build() -> bool:
    """With setuptools, of which setup.py is."""
    return shutil.which(COMPILER[0]) is not None and find_spec("setuptools") is not None


def can_cross_build() -> bool:
    setuptools = find_spec("setuptools") is not None
    return (
        setuptools
        and shutil.which(CROSS_COMPILER) is not None
        and shutil.which(EMULATOR) is not None
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
