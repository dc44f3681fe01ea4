"""The backward functions against the reference and PyTorch: numbers, bits, memory and bad input.

The reference is compared with finite differences in test_reference.py; here it runs in long double.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastnorm as fn
from fastnorm import _reference as reference
from fastnorm.operations import OPERATIONS, Operation, Parameters
from fastnorm.schedule import MIN_RUN

from .fuzz.checks import compare
from .helpers import (
    BF16,
    COMPILED,
    DTYPES,
    F16,
    F32,
    F64,
    SINGLE_AND_DOUBLE,
    Array,
    assert_close,
    assert_same_bits,
    call,
    channels_last,
    data,
    epsilon,
    expected,
    layouts,
    named,
    run_python,
    without,
)

SHAPE = (3, 8, 5, 6)
LAYOUTS = {"channels-first": np.ascontiguousarray, "channels-last": channels_last}
BACKWARD = tuple(op for op in OPERATIONS if op.backward)
WEIGHTS = ("none", "shared", "per sample", "full", "full, in another order")

# What the issue allows: norm(error) / norm(gradient) in float32, at any mean/std up to 1e4.
ALLOWED = 1e-6
RATIOS = (0.0, 1.0, 1e2, 1e4)

on_every_backend = pytest.mark.usefixtures("backend")
by_operation = pytest.mark.parametrize("op", BACKWARD, ids=named)
by_layout = pytest.mark.parametrize("layout", LAYOUTS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=named)


# --- Calling --------------------------------------------------------------------------------------


def parameters(op: Operation, x: Any, weights: str = "shared", **options: Any) -> Parameters:
    """Those of the forward function, with a weight of this kind; instance norm without running."""
    rng = np.random.default_rng(1)
    p = op.parameters(x.shape, x.dtype, rng, per_sample=weights == "per sample", **options)
    if op.name == "instance_norm":
        p = without(p, "running_mean", "running_var")
    if weights == "none":
        return without(p, "weight")
    if weights.startswith("full"):
        w = np.empty_like(np.asarray(x), p["weight"].dtype)
        w[...] = 1 + rng.standard_normal(x.shape) / 4
        p["weight"] = w
        if weights != "full" and x.ndim > 1:
            last = np.asarray(x).flags.c_contiguous
            p["weight"] = channels_last(w) if last else np.ascontiguousarray(w)
    return without(p, "bias") if weights.startswith("full") else p


def pair(shape: tuple[int, ...], dtype: Any, ratio: float, layout: str) -> tuple[Array, Array]:
    """x with this mean/std, and dy without a mean."""
    lie = LAYOUTS[layout]
    return lie(data(shape, dtype, ratio)), lie(data(shape, dtype, seed=1))


def keywords(op: Operation, p: Parameters) -> Parameters:
    """What of the forward function's parameters the backward function takes too."""
    others = ("axis", "normalized_shape", "weight_offset", "where")
    return {k: p[k] for k in {*op.backward_keywords, *others} if k in p}


def statistics(op: Operation, x: Any, p: Parameters) -> tuple[Array, ...]:
    """What the forward function returns for the backward one."""
    result: tuple[Array, ...] = call(op, x, p, return_stats=True)[1:]
    return result


def gradients(op: Operation, dy: Any, x: Any, stats: Any, p: Parameters) -> tuple[Array, ...]:
    result: tuple[Array, ...] = getattr(fn, str(op.backward))(dy, x, *stats, **keywords(op, p))
    return result


def exact_gradients(op: Operation, dy: Any, x: Any, stats: Any, p: Parameters) -> tuple[Array, ...]:
    backward = getattr(reference, str(op.backward))
    result: tuple[Array, ...] = backward(dy, x, *stats, **keywords(op, p), dtype=np.longdouble)
    return result


# --- How far off an element may be ----------------------------------------------------------------


