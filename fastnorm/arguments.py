"""What came in: arrays, parameters and options checked, and put into the form a pass takes.

Every error says what came in, what was expected, and what to write instead.
"""

from __future__ import annotations

import math
import operator
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from importlib import import_module
from itertools import islice
from numbers import Real
from typing import Any, Literal, TypeAlias, TypeGuard, get_args

import numpy as np
from numpy.exceptions import AxisError
from numpy.lib.stride_tricks import as_strided
from numpy.typing import ArrayLike, NDArray

from fastnorm import _core
from fastnorm.arrays import (
    ArrayView,
    broadcast_to,
    is_writable,
    may_share_memory,
    one_of_a_batch,
    pointer_of,
)

Array: TypeAlias = NDArray[Any]
Axes: TypeAlias = int | Sequence[int]
Named: TypeAlias = Literal["relu", "relu6", "silu", "gelu", "gelu_tanh"]
Activation: TypeAlias = Named | Callable[[Any], Any] | None

ACTIVATIONS: tuple[Named, ...] = get_args(Named)


# Two more are added on the way: by groups of channels, and by the fields of moments.
MOST_AXES = 62

# --- Arrays ---------------------------------------------------------------------------------------


def is_float(dtype: np.dtype[Any]) -> bool:
    """float16, float32, float64, or bfloat16 (a type of ml_dtypes, known by its name alone)."""
    return dtype.type in (np.float16, np.float32, np.float64) or dtype.name == "bfloat16"


def is_integer(dtype: np.dtype[Any]) -> bool:
    """Integers and booleans of NumPy's: neither time spans nor the narrow ones of ml_dtypes."""
    return dtype.kind in "biu" and issubclass(dtype.type, np.bool_ | np.integer)


def is_masked(value: Any) -> bool:
    """Whether this is an array of np.ma."""
    ma = sys.modules.get("numpy.ma")
    return ma is not None and isinstance(value, ma.MaskedArray)


def unmask(value: Any, where: ArrayLike | None = None) -> tuple[Any, Any]:
    """An array of np.ma without its mask, and `where` without what that hides.

    Anything else comes back as it is.
    """
    if isinstance(value, list | tuple) and any(map(is_masked, value)):
        with warnings.catch_warnings(action="ignore"):  # that np.ma.masked becomes not a number
            value = np.ma.asarray(value)
    if not is_masked(value):
        return value, where
    array, hidden = np.asarray(value.data), value.mask
    if hidden is np.ma.nomask or hidden.dtype != np.bool_ or not hidden.any():
        return array, where
    chosen = mask_of(where, array)
    return array, ~hidden if chosen is None else chosen & ~hidden


def asked(value: Any, name: str, otherwise: Any = None) -> Any:
    """An attribute of an object that may be anybody's, and whose code may raise anything."""
    try:
        return getattr(value, name, otherwise)
    except Exception:
        return otherwise


_MISSING = object()


def has(value: Any, name: str) -> bool:
    """Whether an object that may be anybody's has an attribute."""
    return asked(value, name, _MISSING) is not _MISSING


def shape_of(value: Any) -> tuple[Any, ...]:
    """The shape of anything; () of what has none."""
    shape = asked(value, "shape")
    return shape if isinstance(shape, tuple) else ()


def plain(value: Any) -> Array | None:
    """An array of NumPy's as a view of the plain kind; None for anything else.

    What a subclass says of its shape, dtype or flags need not be so. The view stays what it is when
    the code of another argument changes the array.
    """
    return np.ndarray.view(value, np.ndarray) if issubclass(type(value), np.ndarray) else None


def read(value: Any, name: str) -> Array:
    """`value` as an array of NumPy's: its own memory wherever that is possible."""
    if isinstance(value, ArrayView):
        return value  # type: ignore[return-value]
    if (own := plain(value)) is not None and not is_masked(value):
        return own
    value, chosen = unmask(value)
    if chosen is not None:
        raise ValueError(
            f"{name} is a masked array that hides {chosen.size - np.count_nonzero(chosen)} of its "
            f"{chosen.size} elements, expected all of them; write {name}.filled(...) with what to "
            "take for those"
        )
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, getattr(torch, "Tensor", ())):
        value = _readable_tensor(value, name, torch)
        if value.dtype is torch.bfloat16:
            return _of_bfloat16(value, name, torch)
    try:
        if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
            return np.from_dlpack(value)
        array = np.asarray(value)
    except MemoryError:
        raise
    except Exception as error:  # whatever another library says
        raise TypeError(
            f"{name} is a {type(value).__name__} that cannot be read as a NumPy array, expected "
            f"numbers; {_instead(value, name)} ({type(error).__name__}: {error})"
        ) from error
    if array.dtype == object and not (array.ndim and type(value) is np.ndarray):
        raise TypeError(
            f"{name} is {shown(value)}, read as dtype object, expected an array of numbers; "
            f"{_instead(value, name)}"
        )
    return array


