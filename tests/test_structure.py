"""Figures of the structure that must not grow, and knowledge that stands in two places alike."""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import _core, _formulas, _reference, arguments, dispatch
from fastnorm._numba import scalar, slopes
from fastnorm.operations import OPERATIONS

from .helpers import COMPILED, ROOT, run_python

PACKAGE = ROOT / "fastnorm"

# Where Numba's kernels and the GPU's take their operands one by one.
NOT_YET = ("_numba",)

# Python functions that a call passes that has not been described before, and how many of them are
# below the backend's first. Running statistics are checked, and moved, as well.
COLD_CALL = {"batch_norm": 18, "batch_norm in training": 22}
IN_THE_BACKEND = 10


# --- Sizes ----------------------------------------------------------------------------------------


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def positional(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = [*node.args.posonlyargs, *node.args.args]
    return len(given) - (bool(given) and given[0].arg in ("self", "cls"))


def agreed() -> set[str]:
    """Public functions, whose signatures are those of PyTorch's or agreed."""
    names = {(op.name, op.backward, op.elementwise_backward) for op in OPERATIONS}
    return {name or "None" for found in names for name in found}


def test_no_line_of_the_kernels_has_more_than_100_columns() -> None:
    """Those of Python are the linter's."""
    core, programs = PACKAGE / "_core", ROOT / "tests" / "kernels"
    files = [f for kind in ("h", "pxi", "pyx") for f in core.glob(f"*.{kind}")]
    long = [
        f"{path.name}:{i}"
        for path in [*files, *programs.glob("*.c")]
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 100
    ]
    assert not long
    assert len(files) > 20


def test_no_function_takes_more_than_eight_by_position() -> None:
    long = [
        f"{path.relative_to(PACKAGE)}: {node.name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] not in NOT_YET
        for node in functions(path)
        if positional(node) > 8 and node.name not in agreed()
    ]
    assert not long


# --- The way in -----------------------------------------------------------------------------------


# What a call passes, in their order; comprehensions and lambdas are part of their function.
PASSED = """
import sys
import numpy as np, fastnorm as fn

def passed(call):
    found = []
    def profile(frame, event, _):
        file, name = frame.f_code.co_filename, frame.f_code.co_qualname
        own = "fastnorm" in file or file.startswith("<the wrapper")
        if event == "call" and own and not name.endswith(">"):
            found.append(file.rpartition("fastnorm/")[2] + " " + name)
    sys.setprofile(profile)
    call()
    sys.setprofile(None)
    return list(dict.fromkeys(found))

x, w = np.ones((8, 64, 8, 8), np.float32), np.ones(64, np.float32)
calls = {
    "group_norm": lambda: fn.group_norm(x, 8),
    "group_norm with weights": lambda: fn.group_norm(x[:4], 8, w, w),
    "layer_norm": lambda: fn.layer_norm(x[0, 0], 8),
    "batch_norm": lambda: fn.batch_norm(x, w, w, w, w),
    "batch_norm in training": lambda: fn.batch_norm(x, w, w, w, w, training=True),
}
fn.rms_norm(x[0, 0], 8)  # what is imported or found once
print({name: (passed(call), passed(call)) for name, call in calls.items()})
"""


@pytest.mark.skipif(not COMPILED, reason="the way without compiled kernels is longer")
def test_a_cold_call_passes_few_functions() -> None:
    run = run_python("-c", PASSED, FASTNORM_BACKEND="cython")
    assert not run.stderr
    for name, (cold, warm) in ast.literal_eval(run.stdout).items():
        assert len(warm) == 1, (name, warm)
        assert len(cold) <= COLD_CALL.get(name, 15), (name, cold)
        backend = next(i for i, function in enumerate(cold) if function.startswith("backends"))
        assert len(cold[backend:]) <= IN_THE_BACKEND, (name, cold)


def test_public_functions_are_what_they_look_like() -> None:
    """The wrapper has the signature, the documentation and the name of what it wraps."""
    for name in sorted(agreed() - {"None"}):
        function = getattr(fn, name)
        body = inspect.unwrap(function)
        assert inspect.isfunction(function)
        assert body is not function
        assert inspect.signature(function) == inspect.signature(body)
        assert function.__doc__.splitlines()[0] == body.__doc__.splitlines()[0]
        assert function.__module__ == body.__module__
        assert function.__annotations__["return"].startswith(("Array", "tuple", "Gradients"))
        assert pickle.loads(pickle.dumps(function)) is function
        with pytest.raises(TypeError, match=name):
            function(no_such_argument=1)


def test_a_wrapper_is_dispatched_by_name_and_position_alike() -> None:
    """An adapter gets every argument by its name, in whatever way it was given."""
    seen: list[dict[str, Any]] = []

    @dispatch.public(cached=False)
    def layer_norm(x: Any, size: int = 3, *, eps: float = 1e-5) -> dispatch.Request[Any]:
        seen.append({"x": x, "size": size, "eps": eps})
        raise LookupError

    for call in (
        lambda: layer_norm(1, 4, eps=2),
        lambda: layer_norm(size=4, x=1, eps=2.0),
        lambda: layer_norm(1, size=4, eps=np.float32(2)),
    ):
        with pytest.raises(LookupError):
            call()
    assert seen == [{"x": 1, "size": 4, "eps": 2.0}] * 3
    with pytest.raises(ValueError, match="eps"):
        layer_norm(1, eps=-1)


# --- What may be taken as it is -------------------------------------------------------------------


class Sub(np.ndarray):
    """A subclass, whose arrays are not plain."""


def any_array(rng: np.random.Generator) -> Any:
    """An array of any kind, layout and alignment."""
    kinds = [np.float32, np.float64, np.float16, ">f4", np.int16, np.bool_, np.longdouble, object]
    dtype = np.dtype(kinds[rng.integers(len(kinds))])
    shape = tuple(rng.integers(0, 4, rng.integers(0, 4)))
    if dtype.hasobject:
        return np.zeros(shape, object)
    memory = np.zeros(4096, np.uint8)
    start = int(rng.integers(0, 3)) if rng.random() < 0.3 else 0
    steps = [int(rng.choice([0, 1, 2, -1, 5])) * dtype.itemsize for _ in shape]
    if rng.random() < 0.2:
        steps = [step + int(rng.integers(0, 2)) for step in steps]
    array = np.ndarray(shape, dtype, memory.data, 2048 + start, steps)  # type: ignore[arg-type]
    if rng.random() < 0.1:
        array = array.view(Sub)
    return array


@pytest.mark.skipif(not COMPILED, reason="no compiled kernels")
def test_python_and_the_kernels_agree_on_what_is_plain() -> None:
    rng = np.random.default_rng(1)
    kernels: Any = _core.kernels
    plain = 0
    for value in [None, 1.0, [1.0], *(any_array(rng) for _ in range(5000))]:
        assert kernels.is_plain(value) == arguments._is_plain(value), value
        plain += kernels.is_plain(value)
        if isinstance(value, np.ndarray):
            lies = arguments._lies_plainly(value)
            assert kernels.array_lies_plainly(value) == lies, (value.strides, value.dtype)
    assert 500 < plain < 4500


@pytest.mark.skipif(not COMPILED, reason="no compiled kernels")
def test_python_and_the_kernels_agree_on_what_overlaps() -> None:
    rng = np.random.default_rng(2)
    kernels: Any = _core.kernels
    memory = np.zeros(64, np.float32)
    apart = 0
    for _ in range(5000):
        pair = []
        for _ in range(2):
            low, high = sorted(rng.integers(0, 65, 2))
            array = memory[low : high : int(rng.choice([1, 2, -1]))]
            if rng.random() < 0.3 and array.size % 2 == 0:
                array = array.reshape(2, -1)
            if rng.random() < 0.2:
                array = array.view(np.int32)
            pair.append(array)
        if rng.random() < 0.2:
            pair[1] = pair[0][...]
        found = kernels.array_writes_apart(*pair)
        assert found == arguments.writes_apart_anywhere(*pair), pair
        apart += found
    assert 500 < apart < 4500


# --- Names, each in one list ----------------------------------------------------------------------


def test_public_names_stand_in_one_list() -> None:
    """A new function is public once its module's __all__ names it: nothing repeats the names."""
    modules = {"backward", "elementwise", "functional", "related"}
    listed = {
        name for module in modules for name in importlib.import_module(f"fastnorm.{module}").__all__
    }
    assert {op.name for op in OPERATIONS} - {"standardize"} <= listed
    assert listed <= set(fn.__all__)
    package = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    pages = (ROOT / "docs/reference/functions.rst").read_text(encoding="utf-8")
    assert not [name for name in listed if re.search(rf'(import |"){name}\b', package)]
    assert set(re.findall(r"public-functions:: (\w+)", pages)) == modules


def test_activations_stand_in_one_table() -> None:
    """Python's names, Numba's functions and the kernels' numbers follow from one table."""
    names = _reference.IN_KERNELS
    assert tuple(_reference.ACTIVATIONS) == arguments.ACTIVATIONS
    header = (PACKAGE / "_core/activations.h").read_text(encoding="utf-8")
    (those,) = re.findall(r"define FN_NAMED_ACTIVATIONS\(X\) X\(IDENTITY\) (.*)", header)
    (others,) = re.findall(r"define FN_ACTIVATIONS\(X\) FN_NAMED_ACTIVATIONS\(X\) (.*)", header)
    assert re.findall(r"X\((\w+)\)", those) == [name.upper() for name in arguments.ACTIVATIONS]
    assert re.findall(r"X\((\w+)\)", f"{those} {others}") == [name.upper() for name in names]
    assert tuple(_formulas.SLOPES) == names
    assert tuple(slopes.NAMED) == arguments.ACTIVATIONS
    for name in names:
        assert all(callable(getattr(scalar, f"{name}_{bits}")) for bits in (32, 64))
        assert f"fn_{name}_32(" in header
    if COMPILED:
        kernels: Any = _core.kernels
        with pytest.raises(SystemError, match="activations"):
            kernels.number_activations((*names, "another"))