def along(op: Operation, statistic: Any, x: Array, p: Parameters) -> Array:
    """A mean, rstd, or number of each group, for every element of x."""
    if op.name in ("layer_norm", "rms_norm"):
        return np.broadcast_to(statistic, x.shape)
    channel = p.get("channel_axis", 1)
    moved = np.moveaxis(x, channel, 1).shape
    groups = np.atleast_2d(statistic)
    if groups.shape[1]:
        groups = np.repeat(groups, moved[1] // groups.shape[1], axis=1)
    groups = groups.reshape(groups.shape + (1,) * (len(moved) - 2))
    return np.moveaxis(np.broadcast_to(groups, moved), 1, channel)


def group_ids(op: Operation, x: Array, stats: tuple[Array, ...], p: Parameters) -> Array:
    """The number of its group, for every element of x."""
    return along(op, np.arange(stats[-1].size).reshape(stats[-1].shape), x, p)


def plain(op: Operation, p: Parameters) -> tuple[str, Parameters]:
    """A norm with a bias that has its weights where `op` has its own, and its keywords."""
    others = without(keywords(op, p), "weight", "training", "weight_offset", "where")
    return ("layer_norm" if op.name == "rms_norm" else op.name), others


def spread_weight(op: Operation, x: Array, p: Parameters) -> Any:
    """The weight of every element of x: what it is as the bias of zeros."""
    if "weight" not in p:
        return 1.0
    name, options = plain(op, p)
    options |= {"training": True} if name == "batch_norm" else {}
    zeros = np.zeros(x.shape)
    return p.get("weight_offset", 0) + getattr(reference, name)(zeros, bias=p["weight"], **options)


def collected(op: Operation, values: Array, x: Array, stats: Any, p: Parameters) -> Array:
    """The sum of `values` over what shares a weight: the gradient of a bias there."""
    name, options = plain(op, p)
    options |= {"weight": p["weight"]} if "weight" in p else {}
    rstd = stats[-1]
    result: Array = getattr(reference, f"{name}_backward")(values, x, 0 * rstd, rstd, **options)[2]
    return result


def sizes(op: Operation, dy: Any, x: Any, stats: Any, p: Parameters) -> tuple[Array, ...]:
    """The sizes of the terms that dx, dweight and dbias are sums of, for each of their elements."""
    x, dy = (np.asarray(a).astype(np.float64) for a in (x, dy))
    mean, rstd = (along(op, s, x, p) for s in (0 * stats[-1], *stats)[-2:])
    g = abs(dy * spread_weight(op, x, p))
    # x - mean is taken from a pair of numbers: the lower one is as large as the other's rounding
    xhat = (abs(x - mean) + epsilon(F32) * abs(mean)) * rstd
    dx = g
    if p.get("training", True):
        ids = group_ids(op, x, stats, p).ravel()
        where = np.broadcast_to(p.get("where", True), x.shape)
        count = np.bincount(ids, where.ravel())
        average, along_xhat = (
            (np.bincount(ids, v.ravel()) / count)[ids].reshape(x.shape) for v in (g, g * xhat)
        )
        dx = g + where * (average + xhat * along_xhat)
    terms = (abs(dy) * xhat, abs(dy))[: len(op.stats)]  # without a mean there is no bias
    return rstd * dx, *(collected(op, v, x, stats, p) for v in terms)


def check(
    op: Operation, dy: Any, x: Any, p: Parameters, stats: tuple[Array, ...] | None = None
) -> tuple[Array, ...]:
    """Compare with the reference given the same statistics, element by element; return what came.

    On its way to dx a term is rounded 6 times: xhat 3 times (rstd, the difference, the step), the
    sum it is multiplied by, the step, and once before that where dy, weight or their product is no
    float. A term of dweight is xhat dy, and added in float to three others before the sum goes on
    in float64. 16 halves are more than that. In float64 a sum's own roundings count, one for each
    element at most; the sums of float32's numbers in float64 are exact next to the rest.
    """
    stats = statistics(op, x, p) if stats is None else stats
    got, exact = gradients(op, dy, x, stats, p), exact_gradients(op, dy, x, stats, p)
    assert len(got) == len(exact)
    computing = F64 if got[0].dtype.itemsize == 8 else F32
    for value, right, size in zip(got, exact, sizes(op, dy, x, stats, p)):
        added = np.size(x) // max(1, min(right.size, stats[-1].size)) if computing == F64 else 0
        # `assert_close` takes the type that is computed in from the result: dweight's may differ
        given = epsilon(F64 if value.dtype.itemsize == 8 else F32)
        halves = math.ceil((16 + added) * max(1.0, epsilon(computing) / given))
        assert_close(value.astype(value.dtype.newbyteorder("=")), right, size, halves)
    return got


def relative(value: Array, exact: Array) -> float:
    """The norm of the error, relative to that of the exact gradient."""
    return float(np.linalg.norm(value - exact) / np.linalg.norm(exact))


def worst(values: tuple[Array, ...], exact: tuple[Array, ...]) -> float:
    """The largest relative error of the gradients; of dx for each sample, whatever its scale."""
    samples = [relative(a, b) for a, b in zip(values[0], exact[0])]
    return max(*samples, *(relative(a, b) for a, b in zip(values[1:], exact[1:])))


# --- Against long double --------------------------------------------------------------------------


@on_every_backend
@by_layout
@by_operation
@pytest.mark.parametrize("ratio", RATIOS)
def test_relative_error(ratio: float, op: Operation, layout: str) -> None:
    """The kernels by themselves: the reference gets the same statistics."""
    x, dy = pair((4, 24, 10, 11), F32, ratio, layout)
    for weights in WEIGHTS:
        p = parameters(op, x, weights)
        stats = statistics(op, x, p)
        got = gradients(op, dy, x, stats, p)
        assert worst(got, exact_gradients(op, dy, x, stats, p)) <= ALLOWED, weights


@on_every_backend
@by_layout
@by_operation
@pytest.mark.parametrize("ratio", RATIOS)
def test_relative_error_from_end_to_end(ratio: float, op: Operation, layout: str) -> None:
    """Forward and backward, of which the reference computes both in long double."""
    x, dy = pair((4, 24, 10, 11), F32, ratio, layout)
    p = parameters(op, x)
    exact = exact_gradients(op, dy, x, expected(op, x, p, return_stats=True)[1:], p)
    assert worst(gradients(op, dy, x, statistics(op, x, p), p), exact) <= ALLOWED


@on_every_backend
@by_layout
@by_operation
@pytest.mark.parametrize("ratio", [0.0, 1e4])
def test_every_element_in_double_precision(ratio: float, op: Operation, layout: str) -> None:
    x, dy = pair((4, 24, 10, 11), F64, ratio, layout)
    for weights in WEIGHTS:
        check(op, dy, x, parameters(op, x, weights))


@on_every_backend
@by_layout
@by_operation
@pytest.mark.parametrize("dtype", [F16, BF16], ids=named)
def test_half_precision(dtype: Any, op: Operation, layout: str) -> None:
    x, dy = pair((4, 24, 10, 11), dtype, 1.0, layout)
    # Storing rounds an element by half a unit, so by epsilon / 2 of itself at most, and those below
    # float16's normal numbers by 2^-25: of elements of size 1 or so, a thousandth of an epsilon.
    allowed = epsilon(dtype) / 2 + epsilon(dtype) / 1000 + ALLOWED
    for weights in WEIGHTS:
        p = parameters(op, x, weights)
        stats = statistics(op, x, p)
        got = gradients(op, dy, x, stats, p)
        assert {g.dtype for g in got} == {dtype}
        wide = tuple(g.astype(np.float64) for g in got)
        assert worst(wide, exact_gradients(op, dy, x, stats, p)) <= allowed


# --- Masks ----------------------------------------------------------------------------------------


def mask_for(x: Array) -> Array:
    """Two thirds of the elements, and of every group more than one."""
    mask = np.random.default_rng(7).random(x.shape) < 0.6
    mask[:, :2] = mask[:, :, :2] = mask[:, :, :, :2] = True
    return mask


def of_some(op: Operation, x: Array, p: Parameters) -> tuple[Array, ...]:
    """The exact statistics with a mask, which cost no compiling."""
    stats = expected(op, x, p, return_stats=True)[1:]
    return tuple(np.asarray(s, np.float64) for s in stats)


@on_every_backend
@by_layout
@by_operation
def test_masks(op: Operation, layout: str) -> None:
    """dx goes through the statistics for what they were of; a mask of np.ma is the same."""
    for dtype, weights in zip(DTYPES, ("none", "shared", "per sample", "full")):
        if "inference" in op.label and dtype != F32:
            continue  # where masks say nothing, the kernels compute
        x, dy = pair(SHAPE, dtype, 1.0, layout)
        p, mask = parameters(op, x, weights), LAYOUTS[layout](mask_for(x))
        stats = of_some(op, x, p | {"where": mask})
        got = check(op, dy, x, p | {"where": mask}, stats)
        again = gradients(op, dy, np.ma.array(x, mask=~mask), stats, p)
        other = np.ones(x.shape[-1:], bool)
        other[0] = False
        both = gradients(op, dy, np.ma.array(x, mask=~mask), stats, p | {"where": other})
        right = gradients(op, dy, x, stats, p | {"where": mask & other})
        for a, b in (*zip(got, again, strict=True), *zip(both, right, strict=True)):
            assert_same_bits(a, b)
        if p.get("training", True):
            unmasked = exact_gradients(op, dy, x, stats, p)[0].astype(x.dtype)
            assert not np.array_equal(got[0], unmasked)


@on_every_backend
@by_layout
@by_operation
def test_masks_alone_in_a_batch_and_with_any_threads(op: Operation, layout: str) -> None:
    x, dy = pair((4, 8, 9, 11), F32, 1.0, layout)
    mask = LAYOUTS[layout](mask_for(x))
    p = parameters(op, x)
    stats = of_some(op, x, p | {"where": mask})
    right = gradients(op, dy, x, stats, p | {"where": mask})
    with fn.threads(1):
        for a, b in zip(right, gradients(op, dy, x, stats, p | {"where": mask})):
            assert_same_bits(a, b)
    if op.name != "batch_norm":
        for i in range(len(x)):
            one = tuple(s[i : i + 1] for s in stats)
            part = slice(i, i + 1)
            dx, *_ = gradients(op, dy[part], x[part], one, p | {"where": mask[part]})
            assert_same_bits(dx, right[0][part])


@on_every_backend
def test_masks_that_leave_nothing_and_what_is_hidden_and_no_number() -> None:
    x, dy = data((3, 6), F32), data((3, 6), F32, seed=2)
    mask = np.ones((3, 6), bool)
    mask[1], mask[2, 4] = False, False
    x[2, 4] = np.nan  # hidden: its statistics are those of the others
    _, mean, rstd = fn.layer_norm(x, 6, where=mask, return_stats=True)
    dx, _, _ = fn.layer_norm_backward(dy, x, mean, rstd, 6, where=mask)
    alone = fn.layer_norm_backward(dy[:1], x[:1], mean[:1], rstd[:1], 6)[0]
    np.testing.assert_allclose(dx[:1], alone, rtol=1e-5, atol=1e-6)
    assert np.isnan(dx[1]).all()  # of no statistics
    np.testing.assert_array_equal(dx[2, 4], (rstd[2] * dy[2, 4]).astype(F32).item())
    # what was hidden has been normalised: its NaN is in the sums
    assert np.isnan(np.delete(dx[2], 4)).all()


# --- Groups of any size and number ----------------------------------------------------------------

SIZES = (1, 2, 3, 5, 49, MIN_RUN - 1, MIN_RUN, MIN_RUN + 1, 4096, 4097, 70000)


def with_groups_of(size: int, op: Operation) -> Iterator[tuple[tuple[int, ...], Parameters]]:
    """Shapes whose groups under `op` have so many elements, and the number of groups."""
    if op.name == "batch_norm":
        yield (1, 3, size), {}
        yield (size, 3), {}
    elif op.name == "instance_norm":
        yield (2, 3, size), {}
    elif op.name == "group_norm":
        yield (2, 3, size), {"num_groups": 3}
        yield (2, size), {"num_groups": 1}
        yield (1, 2 * size, 1), {"num_groups": 2}
        if size % 3 == 0:
            yield (2, 6, size // 3), {"num_groups": 2}
        if size in (49, 4096):
            own = math.isqrt(size)
            yield (2, 3 * own, own), {"num_groups": 3}
    elif "axis" in op.label:
        yield (2, size, 3), {}
        yield (3, size), {}
    else:
        yield (3, size), {}
        yield (2, 3, size), {}


@on_every_backend
@by_layout
@by_operation
@pytest.mark.parametrize("size", SIZES)
def test_groups_of_any_size(size: int, op: Operation, layout: str, backend: str) -> None:
    if size > 10000 and backend == "numpy":
        return  # which is slow, and takes all sizes in one way
    for shape, options in with_groups_of(size, op):
        if op.refuses(shape, **options):
            continue
        if size > 10000 and shape != next(with_groups_of(size, op))[0]:
            continue
        for dtype in SINGLE_AND_DOUBLE if size < 1000 else [F32]:
            x, dy = pair(shape, dtype, 3.0, layout)
            check(op, dy, x, parameters(op, x, **options))


@on_every_backend
@by_operation
@pytest.mark.parametrize("ndim", range(2, 6))
def test_every_number_of_dimensions(ndim: int, op: Operation) -> None:
    shape = (3, 8, 5, 2, 3)[:ndim]
    if op.name == "instance_norm" and ndim == 2:
        with pytest.raises(ValueError, match="one value per channel"):
            statistics(op, data(shape, F32), {})
        return
    for layout in LAYOUTS:
        x, dy = pair(shape, F32, 1.0, layout)
        for weights in WEIGHTS:
            check(op, dy, x, parameters(op, x, weights))
    if "channel_axis" in op.features:
        x, dy = np.moveaxis(x, 1, -1), np.moveaxis(dy, 1, -1)
        for weights in WEIGHTS:
            for layout in LAYOUTS.values():
                check(
                    op, layout(dy), layout(x), parameters(op, layout(x), weights, channel_axis=-1)
                )


@on_every_backend
@by_layout
@pytest.mark.parametrize("num_groups", [1, 2, 8, 16])
def test_any_number_of_groups(num_groups: int, layout: str) -> None:
    op = next(op for op in OPERATIONS if op.name == "group_norm")
    x, dy = pair((3, 16, 5, 6), F32, 1.0, layout)
    for weights in WEIGHTS:
        check(op, dy, x, parameters(op, x, weights, num_groups=num_groups))


@on_every_backend
@by_layout
def test_weights_that_broadcast(layout: str) -> None:
    """Every shape that the forward functions take has gradients of that shape."""
    x, dy = pair(SHAPE, F32, 1.0, layout)
    for op in BACKWARD:
        rows = op.name in ("layer_norm", "rms_norm")
        shapes = [
            (3, 1, 1, 1),
            (1, 8, 1, 1),
            (3, 8, 1, 6),
            (1, 1, 5, 6),
            (1, 1, 1, 1),
            (3, 8, 5, 1),
        ]
        shapes += [] if rows else [(1, 8), (3, 1), (1, 1), (8, 5, 6), (1, 5, 6)]
        for shape in shapes:
            weight = data(shape, F32, 3.0, seed=5)
            got = check(op, dy, x, without(parameters(op, x), "bias") | {"weight": weight})
            assert got[1].shape == shape


@on_every_backend
@by_layout
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_several_axes(name: str, layout: str) -> None:
    op = next(op for op in BACKWARD if op.name == name)
    x, dy = pair((3, 8, 5, 6), F32, 1.0, layout)
    several: list[tuple[int, ...]] = [(1, 2, 3), (3, 1), (0,), (2, 0), (0, 1, 2, 3), (1, 2)]
    for axes in several:
        own = tuple(x.shape[a] for a in axes)
        p: Parameters = {"axis": axes, "weight": data(own, F32, 3.0, seed=4)}
        for q in (p, without(p, "weight")):
            got = check(op, dy, x, q)
            assert all(g.shape == own for g in got[1:])
    whole = {"normalized_shape": x.shape[1:], "weight": data(x.shape[1:], F32, 3.0, seed=4)}
    check(op, dy, x, whole)
    check(op, dy, x, whole | {"weight": channels_last(whole["weight"][None])[0]})


# --- Against PyTorch ------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("shape", [(3, 8, 5, 4), (6, 8), (3, 8, 28)], ids=str)
@pytest.mark.parametrize("op", [op for op in BACKWARD if op.torch], ids=named)
def test_like_pytorch(op: Operation, shape: tuple[int, ...], torch: Any) -> None:
    assert op.torch is not None
    for channel_axis in (1, -1) if "channel_axis" in op.features else (1,):
        if op.name == "instance_norm" and len(shape) == 2:
            continue  # PyTorch has none of one position
        x, dy = data(shape, F64, 1.0, seed=2), data(shape, F64, seed=3)
        p = parameters(op, x, channel_axis=channel_axis)
        leaves = {"x": torch.from_numpy(x).requires_grad_()}
        theirs = op.to_torch(p)
        leaves |= {k: theirs[k].requires_grad_() for k in ("weight", "bias") if k in theirs}
        y = op.torch(leaves["x"], **theirs | without(leaves, "x"))
        y.backward(torch.from_numpy(dy))
        stats = statistics(op, x, p)
        got = gradients(op, dy, x, stats, p)
        # Both add up at most x.size numbers one after another, each as large as |x| or as a term of
        # the gradient. What the mean is off by, times rstd, is what xhat is; what rstd is off by,
        # relatively, twice that. Three such errors and the steps' own at most.
        rstd = max(1.0, float(stats[-1].max()))
        count = x.size // stats[-1].size if "inference" not in op.label else 1
        xhat = (1 + count) * abs(x).max() * rstd
        for value, leaf, size in zip(got, leaves.values(), sizes(op, dy, x, stats, p), strict=True):
            added = max(count, x.size // value.size)
            allowed = epsilon(F64) * (8 + added + 3 * xhat) * size
            assert (abs(value - leaf.grad.numpy()) <= allowed).all()


def test_closer_than_pytorch(torch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """At mean/std 1e4, float32: PyTorch's group norm of channels-last images is all noise."""
    shape = (8, 64, 28, 28)
    lines, theirs, ours = [], [], []
    for op in BACKWARD:
        if "mean" not in op.stats or "inference" in op.label or op.torch is None:
            continue  # of those without a mean there is nothing to lose
        for name, layout in LAYOUTS.items():
            rng = np.random.default_rng(0)
            x = layout((1e4 + rng.standard_normal(shape)).astype(np.float32))
            dy = layout(rng.standard_normal(shape).astype(np.float32))
            p = parameters(op, x)
            leaf = torch.from_numpy(x).requires_grad_()
            op.torch(leaf, **op.to_torch(p)).backward(torch.from_numpy(dy))
            # float64 is 2^29 times finer than what is measured: no need for long double
            exact_stats = getattr(reference, op.name)(x, **p, return_stats=True)[1:]
            backward = getattr(reference, str(op.backward))
            exact = backward(dy, x, *exact_stats, **keywords(op, p))[0]
            theirs.append(relative(leaf.grad.numpy(), exact))
            ours.append(relative(gradients(op, dy, x, statistics(op, x, p), p)[0], exact))
            lines.append(f"{op.label:30} {name:15} {theirs[-1]:8.1e} {ours[-1]:9.1e}")
    with capsys.disabled():
        print("\nrelative error of dx in float32 at mean/std 1e4    PyTorch  fastnorm")
        print(*lines, sep="\n")
    assert max(ours) <= ALLOWED
    assert max(theirs) > 1e-3


# --- The same bits --------------------------------------------------------------------------------

# Many small groups, few large ones, one alone, and rows so long that their weights' sums are many.
LARGE = [(16, 64, 24, 24), (3, 4, 320, 321), (1, 4, 400, 401), (5000, 64), (8, 50000)]


@functools.lru_cache(maxsize=1)
def large(shape: tuple[int, ...], layout: str) -> tuple[Array, Array]:
    return pair(shape, F32, 3.0, layout)


def assert_any_threads(op: Operation, dy: Array, x: Array, p: Parameters) -> None:
    stats = statistics(op, x, p)
    with fn.threads(1):
        serial = gradients(op, dy, x, stats, p)
    for threads in (2, 3, 8):
        with fn.threads(threads):
            for a, b in zip(gradients(op, dy, x, stats, p), serial, strict=True):
                assert_same_bits(a, b)


@by_operation
@by_layout
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_any_number_of_threads(shape: tuple[int, ...], layout: str, op: Operation) -> None:
    if shape == (8, 50000) and op.name not in ("layer_norm", "rms_norm"):
        return  # whose weights are few
    if len(shape) == 2 and op.name == "instance_norm":
        return  # whose statistics would be of one value
    x, dy = large(shape, layout)
    for weights in ("shared", "full")[: 1 if shape in LARGE[:2] else 2]:
        assert_any_threads(op, dy, x, parameters(op, x, weights))


@by_layout
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_any_number_of_threads_for_whole_samples(name: str, layout: str) -> None:
    op = next(op for op in BACKWARD if op.name == name)
    x, dy = large((16, 64, 24, 24), layout)
    for weight in (np.ones(x.shape[1:], F32), x[0].copy(order="K")):
        assert_any_threads(op, dy, x, {"normalized_shape": x.shape[1:], "weight": weight})


@by_layout
@pytest.mark.parametrize("shape", [(6, 64, 20, 20), (16, 4, 200, 200)], ids=str)
@pytest.mark.parametrize("op", [op for op in BACKWARD if 0 not in op.linked(4, 1)], ids=named)
def test_a_sample_alone_and_in_a_batch(op: Operation, shape: tuple[int, ...], layout: str) -> None:
    x, dy = pair(shape, F32, 3.0, layout)
    p = parameters(op, x)
    stats = statistics(op, x, p)
    whole = gradients(op, dy, x, stats, p)[0]
    for i in (0, len(x) - 1):
        own = tuple(s if op.name == "batch_norm" else s[i : i + 1] for s in stats)
        alone = gradients(op, dy[i : i + 1], x[i : i + 1], own, p)[0]
        assert_same_bits(alone, whole[i : i + 1])


@on_every_backend
@by_layout
@by_operation
@pytest.mark.parametrize("dtype", [F32, BF16], ids=named)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_bad_numbers_stay_in_their_group(
    weights: str, dtype: Any, op: Operation, layout: str
) -> None:
    """Nor does a group beyond float32's range, redone in float64, change the bits of others.

    Not even of its neighbours: of 24 channels, three are taken together.
    """
    x, dy = pair((4, 24, 5, 66), dtype, 1.0, layout)
    p = parameters(op, x, weights)
    stats = statistics(op, x, p)
    clean = gradients(op, dy, x, stats, p)[0]
    ids = group_ids(op, x, stats, p)
    if "inference" in op.label:
        ids = np.arange(x.size).reshape(x.shape)
    others = ids != ids[1, 2, 3, 4]
    for bad in (np.nan, np.inf, 1e37):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hot = x.copy(order="K")
            hot[1, 2, 3, 4] = bad
            dirty = gradients(op, dy, hot, statistics(op, hot, p), p)[0]
            assert_same_bits(dirty[others], clean[others])
            if not np.isfinite(bad) and "inference" not in op.label:
                assert np.isnan(dirty[~others]).all()
            hot = dy.copy(order="K")
            hot[1, 2, 3, 4] = bad
            dirty = gradients(op, hot, x, stats, p)[0]
            assert_same_bits(dirty[others], clean[others])
            assert not np.isfinite(bad) or np.isfinite(dirty).all()


# --- Numbers at the ends --------------------------------------------------------------------------


@on_every_backend
@by_layout
@pytest.mark.parametrize("op", [op for op in BACKWARD if "inference" not in op.label], ids=named)
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_a_constant_group_has_no_gradient(dtype: Any, op: Operation, layout: str) -> None:
    """At eps 0 its rstd is 0, and the result its bias whatever x does."""
    if op.name == "rms_norm":
        value = 0.0
    else:
        value = 0.1
    x = LAYOUTS[layout](np.full((3, 8, 5, 66), value, dtype))
    dy = LAYOUTS[layout](data(x.shape, dtype))
    for weights in WEIGHTS:
        p = parameters(op, x, weights) | {"eps": 0.0}
        stats = statistics(op, x, p)
        assert not stats[-1].any()
        dx, dweight, *_ = gradients(op, dy, x, stats, p)
        assert not dx.any()
        assert not dweight.any()


@on_every_backend
@by_layout
@pytest.mark.parametrize("op", [op for op in BACKWARD if "inference" not in op.label], ids=named)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(F32, 1e37), (F32, 1e-40), (F32, 1e29), (F32, 1e-29), (F64, 1e300), (F64, 1e-300)],
    ids=str,
)
def test_nothing_overflows_or_vanishes(
    dtype: Any, scale: float, op: Operation, layout: str
) -> None:
    """dy is as large as the root of x, so that dx is as small: both are at hand in the dtype."""
    x = LAYOUTS[layout]((scale * data((3, 8, 3, 66), F64, 1.0) / 4).astype(dtype))
    dy = LAYOUTS[layout]((math.sqrt(scale) * data(x.shape, F64, seed=2)).astype(dtype))
    for weights in ("none", "shared", "full"):
        got = check(op, dy, x, parameters(op, x, weights) | {"eps": 0.0})
        assert all(np.isfinite(g).all() and g.any() for g in got)


def check_large(large: str, dtype: Any, op: Operation, layout: str, *shapes: Any) -> None:
    """dy xhat, dy weight, or a sum of them, is beyond all floats; dx, dweight and dbias are not."""
    for weights in WEIGHTS[large.endswith("weight") : -1]:
        x, dy = pair(shapes[weights == "shared"], dtype, 1.0, layout)
        p = parameters(op, x, weights, num_groups=2)
        stats = statistics(op, x, p)
        if large.startswith("every"):
            dy = (dy.astype(F64) * 1e38).clip(-3e38, 3e38).astype(dtype)
        if large == "one dy":
            dy[np.unravel_index(np.argmax(abs(x.astype(F64))), x.shape)] = 1.5e38
        elif large == "one weight":
            p["weight"][(-1,) * p["weight"].ndim] = 3e38
        elif large.endswith("weight"):
            p["weight"] = (p["weight"].astype(F64) * 1e-38).astype(dtype)
        got, exact = gradients(op, dy, x, stats, p), exact_gradients(op, dy, x, stats, p)
        for value, right, size in zip(got, exact, sizes(op, dy, x, stats, p), strict=True):
            error = 8 * epsilon(F32) * np.asarray(size, np.longdouble)
            compare(value, right, error, F32, judged=True, what=weights)


@on_every_backend
@by_layout
@by_operation
@pytest.mark.parametrize("dtype", [F32, BF16], ids=named)
@pytest.mark.parametrize("large", ["one dy", "every dy", "one weight", "every dy by its weight"])
def test_what_leaves_the_range_on_the_way(
    large: str, dtype: Any, op: Operation, layout: str
) -> None:
    check_large(large, dtype, op, layout, SHAPE, (9, 8, 7, 33))


@on_every_backend
@pytest.mark.parametrize("rms", [False, True])
def test_products_that_are_nothing_in_float32(rms: bool) -> None:
    """dy times weight is below the least float32, and dx is not, by 1 / std; and xhat is large."""
    rng = np.random.default_rng(0)
    label = "rms_norm" if rms else "layer_norm (normalized_shape)"
    op = next(op for op in BACKWARD if op.label == label)
    outlier = rng.standard_normal((2, 65_536)).astype(F32)
    outlier[:, 0] = 256.0
    slopes = [
        (rng.standard_normal((2, 16)) * 1e-34).astype(F32),
        (np.sign(outlier) * 1e-42).astype(F32),
    ]
    small = (rng.standard_normal((2, 16)) * 1e-10).astype(F32)
    for x, dy, weight in zip((small, outlier), slopes, (1e-12, 1.0), strict=True):
        p = {"normalized_shape": x.shape[-1:], "eps": 0.0}
        p["weight"] = np.full(x.shape[-1], weight, F32)
        stats = statistics(op, x, p)
        dx, exact = gradients(op, dy, x, stats, p)[0], exact_gradients(op, dy, x, stats, p)[0]
        size = sizes(op, dy, x, stats, p)[0]
        assert (abs(dx - exact) <= 8 * epsilon(F32) * size + 2.0**-149).all()


@on_every_backend
@by_operation
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0), (0, 0, 0), (0, 8)], ids=str)
def test_empty(shape: tuple[int, ...], op: Operation) -> None:
    for dtype, weights in itertools.product(DTYPES, WEIGHTS):
        x = np.zeros(shape, dtype)
        p = parameters(op, x, weights)
        axis = 1 if "axis" in p else len(shape) - 1
        groups = {
            "batch_norm": shape[1:2],
            "instance_norm": shape[:2],
            "group_norm": (shape[0], p.get("num_groups", 1)),
        }.get(op.name, tuple(1 if a == axis else n for a, n in enumerate(shape)))
        stats = [np.ones(groups) for _ in op.stats]
        dx, *others = gradients(op, x, x, stats, p)
        assert dx.shape == shape
        assert dx.dtype == dtype
        own = shape[axis] if op.name in ("layer_norm", "rms_norm") else shape[1]
        for gradient in others:
            assert gradient.dtype == dtype
            assert gradient.shape == (p["weight"].shape if "weight" in p else (own,))
            assert not gradient.any()


