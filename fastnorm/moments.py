"""Statistics that merge: count, mean and variance of parts, in any order, anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastnorm.arguments import (
    Array,
    Axes,
    as_numbers,
    check_ddof,
    computing_type,
    mask_of,
    plain,
    reduced_axes,
    shown,
    taken,
    unmask,
    whole_numbers,
)
from fastnorm.dispatch import adapter_of, function_of, public
from fastnorm.execution import Done, Norm, Request
from fastnorm.fields import (
    FIELDS,
    checked_fields,
    fields_of,
    mean_of,
    merge,
    normalised_by,
    scales_of,
    std_of,
    var_of,
)

# One number, where all axes are reduced, or an array of them.
Statistic: TypeAlias = np.float64 | NDArray[np.float64]

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
    fields = _fields(x, axis, where, "x", "moments", keepdims)
    return Done((mean_of(fields)[()], var_of(fields, ddof)[()]))


def _fields(
    x: ArrayLike, axis: Axes | None, where: ArrayLike | None, name: str, of: str, keepdims: bool
) -> Array:
    """The fields of what came into the function `of` by this name."""
    x, where = unmask(x, where)
    array = as_numbers(x, name)
    axes = reduced_axes(array, axis, of)
    fields = fields_of(array, axes, mask_of(where, array))
    return fields if keepdims else fields.squeeze(tuple(a + 1 for a in axes))


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
    return _fields(batch, axis, where, "batch", "Moments.update", keepdims=False)


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
        return sum(comm.allgather(self), Moments(self._axis))

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
        found._fields = checked_fields(found._axis, shape, parts)
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
            fields = checked_fields(axis, own.shape[1:], list(own[: len(FIELDS) + 1]))
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
