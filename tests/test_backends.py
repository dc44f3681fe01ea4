"""Who computes, with how many threads, and what importing costs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest

import fastnorm as fn

from .helpers import BACKENDS, COMPILED, ROOT, run_python


def test_backends_are_chosen_and_restored() -> None:
    before = fn.get_backend()
    for name in BACKENDS:
        with fn.backend(name):
            assert fn.get_backend() == name
        assert fn.get_backend() == before
    with pytest.raises(RuntimeError, match="inside"), fn.backend("numpy"):
        raise RuntimeError("inside")
    assert fn.get_backend() == before
    fn.set_backend("auto")
    assert fn.get_backend() == BACKENDS[0]
    fn.set_backend(before)


def test_threads_are_chosen_and_restored() -> None:
    before = fn.get_num_threads()
    with fn.threads(3):
        assert fn.get_num_threads() == 3
    assert fn.get_num_threads() == before
    for wrong in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="num_threads"):
            fn.set_num_threads(wrong)


def test_show_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert fn.show_config() is None
    printed = capsys.readouterr().out
    config = fn.show_config("dicts")
    json.dumps(config)
    for section in ("versions", "cpu", "machine", "threads", "backends", "cuda"):
        assert section in config
        assert section in printed
    assert np.__version__ in printed


PROBE = "import fastnorm as fn; print(fn.get_backend(), fn.get_num_threads())"


@pytest.mark.parametrize(
    ("environment", "printed"),
    [
        ({"FASTNORM_BACKEND": "numpy", "FASTNORM_NUM_THREADS": "3"}, "numpy 3"),
        ({"FASTNORM_BACKEND": "numpy", "OMP_NUM_THREADS": "5,2"}, "numpy 5"),
        ({"FASTNORM_NUM_THREADS": "7", "OMP_NUM_THREADS": "5"}, f"{BACKENDS[0]} 7"),
    ],
)
def test_environment(environment: dict[str, str], printed: str) -> None:
    run = run_python("-c", PROBE, **environment)
    assert run.stdout.strip() == printed, run.stderr


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"FASTNORM_BACKEND": "fast"}, "'fast'"),
        ({"FASTNORM_NUM_THREADS": "many"}, "FASTNORM_NUM_THREADS='many'"),
        ({"FASTNORM_CPU": "x86-64-v9"}, "x86-64-v9"),
    ],
)
def test_wrong_environment(environment: dict[str, str], words: str) -> None:
    if "FASTNORM_CPU" in environment and not COMPILED:
        return  # nothing is chosen
    run = run_python("-c", PROBE, **environment)
    assert run.returncode != 0
    assert "ValueError" in run.stderr
    assert words in run.stderr


@pytest.mark.skipif(not COMPILED, reason="no compiled kernels")
def test_instruction_sets_can_be_capped() -> None:
    show = "import fastnorm as fn; print(fn.show_config('dicts')['cpu']['instruction set used'])"
    free = run_python("-c", show).stdout.strip()
    capped = run_python("-c", show, FASTNORM_CPU="x86-64-v2").stdout.strip()
    assert capped == ("x86-64-v2" if free.startswith("x86-64") else free)


def test_import_brings_nothing_optional() -> None:
    optional = ["numba", "torch", "dask", "ml_dtypes", "matplotlib", "scipy", "sklearn", "PIL"]
    # a tenth of what NumPy takes, and of what fastnorm does
    optional += ["numpy.random", "concurrent.futures", "multiprocessing", "fastnorm.nn"]
    code = f"import sys, fastnorm; print([m for m in {optional} if m in sys.modules])"
    run = run_python("-c", code)
    assert run.stdout.strip() == "[]", run.stderr


def test_without_compiled_kernels() -> None:
    """A source build with no compiler: Numba's compute, with the same results."""
    code = """
import sys
sys.modules["fastnorm._core._cpu"] = None  # importing it raises ImportError
import numpy as np, fastnorm as fn
x = np.random.default_rng(0).standard_normal((4, 8, 30)).astype(np.float32) + 1000
print(fn.get_backend(), fn.group_norm(x, 2).astype(float).sum(axis=2).round(4).tolist())
"""
    run = run_python("-c", code)
    x = np.random.default_rng(0).standard_normal((4, 8, 30)).astype(np.float32) + 1000
    right = fn.group_norm(x, 2).astype(float).sum(axis=2)
    name, sums = run.stdout.split(" ", 1)
    assert name == "numba", run.stderr
    # 30 outputs of at most 4, each within 3 units of 2^-22 of the other's, rounded to 1e-4
    np.testing.assert_allclose(json.loads(sums), right, atol=30 * 3 * 2**-22 + 1e-4)