def _readable_tensor(tensor: Any, name: str, torch: Any) -> Any:
    """A tensor of PyTorch's that NumPy can read, or bfloat16; refuse any other."""
    wrong = ""
    if tensor.requires_grad and torch.is_grad_enabled():
        wrong = "that requires a gradient, which these functions do not record"
        write = f"{name}.detach(), and use the *_backward functions for gradients"
    elif tensor.layout is not torch.strided:
        wrong, write = f"of layout {tensor.layout}", f"{name}.to_dense()"
    elif tensor.device.type != "cpu":
        wrong, write = f"on the device {tensor.device}", f"{name}.cpu()"
    if wrong:
        raise TypeError(f"{name} is a tensor {wrong}, expected plain numbers; write {write}")
    return tensor.detach().resolve_neg()


def _of_bfloat16(tensor: Any, name: str, torch: Any) -> Array:
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        raise TypeError(
            f"{name} is a tensor of bfloat16, for which NumPy needs the package ml_dtypes, "
            f"expected that or another dtype; write {name}.float(), or install ml_dtypes"
        ) from None
    array: Array = tensor.view(torch.int16).numpy().view(bfloat16)
    return array


def _instead(value: Any, name: str) -> str:
    """What to write for what is no array."""
    if value is None:
        return "give one"
    if isinstance(value, list | tuple):
        return "its parts must have the same shapes; write np.pad(...) to make them equal"
    missing = "bool, na_value=False" if name == "where" else "np.float64, na_value=np.nan"
    for attribute, call in (
        ("toarray", "toarray()"),  # SciPy's sparse arrays
        ("todense", "todense()"),  # PyData's
        ("to_dataarray", "to_dataarray()"),  # xarray's sets of arrays
        ("isna", f"to_numpy({missing})"),  # pandas with pd.NA, or with other objects
        ("collect", "collect()"),  # what Polars will compute
    ):
        if has(value, attribute):
            return f"write {name}.{call}"
    if has(asked(value, "data"), "todense"):  # a sparse array in one of xarray's
        return f"write {name}.data.todense()"
    if has(value, "__next__"):
        return f"write np.array(list({name}))"
    return f"write np.asarray({name}, np.float64)"


def as_array(value: ArrayLike, name: str, like: Array | None = None) -> Array:
    """`value` as a float array the kernels can read: its own memory wherever that is possible.

    Where it is not, the copy lies in memory as `like` does, or else as `value`.
    """
    if is_plain(value):
        return np.ndarray.view(value, np.ndarray)
    array = read(value, name)
    dtype = array.dtype
    if array.ndim > MOST_AXES:
        raise ValueError(
            f"{name} has {array.ndim} dimensions, expected at most {MOST_AXES}; write "
            f"{name}.reshape(...) with fewer"
        )
    if is_float(dtype):
        return _readable(array, like)
    if not is_integer(dtype):
        raise TypeError(
            f"{name} has dtype {dtype}, expected float16, bfloat16, float32, float64, or "
            f"integers or booleans (computed in float64); write {name}.astype(np.float64) or "
            "another of these first"
        )
    return _copied(array, np.float64, like)


def taken(
    x: Any, where: ArrayLike | None, of: str, least: int = 1, shape: str = "(..., D)",
    name: str = "x",
) -> tuple[Array, ArrayLike | None]:  # fmt: skip
    """`x` as an array of at least so many dimensions, and which of its elements count.

    Those do that neither `where` nor the mask of an np.ma array leaves out; all at None.
    """
    if is_plain(x):
        array = np.ndarray.view(x, np.ndarray)
    else:
        x, where = unmask(x, where)
        array = as_array(x, name)
    if array.ndim < least:
        check_ndim(array, least, of, shape)
    return array, where


