"""Statistics that merge: count, mean and variance of parts, in any order, anywhere.

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
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastnorm.arguments import (
    Array,
    Axes,
    as_numbers,
    check_ddof,
    computing_type,
    mask_of,
    packed_as,
    plain,
    reduced_axes,
    shown,
    taken,
    unmask,
    whole_numbers,
)
from fastnorm.backends import compute_moments, moments_at_once
from fastnorm.dispatch import adapter_of, function_of, public
from fastnorm.execution import Done, Norm, Request, exponents_of, extremes, reciprocal
from fastnorm.problem import Scaling

# One number, where all axes are reduced, or an array of them.
Statistic: TypeAlias = np.float64 | NDArray[np.float64]

# The fields that moments are kept as: the first axis of every array of them. Mean and M2 are those
# of the numbers divided by 2^exponent, which is 0 where their squares are in float64's range.
FIELDS = ("count", "mean", "mean_rest", "m2", "m2_rest", "exponent")

# Means and standard deviations up to this are squared and merged as they are: no sum of 2^53 of
# their squares overflows.
MOST = 1e135
# So are deviations from this on, whose squares keep all their digits, and what differs at all
# from a mean from this on: a unit in its last place is 1e-116.
LEAST, LEAST_MEAN = 1e-135, 1e-100

# --- The fields and their merge -------------------------------------------------------------------


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


# --- The functions --------------------------------------------------------------------------------


@public(cached=False, devices=False)
def moments(
    x: ArrayLike,
    axis: Axes | None = None,
    *,
    where: ArrayLike | None = None,
    ddof: float = 0,
    keepdims: bool = False,
) -> Request[tuple[Statistic, Statistic]]:
    r"""Mean and variance in one pass: ``np.mean`` and ``np.var``, in float64 and right.

    .. math:: \mathrm{mean} = \frac{1}{n} \sum x, \quad
              \mathrm{var} = \frac{1}{n - \mathrm{ddof}} \sum (x - \mathrm{mean})^2

    Parameters
    ----------
    x
        Any shape; float16, bfloat16, float32, float64, integers or booleans. Integers are read as
        they are, without a copy in a float type.
    axis
        The axis or axes over which to take them; None for all.
    where
        bool, broadcasts to `x`: only these elements count.
    ddof
        What is subtracted from the count for the variance: 1 for the unbiased one.
    keepdims
        Whether the axes stay, with length 1.

    Returns
    -------
    mean, var
        float64, in the units of x and of x squared. NaN of no elements, the variance also of `ddof`
        or fewer. A variance beyond the range is infinite. Of a group with infinities the mean is
        theirs, or NaN of both signs or with a NaN, and the variance NaN.

    Raises
    ------
    ValueError
        For a `where` that does not fit.
    AxisError
        If `x` has no such axis: ``np.exceptions.AxisError``, which is a ValueError, too.
    TypeError
        For dtypes other than real numbers.

    References
    ----------
    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979, STAN-CS-79-773.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> fn.moments(np.array([[1.0, 10.0], [3.0, 30.0]]), axis=0)
    (array([ 2., 20.]), array([  1., 100.]))
    >>> pixels = np.full((1024, 1024, 3), 200, np.uint8)
    >>> mean, var = fn.moments(pixels)
    >>> float(mean), float(var)
    (200.0, 0.0)
    """
    x, where = unmask(x, where)
    array = as_numbers(x, "x")
    axes = reduced_axes(array, axis, "moments")
    fields = fields_of(array, axes, mask_of(where, array))
    if not keepdims:
        fields = fields.reshape(
            [len(FIELDS), *(n for a, n in enumerate(array.shape) if a not in axes)]
        )
    return Done((mean_of(fields)[()], var_of(fields, ddof)[()]))


@public(cached=False, devices=False)
def standardize(
    x: ArrayLike,
    axis: Axes | None = None,
    *,
    where: ArrayLike | None = None,
    ddof: float = 0,
    eps: float = 0.0,
    out: Array | None = None,
) -> Request[Array]:
    r"""Z-scores: subtract the mean and divide by the standard deviation.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}}

    Parameters
    ----------
    x
        Any shape.
    axis
        The axis or axes that share a mean and a variance; None for all.
    where
        bool, broadcasts to `x`: only these elements enter the statistics; every element is
        standardised.
    ddof
        What is subtracted from the count for the variance.
    eps
        Added to the variance, in the units of x squared.
    out
        The array to write into, of the shape and dtype of `x`; may be `x` itself.

    Returns
    -------
    y
        The shape, dtype and memory order of `x`; float64 for integers and booleans. Where all
        elements are equal it is 0; with `ddof` or fewer of them, NaN.

    Raises
    ------
    ValueError
        For a `where` or `out` that does not fit.
    AxisError
        If `x` has no such axis: ``np.exceptions.AxisError``, which is a ValueError, too.
    TypeError
        For dtypes other than real numbers.

    References
    ----------
    ``scipy.stats.zscore``, which gives NaN where all elements are equal.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> fn.standardize(np.array([[1.0, 10.0], [3.0, 30.0]]), axis=0)
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    array, where = taken(x, where, "standardize", 0)
    axes = reduced_axes(array, axis, "standardize")
    if not array.ndim:
        raise ValueError(f"standardize got one number, {array}, expected an array to compare it in")
    if ddof == 0:
        return Norm(x, array, axes, eps=eps, where=where, out=out)
    if where is None or not array.size:
        # sqrt(n / (n - ddof) var + eps) in terms of a variance with ddof = 0
        count = math.prod(array.shape[axis] for axis in axes)
        left = (count - ddof) / count if count > ddof else np.nan
        scale = np.full([1] * array.ndim, math.sqrt(left), computing_type(array.dtype))
        return Norm(x, array, axes, scale, eps=eps * left if left == left else eps, out=out)
    scales = scales_of(fields_of(array, axes, mask_of(where, array)), eps, ddof)
    return Done(normalised_by(scales, x, array, axes, out=out))


