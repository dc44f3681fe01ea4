"""What is installed, from where, and by which name; what README says to type."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastnorm as fn
from tools import locked
from tools.requirements import oldest, parts, requirements

from .helpers import PATIENCE, REQUIRED, ROOT, run_python
from .test_mpi import mpiexec

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAME = PROJECT["name"]
EXTRAS = PROJECT["optional-dependencies"]

# --- "pip install" lines --------------------------------------------------------------------------

# What else may be named after "pip install", and why.
OTHERS = {
    ".": "this tree",
    "torch": "PyTorch, which .ci/run installs first",
    "timm": "whose norms fastnorm.torch replaces, which .ci/run installs next",
    "jax": "a peer of fastnorm bench",
    "onnxruntime": "another",
    "onnx": "what makes its models",
    "ml_dtypes": "bfloat16 for NumPy",
    "mpich": "an MPI for mpi4py",
    "imagecodecs": "what tifffile decompresses with",
}
# An option, with its value where it takes one, or a requirement; and what lies between two of them.
WORD = re.compile(
    r"""["']?(?:(?:-r|-c|--find-links)\s+\S+|-[\w=-]*|(?P<name>[\w.$({\[-][^\s"'`,;)]*\)?))["']?"""
)
INSTALL = re.compile(r"pip\)? (?:[^\n`]* )?install\b[ \t]*")


def texts() -> Iterator[tuple[str, str]]:
    """Everything that may tell a person or a machine what to install: where, and the text."""
    folders = ("docs", ".github", ".ci", "tools", "tests", "benchmarks")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    paths += [path for path in ROOT.iterdir() if path.is_file()]
    paths += Path(fn.__file__).parent.rglob("*.py")
    kinds = {".md", ".rst", ".py", ".toml", ".yml", ".txt", ".in", ""}
    for path in paths:
        if path.suffix in kinds and "_build" not in path.parts and path.name != Path(__file__).name:
            yield path.name, path.read_text(encoding="utf-8")


def asked_for(text: str) -> list[str]:
    """Every requirement that is named after "pip install", up to the end of the command."""
    found = []
    text = re.sub(r"([\"'])\s*\n\s*f?\1", "", text)  # one string of Python on two lines
    text = text.replace("{extra}", "demo").replace("$(PIP_ARGS)", "-q").replace("$(PIP)", "pip")
    for start in INSTALL.finditer(text):
        at = start.end()
        while word := WORD.match(text, at):
            if word["name"]:
                found.append(word["name"])
            at = word.end()
            ends = word[0][-1:] in "\"'" and word[0][0] not in "\"'"  # a string with the command
            if ends or text[at : at + 1] != " ":
                break
            at += 1
    return found


def fault(requirement: str) -> str | None:
    """What is wrong with a requirement that somebody is told to install."""
    name = re.split(r"[\[=<>~! ]", requirement)[0]
    if name in OTHERS or requirement.startswith("$"):  # a variable of make: its value is checked
        return None
    if name != NAME:
        return f"{name} is not this distribution, nor in OTHERS"
    extras = re.findall(r"[\w-]+", requirement.removeprefix(NAME))
    unknown = [extra for extra in extras if extra not in EXTRAS]
    return f"there is no extra {unknown}" if unknown else None


def test_what_is_told_to_install_installs_this() -> None:
    found = [(where, word) for where, text in texts() for word in asked_for(text)]
    assert {(where, word): fault(word) for where, word in found if fault(word)} == {}
    # each place that has such lines is seen
    assert {"README.md", "install.rst", "terminal.py", "package.py", "run"} <= {w for w, _ in found}
    assert {word for _, word in found if word.startswith(NAME)} >= {
        f"{NAME}[{extra}]" for extra in ("cuda", "dask", "demo", "models", "mpi", "stats")
    }


@pytest.mark.parametrize(
    "line",
    [
        "pip install fastnorm",
        "pip install 'fastnorm[demo]'",
        "pip install -U fastnorm[cuda]",
        'python -m pip install "fastnorm>=1"',
        "pip install fastnorm-kernels[demos]",
        "pip install numba",
    ],
)
def test_a_wrong_line_would_be_seen(line: str) -> None:
    assert [word for word in asked_for(line) if fault(word)]


def test_no_text_names_extras_of_the_other_distribution() -> None:
    wrong = re.compile(r"(?<![\w-])fastnorm\[")
    assert [where for where, text in texts() if wrong.search(text)] == []


def test_make_installs_nothing_by_the_projects_name() -> None:
    """Not even where it is installed: pip may look at the index all the same."""
    for extra in EXTRAS:
        names = [parts(line)["name"] for line in requirements(extra)]
        assert not [name for name in names if name.startswith("fastnorm")], extra
    recipes = re.findall(r"^\t.*\$\(PIP\) install.*$", (ROOT / "Makefile").read_text(), re.M)
    assert recipes
    assert not [line for line in recipes if "fastnorm" in line]


def test_pip_takes_ours(tmp_path: Path) -> None:
    """`pip install fastnorm-kernels[stats]` where somebody else's fastnorm is, without an index."""
    (tmp_path / "index").mkdir()
    for name, version in ((NAME, fn.__version__), ("fastnorm", "99.0")):
        folder = tmp_path / name
        folder.mkdir()
        pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        pyproject = pyproject.replace(f'name = "{NAME}"', f'name = "{name}"')
        pyproject = pyproject.replace('dynamic = ["version"]', f'version = "{version}"')
        pyproject = re.sub(r"\[tool.setuptools.dynamic\]\n.*\n", "", pyproject)
        pyproject = re.sub(r"^(readme|license-files) = .*$", "", pyproject, flags=re.M)
        (folder / "pyproject.toml").write_text(pyproject, encoding="utf-8")
        (folder / "fastnorm").mkdir()
        (folder / "fastnorm/__init__.py").touch()
        pip(
            "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index",
            "-w", str(tmp_path / "index"), str(folder),
        )  # fmt: skip
    would = pip(
        "install", "--dry-run", "--no-deps", "--ignore-installed", "--no-index",
        "--find-links", str(tmp_path / "index"), f"{NAME}[stats]",
    )  # fmt: skip
    assert f"Would install {NAME}-{fn.__version__}\n" in would


