"""The one way in: what every public function does before its own code runs.

A public function documents a call, checks it and describes it as a request (execution.py). Its
wrapper, made here from its signature, does the rest:

1. a call of plain arrays, of a kind that was described before, is answered by the compiled kernels
   (`CachedCalls` in _core/cached_calls.pxi) without any of the following;
2. options such as eps are checked;
3. arrays of another library go to its adapter;
4. the function's own code describes the call, and the request is answered by the backend in use,
   which may cache what it has found under the call's ticket.

A ticket is given for plain arrays and options that are numbers in their range or None, so with one
2 asks only what is None, and 3 has nothing left to find.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from importlib import import_module
from types import FunctionType, ModuleType
from typing import Any, ParamSpec, TypeVar

import numpy as np

from fastnorm import _core, repeated
from fastnorm._numba.gpu.libraries import handles
from fastnorm.arguments import (
    check_ddof,
    check_eps,
    check_flag,
    check_momentum,
    check_size,
    number,
    whole,
)
from fastnorm.execution import Request
from fastnorm.runtime import chosen_backend

P = ParamSpec("P")
R = TypeVar("R")

# --- Arrays of other libraries --------------------------------------------------------------------


def _is_tensor_on_the_cpu(x: Any, library: Any) -> bool:
    """Whether x is PyTorch's; those on a GPU are known by their interface."""
    kind: Any = getattr(library, "Tensor", ())
    return isinstance(x, kind) and bool(x.is_cpu)


# A library is recognised through `sys.modules`: nothing optional is imported to look at a type. An
# adapter is a module that has functions of the same names and arguments as the public ones, or an
# `execute` that has a public function's own code describe a call of arrays on a device; it is
# imported with the first x that needs it.
#
# What is asked of an x: (library that must have been imported, is x of its kind?, the adapter). A
# library that is just being imported may not have its types yet.
_ADAPTERS: tuple[tuple[str, Callable[[Any, ModuleType], bool], str], ...] = (
    (
        "dask.array",
        lambda x, library: isinstance(x, getattr(library, "Array", ())),
        "fastnorm.dask",
    ),
    (
        "torch",
        _is_tensor_on_the_cpu,
        "fastnorm.torch",
    ),
)

# What NumPy makes arrays of is the most common and asked for first.
_OWN = (np.ndarray, list, tuple, float, int)


def adapter_of(x: Any) -> ModuleType | None:
    """Return the module that computes for arrays of this type; None for NumPy and array-likes."""
    if isinstance(x, _OWN):
        return None
    for name, is_its, adapter in _ADAPTERS:
        library = sys.modules.get(name)
        if library is not None and is_its(x, library):
            return import_module(adapter)
    if handles(x):  # any library's
        return import_module("fastnorm._numba.gpu.adapter")
    return None


# What asks the cache for arrays of an adapter that has been imported, by the type of x and the name
# of the function: it takes all arguments in their order, and gives None where it has no answer.
QUICK: dict[type, dict[str, Callable[[tuple[Any, ...]], Any]]] = {}


def function_of(adapter: ModuleType, name: str, of: str) -> Callable[..., Any]:
    """Return the adapter's function of this name; `of` is what was called."""
    function: Callable[..., Any] | None = getattr(adapter, name, None)
    if function is None:
        raise TypeError(
            f"{of} got an array for {adapter.__name__}, which does not have it, expected a NumPy "
            "array; bring it to the host's memory first, as with x.get() or x.cpu().numpy()"
        )
    return function


# --- Options --------------------------------------------------------------------------------------

# Checks of options that mean the same wherever they occur, by name.
CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "training": check_flag,
    "use_input_stats": check_flag,
    "return_stats": check_flag,
    "keepdims": check_flag,
    "num_groups": whole,
    "eps": check_eps,
    "momentum": check_momentum,
    "weight_offset": number,
    "ddof": check_ddof,
    "size": check_size,
    "beta": number,
    "k": number,
}


# The public functions whose own code describes calls of arrays on a device, too.
ON_DEVICES: set[str] = set()

# --- The wrapper ----------------------------------------------------------------------------------

# Compiled once for each function, with its own signature: a wrapper of *args and **kwargs takes
# three times as long to pass them on.
_SOURCE = """\
def make(find, describe):
    def {name}({signature}):
        call = ({given},)
        found = {found}
        return describe(call) if found is None else found
    return {name}
"""