def as_numbers(value: ArrayLike, name: str) -> Array:
    """`as_array`, but integers and booleans stay what they are."""
    array = read(value, name)
    integers = is_integer(array.dtype) and array.ndim <= MOST_AXES
    return _readable(array) if integers else as_array(array, name)


def cast(array: Array, dtype: Any, order: Literal["K", "C"] = "K") -> Array:
    """An array in another float dtype, in which a number may become infinite."""
    with np.errstate(all="ignore"):
        return array.astype(dtype, order=order, copy=False)


def _lies_plainly(array: Array) -> bool:
    """Whether the kernels read and write an array where it lies.

    It is native and aligned, and its elements are whole numbers of elements apart, none of them
    broadcast. The stride of an axis of length 1 is never taken.
    """
    if isinstance(array, ArrayView):
        return True  # no other can be viewed
    size = array.itemsize
    return (
        array.dtype.isnative
        and array.flags.aligned
        and not any(s == 0 or s % size for s, n in zip(array.strides, array.shape) if n > 1)
    )


def _is_plain(value: Any) -> TypeGuard[Array]:
    """Whether this is a plain array of floats that the kernels read where it lies."""
    return (
        type(value) is np.ndarray
        and value.ndim <= MOST_AXES
        and is_float(value.dtype)
        and _lies_plainly(value)
    )


def writes_apart_anywhere(out: Array, other: Array) -> bool:
    """Whether writing `out` cannot change what is still to be read of another array.

    Exactly in place is fine: each element is read before it is written.
    """
    return not may_share_memory(out, other) or (
        out.strides == other.strides
        and out.shape == other.shape
        and out.dtype == other.dtype
        and pointer_of(out) == pointer_of(other)
    )


# The compiled kernels decide what they take as it is, for cached calls and here
# (_core/operands.pxi); without them, and of arrays on a device, the functions above do.
lies_plainly: Callable[[Array], bool] = getattr(_core.kernels, "array_lies_plainly", _lies_plainly)
is_plain: Callable[[Any], TypeGuard[Array]] = getattr(_core.kernels, "is_plain", _is_plain)
writes_apart: Callable[[Array, Array], bool] = getattr(
    _core.kernels, "array_writes_apart", writes_apart_anywhere
)


def _readable(array: Array, like: Array | None = None) -> Array:
    """`array`, or a copy where its elements do not lie as the kernels read them."""
    if lies_plainly(array):
        return array
    return _copied(array, array.dtype.newbyteorder("="), like)


def _copied(array: Array, dtype: Any, like: Array | None) -> Array:
    """A copy that lies in memory as `like` does, or else as `array` does."""
    if isinstance(array, ArrayView):
        return array.astype(dtype)
    if isinstance(like, np.ndarray | ArrayView) and like.shape == array.shape:
        copy = ordered(array.shape, dtype, like.strides)
    else:
        steps = [abs(step) for step in array.strides]
        if array.ndim and steps[0] == 0:  # one sample, broadcast
            steps[0] = max(steps) + 1
        copy = _packed(array.shape, dtype, steps)
    copy[...] = array
    return copy


def packed_as(x: Array, dtype: Any) -> Array:
    """Memory for numbers of the shape of x, in the order of its axes without gaps.

    One sample that lies between others gets a place between others, by which it keeps their walk
    (layout.py): converted, it has the bits that it has in its batch.
    """
    return _packed(x.shape, dtype, [abs(step) for step in x.strides])


def converted(x: Array, dtype: Any) -> Array:
    """`x` in another dtype, where it is of another: as `packed_as` has it."""
    if x.dtype == dtype:
        return x
    copy = packed_as(x, dtype)
    copy[...] = x
    return copy


def _packed(shape: tuple[int, ...], dtype: Any, steps: Sequence[int]) -> Array:
    if shape[:1] == (1,) and steps[0] < max(steps) and one_of_a_batch(steps, shape):
        return ordered((2, *shape[1:]), dtype, steps)[:1]
    return ordered(shape, dtype, steps)


def computing_type(dtype: np.dtype[Any]) -> type[np.floating[Any]]:
    """The type that arithmetic on this dtype runs in: float32, or float64 for float64."""
    return np.float64 if dtype.itemsize == 8 else np.float32


def machine_epsilon(dtype: np.dtype[Any]) -> float:
    """The distance from 1 to the next number of the type that is computed in."""
    return float(np.finfo(computing_type(dtype)).eps)