# --- Options --------------------------------------------------------------------------------------


@on_every_backend
@by_layout
def test_batch_norm_in_inference(layout: str) -> None:
    """dx is weight rstd dy and nothing else, whatever the statistics are."""
    x, dy = pair(SHAPE, F64, 1.0, layout)
    mean, rstd, weight = data((8,), seed=3), 1 + abs(data((8,), seed=4)), data((8,), seed=5)
    dx, dweight, dbias = fn.batch_norm_backward(dy, x, mean, rstd, weight, training=False)
    along_channels = (weight * rstd)[:, None, None]
    # weight times rstd, times dy: two roundings here and there
    np.testing.assert_allclose(dx, dy * along_channels, rtol=4 * epsilon(F64), atol=0)
    # sums of 90 terms, each rounded three times
    xhat = (x - mean[:, None, None]) * rstd[:, None, None]
    for value, terms in ((dweight, dy * xhat), (dbias, dy)):
        size = abs(terms).sum(axis=(0, 2, 3))
        assert (abs(value - terms.sum(axis=(0, 2, 3))) <= (90 + 3) * epsilon(F64) * size).all()


@on_every_backend
@pytest.mark.parametrize("bad", ["max", "inf", "nan"])
@pytest.mark.parametrize("weights", ["none", "shared", "per sample"])
@by_layout
@by_dtype
def test_batch_norm_in_inference_of_what_is_out_of_range(
    dtype: Any, layout: str, weights: str, bad: str
) -> None:
    """dx is weight rstd dy also where x, or x by these statistics, is beyond all numbers."""
    op = next(op for op in BACKWARD if op.label == "batch_norm (inference)")
    for shape in (SHAPE, (70, 8), (2, 8, 3000)):
        x, dy = pair(shape, dtype, 1.0, layout if len(shape) > 2 else "channels-first")
        number = ml_dtypes.finfo(dtype).max if bad == "max" else float(bad)
        x[1, 3], x[0, 5], x[-1, -1] = number, -number, number
        p = parameters(op, x, weights)
        mean, rstd = data((8,), seed=3), np.where(np.arange(8) % 2, 1e20, 2.0)
        right = reference.batch_norm_backward(
            dy, x, mean, rstd, p.get("weight"), training=False, dtype=np.longdouble
        )[0]
        dx = fn.batch_norm_backward(dy, x, mean, rstd, p.get("weight"), training=False)[0]
        with np.errstate(over="ignore"):
            # weight times rstd, times dy
            assert_close(dx, right.astype(F64).astype(dtype).astype(np.longdouble), abs(right))


