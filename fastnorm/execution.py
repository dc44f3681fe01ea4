"""From what a public function asks to what is returned: a Problem for the backend in between.

A public function describes a call as one of the requests below. Its wrapper (dispatch.py) asks for
the answer.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from fastnorm._formulas import rstd_of
from fastnorm.arguments import (
    Activation,
    Array,
    as_array,
    asked,
    cast,
    check_activation,
    check_derivative,
    check_out,
    computing_type,
    is_float,
    laid_as,
    lies_plainly,
    mask_of,
    ordered,
    packed,
    packed_as,
    same_shape,
    writes_apart,
    writes_apart_anywhere,
)
from fastnorm.arrays import (
    ArrayView,
    assign,
    broadcast_to,
    empty_on,
    is_writable,
    plus,
    to_device_of,
    to_host,
)
from fastnorm.backends import at_hand, compute_backward
from fastnorm.problem import BackwardProblem, Problem, Scaling
from fastnorm.repeated import Repeat
from fastnorm.runtime import chosen_backend, empty_like

R = TypeVar("R", covariant=True)
View = Callable[[Array], Array]

# --- Results --------------------------------------------------------------------------------------


def new_like(x: Array) -> Array:
    """Memory for a result, where x is and in its order."""
    if isinstance(x, ArrayView):
        return empty_on(x, x.shape, x.dtype, x.strides)
    return empty_like(x)


def destination(array: Array, out: Array, inputs: Sequence[Array | None]) -> Array:
    """The array to compute into: `out` where the kernels can write there without harm."""
    apart = writes_apart_anywhere if isinstance(array, ArrayView) else writes_apart
    usable = lies_plainly(out) and all(other is None or apart(out, other) for other in inputs)
    return out if usable else new_like(array)


def delivered(y: Array, x: ArrayLike, out: Array | None = None) -> Array:
    """`y` where and in the byte order the caller expects it."""
    if out is not None:
        if y is not out:
            assign(out, y)
        return out
    dtype = asked(x, "dtype")
    if isinstance(dtype, np.dtype) and not dtype.isnative and is_float(dtype):
        return y.astype(dtype)
    return y


def unknown(array: Array, shape: Sequence[int], count: int = 3) -> tuple[Array, ...]:
    """Room for mean, var and rstd; not a number where there is nothing to take them of."""
    if isinstance(array, ArrayView) and array.size:
        return tuple(empty_on(array, shape, np.float64) for _ in range(count))
    if array.size or isinstance(array, ArrayView):
        return tuple(to_device_of(array, part) for part in np.full([count, *shape], np.nan))
    # an array of nothing may have more groups than memory has room for
    return (np.broadcast_to(np.nan, shape),) * count


def handed_out(statistic: Array, shape: tuple[int, ...]) -> Array:
    """A statistic of this shape for the caller, whose own it is to write.

    Of one for each channel every sample gets its own.
    """
    if statistic.size != math.prod(shape):
        return broadcast_to(statistic.reshape(statistic.size), shape).copy()
    own = statistic if is_writable(statistic) else statistic.copy()
    return own.reshape(shape)


# --- What a public function asks ------------------------------------------------------------------


class Request(Generic[R]):
    """A call that has been checked and described."""

    __slots__ = ()

    @abstractmethod
    def answer(self, ticket: Any = None) -> R:
        """Compute; with a ticket the backend may cache what it has found for such calls."""


@dataclass(slots=True, eq=False, repr=False)
class Done(Request[R]):
    """One that has been computed already: nothing of it goes to a backend."""

    value: R

    def answer(self, ticket: Any = None) -> R:
        """Return it."""
        return self.value


class Running(NamedTuple):
    """Running statistics, and how they move: by `counts` elements for each new one."""

    mean: Any
    var: Any
    counts: Array
    momentum: float

    @property
    def moves(self) -> bool:
        """Whether there are any, which then move with the call."""
        return self.mean is not None or self.var is not None


@dataclass(slots=True, eq=False, repr=False)
class Norm(Request[R]):
    """Normalise x, which is read as `array`, over the reduced `axes`.

    `view` shows an array of the shape of x along the axes that the norm works on; `axes` are the
    reduced ones among those, and weight, bias and addend lie along them. `squash` names an
    activation that is applied before the affine step. `statistics` is the shape in which mean and
    rstd are returned.
    """

    x: ArrayLike
    array: Array
    axes: Sequence[int]
    weight: Array | None = None
    bias: Array | None = None
    eps: float = 0.0
    where: ArrayLike | None = None
    residual: ArrayLike | None = None
    activation: Activation = None
    out: Array | None = None
    view: View | None = None
    centred: bool = True
    scaling: Scaling = Scaling.RSTD
    given: tuple[Array, Array] | None = None
    squash: str | None = None
    addend: Array | None = None
    total: Array | None = None
    statistics: tuple[int, ...] = ()
    return_stats: bool = False
    running: Running | None = None

    def answer(self, ticket: Any = None) -> Any:
        """Compute y, or (y, mean, rstd), or (y, total); running statistics move."""
        array, view = self.array, self.view
        on_device = isinstance(array, ArrayView)
        activation, mask, residual, into = self.activation, None, None, None
        if activation is not None and not (
            isinstance(array, ArrayView) and array.device.compiles(activation)
        ):
            activation = check_activation(activation)
        if self.where is not None:
            mask = mask_of(self.where, array)
        if self.residual is not None:
            residual = same_shape(self.residual, "residual", array)
        if self.out is not None:
            # last, when no other argument's code can change it any more
            into = check_out(self.out, array)
        operands = [self.weight, self.bias, residual, self.addend, mask]
        if on_device:
            operands = [to_device_of(array, operand) for operand in operands]
        weight, bias, residual, addend, mask = operands
        # a function of the user's may raise half way: what `out` holds is then as it was
        if into is None or (callable(activation) and not on_device):
            y = new_like(array) if on_device else empty_like(array)
        else:
            y = destination(array, into, [array, *operands])
        seen = array if view is None else view(array)
        reduced = tuple([axis in self.axes for axis in range(seen.ndim)])
        kept = [1 if r else n for n, r in zip(seen.shape, reduced)]
        if self.given is not None:
            mean, var, rstd = self._given(*self.given)
        elif array.size and not on_device:
            mean, var, rstd = np.empty([3, *kept])
        else:
            mean, var, rstd = unknown(array, kept)
        if array.size:
            problem = Problem(
                seen,
                y if view is None else view(y),
                reduced,
                mean,
                var,
                rstd,
                weight,
                bias,
                mask=mask if mask is None or view is None else view(mask),
                residual=residual if residual is None or view is None else view(residual),
                addend=addend,
                total=self.total,
                eps=self.eps,
                centred=self.centred,
                given=self.given is not None,
                scaling=self.scaling,
                activation=self.squash or activation,
                activation_first=self.squash is not None,
                ticket=ticket,
                statistics=self.statistics,
            )
            backend = array.device if isinstance(array, ArrayView) else at_hand[chosen_backend()]
            backend.forward(problem)
            if self.running is not None:
                channels = self.statistics[-1]
                parts = (mean.size // channels, channels)
                update_running(self.running, mean.reshape(parts), var.reshape(parts))
                if isinstance(ticket, Repeat) and self.running.moves:
                    own = self.running._replace(mean=None, var=None)
                    ticket.moves = partial(_move, own, parts)
        if self.out is not None:
            delivered(y, self.x, into)
            y = self.out
        elif ticket is None:
            y = delivered(y, self.x)
        if self.total is not None:
            return y, delivered(self.total, self.x)
        if not self.return_stats:
            return y
        rstd = handed_out(rstd, self.statistics)
        return (y, handed_out(mean, self.statistics), rstd) if self.centred else (y, rstd)

    def _given(self, mean: Array, var: Array) -> tuple[Array, Array, Array]:
        """The statistics that were given where x is, and rstd: of use only if it is returned."""
        if isinstance(self.array, ArrayView):
            mean, var = to_device_of(self.array, mean), to_device_of(self.array, var)
            return mean, var, *unknown(self.array, mean.shape, 1)
        rstd = rstd_of(var, self.eps) if self.return_stats else np.empty_like(var)
        return mean, var, rstd


def scaled(
    x: ArrayLike, array: Array, factor: float, weight: Array | None = None,
    bias: Array | None = None, *, centre: float = 0.0, **options: Any,
) -> Norm[Array]:  # fmt: skip
    """(x - centre) * factor, then what follows a norm; by `axes`, if they are given, at a time.

    Of those along which a weight differs, only the last in memory should be among them.
    """
    one = (1,) * array.ndim
    options |= {"given": (np.full(one, centre), np.full(one, factor)), "scaling": Scaling.FACTOR}
    axes = options.pop("axes", range(array.ndim))
    return Norm(x, array, axes, weight, bias, statistics=(1,), **options)


class After(NamedTuple):
    """What followed the norm in the forward pass: these two were added, then it was activated."""

    bias: ArrayLike | None = None
    residual: ArrayLike | None = None
    activation: Activation = None
    derivative: Any = None  # of an activation that is a function


NOTHING = After()


def through_activation(p: Problem) -> Array:
    """dy times the slope of the activation at the numbers that went into it.

    `p` normalises x by a given mean and, in `var`, rstd; its y is where that goes.
    """
    p.given, p.scaling = True, Scaling.FACTOR
    backend = p.x.device if isinstance(p.x, ArrayView) else at_hand[chosen_backend()]
    backend.forward(p)
    return p.y  # type: ignore[return-value]


# A weight of at most 1/256 of x is converted at once, a larger one as it is read.
SMALL = 256


@dataclass(slots=True, eq=False, repr=False)
class Gradients(Request[R]):
    """From dy to dx, dweight and, of a centred norm, dbias; then to that of a residual.

    `view` shows an array of the shape of x along the axes that the norm works on, `place` does so
    for a parameter of this name; `reduced`, `mean` and `rstd` are along those. `own` is the shape
    of a weight that is not there, along these `axes` of x: of a norm `of_channels`, the channels'.
    """

    dy: ArrayLike
    x: ArrayLike
    array: Array
    reduced: tuple[bool, ...]
    mean: Array | None
    rstd: Array
    weight: ArrayLike | None
    own: tuple[int, ...]
    axes: tuple[int, ...]
    place: Callable[[Array, str], Array]
    view: View | None = None
    of_channels: bool = False
    weight_offset: float = 0.0
    training: bool = True
    where: ArrayLike | None = None
    after: After = NOTHING

    def answer(self, ticket: Any = None) -> Any:
        """Compute (dx, dweight, dbias), or (dx, dweight) of a norm that is not centred."""
        array, view = self.array, self.view or _as_it_is

        def place(p: Array) -> Array:
            return self.place(p, "weight")

        mean, rstd = to_device_of(array, self.mean), to_device_of(array, self.rstd)
        slope = to_device_of(array, same_shape(self.dy, "dy", array))
        mask = to_device_of(array, mask_of(self.where, array))
        if isinstance(ticket, Repeat) and any(given is not None for given in self.after):
            ticket = None  # what is left there answers with the gradient of the norm alone
        slope = self._activated(slope, mean, rstd, ticket)
        dx = new_like(array)
        placed = like = None
        shape, dtype = self.own, array.dtype
        if self.weight is not None:
            like = weight = to_device_of(array, as_array(self.weight, "weight"))
            shape, dtype = weight.shape, weight.dtype
            if self.weight_offset:
                weight = plus(weight, self.weight_offset)
            # the kernels convert a larger one on the way
            small = weight.size <= array.size // SMALL or isinstance(array, ArrayView)
            kind = computing_type(array.dtype)
            if not small and weight.dtype.type is not kind:
                # as a converted one lies: how large the batch is decides no bit
                weight, kind = packed(weight), weight.dtype.type
            weight = laid_as(weight, kind, array)
            placed = place(weight)
        along: Sequence[int] = range(-len(shape), 0)
        if shape == self.own:
            along = self.axes
        elif self.of_channels and len(shape) == 2:  # samples and channels
            along = (0, *self.axes)
        dweight = _ordered(shape, dtype, array, along)
        dbias = None if mean is None else _ordered(shape, dtype, array, along)
        if ticket is not None:
            usual = np.empty(self.own, dtype) if like is None else np.empty_like(like)
            if usual.strides != dweight.strides:
                ticket = None  # a cached call makes the usual ones
        if array.size:
            problem = BackwardProblem(
                view(array),
                view(slope),
                view(dx),
                self.reduced,
                mean,
                rstd,
                placed,
                place(dweight),
                None if dbias is None else place(dbias),
                self.training,
                view(mask) if mask is not None and self.training else None,
                ticket,
                self.own,
            )
            compute_backward(problem)
        else:
            dweight = to_device_of(array, np.zeros(shape, dtype))
            dbias = None if dbias is None else to_device_of(array, np.zeros(shape, dtype))
        found = [delivered(dx, self.x), dweight, *([] if dbias is None else [dbias])]
        if self.after.residual is None:
            return tuple(found)
        dtype = as_array(self.after.residual, "residual").dtype
        dresidual = slope
        if self.after.activation is None or slope.dtype != dtype:
            dresidual = _empty_as(array, dtype)
            assign(dresidual, slope if isinstance(slope, ArrayView) else cast(slope, dtype))
        return *found, delivered(dresidual, self.after.residual)

    def _activated(self, dy: Array, mean: Array | None, rstd: Array, ticket: Any) -> Array:
        """The gradient of what went into the activation."""
        array, view, after = self.array, self.view or _as_it_is, self.after
        compiles = array.device.compiles if isinstance(array, ArrayView) else None
        slope = check_derivative(after.activation, after.derivative, compiles)

        def parameter(value: ArrayLike | None, name: str, offset: float = 0.0) -> Array | None:
            if value is None:
                return None
            own = to_device_of(array, as_array(value, name))
            own = plus(own, offset) if offset else own
            return self.place(laid_as(own, computing_type(array.dtype), array), name)

        bias = parameter(after.bias, "bias")
        residual = None
        if after.residual is not None:
            residual = to_device_of(array, same_shape(after.residual, "residual", array))
        if slope is None or not array.size:
            return dy
        through = _empty_as(array, computing_type(array.dtype))
        # by given statistics each sample is walked by itself, as in the forward pass in inference
        reduced = (not self.of_channels and self.reduced[0], *self.reduced[1:])
        # a cached call makes the usual one
        usual = None if ticket is None else np.empty_like(array, through.dtype).strides
        through_activation(
            Problem(
                view(array),
                view(through),
                reduced,
                to_device_of(array, np.zeros(rstd.shape)) if mean is None else mean,
                rstd,
                unknown(array, rstd.shape, 1)[0],
                parameter(self.weight, "weight", self.weight_offset),
                bias,
                residual=residual if residual is None else view(residual),
                dy=view(dy),
                centred=mean is not None,
                activation=slope,
                ticket=ticket if through.strides == usual else None,
            )
        )
        return through


def _empty_as(x: Array, dtype: Any) -> Array:
    """An array that lies as x does, or where it is."""
    if isinstance(x, ArrayView):
        return empty_on(x, x.shape, dtype, x.strides)
    return new_like(x) if x.dtype == dtype else packed_as(x, dtype)


def _ordered(shape: tuple[int, ...], dtype: np.dtype[Any], x: Array, axes: Sequence[int]) -> Array:
    """An array whose axes lie in memory in the order in which these axes of x do; or where x is."""
    if isinstance(x, ArrayView):
        return empty_on(x, shape, dtype)
    return ordered(shape, dtype, [x.strides[axis] for axis in axes])


# --- Views ----------------------------------------------------------------------------------------


def _as_it_is(array: Array) -> Array:
    return array


def channels_second(axis: int) -> View | None:
    """Show an array of the shape of x with the channels, on `axis`, on axis 1; None: they are."""
    return None if axis == 1 else lambda array: np.moveaxis(array, axis, 1)


# --- Range ----------------------------------------------------------------------------------------


def extremes(x: Array, axes: Sequence[int], mask: Array | None = None) -> tuple[Array, Array]:
    """The least and the greatest of 0 and each group, its axes kept as 1, in float64."""
    chosen: Any = True if mask is None else mask
    options: dict[str, Any] = {"axis": tuple(axes), "keepdims": True, "initial": 0}
    with np.errstate(all="ignore"):
        low, high = (extreme(x, where=chosen, **options) for extreme in (np.min, np.max))
        return low.astype(np.float64), high.astype(np.float64)


def exponents_of(largest: Array) -> Array:
    """Exponents of the powers of two that numbers up to `largest` are brought below 1 by.

    0 where that is 0, infinite or not a number.
    """
    return np.where(np.isfinite(largest), np.frexp(np.nan_to_num(largest))[1], 0)


# --- Running statistics ---------------------------------------------------------------------------


def counted(where: ArrayLike | None, array: Array, axes: tuple[int, ...]) -> Array:
    """How many elements enter each statistic, in the order of the axes that stay."""
    if where is None or not array.size:
        # one number for all, which broadcasts to each, and none where there is no statistic
        kept = [min(n, 1) for a, n in enumerate(array.shape) if a not in axes]
        return np.full(kept, math.prod(array.shape[a] for a in axes))
    mask: Any = mask_of(to_host(where), array)
    return _count(mask, axes)


def _count(mask: Array, axes: tuple[int, ...]) -> Array:
    """np.count_nonzero(mask, axis=axes), sooner for masks that are broadcast or channels-last."""
    part = mask[tuple(slice(1 if step == 0 else None) for step in mask.strides)]  # what is repeated
    times = math.prod(mask.shape[a] // part.shape[a] for a in axes if mask.shape[a])
    steps = {abs(step): a for a, step in enumerate(part.strides) if part.shape[a] > 1}
    if axes and steps and steps[min(steps)] not in axes:
        # numbers side by side are of different statistics: up to 255 of each add up in a byte
        longest = max(axes, key=lambda a: part.shape[a])
        whole = np.moveaxis(np.not_equal(part, False).view(np.uint8), longest, 0)
        parts = [
            np.add.reduce(whole[i : i + 255], axis=0, dtype=np.uint8)
            for i in range(0, len(whole), 255)
        ]
        part = np.expand_dims(np.add.reduce(parts, axis=0, dtype=np.intp), longest)
        counts = np.add.reduce(part, axis=axes)
    else:
        counts = np.count_nonzero(part, axis=axes)
    kept = [n for a, n in enumerate(mask.shape) if a not in axes]
    return np.broadcast_to(np.asarray(counts) * times, kept)


def update_running(running: Running, mean: Array, var: Array) -> None:
    """running = (1 - momentum) * running + momentum * average over axis 0, in float64.

    `mean`, `var` and the counts are (parts, C). A part in which nothing was counted is left out,
    and so is a channel in which that holds for all parts.
    """
    counts, momentum = np.broadcast_to(running.counts, mean.shape), running.momentum
    on_device = None
    moved = []
    for target, parts, unbiased in ((running.mean, mean, False), (running.var, var, True)):
        if isinstance(target, ArrayView):
            if on_device is None:
                on_device = to_device_of(mean, counts.astype(np.float64, order="C"))
            target.device.update_running(target, parts, on_device, momentum, unbiased=unbiased)
        elif target is not None:
            batch = to_host(parts)
            if unbiased:
                with np.errstate(all="ignore"):
                    batch = batch * (counts / (counts - 1))
            moved.append((target, moved_running(target, batch, counts > 0, momentum, 0)))
    # both are there before the first is written: without memory for it none is
    for target, values in moved:
        target[...] = values


def _move(
    as_before: Running, parts: tuple[int, int], targets: Any, mean: Array, var: Array
) -> None:
    """Move others as those before, of a call of as many elements."""
    running = as_before._replace(mean=targets[0], var=targets[1])
    update_running(running, mean.reshape(parts), var.reshape(parts))


def moved_running(
    running: Array, batch: Array, seen: Array, momentum: float, axes: int | tuple[int, ...]
) -> Array:
    """Running statistics moved by the average over `axes` of those of `batch` that are `seen`."""
    with np.errstate(all="ignore"):
        average = np.sum(batch, axis=axes, where=seen) / np.count_nonzero(seen, axis=axes)
        values = (1 - momentum) * running.astype(np.float64) + momentum * average
        return np.where(seen.any(axis=axes), values.astype(running.dtype), running)
