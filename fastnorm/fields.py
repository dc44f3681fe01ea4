"""Fields of moments: what count, mean and variance are kept as, and how those of parts merge.

The moments of a set of numbers are its count, its mean and M2, the sum of squared deviations from
the mean. Those of two sets give those of their union (Chan, Golub and LeVeque 1979), exactly but
for rounding. Mean and M2 are kept as unevaluated sums of two doubles, so that the order of merging
shows in the last bits alone. `merge` below is that formula for everything above the kernels:
batches that stream by, chunks of a Dask array, processes under MPI, a folder of images.

The squares of doubles beyond 1e154 overflow, those below 1e-154 vanish. Moments of such numbers are
kept as those of the numbers divided by a power of two, and its exponent with them: whoever
normalises by merged moments does it through `scales_of` and `normalised_by`, which know of that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastnorm._formulas import reciprocal
from fastnorm.arguments import Array, packed_as, shown
from fastnorm.backends import compute_moments, moments_at_once
from fastnorm.execution import Norm, exponents_of, extremes
from fastnorm.problem import Scaling

# The fields that moments are kept as: the first axis of every array of them. Mean and M2 are those
# of the numbers divided by 2^exponent, which is 0 where their squares are in float64's range.
FIELDS = ("count", "mean", "mean_rest", "m2", "m2_rest", "exponent")

# Means and standard deviations up to this are squared and merged as they are: no sum of 2^53 of
# their squares overflows.
MOST = 1e135
# So are deviations from this on, whose squares keep all their digits, and what differs at all
# from a mean from this on: a unit in its last place is 1e-116.
LEAST, LEAST_MEAN = 1e-135, 1e-100

# --- Of numbers, and of parts ---------------------------------------------------------------------


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b, and what rounding lost of it (Knuth)."""
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


def _at(fields: Array, exponent: Any) -> Array:
    """The same moments, of the numbers divided by 2^exponent."""
    shift = (fields[5] - exponent).astype(np.int64)
    return np.stack(
        [
            fields[0],
            *np.ldexp(fields[1:3], shift),
            *np.ldexp(fields[3:5], 2 * shift),
            np.broadcast_to(exponent, fields[5].shape),
        ]
    )


def _own_exponent(fields: Array) -> Array:
    """The exponent, and of what is all zero, which any unit holds, minus infinity."""
    return np.where((fields[1] == 0) & (fields[3] == 0), -np.inf, fields[5])


def merge(a: Array, b: Array) -> Array:
    """Return the fields of the union of two sets; an empty one changes nothing."""
    with np.errstate(all="ignore"):
        if a[5].any() or b[5].any():
            # the larger unit: what falls below it is nothing to the larger numbers
            common = np.maximum(_own_exponent(a), _own_exponent(b))
            common = np.where(np.isfinite(common), common, 0.0)
            a, b = _at(a, common), _at(b, common)
        count = a[0] + b[0]
        share = b[0] / count
        difference = b[2] - a[2]
        whole = (b[1] - a[1]) + difference
        mean, rest = _two_sum(a[1], (b[1] - a[1]) * share)
        m2, lost = _two_sum(a[3], b[3])
        m2, more = _two_sum(m2, whole * whole * (a[0] * share))
        merged = np.stack(
            [count, mean, a[2] + rest + difference * share, m2, a[4] + b[4] + lost + more, a[5]]
        )
        # of differences to an infinity nothing is left: the mean is infinite or not a number
        finite = np.isfinite(a[1]) & np.isfinite(b[1])
        none = np.zeros_like(count)
        infinite = np.stack([count, a[1] + b[1], none, a[3] + b[3], none, none])
        merged = np.where(finite, merged, infinite)
    return np.where(a[0] == 0, b, np.where(b[0] == 0, a, merged))


def fields_of(x: Array, axes: tuple[int, ...], mask: Array | None = None) -> Array:
    """Return the fields of x over these axes, which are kept as 1 behind the axis of the fields."""
    reduced = tuple(axis in axes for axis in range(x.ndim))
    fields = np.zeros([len(FIELDS), *(1 if r else n for n, r in zip(x.shape, reduced))])
    if not x.size:
        return fields
    if not x.ndim:  # a single number
        return fields_of(x[np.newaxis], (0,), None if mask is None else mask[np.newaxis])[:, 0]
    _fill(x, reduced, mask, fields)
    if x.dtype != np.float64:  # whose squares cannot leave the range
        wrong = ~np.isfinite(fields[1])
    else:
        wrong = _out_of_range(fields)
    if wrong.any():
        _rescale(x, axes, mask, fields, wrong)
    return fields


