"""Builds check_kernels.c, which calls the kernels directly and without Python, and runs it.

python -m tests.kernels x86-64-v3    for an instruction set, or "plain": the compiler's own
python -m tests.kernels aarch64      with a cross compiler, under an emulator
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
FLAGS = ["-std=c11", "-O1", "-fno-fast-math", "-ffp-contract=off", "-fopenmp", "-DFN_CHECKED=1"]
WIDE = {"x86-64-v4": ["-mprefer-vector-width=512"]}

COMPILER = shlex.split(os.environ.get("CC", "cc"))
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"


def main(level: str) -> int:
    if level == "aarch64":
        build, run = [CROSS_COMPILER, *FLAGS, "-static"], [EMULATOR]
        options = ["short"]
    else:
        march = [] if level == "plain" else [f"-march={level}"]
        build, run = [*COMPILER, *FLAGS, *march, *WIDE.get(level, [])], []
        options = []
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder, "check_kernels"))
        source = str(HERE / "check_kernels.c")
        from .cases import write  # and with it fastnorm

        write(Path(folder))
        headers = [f"-I{CORE}", f"-I{folder}"]
        built = subprocess.run([*build, *headers, source, "-lm", "-o", program])
        return built.returncode or subprocess.run([*run, program, *options]).returncode


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
