"""Every example of docs/gallery runs as it is: its asserts hold, it draws, and it is done soon.

Each in a process of its own, where every warning is an error.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

from .helpers import ROOT, run_python
from .test_mpi import mpiexec

pytestmark = pytest.mark.slow

GALLERY = ROOT / "docs" / "gallery"
EXAMPLES = sorted(GALLERY.glob("plot_*.py"))
PROGRAMS = [*(ROOT / "docs" / "examples").glob("*.py")]  # which some of them use

if not EXAMPLES:  # the tests of a wheel come without docs/
    pytest.skip("no docs/gallery here", allow_module_level=True)

# Seconds of processor time for one example, with those of the processes it starts: of one core,
# and the same on a busy machine.
LIMIT = 60

# In the example's folder, as sphinx-gallery does.
RUN = """
import os, pathlib, runpy, sys
import matplotlib.pyplot as plt

path = pathlib.Path(sys.argv[1])
os.chdir(path.parent)
runpy.run_path(str(path), run_name="__main__")
assert plt.get_fignums(), "it draws nothing"
seconds = sum(os.times()[:4])
assert seconds < float(sys.argv[2]), f"it takes {seconds:.0f} s"
print("to its end")
"""


def imported(path: Path) -> set[str]:
    """The libraries that a file imports, beside Python's own."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found - sys.stdlib_module_names - {other.stem for other in PROGRAMS}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem.removeprefix("plot_"))
def test_an_example_runs(path: Path) -> None:
    # Where one must not be missing, FASTNORM_REQUIRE has it and nothing runs at all.
    needed = imported(path)
    if path.stem == "plot_mpi":
        needed |= imported(GALLERY / "mpi" / "four_processes.py")
        if mpiexec() is None:
            pytest.skip("no mpiexec")
    missing = sorted(name for name in needed if importlib.util.find_spec(name) is None)
    if missing:
        pytest.skip(f"it needs {', '.join(missing)}")
    done = run_python(
        "-W", "error", "-W", "ignore:FigureCanvasAgg is non-interactive", "-c", RUN,
        str(path), str(LIMIT), MPLBACKEND="Agg", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("to its end\n"), done.stdout
