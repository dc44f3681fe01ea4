"""What layers other than norms compute, forward and backward: each written once, for every user."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastnorm.arguments import (
    ACTIVATIONS,
    Array,
    Named,
    as_array,
    check_flag,
    check_ndim,
    computing_type,
    did_you_mean,
    is_float,
    is_masked,
    number,
    plain,
    read,
    shown,
    whole,
)

# NaN and infinity are ordinary data here.
_quiet = np.errstate(all="ignore")


def choice(value: Any, name: str, choices: Sequence[str]) -> Any:
    """One of some words; refuse any other."""
    if not (isinstance(value, str) and value in choices):
        raise ValueError(
            f"{name} is {shown(value)}, expected one of {', '.join(map(repr, choices))}"
            + did_you_mean(value, choices)
        )
    return value


def _check_into(
    out: Array | None, shape: tuple[int, ...], dtype: np.dtype[Any], name: str = "out"
) -> None:
    """Refuse an array to write into that is none, or of another shape or dtype than the result."""
    write = f"write np.empty({shape}, np.{dtype})"
    if out is None:
        return
    own = plain(out)
    if own is None or is_masked(out):
        raise TypeError(f"{name} is {shown(out)}, expected a NumPy array; {write}")
    if own.shape != shape or own.dtype != dtype or not own.flags.writeable:
        kind = "" if own.flags.writeable else "read-only "
        raise ValueError(
            f"{name} is a {kind}array of shape {own.shape} and dtype {own.dtype}, expected one of "
            f"shape {shape} and dtype {dtype} to write into; {write}"
        )


def _scale_of(scale: float | None, size: int) -> float:
    """The scale of scores of vectors of this size."""
    return max(size, 1) ** -0.5 if scale is None else number(scale, "scale")


def _alike(of: str, **given: ArrayLike) -> list[Array]:
    """What came in as arrays, by their names; refuse those of different shapes."""
    arrays = [as_array(value, name) for name, value in given.items()]
    if len({array.shape for array in arrays}) > 1:
        shapes = ", ".join(f"{name} {a.shape}" for name, a in zip(given, arrays))
        raise ValueError(f"{of} got arrays of different shapes, expected one: {shapes}")
    return arrays


def _computed(value: ArrayLike, name: str) -> Array:
    """`value` in the type that is computed in: float32 or float64."""
    array = as_array(value, name)
    return array.astype(computing_type(array.dtype), copy=False)


@_quiet
def linear(
    x: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None, *, out: Array | None = None
) -> Array:
    r"""Multiply by a matrix and add a bias.

    .. math:: y = x W^T + b

    Parameters
    ----------
    x
        (..., in_features).
    weight
        (out_features, in_features); a transposed view costs nothing.
    bias
        (out_features,).
    out
        The array to write into, C-contiguous; no overlap with the others.

    Returns
    -------
    y
        (..., out_features).

    Raises
    ------
    ValueError
        If the shapes do not fit.
    TypeError
        For dtypes other than real numbers.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> fn.nn.linear(np.array([1.0, 2.0]), np.array([[1.0, 1.0], [0.0, 3.0]]), np.array([0.0, 1.0]))
    array([3., 7.])
    """
    rows, matrix = _computed(x, "x"), _computed(weight, "weight")
    if matrix.ndim != 2 or not rows.ndim or rows.shape[-1:] != matrix.shape[1:]:
        raise ValueError(
            f"linear got x of shape {rows.shape} and weight of shape {matrix.shape}, expected "
            "(..., in_features) and (out_features, in_features); write weight.T where it lies "
            "the other way round"
        )
    shape = (*rows.shape[:-1], len(matrix))
    _check_into(out, shape, np.result_type(rows, matrix))
    if out is not None and not out.flags.c_contiguous:
        raise ValueError(
            "out is not C-contiguous, expected one piece of memory in order; write "
            "np.empty(...), and copy the result"
        )
    # one product for all leading axes
    y: Array = np.matmul(
        rows.reshape(math.prod(shape[:-1]), rows.shape[-1]),
        matrix.T,
        out=None if out is None else out.reshape(-1, len(matrix)),
    )
    if bias is not None:
        added = _computed(bias, "bias")
        if added.shape != shape[-1:]:
            raise ValueError(f"bias has shape {added.shape}, expected {shape[-1:]}")
        y += added
    return y.reshape(shape)


@_quiet
def softmax(x: ArrayLike, *, out: Array | None = None) -> Array:
    r"""Turn scores along the last axis into shares that add up to 1.

    .. math:: y_i = \frac{e^{x_i}}{\sum_j e^{x_j}}

    Parameters
    ----------
    x
        Any shape of at least 1 dimension.
    out
        The array to write into; may be `x` itself.

    Returns
    -------
    y
        The shape of `x`. Where all of a row is minus infinity there is nothing to share: zeros.

    Raises
    ------
    ValueError
        For an `x` without axes.
    TypeError
        For dtypes other than real numbers.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> fn.nn.softmax(np.array([0.0, 0.0, -np.inf]))
    array([0.5, 0.5, 0. ])
    """
    scores = _computed(x, "x")
    check_ndim(scores, 1, "softmax", "(..., classes)")
    _check_into(out, scores.shape, scores.dtype)
    if not scores.size:  # of any number of rows
        return np.subtract(scores, 0, out=out)
    # the largest becomes 0, so that no exponential overflows; never -inf - -inf
    least = np.finfo(scores.dtype).min
    y: Array = np.subtract(scores, scores.max(-1, keepdims=True, initial=least), out=out)
    np.exp(y, out=y)
    total = y.sum(-1, keepdims=True)
    total[total == 0] = 1
    y /= total
    return y


@_quiet
def softmax_backward(dy: ArrayLike, y: ArrayLike, *, out: Array | None = None) -> Array:
    r"""Return the gradient of the scores that :func:`softmax` turned into `y`.

    .. math:: dx_i = y_i \left(dy_i - \sum_j dy_j y_j\right)

    Parameters
    ----------
    dy, y
        The gradient of the result, and the result.
    out
        The array to write into; may be `dy` itself.

    Returns
    -------
    dx
        The shape of `y`.

    Raises
    ------
    ValueError
        If the shapes differ.
    TypeError
        For dtypes other than real numbers.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> fn.nn.softmax_backward(np.array([1.0, 0.0]), np.array([0.5, 0.5]))
    array([ 0.25, -0.25])
    """
    slope, shares = _alike("softmax_backward", dy=dy, y=y)
    check_ndim(shares, 1, "softmax_backward", "(..., classes)")
    _check_into(out, shares.shape, np.result_type(slope, shares))
    common = np.einsum("...i,...i->...", slope, shares)[..., None]
    dx: Array = np.subtract(slope, common, out=out)
    dx *= shares
    return dx


@_quiet
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    out: Array | None = None,
    weights: Array | None = None,
) -> tuple[Array, Array]:
    r"""Scaled dot-product attention.

    .. math:: w = \mathrm{softmax}(s \, q k^T + m), \quad y = w v

    Leading axes are heads, samples and whatever else; they broadcast, so that several query heads
    may share one of keys and values.

    Parameters
    ----------
    query
        (..., L, D).
    key
        (..., S, D).
    value
        (..., S, E).
    mask
        Floats that broadcast to (..., L, S), added to the scores: 0 lets through, minus infinity
        does not.
    causal
        Whether a position sees only itself and those before it. The last query is at the last key,
        as with a cache of earlier keys.
    scale
        Of the scores; None is 1 / sqrt(D).
    out, weights
        Arrays to write `y` and the weights into.

    Returns
    -------
    y
        (..., L, E); zeros where nothing is let through.
    weights
        (..., L, S).

    Raises
    ------
    ValueError
        If the shapes do not fit.
    TypeError
        For dtypes other than real numbers, and for a mask that is not of floats.

    References
    ----------
    Vaswani and others, "Attention Is All You Need", 2017, arXiv:1706.03762.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> q = k = np.zeros((2, 3))
    >>> y, weights = fn.nn.attention(q, k, np.array([[1.0], [3.0]]), causal=True)
    >>> y.ravel(), weights
    (array([1., 2.]), array([[1. , 0. ],
           [0.5, 0.5]]))
    """
    q, k, v = _computed(query, "query"), _computed(key, "key"), _computed(value, "value")
    try:
        np.broadcast_shapes(*(part.shape[:-2] for part in (q, k, v)))
        together = True
    except ValueError:
        together = False
    if (
        not together
        or min(q.ndim, k.ndim, v.ndim) < 2
        or q.shape[-1] != k.shape[-1]
        or k.shape[-2] != v.shape[-2]
    ):
        raise ValueError(
            f"attention got query, key and value of shapes {q.shape}, {k.shape} and {v.shape}, "
            "expected (..., L, D), (..., S, D) and (..., S, E), whose leading axes broadcast"
        )
    causal, factor = check_flag(causal, "causal"), _scale_of(scale, q.shape[-1])
    kind = np.result_type(q, k)
    ahead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    _check_into(weights, (*ahead, q.shape[-2], k.shape[-2]), kind, "weights")
    ahead = np.broadcast_shapes(ahead, v.shape[:-2])
    _check_into(out, (*ahead, q.shape[-2], v.shape[-1]), np.result_type(kind, v))
    scores: Array = np.matmul(q, k.swapaxes(-1, -2), out=weights)
    scores *= factor
    if mask is not None:
        added = read(mask, "mask")
        if not is_float(added.dtype):
            raise TypeError(
                f"mask has dtype {added.dtype}, expected floats that are added to the scores; "
                "write np.where(allowed, 0.0, -np.inf)"
            )
        try:
            scores += added.astype(scores.dtype, copy=False)
        except ValueError:
            raise ValueError(
                f"mask has shape {added.shape}, expected one that broadcasts to the scores' "
                f"{scores.shape}: (..., L, S)"
            ) from None
    if causal:
        length, seen = scores.shape[-2:]
        scores += np.triu(np.full((length, seen), -np.inf, scores.dtype), 1 + seen - length)
    softmax(scores, out=scores)
    return np.matmul(scores, v, out=out), scores


@_quiet
def attention_backward(
    dy: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    weights: ArrayLike,
    *,
    scale: float | None = None,
    out: tuple[Array | None, Array | None, Array | None] = (None, None, None),
) -> tuple[Array, Array, Array]:
    r"""Return the gradients of query, key and value from that of the result of :func:`attention`.

    .. math:: dv = w^T dy, \quad dq = s \, ds \, k, \quad dk = s \, ds^T q

    where ds is the gradient of the scores, from dw = dy vᵀ.

    Parameters
    ----------
    dy
        The gradient of `y`, (..., L, E).
    query, key, value, scale
        As they were given; the leading axes must have been the same, not broadcast.
    weights
        As returned.
    out
        Arrays to write the three gradients into.

    Returns
    -------
    dquery, dkey, dvalue
        The shapes of `query`, `key` and `value`.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    TypeError
        For dtypes other than real numbers.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 4, 8))
    >>> y, weights = fn.nn.attention(q, k, v)
    >>> dq, dk, dv = fn.nn.attention_backward(y, q, k, v, weights)
    >>> bool(np.allclose(dv.sum(0), y.sum(0)))
    True
    """
    given = {"dy": dy, "query": query, "key": key, "value": value, "weights": weights}
    slope, q, k, v, w = (as_array(array, name) for name, array in given.items())
    ahead, length, seen = q.shape[:-2], q.shape[-2:-1], k.shape[-2:-1]
    size, width = q.shape[-1:], v.shape[-1:]
    ends = (length + width, length + size, seen + size, seen + width, length + seen)
    found = [array.shape for array in (slope, q, k, v, w)]
    if q.ndim < 2 or found != [ahead + end for end in ends]:
        shapes = ", ".join(f"{name} {shape}" for name, shape in zip(given, found))
        raise ValueError(
            f"attention_backward got {shapes}; expected dy (..., L, E), query (..., L, D), key "
            "(..., S, D), value (..., S, E) and weights (..., L, S), of the same leading axes"
        )
    s = _scale_of(scale, q.shape[-1])
    if not (isinstance(out, tuple) and len(out) == 3):
        raise TypeError(f"out is {shown(out)}, expected a tuple of three arrays, each may be None")
    kind = np.result_type(slope, w, q, k, v)
    for into, like in zip(out, (q, k, v)):
        _check_into(into, like.shape, kind)
    dvalue = np.matmul(w.swapaxes(-1, -2), slope, out=out[2])
    dscores = np.matmul(slope, v.swapaxes(-1, -2))
    softmax_backward(dscores, w, out=dscores)
    dscores *= s
    dquery = np.matmul(dscores, k, out=out[0])
    dkey = np.matmul(dscores.swapaxes(-1, -2), q, out=out[1])
    return dquery, dkey, dvalue


@_quiet
def activation_backward(dy: ArrayLike, x: ArrayLike, y: ArrayLike, activation: Named) -> Array:
    r"""Return the gradient of the `x` that an activation turned into `y`.

    With :math:`p = y/x`, the share that was let through, which is :math:`\Phi(x)` or
    :math:`\sigma(\cdot)`:

    .. math::

        \mathrm{gelu}' &= p + x \varphi(x) \\
        \mathrm{silu}' &= p + y (1 - p) \\
        \mathrm{gelu\_tanh}' &= p + y (1 - p) \, 2 \sqrt{2/\pi} \, (1 + 3 \cdot 0.044715 \, x^2)

    Parameters
    ----------
    dy
        The gradient of `y`.
    x, y
        What went in and what came out.
    activation
        ``"relu"``, ``"relu6"``, ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.

    Returns
    -------
    dx
        The shape of `x`.

    Raises
    ------
    ValueError
        For another name, or shapes that differ.
    TypeError
        For dtypes other than real numbers.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> fn.nn.activation_backward(np.ones(2), np.array([-1.0, 2.0]), np.array([0.0, 2.0]), "relu")
    array([0., 1.])
    """
    choice(activation, "activation", ACTIVATIONS)
    gradient, before, after = _alike("activation_backward", dy=dy, x=x, y=y)
    if activation == "relu":
        return np.where(before > 0, gradient, 0)
    if activation == "relu6":
        return np.where((before > 0) & (before < 6), gradient, 0)
    slope: Array = after / before
    slope[before == 0] = 0.5
    if activation == "gelu":
        slope += before * (np.exp(-0.5 * (before * before)) * (2 * math.pi) ** -0.5)
    elif activation == "silu":
        slope += after * (1 - slope)
    else:
        # beyond 50 all or nothing is let through: y (1 - p) is 0, and stays it
        square = np.clip(before, -50, 50) ** 2
        inner = (8 / math.pi) ** 0.5 * (1 + 3 * 0.044715 * square)
        slope += after * (1 - slope) * inner
    slope *= gradient
    return slope


@_quiet
def cross_entropy(
    scores: ArrayLike, target: ArrayLike, *, ignore_index: int = -100
) -> tuple[float, Array]:
    r"""Return the mean of -log p(right class), in nats, and the gradient of the scores.

    .. math:: L = -\frac{1}{n} \sum \log \mathrm{softmax}(s)_t, \quad
              ds = \frac{\mathrm{softmax}(s) - [i = t]}{n}

    Parameters
    ----------
    scores
        (..., classes).
    target
        (...), the index of the right class of each.
    ignore_index
        What stands in `target` where there is no right class: such a place is not counted in n, and
        its gradient is 0. Where that is all of them, the loss is NaN, as in PyTorch.

    Returns
    -------
    loss
        A float.
    gradient
        The shape of `scores`.

    Raises
    ------
    ValueError
        If the shapes do not fit, or a class is no integer or none of those.
    TypeError
        If the scores are not real numbers, or `target` is no array.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> loss, gradient = fn.nn.cross_entropy(np.zeros((1, 2)), np.array([1]))
    >>> round(loss, 4), gradient
    (0.6931, array([[ 0.5, -0.5]]))
    """
    s, right = _computed(scores, "scores"), read(target, "target")
    if not s.ndim or s.shape[:-1] != right.shape or right.dtype.kind not in "iu":
        raise ValueError(
            f"cross_entropy got scores of shape {s.shape} and target of shape {right.shape} and "
            f"dtype {right.dtype}, expected (..., classes) and integers of shape (...); write "
            "np.moveaxis(scores, 1, -1) where the classes are on axis 1"
        )
    classes, ignore_index = s.shape[-1], whole(ignore_index, "ignore_index")
    if not -(1 << 63) <= ignore_index < 1 << 64:
        raise ValueError(
            f"ignore_index is {shown(ignore_index)}, expected an integer that a target can have, "
            "such as -100"
        )
    counted = right != ignore_index
    wrong = right[counted & ((right < 0) | (right >= classes))]
    if wrong.size:
        raise ValueError(
            f"target has the class {wrong[0]}, expected 0 to {classes - 1}, or {ignore_index} "
            "(ignore_index) where there is none"
        )
    gradient = softmax(s)
    if not counted.any():
        return math.nan, np.zeros_like(gradient)
    place = np.where(counted, right, 0).astype(np.intp)[..., None]
    # log p from the scores: p itself may have become 0
    shifted = s - s.max(-1, keepdims=True)
    total = np.log(np.exp(shifted).sum(-1))
    loss = total - np.take_along_axis(shifted, place, -1)[..., 0]
    np.put_along_axis(gradient, place, np.take_along_axis(gradient, place, -1) - 1, -1)
    gradient /= np.count_nonzero(counted)
    gradient[~counted] = 0
    return float(loss[counted].mean()), gradient