def _out_of_range(fields: Array) -> Array:
    """Where the moments of doubles as they are may be wrong: squares overflowed or vanished."""
    with np.errstate(all="ignore"):
        count, size, var = fields[0], abs(fields[1]), fields[3] / fields[0]
        good = (size <= MOST) & (var <= MOST**2) & ((var > LEAST**2) | (size >= LEAST_MEAN))
        return (count > 0) & ~good


def _rescale(
    x: Array, axes: tuple[int, ...], mask: Array | None, fields: Array, wrong: Array
) -> None:
    """Fill in what is out of range: of numbers brought to 1 by a power of two, or of infinities."""
    low, high = extremes(x, axes, mask)
    with np.errstate(all="ignore"):
        largest = np.maximum(-low, high)  # NaN of NaN
        finite = np.isfinite(largest)
        exponent = np.where(wrong, exponents_of(largest), 0)
        if exponent.any():
            again = np.zeros_like(fields)
            reduced = tuple(axis in axes for axis in range(x.ndim))
            brought = np.ldexp(x, -exponent, out=packed_as(x, x.dtype))
            _fill(brought, reduced, mask, again)
            again[5] = exponent
            np.copyto(fields, again, where=exponent != 0)
        # infinite of one sign: that; of both, or with a NaN: NaN
        m2 = np.where(np.isnan(largest), np.nan, np.inf)
        none = np.zeros_like(m2)
        np.copyto(fields[1:5], np.stack([low + high, none, m2, none]), where=wrong & ~finite)


def _fill(x: Array, reduced: tuple[bool, ...], mask: Array | None, fields: Array) -> None:
    """Fill `fields`, which are zeros, with those of x as they are."""
    most = moments_at_once(x.dtype)
    if most is None or x.size <= most:
        compute_moments(x, reduced, mask, fields[:5])
    else:
        _merge_parts(x, reduced, mask, fields, most)


def _merge_parts(
    x: Array, reduced: tuple[bool, ...], mask: Array | None, fields: Array, most: int
) -> None:
    """Merge the fields of x into `fields`, `most` elements at a time."""
    if x.size <= most:
        part = np.zeros_like(fields)
        compute_moments(x, reduced, mask, part[:5])
        fields[...] = merge(fields, part)
        return
    axis = max((a for a in range(x.ndim) if x.shape[a] > 1), key=lambda a: abs(x.strides[a]))
    middle = x.shape[axis] // 2
    for half in (slice(middle), slice(middle, None)):
        index = (*[slice(None)] * axis, half)
        into = fields if reduced[axis] else fields[(slice(None), *index)]
        _merge_parts(x[index], reduced, None if mask is None else mask[index], into, most)


def _exponent_of(fields: Array) -> Any:
    return np.asarray(fields[5], np.int64)


def mean_of(fields: Array) -> Array:
    """Return the mean: the two doubles added up, NaN of no elements."""
    with np.errstate(all="ignore"):
        mean = np.ldexp(fields[1] + fields[2], _exponent_of(fields))
    return np.where(fields[0] > 0, mean, np.nan)


def _scaled_var(fields: Array, ddof: float) -> Array:
    """The variance of the numbers divided by 2^exponent."""
    m2 = np.where(np.isfinite(fields[1]), np.maximum(fields[3] + fields[4], 0.0), np.nan)
    return np.where(fields[0] > ddof, m2 / (fields[0] - ddof), np.nan)


def var_of(fields: Array, ddof: float = 0) -> Array:
    """Return M2 / (count - ddof), NaN where that is not positive."""
    with np.errstate(all="ignore"):
        return np.asarray(np.ldexp(_scaled_var(fields, ddof), 2 * _exponent_of(fields)))


def std_of(fields: Array, ddof: float = 0) -> Array:
    """Return the root of the variance, also where that is beyond the range."""
    with np.errstate(all="ignore"):
        return np.asarray(np.ldexp(np.sqrt(_scaled_var(fields, ddof)), _exponent_of(fields)))


class Scales(NamedTuple):
    """What normalises by moments: ((x / 2^exponent - mean) - rest) * rstd."""

    mean: Array
    rest: Array
    rstd: Array
    exponent: Array

    def rstd_of_x(self) -> Array:
        """The rstd of x itself."""
        with np.errstate(all="ignore"):
            return np.asarray(np.ldexp(self.rstd, -self.exponent))


