"""Who computes, and with how many threads.

A backend is two functions, one that carries out a `Pass` and one for a `BackwardPass`; adding one
is adding these to `_AVAILABLE`. Everything above this floor describes passes and knows no backend.
"""

from __future__ import annotations

import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastnorm import _core, _reference, limits
from fastnorm.arguments import did_you_mean, shown
from fastnorm.description import BackwardPass, Pass, Scaling
from fastnorm.elsewhere import Elsewhere, host
from fastnorm.layout import Layout, ascending, describe, steps_of

Array = NDArray[Any]

# In the order of `enum Activation` in _core/kernels.pxi.
ACTIVATIONS = (None, "relu", "silu", "gelu", "gelu_tanh", "tanh")

# What `quick_forward` and `quick_backward` are asked for.
BATCH, INFERENCE, INSTANCE, GROUP, LAYER, RMS, ADD_LAYER, ADD_RMS = range(8)
LENGTH, WEIGHT, STANDARD, RESPONSE, TANH, ACTIVATION = range(8, 14)  # those of related.py

# --- Compiled kernels: Cython's and Numba's -------------------------------------------------------

# operands in the order of the kernels' signature; all but the statistics may be absent
_OPERANDS = ("x", "y", "residual", "addend", "total", "mask", "weight", "bias")


def _layout_of(operands: dict[str, Array], reduced: tuple[bool, ...]) -> Layout | None:
    shape = operands["x"].shape
    steps = {
        "stats" if name == "rstd" else name: steps_of(array, shape)
        for name, array in operands.items()
        if name not in ("mean", "var")
    }
    return describe(shape, reduced, tuple(steps.items()))


def _compiled(p: Pass, kernels: Any) -> None:
    given = {n: array for n in _OPERANDS if (array := getattr(p, n)) is not None}
    given |= {"mean": p.mean, "var": p.var, "rstd": p.rstd}
    operands = ascending(given)
    layout = _layout_of(operands, p.reduced)
    if p.total is not None and p.addend is not None and (layout is None or layout.columns):
        # the kernels add on the way only along runs
        with np.errstate(all="ignore"):
            total = p.x.astype(_computing(p.x.dtype)) + p.addend.astype(_computing(p.x.dtype))
            p.total[...] = total
        p.x, p.addend, p.total, p.key = p.total, None, None, None
        return _compiled(p, kernels)
    y_back = None
    if layout is None:
        # an order of axes that the kernels cannot walk: kept axes first, then reduced, in copies
        order = sorted(range(p.x.ndim), key=lambda axis: p.reduced[axis])
        y_back = p.y.transpose(order) if p.y is not None else None
        for name, array in given.items():
            moved = array.transpose(order)
            if name in ("weight", "bias"):
                moved = np.broadcast_to(moved, tuple(p.x.shape[axis] for axis in order))
            if name in ("mean", "var", "rstd"):
                operands[name] = moved
            else:
                operands[name] = (
                    np.empty(moved.shape, moved.dtype)
                    if name == "y"
                    else (np.ascontiguousarray(moved))
                )
        layout = _layout_of(operands, tuple(sorted(p.reduced)))
        assert layout is not None, "contiguous operands always have a layout"
    raised = kernels.run_pass(
        layout,
        operands["x"],
        operands.get("y"),
        operands["mean"],
        operands["var"],
        operands["rstd"],
        weight=operands.get("weight"),
        bias=operands.get("bias"),
        mask=operands.get("mask"),
        residual=operands.get("residual"),
        addend=operands.get("addend"),
        total=operands.get("total"),
        centred=p.centred,
        given=p.given,
        scaling=p.scaling,
        eps=p.eps,
        **_activation(p, kernels),
        activation_first=p.activation_first,
        threads=_kernel_threads(),
        key=p.key if y_back is None else None,
        statistics=p.statistics,
    )
    if raised:
        from fastnorm._numba import activations

        activations.raise_again(p.activation, _computing(p.x.dtype))
    if y_back is not None:
        y_back[...] = operands["y"]
    return None


