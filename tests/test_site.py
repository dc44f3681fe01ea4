"""What the documentation says and does without a browser: pictures, the chooser, figures, blocks.

`make site-check` looks at the built pages, in a browser (site_check.py).
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import cli
from fastnorm.operations import OPERATIONS

from .helpers import ROOT, run_python

DOCS = ROOT / "docs"
CHOOSER = json.loads((DOCS / "_static" / "chooser.json").read_text(encoding="utf-8"))
BY_LABEL = {op.label: op for op in OPERATIONS}


def load(path: Path) -> ModuleType:
    """A file of the documentation, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


blocks = load(DOCS / "charts" / "blocks.py")

# --- Pictures -------------------------------------------------------------------------------------


def test_pictures_are_what_their_command_draws() -> None:
    """A changed table of operations changes them: python docs/charts/blocks.py."""
    drawn = blocks.pictures()
    kept = {path.name: path.read_text(encoding="utf-8") for path in blocks.FOLDER.glob("*.svg")}
    assert kept == drawn


@pytest.mark.parametrize(
    ("key", "call"),
    [
        ("batch", lambda x: fn.batch_norm(x, training=True)),
        ("layer", lambda x: fn.layer_norm(x, axis=(1, 2))),
        ("instance", lambda x: fn.instance_norm(x)),
        ("group", lambda x: fn.group_norm(x, 2)),
        ("token", lambda x: fn.layer_norm(x, axis=1)),
        ("token", lambda x: fn.rms_norm(x, axis=1)),
    ],
)
def test_blue_cells_are_those_that_a_result_depends_on(key: str, call: Any) -> None:
    label, arguments, *_ = blocks.NORMS[key]
    blue = blocks.shared(label, arguments)
    x = np.random.default_rng(0).standard_normal(blocks.SHAPE)
    seen, before = np.zeros_like(blue), call(x)[0, -1, 0]
    for cell in np.ndindex(x.shape):
        other = x.copy()
        other[cell] += 3.0
        seen[cell] = call(other)[0, -1, 0] != before
    assert np.array_equal(seen, blue)


# --- The chooser ----------------------------------------------------------------------------------


def chosen(network: str, batch: int) -> dict[str, Any]:
    """As chooser.js has it."""
    for answer in CHOOSER["answers"]:
        least, most = answer.get("batch", (1, None))
        if network in answer["networks"] and least <= batch and (most is None or batch <= most):
            found: dict[str, Any] = answer
            return found
    raise AssertionError(f"no answer for {network}, {batch}")


NETWORKS = [network["key"] for network in CHOOSER["networks"]]


def test_every_question_has_an_answer_and_every_answer_a_question() -> None:
    given = [chosen(network, batch) for network in NETWORKS for batch in range(1, 70)]
    assert all(answer in given for answer in CHOOSER["answers"])
    assert {key for answer in CHOOSER["answers"] for key in answer["networks"]} == set(NETWORKS)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("batch", [1, 2, 15, 16, 31, 32, 64])
def test_small_batches_get_a_norm_within_a_sample(network: str, batch: int) -> None:
    """As the table of operations says what reaches what."""
    label = chosen(network, batch)["operation"]
    if label is None:
        return
    operation = BY_LABEL[label]
    ids = operation.group_ids((2, 4, 3, 3))
    within = not set(ids[0].ravel()) & set(ids[1].ravel())
    assert within or batch >= 32
    if network == "images":
        assert within == (batch < 32)