@on_every_backend
@by_layout
def test_instance_norm_of_running_statistics(layout: str) -> None:
    """Its gradients are batch norm's in inference: it is linear, so that differences are exact."""
    x, dy = pair(SHAPE, F64, 1.0, layout)
    running = {"running_mean": data((8,), seed=3), "running_var": 1 + abs(data((8,), seed=4))}
    weight, bias = data((8,), seed=5), data((8,), seed=6)

    def result(x: Array, weight: Array, bias: Array) -> Array:
        options = {"weight": weight, "bias": bias, "use_input_stats": False}
        y: Array = fn.instance_norm(x, **running, **options)
        return y

    forward = fn.instance_norm(x, **running, use_input_stats=False, return_stats=True)
    mean, rstd = (s[0] for s in forward[1:])
    grads = fn.batch_norm_backward(dy, x, mean, rstd, weight, training=False)
    leaves = [x, weight, bias]
    for i, gradient in enumerate(grads):
        step = data(leaves[i].shape, seed=7)
        moved = [leaf + step if i == k else leaf for k, leaf in enumerate(leaves)]
        terms = dy * (result(*moved) - result(*leaves))
        # 720 terms, of results of which none is above 2^8
        allowed = 720 * epsilon(F64) * (abs(dy) * 2**8).sum()
        assert abs(terms.sum() - (gradient * step).sum()) <= allowed


