"""Cases after the tests of SciPy, scikit-learn, NumPy and flax: z-scores, masks."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import fastnorm as fn

X = np.random.default_rng(5).normal(3.0, 2.0, (7, 6, 5))

# a mean and a spread of at most 210 numbers below 16, from sums in the worst order, then a quotient
CLOSE = 210 * 16 * 2.0**-53


@pytest.fixture(scope="module")
def stats() -> Any:
    return pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("axis", [0, 1, -1, None, (0, 2)])
def test_zscore(axis: Any, ddof: int, stats: Any) -> None:
    right = stats.zscore(X, axis, ddof)
    np.testing.assert_allclose(fn.standardize(X, axis, ddof=ddof), right, rtol=0, atol=CLOSE)


def test_zscore_with_nan(stats: Any) -> None:
    """SciPy's nan_policy="propagate" is what happens; "omit" is where=~np.isnan(x)."""
    x = X[0].copy()
    x[1, 2] = np.nan
    y = fn.standardize(x, 1)
    np.testing.assert_allclose(y, stats.zscore(x, 1), rtol=0, atol=CLOSE)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()
    there = ~np.isnan(x)
    right = stats.zscore(x, 1, nan_policy="omit")
    np.testing.assert_allclose(fn.standardize(x, 1, where=there), right, rtol=0, atol=CLOSE)
    mean, var = fn.moments(x, 1, where=there)
    np.testing.assert_allclose(mean, np.nanmean(x, 1), rtol=CLOSE)
    np.testing.assert_allclose(var, np.nanvar(x, 1), rtol=CLOSE)


def test_zmap(stats: Any) -> None:
    """By the statistics of other data: batch norm in inference."""
    scores, compare = X[0], X[1]
    running = compare.mean(0), compare.var(0)
    right = stats.zmap(scores, compare)
    np.testing.assert_allclose(fn.batch_norm(scores, *running, eps=0.0), right, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("axis", [0, 1])
def test_scale(axis: int) -> None:
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    x = X[0].copy()
    x[:, 1] = x[2] = 0.1  # what is constant becomes 0
    right = preprocessing.scale(x, axis=axis)
    np.testing.assert_allclose(fn.standardize(x, axis), right, rtol=0, atol=CLOSE)
    right = preprocessing.normalize(x, axis=axis)
    np.testing.assert_allclose(fn.l2_normalize(x, axis), right, rtol=0, atol=CLOSE)
    scaler = preprocessing.StandardScaler()
    parts = fn.Moments(axis=0)
    for part in (x[:2], x[2:3], x[3:]):
        scaler.partial_fit(part)
        parts.update(part)
    np.testing.assert_allclose(parts.mean, scaler.mean_, rtol=CLOSE)
    np.testing.assert_allclose(parts.var(), scaler.var_, rtol=0, atol=CLOSE)


def test_variances_like_numpy() -> None:
    """Its own cases: nothing selected, scalars, empty arrays, masks of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x, options in (
            (np.ones(0), {}), (3.0, {}),
            (np.ones((2, 0)), {"axis": 0}), (np.ones((2, 0)), {"axis": 1}), (X, {"axis": ()}),
            (X, {"axis": (1, 0), "keepdims": True}), (X > 3, {}), (X.astype(np.int8), {"axis": 2}),
            (X, {"axis": 1, "where": np.zeros(5, bool)}),
        ):  # fmt: skip
            _, var = fn.moments(x, **options)
            right = np.var(x, **options)
            np.testing.assert_allclose(var, right, rtol=CLOSE, atol=CLOSE)
            assert var.shape == right.shape


def test_masks_like_those_of_flax() -> None:
    """A mask selects what the statistics are of, and everything is normalised by them."""
    mask = np.arange(5) < np.array([5, 3, 1, 4, 2, 5, 5])[:, None]
    y, mean, _ = fn.layer_norm(X[:, 0], 5, where=mask, eps=1e-6, return_stats=True)
    for i, row in enumerate(X[:, 0]):
        seen = row[mask[i]]
        np.testing.assert_allclose(mean[i], seen.mean(), rtol=CLOSE)
        right = (row - seen.mean()) / np.sqrt(seen.var() + 1e-6)
        # one element alone has a spread of 0: what comes after it is divided by sqrt(eps)
        np.testing.assert_allclose(y[i], right, rtol=1e3 * CLOSE, atol=CLOSE)
    running = np.zeros(6), np.ones(6)
    whole = np.broadcast_to(mask[:, None], X.shape)
    fn.batch_norm(X, *running, training=True, momentum=1.0, where=whole)
    right = np.array([X[:, c][mask].mean() for c in range(6)])
    np.testing.assert_allclose(running[0], right, rtol=CLOSE)
