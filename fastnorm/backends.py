"""Who computes, and with how many threads.

A backend is two functions, one that carries out a `Pass` and one for a `BackwardPass`; adding one
is adding these to `_AVAILABLE`. Everything above this floor describes passes and knows no backend.
"""

from __future__ import annotations

import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastnorm import _core, _reference
from fastnorm.description import BackwardPass, Pass, Scaling
from fastnorm.elsewhere import Elsewhere
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
    kernels.run_pass(
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
    kernels.know(p.activation, kind is np.float64, address)  # for the quick door
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
            x = x.astype(wider) * p.var
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

_current = ""


def compute(p: Pass) -> None:
    """Carry out a pass on the backend in use, or where x is."""
    if isinstance(p.x, Elsewhere):
        p.x.compute(p)
    else:
        _AVAILABLE[_current][0](p)


def compute_backward(p: BackwardPass) -> None:
    """Carry out a backward pass on the backend in use, or where x is."""
    if isinstance(p.x, Elsewhere):
        p.x.compute_backward(p)
    else:
        _AVAILABLE[_current][1](p)


# Elements that moments are taken of at once where they are converted first: a few megabytes.
BLOCK = 1 << 18


def moments_at_once(dtype: np.dtype[Any]) -> int | None:
    """How many elements `compute_moments` takes in one call; None for any number."""
    wide_integer = dtype.kind in "iu" and dtype.itemsize > 2
    as_it_is = dtype == np.float64 if _current == "numba" else not wide_integer
    return None if _current != "numpy" and as_it_is else BLOCK


def compute_moments(x: Array, reduced: tuple[bool, ...], mask: Array | None, fields: Array) -> None:
    """Fill `fields`, (5, ...) with the reduced axes as 1, with the moments of x.

    They are count, mean, rest of the mean, sum of squared deviations from it, and its rest: each of
    the two is an unevaluated sum of two doubles. `x` may be of integers or booleans.
    """
    if x.dtype.kind in "iu" and x.dtype.itemsize > 2:
        x = x.astype(np.float64)
    _MOMENTS[_current](x, reduced, mask, fields)


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


def _tell_kernels() -> None:
    """Tell the kernels what the quick doors need to know."""
    if _core.kernels is not None:
        _core.kernels.set_state(_current == "cython", _kernel_threads())


def set_backend(name: str) -> None:
    """Choose who computes, for the whole process.

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
    if name not in NAMES:
        raise ValueError(f"no backend is called {name!r}: use one of {', '.join(map(repr, NAMES))}")
    if name != "auto" and name not in _AVAILABLE:
        raise ValueError(
            f"this installation has no {name!r} backend, expected one of "
            f"{', '.join(map(repr, _AVAILABLE))}; use one of those, or 'auto'"
        )
    _current = next(iter(_AVAILABLE)) if name == "auto" else name
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
    return _current


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use another backend inside a ``with`` block.

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
    before = _current
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


# --- Threads --------------------------------------------------------------------------------------

# GNU OpenMP hangs in a forked child of a process that has used threads, so a child runs serially.
_forked = False


def _in_child() -> None:
    global _forked, _serial_lock
    _forked = True
    _serial_lock = threading.Lock()  # which another thread may have held
    _tell_kernels()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def _default_threads() -> int:
    for name in ("FASTNORM_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "").split(",")[0].strip()
        if value.isdigit() and int(value) > 0:
            return int(value)
        if value and name.startswith("FASTNORM"):
            raise ValueError(f"{name}={value!r} is no number of threads: set it to 1 or more")
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_threads = _default_threads()

# How many `serial` blocks are being run, by all threads together.
_serial = 0
_serial_lock = threading.Lock()


def _kernel_threads() -> int:
    return 1 if _serial else get_num_threads()


@contextmanager
def serial() -> Iterator[None]:
    """Run kernels on one thread inside a ``with`` block, between products of matrices.

    BLAS and OpenMP each keep their threads spinning after a call. Where the two take turns on the
    same processors they wait for each other: a block stack of 0.13 s took 0.33 s on two cores.
    Other threads' kernels are told so too meanwhile, which costs time and changes no bits.
    """
    global _serial
    with _serial_lock:
        _serial += 1
        _tell_kernels()
    try:
        yield
    finally:
        with _serial_lock:
            _serial -= 1
            _tell_kernels()


def set_num_threads(n: int) -> None:
    """Set the largest number of threads a call may use, for the whole process.

    Results do not depend on it, bit for bit. Small arrays use one thread whatever it is.

    Parameters
    ----------
    n
        1 or more. At import it is ``FASTNORM_NUM_THREADS``, else ``OMP_NUM_THREADS``, else the
        number of processors this process may run on.

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
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise ValueError(f"num_threads is {n!r}, and must be a whole number, 1 or more")
    _threads = int(n)
    _tell_kernels()


def get_num_threads() -> int:
    """Return the largest number of threads a call may use.

    Returns
    -------
    int
        1 in a forked child: OpenMP cannot run there.

    Examples
    --------
    >>> import fastnorm as fn
    >>> fn.get_num_threads() >= 1
    True
    """
    return 1 if _forked else _threads


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Use at most `n` threads inside a ``with`` block.

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
    before = _threads
    set_num_threads(n)
    try:
        yield
    finally:
        set_num_threads(before)


# --- What is at hand ------------------------------------------------------------------------------


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
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode is {mode!r}: use 'stdout' to print, 'dicts' to get a dictionary")
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
        },
        "threads": {
            "at most": get_num_threads(),
            "openmp": _core.kernels is not None and _core.kernels.has_threads(),
        },
        "backends": {"in use": _current, "at hand": list(_AVAILABLE)},
        "cuda": {"numba.cuda imported": "numba.cuda" in sys.modules},
    }
    if mode == "dicts":
        return config
    for section, entries in config.items():
        print(section)
        for name, value in entries.items():
            shown = ", ".join(value) if isinstance(value, list) else value
            print(f"  {name}: {shown}")
    return None


set_backend(os.environ.get("FASTNORM_BACKEND", "") or "auto")