@on_every_backend
@by_layout
@by_dtype
def test_weight_offset(dtype: Any, layout: str) -> None:
    op = next(op for op in BACKWARD if op.name == "rms_norm")
    x, dy = pair((3, 8, 5, 66), dtype, 1.0, layout)
    for weights in WEIGHTS:
        p = parameters(op, x, weights) | {"weight_offset": 1.0}
        check(op, dy, x, p)
    # a weight w with an offset of 1 is a weight w + 1
    w = data((66,), F64, seed=3).astype(np.float16).astype(np.float64)
    (rstd,) = fn.rms_norm(x, 66, return_stats=True)[1:]
    shifted = fn.rms_norm_backward(dy, x, rstd, 66, w, weight_offset=1.0)
    for a, b in zip(shifted, fn.rms_norm_backward(dy, x, rstd, 66, w + 1), strict=True):
        assert_same_bits(a, b)


# --- Dtypes and memory order ----------------------------------------------------------------------
# NumPy's backend takes any array in one way: it is in a few of these tests, and in the last.


@by_operation
@pytest.mark.parametrize("other", DTYPES, ids=named)
@by_dtype
def test_dtypes(dtype: Any, other: Any, op: Operation) -> None:
    """dx is of x's dtype, dweight and dbias of the weight's, whatever that of dy is."""
    for layout in LAYOUTS.values():
        x, dy = layout(data(SHAPE, dtype, 1.0)), layout(data(SHAPE, other, seed=1))
        for weights in ("none", "shared", "full")[other != dtype :]:
            p = parameters(op, x, weights)
            if "weight" in p:
                p["weight"] = p["weight"].astype(other)
            dx, *others = check(op, dy, x, p)
            assert dx.dtype == dtype
            assert dx.strides == x.strides
            assert all(g.dtype == (other if "weight" in p else dtype) for g in others)