def parameter(value: ArrayLike, name: str, x: Array) -> Array:
    """A weight or bias in the type that is computed in."""
    return laid_as(as_array(value, name), computing_type(x.dtype), x)


def laid_as(p: Array, dtype: Any, x: Array) -> Array:
    """A parameter in a dtype, each of its samples without gaps, one after another in memory.

    Samples that lie between one another, and a slice of such, would be read by other loops than one
    sample's copy, of other bits. What is in C's order stays so: the cache of calls makes such
    copies by itself.
    """
    of_samples = not isinstance(p, ArrayView) and (p.ndim == x.ndim or p.ndim == 2 < x.ndim)
    if not of_samples or _is_packed(p.shape[1:], p.strides[1:], p.itemsize):
        return p if p.dtype.type is dtype else cast(p, dtype)
    copy = ordered(p.shape, dtype, (max(map(abs, p.strides)) + 1, *p.strides[1:]))
    with np.errstate(all="ignore"):
        copy[...] = p
    return copy


def _is_packed(shape: Sequence[int], steps: Sequence[int], itemsize: int) -> bool:
    """Whether the elements of an array are neighbours, in any order of its axes."""
    for step, n in sorted((abs(step), n) for step, n in zip(steps, shape) if n > 1):
        if step != itemsize:
            return False
        itemsize *= n
    return True


def packed(p: Array) -> Array:
    """A parameter, or where it has gaps or lies backwards a copy in the order of memory."""
    forwards = min(p.strides, default=0) >= 0
    return p if forwards and _is_packed(p.shape, p.strides, p.itemsize) else p.copy("K")


def ordered(shape: tuple[int, ...], dtype: Any, steps: Sequence[int]) -> Array:
    """An array whose axes lie in memory in the order of these steps."""
    order = sorted(range(len(shape)), key=lambda i: -abs(steps[i]))
    return np.empty([shape[i] for i in order], dtype).transpose(np.argsort(order))


def check_ndim(x: Array, least: int, of: str, shape: str) -> None:
    """Refuse an x of fewer dimensions than `of` needs."""
    if x.ndim < least:
        raise ValueError(
            f"{of} got x of shape {x.shape}, expected at least {least} dimensions {shape}; "
            "write x.reshape(...) to add the missing ones"
        )


# --- Options --------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """What came in, short enough for a message."""
    if shape := shape_of(value):
        kind = "an array" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
        return f"{kind} of shape {shown(tuple(shape))}"
    try:
        text = repr(value)
    except Exception:  # of an int with thousands of digits, and of whatever somebody wrote
        text = ""
    if text and len(text) <= 80:
        return text
    return (
        "a number of more than 80 digits"
        if isinstance(value, int)
        else (f"a {type(value).__name__}")
    )


def number(value: Any, name: str, expected: str = "a finite number") -> float:
    """Return a finite number as a float; NumPy's scalars are numbers, booleans are none."""
    if isinstance(value, np.ndarray | np.generic):
        real = not value.ndim and (is_float(value.dtype) or value.dtype.kind in "iu")
        real = real and value is not np.ma.masked
    else:
        real = isinstance(value, Real) and not isinstance(value, bool)
    if not real:
        raise TypeError(f"{name} is {shown(value)}, expected {expected}; write a Python float")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise ValueError(f"{name} is {shown(value)}, expected {expected}")
    return found


def check_eps(eps: float, name: str = "eps") -> float:
    """Return eps as a float; refuse one that is negative, infinite or not a number."""
    expected = "a finite number, 0 or more, such as 1e-5"
    found = number(eps, name, expected)
    if found < 0:
        raise ValueError(f"{name} is {shown(eps)}, expected {expected}")
    return found


def check_momentum(momentum: float, name: str = "momentum") -> float:
    """Return momentum as a float; refuse one that is not from 0 to 1."""
    expected = "a number from 0 to 1: the share of the batch in the running statistics"
    found = number(momentum, name, expected)
    if not 0 <= found <= 1:
        raise ValueError(f"{name} is {shown(momentum)}, expected {expected}")
    return found


def check_ddof(ddof: float, name: str = "ddof") -> float:
    """Return ddof; refuse one that is not a finite number."""
    return number(ddof, name, "a finite number: 0, or 1 for sample variances")