def run_copy(
    tmp_path: Path, broken: str, code: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Python with a copy of the package in which one compiled module is no library; "": none is."""
    ignored = ["__pycache__", *([] if broken else ["*.so", "*.pyd"])]
    shutil.copytree(
        ROOT / "fastnorm", tmp_path / "fastnorm", ignore=shutil.ignore_patterns(*ignored)
    )
    if broken:
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        (tmp_path / "fastnorm/_core" / f"{broken}{suffix}").write_bytes(b"no library")
    return run_python("-P", "-c", code, PYTHONPATH=str(tmp_path), **environment)


def test_kernels_that_are_there_and_do_not_load(tmp_path: Path) -> None:
    """Never silence: a warning with the reason and with what is used instead."""
    used = fn.show_config("dicts")["cpu"]["instruction set used"] if COMPILED else ""
    broken = f"_kernels_{used.removeprefix('x86-64-')}" if COMPILED else "_cpu"
    code = "import fastnorm as fn; print(fn.show_config('dicts')['cpu']['failed to load'])"
    run = run_copy(tmp_path, broken, f"{code}; print(fn.get_backend())")
    told, backend = run.stdout.splitlines()
    reason = f"{broken}: ImportError: "
    assert told.startswith(reason)
    instead = f"{backend} is used" if backend != "cython" else "the kernels for "
    assert "RuntimeWarning" in run.stderr
    assert reason in run.stderr
    assert instead in run.stderr


def test_kernels_that_do_not_load_are_named_where_they_are_asked_for(tmp_path: Path) -> None:
    run = run_copy(tmp_path, "_cpu", "import fastnorm", FASTNORM_BACKEND="cython")
    assert run.returncode == 1
    assert "no 'cython' backend" in run.stderr
    assert "(_cpu: ImportError: " in run.stderr


def test_kernels_that_were_not_built_are_no_fault(tmp_path: Path) -> None:
    code = "import fastnorm as fn; print(fn.get_backend())"
    run = run_copy(tmp_path, "", code)
    others = [name for name in BACKENDS if name != "cython"]
    assert (run.stdout, run.stderr) == (f"{others[0]}\n", "")


def test_a_backend_is_one_file_and_one_line(tmp_path: Path) -> None:
    """As CONTRIBUTING says: a module with five functions, and its name in a table."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd")
    shutil.copytree(ROOT / "fastnorm", tmp_path / "fastnorm", ignore=ignored)
    folder = tmp_path / "fastnorm/backends"
    (folder / "loud.py").write_text(
        "from fastnorm.backends.numpy import available, backward, moments, takes_whole\n"
        "from fastnorm.backends import numpy\n"
        "def forward(p):\n"
        "    print('loud')\n"
        "    numpy.forward(p)\n"
    )
    table = (folder / "__init__.py").read_text()
    line = '"numpy": numpy}'
    assert table.count(line) == 1
    (folder / "__init__.py").write_text(
        table.replace(
            line, '"numpy": numpy, "loud": import_module("fastnorm.backends.loud")}'
        ).replace("import os\n", "import os\nfrom importlib import import_module\n")
    )
    code = """
import numpy as np, fastnorm as fn
x = np.arange(48.0).reshape(2, 4, 6)
with fn.backend("loud"):
    y, mean, rstd = fn.group_norm(x, 2, return_stats=True)
    dx, _, _ = fn.group_norm_backward(x, x, mean, rstd, 2)
    print(fn.get_backend(), fn.show_config("dicts")["backends"], fn.moments(x)[0])
fn.set_backend("numpy")
assert np.array_equal(y, fn.group_norm(x, 2))
assert np.array_equal(dx, fn.group_norm_backward(x, x, mean, rstd, 2)[0])
try:
    fn.set_backend("lout")
except ValueError as error:
    print(error)
"""
    run = run_python("-P", "-c", code, PYTHONPATH=str(tmp_path))
    assert run.returncode == 0, run.stderr
    first, second, third = run.stdout.splitlines()
    assert first == "loud"
    assert second.startswith("loud {'in use': 'loud', ")
    assert "'loud'" in second
    assert second.endswith("23.5")
    assert "did you mean 'loud'" in third


def test_helpers_do_not_leak_the_environment() -> None:
    assert "FASTNORM_BACKEND" not in os.environ