@on_every_backend
@by_operation
@pytest.mark.parametrize("dtype", ["u1", "i4", "i8", "?"])
def test_integers_and_lists(dtype: str, op: Operation) -> None:
    x = np.random.default_rng(4).integers(0, 2 if dtype == "?" else 100, SHAPE).astype(dtype)
    dy = np.random.default_rng(5).integers(0, 2 if dtype == "?" else 100, SHAPE).astype(dtype)
    p = without(parameters(op, x), "weight")
    stats = statistics(op, x, p)
    right = gradients(op, dy.astype(np.float64), x.astype(np.float64), stats, p)
    listed = gradients(op, dy.tolist(), x.tolist(), [s.tolist() for s in stats], p)
    for a, b, c in zip(gradients(op, dy, x, stats, p), listed, right, strict=True):
        assert_same_bits(a, c)
        assert_same_bits(b, c)


@on_every_backend
@by_operation
def test_any_layout_of_x(op: Operation) -> None:
    x, dy = data(SHAPE, F32, 1.0), data(SHAPE, F32, seed=1)
    p = parameters(op, x)
    for name, array in layouts(x):
        dx = check(op, dy, array, p)[0]
        assert dx.dtype == array.dtype, name
        assert dx.strides == np.empty_like(array).strides, name


@by_operation
@by_layout
def test_any_layout_of_dy(layout: str, op: Operation) -> None:
    x, dy = LAYOUTS[layout](data(SHAPE, F32, 1.0)), data(SHAPE, F32, seed=1)
    for weights in ("shared", "full"):
        p = parameters(op, x, weights)
        for _, array in layouts(dy):
            check(op, array, x, p)
    for axis in range(4):
        first = np.take(dy, [0], axis)
        check(op, np.broadcast_to(first, SHAPE), x, p)
    check(op, np.broadcast_to(np.float32(1.5), SHAPE), x, p)


@by_operation
@by_layout
def test_any_layout_of_the_weight(layout: str, op: Operation) -> None:
    x, dy = pair(SHAPE, F32, 1.0, layout)
    full = parameters(op, x, "full")
    for name, array in layouts(full["weight"]):
        dweight = check(op, dy, x, full | {"weight": array})[1]
        assert dweight.dtype == array.dtype.newbyteorder("="), name
    for weights in ("shared", "per sample"):
        p = parameters(op, x, weights)
        for array in orders(p["weight"]):
            check(op, dy, x, p | {"weight": array})


def orders(array: Array) -> Iterator[Array]:
    """The same numbers in other memory, whatever the number of axes."""
    yield np.asfortranarray(array)
    yield np.repeat(array, 2, axis=-1)[..., ::2]
    turn = (slice(None, None, -1),) * array.ndim
    yield np.ascontiguousarray(array[turn])[turn]
    yield array.astype(array.dtype.newbyteorder("S"))
    locked = array.copy()
    locked.flags.writeable = False
    yield locked


@on_every_backend
@by_operation
@by_layout
def test_any_layout_of_the_statistics(layout: str, op: Operation) -> None:
    """Mean and rstd come from the caller, each in memory of its own kind."""
    x, dy = pair(SHAPE, F32, 1.0, layout)
    p = parameters(op, x)
    stats = statistics(op, x, p)
    for changed in range(len(stats)):
        for array in orders(stats[changed]):
            check(op, dy, x, p, tuple(array if i == changed else s for i, s in enumerate(stats)))
    check(op, dy, x, p, tuple(s.astype(F32).astype(F64) for s in stats))
    single = tuple(s.astype(F32) for s in stats)
    wide = tuple(s.astype(F64) for s in single)
    for a, b in zip(gradients(op, dy, x, single, p), gradients(op, dy, x, wide, p), strict=True):
        assert_same_bits(a, b)