def _activation(p: Pass, kernels: Any) -> dict[str, Any]:
    """A number, or where Numba has compiled the function, that or the address of its loop."""
    if not callable(p.activation):
        return {"activation": ACTIVATIONS.index(p.activation)}
    if not hasattr(kernels, "know"):
        return {"activation": p.activation}
    from fastnorm._numba import activations

    kind = _computing(p.x.dtype)
    address = activations.address_of(p.activation, kind)
    kernels.know(  # for the quick door
        p.activation, kind is np.float64, address, activations.raise_again
    )
    return {"user": address}


def _compiled_backward(p: BackwardPass, kernels: Any) -> None:
    operands = {"x": p.x, "dy": p.dy, "dx": p.dx, "rstd": p.rstd, "dweight": p.dweight}
    if p.mean is not None:
        operands["mean"] = p.mean
    beside = {"factor": p.weight, "dbias": p.dbias}
    operands |= {name: array for name, array in beside.items() if array is not None}
    operands = ascending(operands)
    described = {name: array for name, array in operands.items() if name != "dbias"}
    layout = _layout_of(described, p.reduced)
    if layout is None and p.dy.strides != _strides_like(p.x, p.dy):
        dy = np.empty_like(p.x, p.dy.dtype)
        if dy.strides != p.dy.strides:  # or it would come here again
            dy[...] = p.dy
            return _compiled_backward(replace(p, dy=dy, key=None), kernels)
    if layout is None or not kernels.walks_back(layout):
        return _spread_backward(p, kernels)
    kernels.run_backward(
        layout,
        operands["x"],
        operands["dy"],
        operands["dx"],
        operands.get("mean"),
        operands["rstd"],
        operands.get("factor"),
        operands["dweight"],
        operands.get("dbias"),
        centred=p.mean is not None,
        training=p.training,
        threads=_kernel_threads(),
        key=p.key,
        own=p.own,
    )
    return None