# --- The accumulator ------------------------------------------------------------------------------


def fields_of_batch(batch: ArrayLike, axis: Axes | None, where: ArrayLike | None) -> Array:
    """What `Moments.update` takes in of a batch, along the axes that stay."""
    batch, where = unmask(batch, where)
    array = as_numbers(batch, "batch")
    axes = reduced_axes(array, axis, "Moments.update")
    fields = fields_of(array, axes, mask_of(where, array))
    kept = [n for axis, n in enumerate(array.shape) if axis not in axes]
    return fields.reshape([len(FIELDS), *kept])


class Moments:
    r"""Count, mean and variance of data that comes in parts.

    .. math::

       n = n_a + n_b, \quad
       \mathrm{mean} = \mathrm{mean}_a + \delta \frac{n_b}{n}, \quad
       M_2 = M_{2,a} + M_{2,b} + \delta^2 \frac{n_a n_b}{n}, \quad
       \delta = \mathrm{mean}_b - \mathrm{mean}_a

    Parts may be cut anywhere and merged in any order. Mean and M2 are kept as pairs of doubles:
    the results agree to the last few bits. A new accumulator is empty, and merging it into another
    changes nothing.

    Parameters
    ----------
    axis
        The axis or axes over which statistics are taken; None for all. The axes that stay must keep
        their sizes from one batch to the next.

    Raises
    ------
    ValueError
        For axes that are given twice; on an update, for a batch whose kept axes have other sizes.
    TypeError
        For axes that are not whole numbers.

    References
    ----------
    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979, STAN-CS-79-773.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> images = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
    >>> m = fn.Moments(axis=(0, 2, 3))
    >>> for image in images:
    ...     m = m.update(image[np.newaxis])
    >>> m.count, m.mean
    (array([32, 32, 32]), array([31.5, 47.5, 63.5]))
    >>> m == fn.Moments.from_array(images, axis=(0, 2, 3))
    True
    >>> halves = [fn.Moments.from_array(part, axis=(0, 2, 3)) for part in np.split(images, 2)]
    >>> sum(halves, fn.Moments(axis=(0, 2, 3))).std(ddof=1).round(3)
    array([24.83, 24.83, 24.83])
    """

    __slots__ = ("_axis", "_fields")
    __hash__ = None  # type: ignore[assignment]  # it changes

    def __init__(self, axis: Axes | None = None) -> None:
        self._axis = _checked_axis(axis)
        self._fields: Array | None = None  # (5, ...) without the reduced axes; None before any data

    @classmethod
    def from_array(
        cls, x: ArrayLike, axis: Axes | None = None, *, where: ArrayLike | None = None
    ) -> Self:
        """Return the moments of one array; arguments as for :func:`moments`."""
        return cls(axis).update(x, where)

    @property
    def axis(self) -> tuple[int, ...] | None:
        """The axes over which statistics are taken, as they were given; None for all."""
        return self._axis

    # --- Data in ----------------------------------------------------------------------------------

    def update(self, batch: ArrayLike, where: ArrayLike | None = None) -> Self:
        """Take in a batch, and return the accumulator.

        Parameters
        ----------
        batch
            As for :func:`moments`. A Dask array is computed, chunk by chunk.
        where
            bool, broadcasts to `batch`: only these elements count.

        Raises
        ------
        ValueError
            If the axes that stay have other sizes than before. Nothing has changed then.
        TypeError
            For dtypes other than real numbers.
        """
        if (adapter := adapter_of(batch)) is not None:
            own = function_of(adapter, "fields_of", "Moments.update")
            return self._take(own(batch, self._axis, where))
        return self._take(fields_of_batch(batch, self._axis, where))

    def merge(self, other: Moments) -> Self:
        """Take in what another accumulator has seen, and return this one.

        One that has seen nothing changes nothing, and ``Moments()`` takes over the other's axes.

        Raises
        ------
        ValueError
            If the other is over different axes, or the axes that stay have other sizes here and
            there. Nothing has changed then.
        TypeError
            If the other is not one of these.
        """
        if not isinstance(other, Moments):
            raise TypeError(
                f"Moments.merge got a {type(other).__name__}, expected Moments; write "
                "m.update(x) for an array"
            )
        if other._fields is None:
            return self
        if self._fields is None and self._axis is None:
            self._axis, self._fields = other._axis, other._fields
            return self
        kept = other._fields.ndim - 1
        if _places(self._axis, kept) != _places(other._axis, kept):
            raise ValueError(
                f"Moments.merge got moments over axis={other._axis}, expected axis={self._axis} as "
                "these are; take both over the same axes"
            )
        return self._take(other._fields)

    def _take(self, fields: Array) -> Self:
        if self._fields is None:
            self._fields = fields.copy()
            return self
        if self._fields.shape != fields.shape:
            raise ValueError(
                f"these are moments of shape {fields.shape[1:]}, expected "
                f"{self._fields.shape[1:]} as before: the axes that stay must keep their sizes"
            )
        self._fields = merge(self._fields, fields)
        return self

    def __add__(self, other: object) -> Moments:
        if not isinstance(other, Moments):
            return NotImplemented
        return self.copy().merge(other)

    def __radd__(self, other: object) -> Moments:
        # sum() starts from 0
        return self.copy() if isinstance(other, int) and other == 0 else NotImplemented

    def copy(self) -> Moments:
        """Return an accumulator of the same data that goes its own way."""
        return Moments(self._axis).merge(self)

    def allreduce(self, comm: Any) -> Moments:
        """Return the moments of what all processes have seen, the same bits in each.

        Parameters
        ----------
        comm
            A communicator of mpi4py. Every process must call this; one that has seen nothing takes
            part with an empty accumulator.

        Raises
        ------
        TypeError
            If it is no such communicator.
        """
        if not hasattr(comm, "allgather"):
            raise TypeError(
                f"comm is {shown(comm)}, expected a communicator of mpi4py; write MPI.COMM_WORLD"
            )
        total = Moments(self._axis)
        for part in comm.allgather(self):
            total.merge(part)
        return total

    # --- Results out ------------------------------------------------------------------------------

    @property
    def count(self) -> np.int64 | NDArray[np.int64]:
        """How many elements each mean is of, int64."""
        return np.int64(0) if self._fields is None else self._fields[0].astype(np.int64)[()]

    @property
    def mean(self) -> Statistic:
        """The means, float64; NaN of no elements."""
        return np.float64(np.nan) if self._fields is None else mean_of(self._fields)[()]

    def var(self, ddof: float = 0) -> Statistic:
        """Return the variances, float64; NaN of `ddof` or fewer elements."""
        ddof = check_ddof(ddof)
        return np.float64(np.nan) if self._fields is None else var_of(self._fields, ddof)[()]

    def std(self, ddof: float = 0) -> Statistic:
        """Return the standard deviations, float64; NaN of `ddof` or fewer elements."""
        ddof = check_ddof(ddof)
        return np.float64(np.nan) if self._fields is None else std_of(self._fields, ddof)[()]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as numbers, strings and lists, which JSON keeps exactly."""
        values: dict[str, Any] = dict.fromkeys(("shape", *FIELDS))
        if self._fields is not None:
            values = {"shape": list(self._fields.shape[1:])}
            values |= dict(zip(FIELDS, self._fields.tolist()))
        return {"axis": None if self._axis is None else list(self._axis), **values}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Self:
        """Return the accumulator that :meth:`to_dict` was called on.

        Raises
        ------
        ValueError
            If `d` has not got the entries that it returns, or they cannot be moments: counts that
            are negative or no whole numbers, say.
        TypeError
            If `d` is not a dictionary, or an entry is not made of numbers.
        """
        if not isinstance(d, Mapping):
            raise TypeError(
                f"Moments.from_dict got a {type(d).__name__}, expected what to_dict() returns"
            )
        # dictionaries of before there were shapes and exponents have neither
        if missing := {"axis", *FIELDS[:5]} - d.keys():
            raise ValueError(
                f"Moments.from_dict misses {sorted(missing)}, expected what to_dict() returns"
            )
        if unknown := d.keys() - {"axis", "shape", *FIELDS}:
            raise ValueError(
                f"Moments.from_dict got {sorted(map(str, unknown))}, which it does not know, "
                "expected what to_dict() returns"
            )
        found = cls(d["axis"])
        if all(d.get(name) is None for name in FIELDS):
            return found
        parts = []
        for name in FIELDS:
            if name not in d:
                continue
            try:
                parts.append(np.asarray(d[name]))
            except ValueError:
                raise ValueError(
                    f"{name} of these moments has rows of different lengths, expected what "
                    "to_dict() returns"
                ) from None
            except MemoryError:
                raise
            except Exception as error:
                raise TypeError(
                    f"{name} of these moments cannot be read as an array ({shown(error)}), "
                    "expected what to_dict() returns"
                ) from error
        shape = _checked_axis(d.get("shape"), "shape")
        if shape is None:
            shape = parts[0].shape
        if any(n < 0 for n in shape):
            raise ValueError(f"Moments.from_dict got shape={shown(shape)}, expected 0 or more each")
        if not math.prod(shape):  # lists of nothing have lost their shape
            try:
                parts = [part if part.size else part.reshape(shape) for part in parts]
            except ValueError:
                raise ValueError(
                    f"Moments.from_dict got shape={shown(shape)}, expected what an array can have"
                ) from None
        found._fields = _checked_fields(found._axis, shape, parts)
        return found

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Moments):
            return NotImplemented
        if self._fields is None or other._fields is None:
            return self._axis == other._axis and self._fields is other._fields
        same = np.array_equal(self._fields, other._fields, equal_nan=True)
        return self._axis == other._axis and same

    def __getstate__(self) -> tuple[Any, ...]:
        return self._axis, self._fields

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        # a pickle may be anybody's
        if not isinstance(state, tuple) or len(state) != 2:
            raise ValueError("this is no state of Moments, expected what pickle.dumps made of one")
        axis, fields = _checked_axis(state[0]), state[1]
        if fields is not None:
            own = plain(fields)
            if own is None or not own.ndim:
                raise TypeError("this is no state of Moments, expected an array of their fields")
            fields = _checked_fields(axis, own.shape[1:], list(own[: len(FIELDS) + 1]))
        self._axis, self._fields = axis, fields

    def __repr__(self) -> str:
        if self._fields is None:
            return f"Moments(axis={self._axis})"
        return (
            f"<Moments(axis={self._axis}) of shape {self._fields.shape[1:]}, "
            f"{int(self._fields[0].sum())} elements>"
        )


def _checked_axis(axis: Any, name: str = "axis") -> tuple[int, ...] | None:
    if axis is None:
        return None
    axes = whole_numbers(axis, name)
    if name == "axis" and len(set(axes)) != len(axes):
        raise ValueError(f"axis is {shown(axis)}, expected different axes")
    return axes


def _places(axis: tuple[int, ...] | None, kept: int) -> tuple[int, ...] | None:
    """The reduced axes in order, if there are `kept` others; None where there are no others."""
    if axis is None or not kept:
        return None
    return tuple(sorted(a % (kept + len(axis)) for a in axis))


def _checked_fields(
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