@on_every_backend
@by_operation
@by_layout
def test_nothing_of_the_caller_is_touched(layout: str, op: Operation) -> None:
    for dtype in DTYPES:
        for weights in WEIGHTS:
            x, dy = pair(SHAPE, dtype, 1.0, layout)
            p = parameters(op, x, weights)
            mine = [dy, x, *statistics(op, x, p), *([p["weight"]] if "weight" in p else [])]
            before = [array.copy() for array in mine]
            got = gradients(op, dy, x, mine[2 : 2 + len(op.stats)], p)
            for array, copy in zip(mine, before, strict=True):
                assert_same_bits(array, copy)
                assert not any(np.may_share_memory(array, g) for g in got)
            assert all(g.flags.writeable for g in got)


@on_every_backend
@settings(max_examples=60)
@given(st.data())
def test_any_shape(draw: st.DataObject) -> None:
    op = draw.draw(st.sampled_from(BACKWARD))
    ndim = draw.draw(st.integers(max(2, op.min_ndim), 5))
    shape = [draw.draw(st.integers(1, 6)) for _ in range(ndim)]
    shape[0], shape[1] = max(shape[0], 2), 4 * shape[1]
    if op.name == "instance_norm" and math.prod(shape[2:]) == 1:
        shape.append(2)  # of one value there are no statistics
        ndim = len(shape)

    def laid_out(x: Array) -> Array:
        """The same numbers, its axes in any order and direction, with or without gaps."""
        order = draw.draw(st.permutations(range(ndim)))
        steps = [draw.draw(st.sampled_from([1, 1, 1, 2, -1, -2])) for _ in range(ndim)]
        length = [x.shape[a] * abs(steps[a]) for a in order]
        memory = np.zeros(length, x.dtype).transpose(np.argsort(order))
        array = memory[tuple(slice(None, None, step) for step in steps)]
        array[...] = x
        return array

    dtype, other = (draw.draw(st.sampled_from(DTYPES)) for _ in range(2))
    x = laid_out(data(tuple(shape), dtype, draw.draw(st.sampled_from([0.0, 1.0, 3.0]))))
    dy = laid_out(data(tuple(shape), other, seed=1))
    weights = draw.draw(st.sampled_from(WEIGHTS))
    p = parameters(op, x, weights)
    if op.name in ("layer_norm", "rms_norm") and draw.draw(st.booleans()):
        axes = draw.draw(st.permutations(range(ndim)))[: draw.draw(st.integers(1, ndim))]
        p = {"axis": tuple(axes)}
        if weights != "none":
            p["weight"] = data(tuple(shape[a] for a in axes), dtype, 3.0, seed=2)
    elif weights == "full":
        p["weight"] = laid_out(p["weight"])
    check(op, dy, x, p)


# --- Memory ---------------------------------------------------------------------------------------

IMAGES = (8, 64, 256, 256)  # 128 MB in float32
SAMPLES = (32, 64, 128, 128)  # likewise, of 1M elements each


def memory_cases() -> dict[str, tuple[str, Any, Any, str, Any, str, Parameters]]:
    """Label: function, x's shape, dtype and layout, the weight's shape and layout, the rest."""
    cases: dict[str, tuple[str, Any, Any, str, Any, str, Parameters]] = {}

    def add(label: str, name: str, x: tuple[Any, ...], weight: Any, order: str, **p: Any) -> None:
        cases[f"{name}, {x[1]} {x[2]}{label}"] = (name, *x, weight, order, p)

    for layout, dtype in itertools.product(LAYOUTS, (F32, F16)):
        n = IMAGES[0] * 4 // dtype.itemsize
        images = (n, *IMAGES[1:]), dtype, layout
        samples = (4 * n, *SAMPLES[1:]), dtype, layout
        add("", "batch_norm", images, (64,), layout)
        add("", "instance_norm", images, (64,), layout)
        add("", "group_norm", images, (64,), layout, num_groups=8)
        add("", "rms_norm", images, (256,), layout, normalized_shape=256)
        add("", "layer_norm", images, (256,), layout, normalized_shape=256)
        add(", of channels", "layer_norm", images, (64,), layout, axis=1)
        add(", of samples", "layer_norm", samples, SAMPLES[1:], layout, axis=(1, 2, 3))
        add(", weight like x", "group_norm", images, images[0], layout, num_groups=8)
        if dtype == F32:
            (other,) = (name for name in LAYOUTS if name != layout)
            add(", weight like x", "batch_norm", images, images[0], layout)
            add(", weight like x", "instance_norm", images, images[0], layout)
            add(f", weight like x but {other}", "instance_norm", images, images[0], other)
            add(", of samples without weight", "layer_norm", samples, None, "", axis=(1, 2, 3))
            label = f", of samples, weight {other}"
            add(label, "layer_norm", samples, SAMPLES[1:], other, axis=(1, 2, 3))
    return dict(sorted(cases.items(), key=lambda case: str(case[1][1:4])))  # each x is made once


MEMORY_CASES = memory_cases()


def touched(shape: tuple[int, ...], dtype: Any, layout: str) -> Array:
    """Ones, all of them in memory; images, or one of them, in the order of `layout`."""
    if layout == "channels-last" and len(shape) > 2:
        return np.moveaxis(np.ones((*shape[:-3], *shape[-2:], shape[-3]), dtype), -1, -3)
    return np.ones(shape, dtype)


def measure_peaks() -> None:
    """In a process of its own: print label -> (peak beyond inputs and outputs, bytes of x)."""

    def status(name: str) -> int:
        text = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", text)[1])  # type: ignore[index]

    found = {}
    ready: tuple[Any, Array] | None = None
    for label, (name, shape, dtype, layout, weight, order, options) in MEMORY_CASES.items():
        if ready is None or ready[0] != (shape, dtype, layout):
            ready = None  # or there would be room for two
            ready = (shape, dtype, layout), touched(shape, dtype, layout)
        x = ready[1]
        w = None if weight is None else touched(weight, dtype, order)
        axes = np.atleast_1d(options.get("axis", 3))
        kept = {
            "batch_norm": shape[1:2],
            "instance_norm": shape[:2],
            "group_norm": (shape[0], options.get("num_groups")),
        }.get(name, tuple(1 if a in axes else n for a, n in enumerate(shape)))
        stats = [np.ones(kept) for _ in range(1 if name == "rms_norm" else 2)]
        backward = getattr(fn, f"{name}_backward")
        small = np.ones((4, 8, 5, 6), dtype)  # what is loaded or set up at the first call
        fn.layer_norm_backward(small, small, *np.ones((2, 4, 8, 5, 1)), axis=3)
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
        out = backward(x, x, *stats, weight=w, **options)
        found[label] = status("VmHWM") - before - sum(g.nbytes for g in out), x.nbytes
        del out, w, stats
    print(json.dumps(found))