def pip(*arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        env={k: v for k, v in os.environ.items() if k != "PIP_QUIET"},  # what it says is looked at
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


# --- Lower bounds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", ["build-system", *EXTRAS])
def test_every_requirement_has_a_lower_bound(extra: str) -> None:
    """Which `make test-oldest` installs; one that is pinned needs none."""
    pinned = [line for line in requirements(extra) if oldest(line) is None]
    assert pinned in ([], ["transformers==5.24.0"])


def test_kernels_are_compiled_for_the_oldest_numpy() -> None:
    """They load with it then, whichever NumPy they were built with."""
    (numpy,) = (line for line in requirements("build-system") if parts(line)["name"] == "numpy")
    named = f"NPY_{parts(numpy)['version'].replace('.', '_')}_API_VERSION"
    assert f'("NPY_TARGET_VERSION", "{named}")' in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_a_library_has_one_bound() -> None:
    bounds: dict[str, set[str]] = {}
    for line in requirements("build-system", *EXTRAS):
        bounds.setdefault(parts(line)["name"].lower(), set()).add(parts(line)["version"])
    assert {name: bound for name, bound in bounds.items() if len(bound) > 1} == {}


# --- Workflows ------------------------------------------------------------------------------------


def workflows() -> list[Path]:
    return sorted((ROOT / ".github/workflows").glob("*.yml"))


def test_actions_are_pinned_by_commit() -> None:
    used = [
        (path.name, line.strip())
        for path in workflows()
        for line in path.read_text(encoding="utf-8").splitlines()
        if "uses:" in line
    ]
    assert len(used) > 5
    pinned = re.compile(r"(- )?uses: [\w.-]+/[\w./-]+@[0-9a-f]{40} # v[\d.]+")
    assert [use for use in used if not pinned.fullmatch(use[1])] == []


def test_an_action_is_used_at_one_commit() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in workflows())
    commits: dict[str, set[str]] = {}
    for name, commit in re.findall(r"uses: ([\w./-]+)@(\w+ # \S+)", text):
        commits.setdefault(name, set()).add(commit)
    assert {name: found for name, found in commits.items() if len(found) > 1} == {}


def test_workflows_may_do_little() -> None:
    for path in workflows():
        text = path.read_text(encoding="utf-8")
        assert "\npermissions:\n  contents: read\n\n" in text, path.name
        assert set(re.findall(r"(\S+): write\b", text)) <= {"id-token"}  # trusted publishing
        checkouts = text.count("actions/checkout@")
        assert text.count("persist-credentials: false") == checkouts, path.name


# --- Two makes at once ----------------------------------------------------------------------------


def test_a_command_waits_for_the_one_before(tmp_path: Path) -> None:
    """As the recipes of two makes do."""
    lock, log = tmp_path / "lock", tmp_path / "log"
    lock.touch()
    code = (
        "import sys, time; log = open(sys.argv[1], 'a'); print('begins', file=log, flush=True); "
        "time.sleep(0.3); print('ends', file=log, flush=True)"
    )
    command = (str(lock), sys.executable, "-c", code, str(log))
    script = str(Path(locked.__file__))
    threads = [threading.Thread(target=run_python, args=(script, *command)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert log.read_text().split() == ["begins", "ends"] * 3


def test_a_locked_command_fails_as_itself(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    assert locked.main(str(lock), sys.executable, "-c", "raise SystemExit(7)") == 7


# --- README ---------------------------------------------------------------------------------------


def test_readmes_blocks_run_one_after_the_other(tmp_path: Path) -> None:
    """As they are, in one session of Python."""
    pytest.importorskip("dask")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert len(blocks) >= 4
    if mpiexec() is None:  # there is no MPI: all but the last lines, which need one
        assert "mpi4py" not in REQUIRED
        blocks[-1] = blocks[-1].partition("from mpi4py")[0]
    program = tmp_path / "readme.py"
    program.write_text("\n\n".join(blocks), encoding="utf-8")
    run = run_python("-W", "error", str(program), PYTHONPATH=str(ROOT))
    assert (run.returncode, run.stderr) == (0, "")


def test_readme_says_how_long_the_tests_take() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"^\$ make test +# .*\bminutes\b", text, re.M)
    assert re.search(r"^\$ make test-quick +# .*\bseconds\b", text, re.M)