def check_size(size: int, name: str = "size") -> int:
    """Return how many neighbouring channels, 1 or more."""
    expected = "a whole number of channels, 1 or more"
    found = whole(size, name, expected)
    if not 1 <= found < 1 << 63:
        raise ValueError(f"{name} is {shown(found)}, expected {expected}, below 2^63")
    return found


def check_flag(value: Any, name: str) -> bool:
    """Return True or False; NumPy's, 0 and 1 are such, too."""
    if isinstance(value, bool | np.bool_ | int | np.integer) and value in (0, 1):
        return bool(value)
    raise TypeError(f"{name} is {shown(value)}, expected True or False")


def whole(value: Any, name: str, expected: str = "a whole number") -> int:
    """Return what Python takes for an index, but no boolean."""
    try:
        if not isinstance(value, bool | np.bool_):
            return operator.index(value)
    except Exception:  # a TypeError, or what somebody's `__index__` raises
        pass
    raise TypeError(
        f"{name} is {shown(value)}, expected {expected}, such as 1"
        + ("; the array x comes first" if shape_of(value) else "")
    )


def whole_numbers(value: Any, name: str) -> tuple[int, ...]:
    """Return one whole number or a sequence of them as a tuple."""
    if type(value) is int:
        return (value,)
    expected = "a whole number or a tuple of whole numbers"
    if has(value, "__index__") and not shape_of(value):
        return (whole(value, name, expected),)
    # an array of data that came in an option's place may be large
    refused = isinstance(value, str | bytes | Set | Mapping) or len(shape_of(value)) > 1
    try:
        # no array has more axes than these, and what gives numbers may never end
        items = [] if refused else list(islice(value, MOST_AXES + 3))
        refused |= len(items) > MOST_AXES + 2
        refused |= np.dtype(asked(value, "dtype", int)).kind not in "iu"
    except Exception:  # whatever somebody's code raises
        refused = True
    if refused:
        return (whole(value, name, expected),)
    return tuple(whole(item, name, expected) for item in items)


def axes_of(x: Array, axis: Any, of: str, name: str = "axis") -> tuple[int, ...]:
    """The axes that were given, in their order, each 0 or more."""
    places = whole_numbers(axis, name)
    if any(not -x.ndim <= a < x.ndim for a in places):
        span = f"from {-x.ndim} to {x.ndim - 1}" if x.ndim else "none, as x is a single number"
        raise AxisError(
            f"{of} got {name}={shown(axis)} for x of shape {x.shape}, expected axes {span}"
        )
    places = tuple(a % x.ndim for a in places)
    if len(set(places)) != len(places):
        raise ValueError(
            f"{of} got {name}={shown(axis)} for x of shape {x.shape}, expected different axes"
        )
    return places


def did_you_mean(value: Any, choices: Sequence[str]) -> str:
    """The choice that is nearest to what came in, as the end of a message."""
    if not isinstance(value, str):
        return ""
    from difflib import get_close_matches

    meant = get_close_matches(value.strip().lower(), choices, 1)
    return f"; did you mean {meant[0]!r}?" if meant else ""


def channel_axis_of(x: Array, channel_axis: int, of: str, *, samples: bool = True) -> int:
    """Return the channels' axis, 0 or more; with `samples`, axis 0 must be left for those."""
    given = channel_axis if type(channel_axis) is int else whole(channel_axis, "channel_axis")
    if not -x.ndim <= given < x.ndim:
        raise AxisError(
            f"{of} got channel_axis={shown(channel_axis)} for x of shape {x.shape}, expected "
            f"{-x.ndim} to {x.ndim - 1}; write channel_axis=1 for (N, C, ...), -1 for (N, ..., C)"
        )
    axis = given % x.ndim
    if samples and axis == 0:
        raise ValueError(
            f"{of} got channel_axis={channel_axis} for x of shape {x.shape}, but axis 0 holds the "
            "samples; write x[np.newaxis] and channel_axis=1 for one sample (C, ...)"
        )
    return axis


# --- Weights, masks, results ----------------------------------------------------------------------