@pytest.fixture(scope="module")
def peaks() -> dict[str, tuple[int, int]]:
    if not COMPILED:
        pytest.skip("the plain backend computes in long double")
    if not sys.platform.startswith("linux"):
        pytest.skip("the peak of one call is known on Linux alone")
    # memory that is freed goes back at once: what is used again would not be seen
    at_once = {f"MALLOC_{name}_": "65536" for name in ("MMAP_THRESHOLD", "TRIM_THRESHOLD")}
    run = run_python(
        "-c", "from tests.test_backward import measure_peaks; measure_peaks()", **at_once
    )
    if "PermissionError" in run.stderr or "FileNotFoundError" in run.stderr:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, tuple[int, int]] = json.loads(run.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("label", MEMORY_CASES)
def test_peak_memory(label: str, peaks: dict[str, tuple[int, int]]) -> None:
    """Beyond what comes in and goes out, 4 MB and 2 % of x at most."""
    peak, x = peaks[label]
    assert peak <= 4e6 + 0.02 * x, f"{peak / 1e6:.1f} MB for an x of {x / 1e6:.1f} MB"


# --- Bad input ------------------------------------------------------------------------------------

X = data((4, 8, 5, 6), np.float32)
C, NC, NG, ROW = np.ones(8), np.ones((4, 8)), np.ones((4, 2)), np.ones((4, 8, 5, 1))

CASES: list[tuple[str, type[Exception], str, Any]] = [
    (
        "dy",
        ValueError,
        r"dy has shape \(4, 8, 5\), expected that of x, \(4, 8, 5, 6\).*broadcast_to",
        lambda: fn.batch_norm_backward(X[..., 0], X, C, C),
    ),
    (
        "dy that would broadcast",
        ValueError,
        r"dy has shape \(1, 8, 5, 6\)",
        lambda: fn.layer_norm_backward(X[:1], X, ROW, ROW, 6),
    ),
    (
        "batch mean",
        ValueError,
        r"mean has shape \(7,\), expected \(8,\).*batch_norm_backward.*return_stats=True",
        lambda: fn.batch_norm_backward(X, X, C[:7], C),
    ),
    (
        "instance rstd",
        ValueError,
        r"rstd has shape \(8,\), expected \(4, 8\)",
        lambda: fn.instance_norm_backward(X, X, NC, C),
    ),
    (
        "group mean",
        ValueError,
        r"mean has shape \(4, 8\), expected \(4, 2\)",
        lambda: fn.group_norm_backward(X, X, NC, NG, 2),
    ),
    (
        "row rstd",
        ValueError,
        r"rstd has shape \(4, 8, 5\), expected \(4, 8, 5, 1\)",
        lambda: fn.rms_norm_backward(X, X, ROW[..., 0], 6),
    ),
    (
        "axis rstd",
        ValueError,
        r"rstd has shape \(4, 8, 5, 1\), expected \(4, 1, 5, 6\)",
        lambda: fn.layer_norm_backward(X, X, np.ones((4, 1, 5, 6)), ROW, axis=1),
    ),
    (
        "weight",
        ValueError,
        r"weight has shape \(7,\).*\(8,\)",
        lambda: fn.group_norm_backward(X, X, NG, NG, 2, C[:7]),
    ),
    (
        "weight of samples",
        ValueError,
        r"weight has shape \(3, 8\).*\(4, 8\)",
        lambda: fn.instance_norm_backward(X, X, NC, NC, NC[:3]),
    ),
    (
        "row weight",
        ValueError,
        r"weight has shape \(5,\).*\(6,\)",
        lambda: fn.layer_norm_backward(X, X, ROW, ROW, 6, C[:5]),
    ),
    (
        "complex dy",
        TypeError,
        r"dy has dtype complex64.*dy\.astype",
        lambda: fn.layer_norm_backward(X.astype("c8"), X, ROW, ROW, 6),
    ),
    (
        "complex x",
        TypeError,
        "x has dtype complex64",
        lambda: fn.batch_norm_backward(X, X.astype("c8"), C, C),
    ),
    (
        "complex weight",
        TypeError,
        "weight has dtype complex128",
        lambda: fn.batch_norm_backward(X, X, C, C, C * 1j),
    ),
    (
        "complex mean",
        TypeError,
        "mean has dtype complex128",
        lambda: fn.batch_norm_backward(X, X, C * 1j, C),
    ),
    (
        "object dy",
        TypeError,
        "dy has dtype object",
        lambda: fn.rms_norm_backward(X.astype(object), X, ROW, 6),
    ),
    (
        "long double dy",
        TypeError,
        "dy has dtype (float128|longdouble)",
        lambda: fn.rms_norm_backward(X.astype("g"), X, ROW, 6),
    ),
    (
        "no mean",
        ValueError,
        "layer_norm_backward got mean=None.*rms_norm_backward",
        lambda: fn.layer_norm_backward(X, X, None, ROW, 6),
    ),
    (
        "no rstd",
        TypeError,
        "rstd",
        lambda: fn.rms_norm_backward(X, X, None, 6),
    ),
    (
        "no dy",
        TypeError,
        "dy is None",
        lambda: fn.rms_norm_backward(None, X, ROW, 6),
    ),
    (
        "neither",
        ValueError,
        "layer_norm_backward got neither of normalized_shape and axis",
        lambda: fn.layer_norm_backward(X, X, ROW, ROW),
    ),
    (
        "both",
        ValueError,
        "rms_norm_backward got both of normalized_shape and axis",
        lambda: fn.rms_norm_backward(X, X, ROW, 6, axis=-1),
    ),
    (
        "trailing",
        ValueError,
        r"normalized_shape=\(5,\)",
        lambda: fn.layer_norm_backward(X, X, ROW, ROW, (5,)),
    ),
    ("axis", ValueError, "axis=4 .*-4 to 3", lambda: fn.rms_norm_backward(X, X, ROW, axis=4)),
    (
        "no divisor",
        ValueError,
        "num_groups=3 .*8 channels.*1, 2, 4, 8",
        lambda: fn.group_norm_backward(X, X, np.ones((4, 3)), np.ones((4, 3)), 3),
    ),
    (
        "half a group",
        TypeError,
        "num_groups is 2.5",
        lambda: fn.group_norm_backward(X, X, NG, NG, 2.5),
    ),
    (
        "channel axis",
        ValueError,
        "group_norm_backward got channel_axis=4 .*-4 to 3",
        lambda: fn.group_norm_backward(X, X, NG, NG, 2, channel_axis=4),
    ),
    (
        "samples",
        ValueError,
        r"channel_axis=0.*x\[np.newaxis\]",
        lambda: fn.instance_norm_backward(X, X, NC, NC, channel_axis=0),
    ),
    (
        "one axis",
        ValueError,
        "batch_norm_backward got x of shape .*at least 2 dimensions",
        lambda: fn.batch_norm_backward(X[0, 0, 0], X[0, 0, 0], C, C),
    ),
    (
        "scalar",
        ValueError,
        "at least 1 dimension",
        lambda: fn.rms_norm_backward(np.float32(1), np.float32(1), np.ones(()), axis=-1),
    ),
]


@on_every_backend
@pytest.mark.parametrize(
    ("error", "words", "wrong"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_bad_input(error: type[Exception], words: str, wrong: Any) -> None:
    with pytest.raises(error, match=re.compile(words, re.DOTALL)):
        wrong()