class _Function:
    """What a wrapper knows of its public function."""

    __slots__ = (
        "adapters",
        "at",
        "body",
        "cached",
        "checks",
        "names",
        "public",
        "repeats",
        "uncached",
        "x",
    )

    def __init__(
        self,
        body: FunctionType,
        names: tuple[str, ...],
        meaning: dict[str, str],
        checks: dict[str, Callable[[Any, str], Any]],
    ) -> None:
        self.body, self.names = body, names
        self.x = next(name for name in names if meaning.get(name, name) == "x")
        self.at = names.index(self.x)
        positional = names[: body.__code__.co_argcount]
        defaults = dict(zip(reversed(positional), reversed(body.__defaults__ or ())))
        defaults |= body.__kwdefaults__ or {}
        # what is None by default may also be given as None
        self.checks = tuple(
            (name, check, defaults.get(name, 0) is None)
            for name in names
            if (check := (CHECKS | checks).get(name)) is not None
        )
        self.public: Callable[..., Any] = body
        self.adapters = True
        self.cached: Any = None
        self.repeats = False
        self.uncached = [i for i, name in enumerate(names) if meaning.get(name) == "uncached"]

    def describe(self, call: tuple[Any, ...]) -> Any:
        """Answer a call that the kernels have not, its arguments in the order of `names`."""
        quick = QUICK.get(type(call[self.at]))
        if quick is not None and self.adapters:
            found = quick[self.body.__name__](call)
            if found is not None:
                return found
        repeat = None
        if (
            self.repeats
            and chosen_backend() == "numba"
            and (not self.uncached or all(call[i] is None for i in self.uncached))
        ):
            answer, repeat = repeated.find(self, call)
            found = None if answer is None else answer(call)
            if found is not None:
                return found
        ticket = None if self.cached is None else self.cached.ticket(call)
        named = dict(zip(self.names, call))
        for name, check, may_be_none in self.checks:
            value = named[name]
            if not may_be_none if value is None else ticket is None:
                named[name] = check(value, name)
        adapter = adapter_of(named[self.x]) if ticket is None and self.adapters else None
        if adapter is not None:
            return self.sent(adapter, named)
        request: Request[Any] = self.body(**named)
        if repeat is None:
            return request.answer(ticket)
        result = request.answer(repeat)
        repeat.keep(result)
        return result

    def sent(self, adapter: ModuleType, named: dict[str, Any]) -> Any:
        """Have an adapter answer a call."""
        name = self.body.__name__
        if name in ON_DEVICES and hasattr(adapter, "execute"):
            return adapter.execute(self.public, named)
        return function_of(adapter, name, name)(**named)


def public(
    *,
    cached: bool = True,
    adapters: bool = True,
    devices: bool = True,
    meaning: dict[str, str] | None = None,
    checks: dict[str, Callable[[Any, str], Any]] | None = None,
) -> Callable[[Callable[P, Request[R]]], Callable[P, R]]:
    """Make a public function of one that describes a call.

    `meaning` gives arguments the meaning that others of another name have, as of v in
    ``weight_norm(v, g)``, which is x; that of "uncached" are calls described each time. `checks`
    adds to CHECKS. Without `adapters` only NumPy's arrays are taken, without `devices` none that
    are on a device.
    """

    def decorated(body: Any) -> Any:
        code = body.__code__
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        function = _Function(body, names, meaning or {}, checks or {})
        function.adapters = adapters
        if adapters and devices:
            ON_DEVICES.add(body.__name__)
        function.repeats = cached
        if cached and _core.kernels is not None:
            means = tuple((meaning or {}).get(name, name) for name in names)
            function.cached = _core.kernels.CachedCalls(means)
        wrapper = _wrapper(body, function, names, code.co_argcount)
        function.public = wrapper
        return wrapper

    return decorated


def _wrapper(body: Any, function: _Function, names: tuple[str, ...], positional: int) -> Any:
    """Return a function of the signature of `body` that asks the cache, and then describes."""
    parameters = [*names[:positional], *(["*"] * (positional < len(names))), *names[positional:]]
    source = _SOURCE.format(
        name=body.__name__,
        signature=", ".join(parameters),
        given=", ".join(names),
        found="None" if function.cached is None else "find(call)",
    )
    made: dict[str, Any] = {}
    file = f"<the wrapper of {body.__name__}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)  # for tracebacks
    exec(compile(source, file, "exec"), body.__globals__, made)
    find = None if function.cached is None else function.cached.find
    wrapper = made["make"](find, function.describe)
    wrapper.__defaults__, wrapper.__kwdefaults__ = body.__defaults__, body.__kwdefaults__
    wrapper.__doc__, wrapper.__module__ = body.__doc__, body.__module__
    wrapper.__qualname__ = body.__qualname__
    # what a caller gets is the answer, not the request
    answer = body.__annotations__["return"].partition("[")[2].removesuffix("]")
    body.__annotations__["return"] = answer
    wrapper.__annotations__ = body.__annotations__
    wrapper.__wrapped__ = body
    wrapper.find = find  # for adapters, whose arrays are plain ones underneath
    return wrapper