def scales_of(
    fields: Array, eps: float = 0.0, ddof: float = 0, *, centred: bool = True, length: bool = False
) -> Scales:
    """Return the scales by 1 / sqrt(var + eps), or with `length` by 1 / max(length, eps).

    `centred=False` measures from 0 instead of from the mean. Where all is 0, rstd is 0.
    """
    with np.errstate(all="ignore"):
        if eps and fields[5].any():
            # a unit in which eps is in range, too; where it is larger than the data, eps decides
            least = math.frexp(eps if length else math.sqrt(eps))[1]
            fields = _at(fields, np.where(fields[5] < 0, np.maximum(fields[5], least), fields[5]))
        exponent, mean, rest = _exponent_of(fields), fields[1], fields[2]
        if centred:
            var = _scaled_var(fields, ddof)
        else:
            square = fields[3] + fields[4] + fields[0] * (mean + rest) ** 2
            square = np.where(np.isfinite(mean), square, fields[3])  # of infinities
            var = square if length else square / fields[0]
            mean = rest = np.zeros_like(mean)
        if length:
            divisor = np.maximum(np.sqrt(var), np.ldexp(eps, -exponent))
        else:
            divisor = np.sqrt(var + np.ldexp(eps, -2 * exponent))
        mean = np.where(fields[0] > 0, mean, np.nan)
        return Scales(mean, rest, reciprocal(divisor), exponent)


def normalised_by(
    scales: Scales,
    x: ArrayLike,
    array: Array,
    axes: Sequence[int],
    weight: Array | None = None,
    bias: Array | None = None,
    **options: Any,
) -> Array:
    """Normalise x, a checked `array`, by statistics that were merged; `options` as for `Norm`."""
    mean, rest, rstd, exponent = scales
    if array.dtype == np.float64:
        with np.errstate(all="ignore"):
            if exponent.any():
                array = np.ldexp(array, -exponent, out=packed_as(array, array.dtype))
            seen = abs(rest) * rstd > 2.0**-54
            if seen.any():
                # Digits of the mean that one double does not hold would be seen in the result. Only
                # in these groups: the bits of the others must not depend on their neighbours.
                into = packed_as(array, array.dtype)
                less = np.subtract(array, np.where(seen, mean, 0.0), out=into)
                array = np.subtract(less, np.where(seen, rest, 0.0), out=less)
                mean = np.where(seen, 0.0, mean)
    given = np.ascontiguousarray(mean), np.ascontiguousarray(rstd)
    options |= {"given": given, "scaling": Scaling.FACTOR}
    return Norm[Array](x, array, axes, weight, bias, **options).answer()


# --- What comes from outside ----------------------------------------------------------------------


def checked_fields(
    axis: tuple[int, ...] | None, shape: tuple[int, ...], parts: Sequence[Array]
) -> Array:
    """Fields that came from outside as one array; refuse what cannot be the moments of anything."""
    if len(parts) not in (len(FIELDS) - 1, len(FIELDS)):
        raise ValueError(f"these are {len(parts)} fields of moments, expected {len(FIELDS)}")
    for name, part in zip(FIELDS, parts, strict=False):
        if part.dtype.kind not in "fiu":
            raise TypeError(
                f"{name} of these moments has dtype {part.dtype}, expected real numbers"
            )
        if part.shape != shape:
            raise ValueError(
                f"{name} of these moments has shape {part.shape}, and they are of shape "
                f"{shown(shape)}: fields of different shapes, expected one"
            )
    fields = np.zeros([len(FIELDS), *shape])
    with np.errstate(all="ignore"):
        for i, part in enumerate(parts):
            fields[i] = part
    count, mean, rest, m2, m2_rest, exponent = fields
    finite = np.isfinite(mean)
    with np.errstate(all="ignore"):
        checks = (
            (
                ~((count >= 0) & (count <= 2**53) & (count % 1 == 0)),
                "counts that are whole numbers",
            ),
            (~(np.isfinite(rest) & np.isfinite(m2_rest)) & finite, "rests that are finite"),
            (finite & ~((m2 >= 0) & (m2 < np.inf)), "an m2 that is finite and not negative"),
            ((count == 0) & (m2 > 0), "an m2 of 0 where nothing was counted"),
            (~((abs(exponent) <= 1100) & (exponent % 1 == 0)), "exponents that are whole numbers"),
        )
    for wrong, message in checks:
        if wrong.any():
            raise ValueError(f"these cannot be moments, expected {message}; use Moments.to_dict()")
    if axis is None and shape:
        raise ValueError(f"these are moments of shape {shape} over all axes, expected shape ()")
    return fields
