"""The tests with the oldest of everything that pyproject.toml allows.

Arguments, if any, are pytest's, in place of the choice below.
In a copy of the tree, with an environment of its own, the kernels are built by the oldest Cython
against the oldest NumPy, and the tests run that meet other libraries. Then those of the arithmetic
run on the kernels that this tree has, which were built against a newer NumPy.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from requirements import oldest, requirements

ROOT = Path(__file__).parent.parent
EXTRAS = ("build-system", "demo", "dask", "models", "mpi", "stats", "test")
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv*", "*.so", "*.pyd", "__pycache__", ".*_cache", ".hypothesis", "build", "dist"
)
# Those that call other libraries. What these are given, the rest of the tests covers.
TESTS = (
    "tests/test_backends.py", "tests/test_cli.py", "tests/test_dask.py",
    "tests/test_example_digits.py", "tests/test_features.py", "tests/test_moments.py",
    "tests/test_mpi.py", "tests/test_numba.py", "tests/test_overloads.py",
    "tests/test_placement.py", "tests/test_stats.py",
)  # fmt: skip
# Old libraries warn of what the newest of those beneath them are about to take away.
WARNINGS = ("-W", "ignore::DeprecationWarning")
KERNELS = ("tests/test_backends.py", "tests/test_accuracy.py", "--quick")


def main(*arguments: str) -> None:
    """Make the copy and its environment, run the tests; an error of one ends it."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        shutil.copytree(ROOT, tree, ignore=NOT_COPIED)
        subprocess.run([sys.executable, "-m", "venv", f"{folder}/venv"], check=True)
        python = Path(folder, "venv", "Scripts" if sys.platform == "win32" else "bin", "python")
        pins = Path(folder, "oldest.txt")
        wanted = requirements(*EXTRAS)
        pins.write_text("\n".join(filter(None, map(oldest, wanted))), encoding="utf-8")

        def run(*command: str) -> None:
            print("$ python", *command, flush=True)
            subprocess.run([str(python), *command], cwd=tree, check=True)

        install = ("-m", "pip", "--disable-pip-version-check", "install", "-q")
        run(*install, "-r", str(pins))
        run(*install, "--no-build-isolation", "--no-deps", "-e", ".")
        run("-m", "pytest", "-q", *WARNINGS, *(arguments or TESTS))
        if arguments:
            return
        for path in (ROOT / "fastnorm/_core").glob("*.[sp][oy]*"):
            if path.suffix in (".so", ".pyd"):
                shutil.copy(path, tree / "fastnorm/_core")
        run("-m", "pytest", "-q", *WARNINGS, *KERNELS)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