@pytest.mark.parametrize("answer", CHOOSER["answers"], ids=lambda answer: answer["norm"])
def test_an_answers_call_runs_and_is_that_function(answer: dict[str, Any]) -> None:
    sections = (DOCS / "which-norm.rst").read_text(encoding="utf-8")
    titles = re.findall(r"^(.+)\n-{4,}$", sections, re.MULTILINE)
    names = {re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") for title in titles}
    assert answer["section"] in names
    if answer["operation"] is None:
        return
    rng = np.random.default_rng(0)
    given = {
        "x": rng.standard_normal((4, 32, 5, 5)),
        "tokens": rng.standard_normal((4, 7, 32)),
        "weight": np.ones(32),
        "bias": np.zeros(32),
        "running_mean": np.zeros(32),
        "running_var": np.ones(32),
        "scale": np.zeros((4, 1, 32)),
        "shift": np.zeros((4, 1, 32)),
        "style_std": np.ones((4, 32)),
        "style_mean": np.zeros((4, 32)),
    }
    name = BY_LABEL[answer["operation"]].name
    assert answer["call"].startswith(f"fn.{name}(")
    y = eval(answer["call"], {"fn": fn} | given)
    assert y.shape in (given["x"].shape, given["tokens"].shape)
    assert np.isfinite(y).all()


# --- The three numbers ----------------------------------------------------------------------------


def test_the_first_pages_numbers_name_commands_that_are_there() -> None:
    pytest.importorskip("sphinx")
    found = list(load(DOCS / "_ext" / "figures.py").figures())
    assert len(found) == 3
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for number, text, command, machine in found:
        assert re.match(r"\d", number)
        assert text
        assert machine["processor"]
        if command.startswith("make "):
            assert f"\n{command.removeprefix('make ')}:" in makefile
        else:
            module = command.removeprefix("python -m ").replace(".", "/")
            assert (ROOT / f"{module}.py").exists()


# --- Blocks of code -------------------------------------------------------------------------------

PAGES = [*DOCS.rglob("*.rst"), *(ROOT / f for f in ("README.md", "CONTRIBUTING.md", "SECURITY.md"))]
PAGES = [page for page in PAGES if not {"_build", "generated", "auto_examples"} & {*page.parts}]
OWN = {  # of other programs than make, Python and fastnorm: what has to be there
    ".ci/run": ROOT / ".ci" / "run",
}


def commands() -> list[str]:
    """Every line that a page tells to type."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        found += re.findall(r"^ *\$ (.+)$", text, re.MULTILINE)
    return list(dict.fromkeys(found))


def test_no_block_of_python_is_left_out() -> None:
    """Those of the pages are doctest, testcode or whole files, which make docs and tests run."""
    for page in DOCS.rglob("*.rst"):
        if page in PAGES:
            text = page.read_text(encoding="utf-8")
            assert not re.search(r"code(-block)?:: *(py|pycon|ipython)", text), page.name
            for file in re.findall(r"literalinclude:: (examples/\S+\.py)", text):
                assert (ROOT / "tests" / f"test_example_{file[9:-3]}.py").exists() or file in {
                    "examples/gpt2.py"  # of test_example_models.py
                }


def fault_of(command: str) -> str | None:
    """What is wrong with a line to type; test_supply.py looks at those of pip."""
    program, *words = shlex.split(command, comments=True)
    while "=" in program:
        program, *words = words
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = [word for word in words if "=" not in word]
        missing = [
            t for t in targets if not re.search(rf"^{re.escape(t)}:", makefile, re.MULTILINE)
        ]
        return f"no target {missing}" if missing else None
    if program == "fastnorm":
        try:
            cli._parser().parse_args(words)
        except SystemExit as end:
            return f"not taken: {end}" if end.code else None
        return None
    if program == "python":
        if words[0] == "-c":
            compile(words[1], "-c", "exec")
            return None
        file = ROOT / (words[1].replace(".", "/") if words[0] == "-m" else words[0])
        there = file.is_file() or file.is_dir() or file.with_suffix(".py").is_file()
        return None if there else f"no {file.name}"
    if program == "pip":
        return None
    return None if program in OWN and OWN[program].exists() else f"what is {program}?"


@pytest.mark.parametrize("command", commands())
def test_a_command_that_is_shown_can_be_used(command: str) -> None:
    assert fault_of(command) is None


@pytest.mark.parametrize(
    "command", ["make everything", "fastnorm benhc x", "python -m benchmarks.acuracy", "rm -r x"]
)
def test_a_wrong_command_would_be_seen(command: str) -> None:
    assert fault_of(command)


def test_readmes_block_of_pytorch_runs(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```py\n(.*?)^```", text, re.M | re.S)
    before = """
import torch
import fastnorm as fn
model = torch.nn.Sequential(torch.nn.LayerNorm(768))
tensor, weight, bias = torch.randn(4, 768), torch.ones(768), torch.zeros(768)
"""
    program = tmp_path / "readme.py"
    program.write_text(before + block, encoding="utf-8")
    run = run_python(str(program), PYTHONPATH=str(ROOT))
    assert (run.returncode, run.stderr) == (0, "")
    assert "LayerNorm" in run.stdout
