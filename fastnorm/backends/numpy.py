"""NumPy alone: the formulas in long double, at NumPy's speed."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastnorm import _formulas
from fastnorm.arguments import cast, computing_type
from fastnorm.backends.base import sum_to
from fastnorm.problem import Array, BackwardProblem, Problem, Scaling


def available() -> bool:
    """NumPy is always there."""
    return True


def forward(p: Problem) -> None:
    """Carry out a pass over an array."""
    axes = tuple(axis for axis, reduced in enumerate(p.reduced) if reduced)
    x = p.x
    # what the formulas round on the way stays below what rounding the result takes
    wider = np.longdouble if x.dtype == np.float64 else np.float64
    with np.errstate(all="ignore"):
        if p.total is not None and p.addend is not None:
            computing = computing_type(x.dtype)
            p.total[...] = x.astype(computing) + p.addend.astype(computing)
            x = p.total
        given: Any = (p.mean, p.var) if p.given else None
        if p.scaling is Scaling.FACTOR:
            x = (x.astype(wider) - p.mean) * p.var
            given = 0.0, 1.0
        affine = (p.weight, p.bias)
        y, mean, var, rstd = _formulas.normalize(
            x,
            axes,
            *(affine if not p.activation_first else (None, None)),
            p.eps,
            centred=p.centred,
            where=p.mask,
            residual=p.residual,
            scale="l2" if p.scaling is Scaling.NORM else "rstd",
            given=given,
            dtype=wider,
        )
        if p.y is not None:
            if callable(p.activation):
                from fastnorm._numba import activations

                y = activations.apply(p.activation, y.astype(computing_type(p.x.dtype)))
            elif p.activation in _formulas.SQUASHES:
                y = _formulas.SQUASHES[p.activation](y)
            elif p.dy is not None:
                y = _formulas.SLOPES[p.activation](y.astype(np.float64))
            elif p.activation is not None:
                # long double has no erf of its own; activations only pass on relative errors
                y = _formulas.activate(y.astype(np.float64), p.activation)
            if p.activation_first:
                weight, bias = affine
                y = y * (1.0 if weight is None else weight) + (0.0 if bias is None else bias)
            p.y[...] = y if p.dy is None else y * p.dy
        if not p.given:
            p.mean[...], p.var[...], p.rstd[...] = mean, var, rstd


def backward(p: BackwardProblem) -> None:
    """Carry out a pass back."""
    axes = tuple(axis for axis, reduced in enumerate(p.reduced) if reduced)
    wider = np.longdouble if p.x.dtype == np.float64 else np.float64
    dx, dweight, dbias = _formulas.normalize_backward(
        p.dy,
        p.x,
        axes,
        0.0 if p.mean is None else p.mean,
        p.rstd,
        None if p.weight is None else cast(p.weight, computing_type(p.x.dtype)),
        centred=p.mean is not None,
        training=p.training,
        where=p.mask,
        dtype=wider,
    )
    with np.errstate(all="ignore"):
        p.dx[...] = dx
        sum_to(p.dweight, dweight)
        if p.dbias is not None:
            sum_to(p.dbias, dbias)


def moments(x: Array, reduced: tuple[bool, ...], mask: Array | None, out: Array) -> None:
    """Fill `out` with the moments of x."""
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
        out[0], out[1], out[3] = count, mean, m2
        out[2], out[4] = (mean - out[1]) + rest, m2 - out[3]


def takes_whole(dtype: np.dtype[Any]) -> bool:
    """Never: each type is converted to long double."""
    return False