def fits(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether NumPy broadcasts an array of one shape to the other."""
    return len(shape) <= len(whole) and all(
        n in (1, all_) for n, all_ in zip(reversed(shape), reversed(whole))
    )


def spread(value: Array, shape: tuple[int, ...], name: str, expected: str) -> Array:
    """`value` with as many axes as `shape`, each of its length or 1."""
    if not fits(value.shape, shape):
        raise ValueError(f"{name} has shape {value.shape} for x of shape {shape}, {expected}")
    return value.reshape((1,) * (len(shape) - value.ndim) + value.shape)


def along_channels(p: Array, name: str, x: Array, axis: int) -> Array:
    """A weight or bias of a channel norm, along the axes of x with the channels moved to axis 1."""
    samples, channels = (1 if axis == 0 else x.shape[0]), x.shape[axis]
    if p.ndim <= 2 and fits(p.shape, (samples, channels)):
        return p.reshape((1,) * (2 - p.ndim) + p.shape + (1,) * (x.ndim - 2))
    expected = (
        f"expected ({channels},) for each channel, ({samples}, {channels}) for each sample and "
        "channel, or a shape of as many dimensions as x that broadcasts against it"
    )
    if p.ndim < min(3, x.ndim):
        raise ValueError(f"{name} has shape {p.shape} for x of shape {x.shape}, {expected}")
    return np.moveaxis(spread(p, x.shape, name, expected), axis, 1)


def channel_parameter(
    value: ArrayLike | None, name: str, x: Array, axis: int, groups: int | None = None
) -> Array | None:
    """`along_channels` of what came in, if anything did, in the type that is computed in.

    With `groups` the channels, axis 1, are split into (groups, channels of a group).
    """
    if value is None:
        return None
    kind, channels = np.float64 if x.dtype.itemsize == 8 else np.float32, x.shape[axis]
    if is_plain(value) and value.dtype.type is kind and value.shape == (channels,):
        places = (1,) * (x.ndim - 2)
        return value.reshape((1, channels, *places) if groups is None else (1, groups, -1, *places))
    placed = along_channels(parameter(value, name, x), name, x, axis)
    return placed if groups is None else grouped(placed, groups)


def grouped(array: Array, groups: int, axis: int = 1) -> Array:
    """An array of the shape of x, or a weight, as (N, groups, channels of a group, ...).

    Its channels are on `axis`; a weight's that is one for all become (1, 1).
    """
    if axis != 1:
        array = np.moveaxis(array, axis, 1)
    shape = array.shape
    both = (1, 1) if shape[1] == 1 else (groups, shape[1] // groups)
    split = array.reshape(shape[:1] + both + shape[2:])
    if isinstance(split, np.ndarray) and split.strides[0] != array.strides[0]:
        # NumPy forgets how far the next sample would be, which tells columns from runs (layout.py)
        split = as_strided(split, strides=(array.strides[0], *split.strides[1:]))
    return split


def along_axes(p: Array, name: str, x: Array, axes: tuple[int, ...]) -> Array:
    """A weight or bias of layer or RMS norm, along the axes of x."""
    own = tuple([x.shape[axis] for axis in axes])
    if p.shape == own or fits(p.shape, own):
        # its axes lie in the order in which those of x were given, and have to lie in that of x
        given = axes[len(axes) - p.ndim :]
        lengths = dict(zip(given, p.shape))
        order = sorted(range(p.ndim), key=given.__getitem__)
        return p.transpose(order).reshape([lengths.get(axis, 1) for axis in range(x.ndim)])
    expected = (
        f"expected {own}, or a shape that broadcasts against x for parameters of each sample, such "
        f"as {tuple(1 if a in axes else n for a, n in enumerate(x.shape[:1])) + x.shape[1:]}"
    )
    return spread(p, x.shape, name, expected)


def axis_parameter(
    value: ArrayLike | None, name: str, x: Array, axes: tuple[int, ...]
) -> Array | None:
    """`along_axes` of what came in, if anything did, in the type that is computed in."""
    return None if value is None else along_axes(parameter(value, name, x), name, x, axes)


def mask_of(where: ArrayLike | None, x: Array) -> Array | None:
    """Return `where` as booleans of the shape of x."""
    if where is None:
        return None
    if is_masked(where):
        where = where.filled(False)  # type: ignore[union-attr]
    mask = read(where, "where")
    if mask.dtype != np.bool_:
        raise TypeError(f"where has dtype {mask.dtype}, expected bool; write where.astype(bool)")
    try:
        return broadcast_to(mask, x.shape)
    except ValueError:
        raise ValueError(
            f"where has shape {mask.shape}, expected one that broadcasts to x of shape {x.shape}; "
            "add axes of length 1, as in where[:, np.newaxis]"
        ) from None


def same_shape(value: ArrayLike, name: str, x: Array) -> Array:
    """Return `value` as an array of the shape of x."""
    array = as_array(value, name, x)
    if array.shape != x.shape:
        raise ValueError(
            f"{name} has shape {array.shape}, expected that of x, {x.shape}; write "
            f"np.broadcast_to({name}, x.shape) if it is to be repeated"
        )
    return array


def _is_jitted(function: Any) -> bool:
    numba = sys.modules.get("numba")
    return numba is not None and bool(numba.extending.is_jitted(function))


def check_activation(activation: Activation) -> Activation:
    """Refuse an activation that the kernels neither have nor can call."""
    if activation is None or (isinstance(activation, str) and activation in ACTIVATIONS):
        return activation
    if _is_jitted(activation):
        return activation
    known = isinstance(activation, str) or callable(activation)
    raise (ValueError if known else TypeError)(
        f"activation is {shown(activation)}, expected None, one of "
        f"{', '.join(map(repr, ACTIVATIONS))}, or a function of one number compiled with Numba; "
        "write numba.njit(f)" + did_you_mean(activation, ACTIVATIONS)
    )


def check_derivative(
    activation: Activation, derivative: Any, compiles: Callable[[Any], bool] | None = None
) -> Activation:
    """What the gradient goes through an activation by: its name, or its derivative, compiled.

    `compiles` tells of a device what functions it takes; None: those that Numba has compiled.
    """
    taken = compiles or _is_jitted
    if not callable(activation) or not taken(activation):
        activation = check_activation(activation)
    if not callable(activation):
        if derivative is None:
            return activation
        raise ValueError(
            f"derivative is {shown(derivative)} and activation is {shown(activation)}, whose "
            "derivative is known; write derivative=None"
        )
    if isinstance(derivative, str) and derivative == "central":
        return import_module("fastnorm._numba.slopes").central(activation)
    if not taken(derivative):
        raise (ValueError if derivative is None or isinstance(derivative, str) else TypeError)(
            f"derivative is {shown(derivative)}, expected that of the activation, a function of "
            'one number compiled with Numba; write numba.njit(f), or derivative="central" for '
            "central differences"
        )
    return derivative


def check_out(out: Array | None, x: Array) -> Array | None:
    """`out` as a plain array; refuse another type, memory, dtype or shape than that of x.

    And a read-only one.
    """
    if out is None:
        return None
    shape, dtype = x.shape, x.dtype
    if isinstance(x, ArrayView) and not isinstance(out, ArrayView):
        raise TypeError(
            f"out is a {type(out).__name__}, expected an array where x is; write an empty array "
            "like x of the library that made it"
        )
    own: Array | None = out if isinstance(out, ArrayView) else plain(out)
    if own is None or is_masked(out):
        raise TypeError(
            f"out is a {type(out).__name__}, expected a NumPy array; write "
            + ("out.data" if is_masked(out) else "np.empty_like(x)")
        )
    if own.dtype.type is not dtype.type:  # in any byte order
        raise TypeError(
            f"out has dtype {own.dtype}, expected {dtype} as x has; write np.empty_like(x)"
        )
    if own.shape != shape:
        raise ValueError(
            f"out has shape {own.shape}, expected {shape} as x has; write np.empty_like(x)"
        )
    if not is_writable(own):
        raise ValueError("out is read-only, expected a writable array; write np.empty_like(x)")
    if isinstance(own, np.ndarray) and _is_shared(own):
        raise ValueError(
            f"out has elements that share memory (shape {own.shape}, strides {own.strides}), "
            "expected a place for each; write np.empty_like(x)"
        )
    return own


def _is_shared(array: Array) -> bool:
    """Whether two elements of an array have memory in common."""
    extent = size = array.itemsize
    axes = sorted((abs(step), n) for step, n in zip(array.strides, array.shape) if n > 1)
    if not array.size:
        return False
    for step, n in axes:
        if step < extent:
            break
        extent += step * (n - 1)
    else:
        return False
    if array.size > 1 << 24:
        return True  # perhaps; nobody has such arrays but by as_strided
    places = np.zeros(1, np.intp)
    for step, n in axes:
        places = np.add.outer(places, step * np.arange(n)).ravel()
    places.sort()
    return bool((np.diff(places) < size).any())


def check_running(
    mean: ArrayLike | None, var: ArrayLike | None, channels: int, *, written: bool
) -> tuple[Array | None, Array | None]:
    """Running statistics as plain arrays; those that are `written` must be arrays that can be."""
    found: list[Array | None] = []
    for name, value in (("running_mean", mean), ("running_var", var)):
        if value is None:
            found.append(None)
            continue
        if written and not issubclass(type(value), np.ndarray | ArrayView):
            raise TypeError(
                f"{name} is a {type(value).__name__}, expected a NumPy array: it is updated in "
                f"place; write np.{'zeros' if name == 'running_mean' else 'ones'}({channels})"
            )
        array: Array = np.ndarray.view(value, np.ndarray) if is_plain(value) else read(value, name)
        if array.shape != (channels,):
            raise ValueError(
                f"{name} has shape {array.shape}, expected ({channels},): one for each channel"
            )
        if not is_float(array.dtype):
            raise TypeError(f"{name} has dtype {array.dtype}, expected a float dtype")
        if written and not is_writable(array):
            raise ValueError(f"{name} is read-only, and is updated in place; write {name}.copy()")
        found.append(array)
    return found[0], found[1]


def statistic(value: ArrayLike, name: str, shape: tuple[int, ...], of: str) -> Array:
    """A mean or rstd as float64, one for each group."""
    array = as_array(value, name)
    if array.shape != shape:
        raise ValueError(
            f"{name} has shape {array.shape}, expected {shape}; give {of} what the forward "
            "function returned with return_stats=True"
        )
    return cast(array, np.float64, "C")


def require_two(counts: Array | int, of: str, instead: str, per: str = "channel") -> None:
    """Refuse statistics of a single value: their variance is 0, and 0/0 where it is unbiased."""
    if np.any(np.equal(counts, 1)):  # not the least: one of which all is left out has 0
        raise ValueError(
            f"{of} got one value per {per} to take statistics from, expected at least 2: nothing "
            f"but the bias is left of one; {instead}"
        )


def _divisors(n: int, asked: int) -> list[int]:
    """Up to 12 divisors of n, of those that are found in a millisecond the nearest."""
    small = [d for d in range(1, min(math.isqrt(n), 1 << 14) + 1) if n % d == 0]
    return sorted(sorted({*small, *(n // d for d in small)}, key=lambda d: abs(d - asked))[:12])


def groups_of(num_groups: int, channels: int) -> int:
    """Return num_groups; refuse one that does not divide the channels."""
    groups = num_groups if type(num_groups) is int else whole(num_groups, "num_groups")
    if not 1 <= groups <= max(channels, 1) or channels % groups:
        raise ValueError(
            f"num_groups={shown(num_groups)} does not divide the {channels} channels; use "
            + (f"one of {', '.join(map(str, _divisors(channels, groups)))}" if channels else "1")
        )
    return groups


def reduced_axes(x: Array, axis: Axes | None, of: str) -> tuple[int, ...]:
    """The axes that NumPy's `axis` means, in order; None for all of them."""
    return tuple(range(x.ndim)) if axis is None else tuple(sorted(axes_of(x, axis, of)))


def layer_axes(
    x: Array, normalized_shape: Axes | None, axis: Axes | None, of: str
) -> tuple[int, ...]:
    """The normalised axes, in the order given: that of the weight's own axes."""
    if (normalized_shape is None) == (axis is None):
        both = "neither" if axis is None else "both"
        raise ValueError(
            f"{of} got {both} of normalized_shape and axis, expected exactly one; write "
            f"{of}(x, x.shape[-1]) or {of}(x, axis=-1) for the last axis"
        )
    name = "axis" if normalized_shape is None else "normalized_shape"
    given = whole_numbers(axis if normalized_shape is None else normalized_shape, name)
    check_ndim(x, 1, of, "(..., D)")
    if normalized_shape is None:
        if not given:
            raise ValueError(
                f"{of} got axis={shown(axis)} for x of shape {x.shape}, expected one or more axes"
            )
        return axes_of(x, axis, of)
    if not given or x.shape[x.ndim - len(given) :] != given or len(given) > x.ndim:
        raise ValueError(
            f"{of} got normalized_shape={shown(normalized_shape)} for x of shape {x.shape}, "
            "expected its trailing shape; write x.shape[-1] for the last axis, or axis=... for any "
            "others"
        )
    return tuple(range(x.ndim - len(given), x.ndim))