def _strides_like(array: Array, other: Array) -> tuple[int, ...]:
    """The strides of `array` if its elements were as large as those of `other`."""
    return tuple(stride // array.itemsize * other.itemsize for stride in array.strides)


def _spread_backward(p: BackwardPass, kernels: Any) -> None:
    """An order of axes that the kernels cannot walk: in copies, a weight for each element."""
    order = sorted(range(p.x.ndim), key=lambda axis: p.reduced[axis])

    def copied(array: Array) -> Array:
        return np.ascontiguousarray(np.broadcast_to(array, p.x.shape).transpose(order))

    x, dy = copied(p.x), copied(p.dy)
    dx, dweight, dbias = np.empty_like(x), np.empty(x.shape), np.empty(x.shape)
    _compiled_backward(
        BackwardPass(
            x,
            dy,
            dx,
            tuple(sorted(p.reduced)),
            None if p.mean is None else p.mean.transpose(order),
            p.rstd.transpose(order),
            None if p.weight is None else copied(p.weight),
            dweight,
            dbias,
            p.training,
        ),
        kernels,
    )
    back = np.argsort(order)
    p.dx[...] = dx.transpose(back)
    for gradient, elements in ((p.dweight, dweight), (p.dbias, dbias)):
        if gradient is not None:
            _sum_to(gradient, elements.transpose(back))


def _sum_to(gradient: Array, elements: Array) -> None:
    """Sum over the axes along which `gradient` has length 1."""
    axes = tuple(axis for axis, size in enumerate(gradient.shape) if size == 1)
    with np.errstate(all="ignore"):
        gradient[...] = elements.sum(axis=axes, keepdims=True)


def _cython(p: Pass) -> None:
    _compiled(p, _core.kernels)


def _cython_backward(p: BackwardPass) -> None:
    _compiled_backward(p, _core.kernels)


def _cython_moments(x: Array, reduced: tuple[bool, ...], mask: Array | None, fields: Array) -> None:
    _compiled_moments(x, reduced, mask, fields, _core.kernels)


def _numba(p: Pass) -> None:
    from fastnorm._numba import cpu

    _compiled(p, cpu)


def _numba_backward(p: BackwardPass) -> None:
    from fastnorm._numba import cpu

    _compiled_backward(p, cpu)


def _numba_moments(x: Array, reduced: tuple[bool, ...], mask: Array | None, fields: Array) -> None:
    from fastnorm._numba import cpu

    # its sums of doubles are pairs, of which those of parts merge to the same however they were cut
    _compiled_moments(x.astype(np.float64, copy=False), reduced, mask, fields, cpu)


def _computing(dtype: np.dtype[Any]) -> type[np.floating[Any]]:
    return np.float64 if dtype.itemsize == 8 else np.float32


def _compiled_moments(
    x: Array, reduced: tuple[bool, ...], mask: Array | None, fields: Array, kernels: Any
) -> None:
    given = {"x": x, "fields": fields} | ({} if mask is None else {"mask": mask})
    turn = tuple(slice(None, None, -1 if stride < 0 else 1) for stride in x.strides)
    operands = {n: a[(slice(None), *turn)] if n == "fields" else a[turn] for n, a in given.items()}
    layout = _moments_layout(operands, reduced)
    if layout is None:
        # an order of axes that the kernels cannot walk: kept axes first, then reduced, in copies
        order = sorted(range(x.ndim), key=lambda axis: reduced[axis])
        operands = {
            n: np.ascontiguousarray(a.transpose(order)) for n, a in given.items() if a is not fields
        }
        operands["fields"] = fields.transpose(0, *(axis + 1 for axis in order))
        layout = _moments_layout(operands, tuple(sorted(reduced)))
        assert layout is not None, "contiguous operands always have a layout"
    kernels.run_moments(layout, **operands, threads=_kernel_threads())


def _moments_layout(operands: dict[str, Array], reduced: tuple[bool, ...]) -> Layout | None:
    first = {"rstd": operands["fields"][0]}
    return _layout_of({n: a for n, a in operands.items() if n != "fields"} | first, reduced)


# --- NumPy ----------------------------------------------------------------------------------------


def _numpy(p: Pass) -> None:
    axes = tuple(axis for axis, reduced in enumerate(p.reduced) if reduced)
    x = p.x
    # what the formulas round on the way stays below what rounding the result takes
    wider = np.longdouble if x.dtype == np.float64 else np.float64
    with np.errstate(all="ignore"):
        if p.total is not None and p.addend is not None:
            computing = _computing(x.dtype)
            p.total[...] = x.astype(computing) + p.addend.astype(computing)
            x = p.total
        statistics: dict[str, Any] = {"mean": p.mean, "var": p.var} if p.given else {}
        if p.scaling is Scaling.FACTOR:
            x = (x.astype(wider) - p.mean) * p.var
            statistics = {"mean": 0.0, "var": 1.0}
        affine = (p.weight, p.bias)
        y, mean, var, rstd = _reference.normalize(
            x,
            axes,
            *(affine if not p.activation_first else (None, None)),
            p.eps,
            centred=p.centred,
            where=p.mask,
            residual=p.residual,
            scale="l2" if p.scaling is Scaling.NORM else "rstd",
            return_rstd=True,
            dtype=wider,
            **statistics,
        )
        if p.y is not None:
            if callable(p.activation):
                from fastnorm._numba import activations

                y = activations.apply(p.activation, y.astype(_computing(p.x.dtype)))
            elif p.activation == "tanh":
                y = np.tanh(y)
            elif p.activation is not None:
                # long double has no erf of its own; activations only pass on relative errors
                y = _reference.activate(y.astype(np.float64), p.activation)
            if p.activation_first:
                weight, bias = affine
                y = y * (1.0 if weight is None else weight) + (0.0 if bias is None else bias)
            p.y[...] = y
        if not p.given:
            p.mean[...], p.var[...], p.rstd[...] = mean, var, rstd


def _numpy_backward(p: BackwardPass) -> None:
    axes = tuple(axis for axis, reduced in enumerate(p.reduced) if reduced)
    wider = np.longdouble if p.x.dtype == np.float64 else np.float64
    dx, dweight, dbias = _reference.normalize_backward(
        p.dy,
        p.x,
        axes,
        0.0 if p.mean is None else p.mean,
        p.rstd,
        p.weight,
        centred=p.mean is not None,
        training=p.training,
        where=p.mask,
        dtype=wider,
    )
    with np.errstate(all="ignore"):
        p.dx[...] = dx
        _sum_to(p.dweight, dweight)
        if p.dbias is not None:
            _sum_to(p.dbias, dbias)


def _numpy_moments(x: Array, reduced: tuple[bool, ...], mask: Array | None, fields: Array) -> None:
    axes = tuple(axis for axis, r in enumerate(reduced) if r)
    chosen: Any = True if mask is None else mask

    def total(values: Array) -> Array:
        return values.sum(axis=axes, keepdims=True, where=chosen)

    with np.errstate(all="ignore"):
        wide = x.astype(np.longdouble)  # no faster way is asked of this backend
        count = total(np.ones(x.shape))
        mean = np.where(count > 0, total(wide) / count, 0)
        deviation = wide - mean
        rest = np.where(count > 0, total(deviation) / count, 0)
        m2 = total(deviation**2) - count * rest**2
        fields[0], fields[1], fields[3] = count, mean, m2
        fields[2], fields[4] = (mean - fields[1]) + rest, m2 - fields[3]


# --- The choice -----------------------------------------------------------------------------------

# The fastest first.
_AVAILABLE: dict[str, tuple[Callable[[Pass], None], Callable[[BackwardPass], None]]] = {}
if _core.kernels is not None:
    _AVAILABLE["cython"] = _cython, _cython_backward
if find_spec("numba") is not None:
    _AVAILABLE["numba"] = _numba, _numba_backward
_AVAILABLE["numpy"] = _numpy, _numpy_backward
_MOMENTS = {"cython": _cython_moments, "numba": _numba_moments, "numpy": _numpy_moments}
NAMES = ("auto", "cython", "numba", "numpy")

# Of the process; `_Here` has what a context chooses for itself.
_current = ""


def compute(p: Pass) -> None:
    """Carry out a pass on the backend in use, or where x is."""
    if isinstance(p.x, Elsewhere):
        p.x.compute(p)
    else:
        _AVAILABLE[get_backend()][0](p)


def compute_backward(p: BackwardPass) -> None:
    """Carry out a backward pass on the backend in use, or where x is; with a mask in NumPy."""
    if p.mask is not None:
        _masked_backward(p)
    elif isinstance(p.x, Elsewhere):
        p.x.compute_backward(p)
    else:
        _AVAILABLE[get_backend()][1](p)


def _masked_backward(p: BackwardPass) -> None:
    """In NumPy's memory and by its formulas: the kernels know of no masks here."""
    if not isinstance(p.x, Elsewhere):
        return _numpy_backward(p)
    names = ("x", "dy", "mean", "rstd", "weight", "mask")
    operands: dict[str, Any] = {name: host(getattr(p, name)) for name in names}
    results = {n: a for n in ("dx", "dweight", "dbias") if (a := getattr(p, n)) is not None}
    here: dict[str, Any] = {n: np.empty(a.shape, a.dtype) for n, a in results.items()}
    _numpy_backward(replace(p, **operands, **here))
    for name, array in results.items():
        array.fill_from(p.x.placed(here[name]))
    return None


# Elements that moments are taken of at once where they are converted first: a few megabytes.
BLOCK = 1 << 18


def moments_at_once(dtype: np.dtype[Any]) -> int | None:
    """How many elements `compute_moments` takes in one call; None for any number."""
    wide_integer = dtype.kind in "iu" and dtype.itemsize > 2
    name = get_backend()
    as_it_is = dtype == np.float64 if name == "numba" else not wide_integer
    return None if name != "numpy" and as_it_is else BLOCK


def compute_moments(x: Array, reduced: tuple[bool, ...], mask: Array | None, fields: Array) -> None:
    """Fill `fields`, (5, ...) with the reduced axes as 1, with the moments of x.

    They are count, mean, rest of the mean, sum of squared deviations from it, and its rest: each of
    the two is an unevaluated sum of two doubles. `x` may be of integers or booleans.
    """
    if x.dtype.kind in "iu" and x.dtype.itemsize > 2:
        x = x.astype(np.float64)
    _MOMENTS[get_backend()](x, reduced, mask, fields)


class _Unplanned:
    """What the quick doors return without compiled kernels."""

    key = None


def _no_plan(*call: Any) -> Any:
    return _Unplanned()


# What the backend answers without a description: the result, or `Unplanned`, after which the call
# is to be described in a `Pass` that carries its key.
#
#     quick_forward(norm, first, second, x, weight, bias, eps, return_stats, where, residual,
#                   activation, out, own_eps, running_mean, running_var, momentum)
#     quick_backward(norm, first, second, dy, x, mean, rstd, weight)
#
# `norm`, `first` and `second` (whole numbers, tuples of them, or None) say what is asked of these
# arrays; without `own_eps` the norm's own for this dtype is used.
Unplanned: Any = getattr(_core.kernels, "Unplanned", _Unplanned)
quick_forward: Any = getattr(_core.kernels, "quick_forward", _no_plan)
quick_backward: Any = getattr(_core.kernels, "quick_backward", _no_plan)


def _empty_like(array: Array) -> Array:
    return np.empty_like(array, subok=False)


# Memory for a result, in the order of another array: from what is kept, where there is any.
empty_like: Callable[[Array], Array] = getattr(_core.kernels, "empty_like", _empty_like)


def trim_memory() -> int:
    """Give the memory that is kept for results back to the system.

    Results of 16 MB and more come from memory that is kept when they are freed, up to
    ``FASTNORM_KEEP_MB``. Arrays in use are not touched, and later results are kept again.

    Returns
    -------
    int
        How many bytes that was.

    Examples
    --------
    >>> import fastnorm as fn
    >>> freed = fn.trim_memory()
    >>> fn.trim_memory()
    0
    """
    return 0 if _core.kernels is None else int(_core.kernels.trim())


# --- Choices of a context -------------------------------------------------------------------------


class _Choice:
    """What one `with` block has chosen; compared by identity."""

    __slots__ = ("backend", "serial", "threads")

    def __init__(
        self, backend: str | None = None, threads: int | None = None, serial: bool = False
    ) -> None:
        self.backend, self.threads, self.serial = backend, threads, serial


class _Here(NamedTuple):
    """What the `with` blocks around have chosen; the kernels read the first two by their place."""

    answers: bool | None  # whether calls are answered from plans; None: as in the process
    kernel_threads: int  # 0: as in the process
    backend: str | None
    threads: int | None
    choices: tuple[_Choice, ...]  # from the outermost in


# A thread begins with none, a task with those of where it was made.
_here: ContextVar[_Here | None] = ContextVar("fastnorm", default=None)


def _choose(choices: tuple[_Choice, ...]) -> None:
    backend = threads = None
    serial = False
    for choice in choices:
        backend = choice.backend or backend
        threads = choice.threads or threads
        serial |= choice.serial
    answers = None if backend is None else backend == "cython"
    kernel_threads = 1 if serial else min(threads or 0, MOST_THREADS)
    if _core.kernels is not None:
        _core.kernels.set_scope(_here)
    _here.set(_Here(answers, kernel_threads, backend, threads, choices) if choices else None)


@contextmanager
def _scope(choice: _Choice) -> Iterator[None]:
    """Add a choice to this context's; in the end take away this one, whatever came after it.

    A generator may end after blocks that began later, or in another context, where it is not found.
    """
    here = _here.get()
    _choose((*(here.choices if here else ()), choice))
    try:
        yield
    finally:
        here = _here.get()
        if here is not None:
            _choose(tuple(other for other in here.choices if other is not choice))


# --- Backends -------------------------------------------------------------------------------------


def _tell_kernels() -> None:
    """Tell the kernels what the quick doors need to know of the process."""
    if _core.kernels is not None:
        allowed = 1 if _forked else MOST_THREADS
        _core.kernels.set_state(_current == "cython", min(_threads, MOST_THREADS), allowed)


def _known(name: str) -> str:
    """The backend that a name stands for, if there is one."""
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(
            f"no backend is called {shown(name)}: use one of {', '.join(map(repr, NAMES))}"
            + did_you_mean(name, NAMES)
        )
    if name != "auto" and name not in _AVAILABLE:
        raise ValueError(
            f"this installation has no {name!r} backend, expected one of "
            f"{', '.join(map(repr, _AVAILABLE))}; use one of those, or 'auto'"
            + (f" ({_failures()})" if name == "cython" and _core.failed else "")
        )
    return next(iter(_AVAILABLE)) if name == "auto" else name


def set_backend(name: str) -> None:
    """Choose who computes, for the whole process.

    Inside ``with fn.backend(...)`` that block's own choice stays.

    Parameters
    ----------
    name
        ``"cython"``, ``"numba"`` (kernels compiled on first use, which takes seconds once),
        ``"numpy"``, or ``"auto"``: the fastest at hand. Also read at import from the environment
        variable ``FASTNORM_BACKEND``.

    Raises
    ------
    ValueError
        If there is no such backend, or this installation does not have it.

    Examples
    --------
    >>> import fastnorm as fn
    >>> fn.set_backend("numpy")
    >>> fn.get_backend()
    'numpy'
    >>> fn.set_backend("auto")
    """
    global _current
    _current = _known(name)
    _tell_kernels()


def get_backend() -> str:
    """Return the name of the backend that computes.

    Returns
    -------
    str
        Never ``"auto"``, but what it stands for.

    Examples
    --------
    >>> import fastnorm as fn
    >>> fn.get_backend() in ("cython", "numba", "numpy")
    True
    """
    here = _here.get()
    return _current if here is None or here.backend is None else here.backend


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use another backend inside a ``with`` block.

    The choice is this context's: other threads and asyncio tasks keep theirs, tasks that are made
    inside the block take it over, threads do not.

    Parameters
    ----------
    name
        As for :func:`set_backend`.

    Raises
    ------
    ValueError
        If there is no such backend, or this installation does not have it.

    Examples
    --------
    >>> import fastnorm as fn
    >>> with fn.backend("numpy"):
    ...     print(fn.get_backend())
    numpy
    """
    with _scope(_Choice(backend=_known(name))):
        yield


# --- Threads --------------------------------------------------------------------------------------

# GNU OpenMP hangs in a forked child of a process that has used threads, so a child runs serially.
_forked = False


def _in_child() -> None:
    global _forked
    _forked = True
    _tell_kernels()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


# However many are asked for, kernels start no more: threads beyond the processors gain nothing, and
# OpenMP ends the process when the system has no more of them.
MOST_THREADS = max(64, os.cpu_count() or 1)


def _default_threads() -> int:
    value = os.environ.get("FASTNORM_NUM_THREADS", "").strip()
    if value:
        n = limits.whole_number(value)
        if not n:
            raise ValueError(
                f"FASTNORM_NUM_THREADS={value!r} is no number of threads: set it to 1 or more, or "
                "unset it"
            )
        return n
    # OpenMP's is a list, one for each level of nesting; what OpenMP does not take is passed over
    n = limits.whole_number(os.environ.get("OMP_NUM_THREADS", "").split(",")[0])
    return n if n and n < 1 << 31 else limits.processors()


_threads = _default_threads()


def _kernel_threads() -> int:
    """How many threads a kernel may use here."""
    here = _here.get()
    n = 1 if _forked else min((here and here.kernel_threads) or _threads, MOST_THREADS)
    return _within_limit(n)


def _within_limit(n: int) -> int:
    """`n`, or fewer where OpenMP has been given a limit."""
    limit = 0 if _core.kernels is None else _core.kernels.openmp_limit()
    return min(n, limit) if limit else n


def serial() -> AbstractContextManager[None]:
    """Run kernels on one thread inside a ``with`` block, between products of matrices.

    BLAS and OpenMP each keep their threads spinning after a call. Where the two take turns on the
    same processors they wait for each other: a block stack of 0.13 s took 0.33 s on two cores.
    """
    return _scope(_Choice(serial=True))


def _number_of_threads(n: int) -> int:
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise ValueError(f"num_threads is {n!r}, and must be a whole number, 1 or more")
    return int(n)


def set_num_threads(n: int) -> None:
    """Set the largest number of threads a call may use, for the whole process.

    Results do not depend on it, bit for bit. Small arrays use one thread whatever it is. Inside
    ``with fn.threads(...)`` that block's own choice stays.

    Parameters
    ----------
    n
        1 or more. At import it is ``FASTNORM_NUM_THREADS``, else ``OMP_NUM_THREADS``, else the
        number of processors that this process may use, by its affinity and its container's quota.
        Kernels start 64 threads at most, or one for each processor of the machine.

    Raises
    ------
    ValueError
        If `n` is not a whole number, or is less than 1.

    Examples
    --------
    >>> import fastnorm as fn
    >>> before = fn.get_num_threads()
    >>> fn.set_num_threads(1)
    >>> fn.get_num_threads()
    1
    >>> fn.set_num_threads(before)
    """
    global _threads
    _threads = _number_of_threads(n)
    _tell_kernels()


def get_num_threads() -> int:
    """Return the largest number of threads a call may use.

    Returns
    -------
    int
        What was asked for; or a limit that OpenMP has been given since it began, as by
        ``threadpoolctl.threadpool_limits``. 1 in a forked child: OpenMP cannot run there.

    Examples
    --------
    >>> import fastnorm as fn
    >>> fn.get_num_threads() >= 1
    True
    """
    if _forked:
        return 1
    here = _here.get()
    n = (here and here.threads) or _threads
    return _within_limit(n)


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Use at most `n` threads inside a ``with`` block.

    The choice is this context's, as with :func:`backend`.

    Parameters
    ----------
    n
        As for :func:`set_num_threads`.

    Raises
    ------
    ValueError
        If `n` is not a whole number, or is less than 1.

    Examples
    --------
    >>> import fastnorm as fn
    >>> with fn.threads(1):
    ...     print(fn.get_num_threads())
    1
    """
    with _scope(_Choice(threads=_number_of_threads(n))):
        yield


# --- What is at hand ------------------------------------------------------------------------------


def _failures() -> str:
    """The compiled modules that are there and did not load, with the reasons."""
    return "; ".join(f"{name}: {reason}" for name, reason in _core.failed.items())


def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Show versions, instruction sets, threads and backends.

    Parameters
    ----------
    mode
        ``"stdout"`` prints, ``"dicts"`` returns the same as a dictionary.

    Returns
    -------
    dict or None
        With ``"dicts"``; otherwise None.

    Raises
    ------
    ValueError
        If `mode` is neither.

    Examples
    --------
    >>> import fastnorm as fn
    >>> sorted(fn.show_config("dicts"))
    ['backends', 'cpu', 'cuda', 'threads', 'versions']
    """
    modes = ("stdout", "dicts")
    if not isinstance(mode, str) or mode not in modes:
        raise ValueError(
            f"mode is {shown(mode)}: use 'stdout' to print, 'dicts' to get a dictionary"
            + did_you_mean(mode, modes)
        )
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version(), "numpy": np.__version__}
    for name, distribution in (("fastnorm", "fastnorm-kernels"), ("numba", "numba")):
        try:
            versions[name] = version(distribution)
        except PackageNotFoundError:
            versions[name] = "not installed"
    config: dict[str, Any] = {
        "versions": versions,
        "cpu": {
            "machine": platform.machine(),
            "instruction set found": _core.level_found or "unknown",
            "instruction set used": _core.level_used or "none: no compiled kernels",
            "failed to load": _failures() or "none",
        },
        "threads": {
            "at most": get_num_threads(),
            "openmp": _core.kernels is not None and _core.kernels.has_threads(),
        },
        "backends": {"in use": get_backend(), "at hand": list(_AVAILABLE)},
        "cuda": {"numba.cuda imported": "numba.cuda" in sys.modules},
    }
    if mode == "dicts":
        return config
    for section, entries in config.items():
        print(section)
        for name, value in entries.items():
            text = ", ".join(value) if isinstance(value, list) else value
            print(f"  {name}: {text}")
    return None


set_backend(os.environ.get("FASTNORM_BACKEND", "") or "auto")
if _core.failed:
    _used = f"the kernels for {_core.level_used} are" if _core.kernels else f"{_current} is"
    warnings.warn(
        f"fastnorm could not load all of its compiled kernels, {_used} used instead "
        f"({_failures()}); installing fastnorm-kernels again, from source where that does not "
        "help, builds them for this Python and NumPy",
        RuntimeWarning,
        stacklevel=2,
    )
