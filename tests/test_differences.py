"""Where we differ from other libraries on purpose: docs/differences.rst, row by row."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastnorm as fn

from .helpers import ROOT

X = np.random.default_rng(0).standard_normal((4, 6, 5))
ROWS: dict[str, Callable[[Any], None]] = {}


def row(name: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    def add(check: Callable[[Any], None]) -> Callable[[Any], None]:
        ROWS[name] = check
        return check

    return add


def test_the_table_and_the_tests_have_the_same_rows() -> None:
    page = ROOT / "docs" / "differences.rst"
    if not page.exists():
        pytest.skip("the documentation is not here: a wheel is tested")
    text = page.read_text()
    first = re.findall(r"^   \* - (.+)$", text, re.MULTILINE)
    assert first[1:] == list(ROWS)


def refused(call: Callable[[], Any], *kinds: type[Exception]) -> None:
    with pytest.raises(kinds or (ValueError,)):
        call()


@row("Kind of error")
def _(torch: Any) -> None:
    refused(lambda: torch.nn.functional.layer_norm(torch.ones(2, 3), (2,)), RuntimeError)
    refused(lambda: fn.layer_norm(np.ones((2, 3)), (2,)), ValueError)
    wrong = torch.ones(2, 3), torch.tensor([3, 0])
    refused(lambda: torch.nn.functional.cross_entropy(*wrong), IndexError)
    refused(lambda: fn.nn.cross_entropy(np.ones((2, 3)), np.array([3, 0])), ValueError)


@row("Negative eps")
def _(torch: Any) -> None:
    assert torch.nn.functional.group_norm(torch.from_numpy(X), 2, eps=-0.01).isfinite().all()
    refused(lambda: fn.group_norm(X, 2, eps=-0.01))


@row("eps of 0")
def _(torch: Any) -> None:
    x = np.ones((4, 1))
    options = {"training": True, "eps": 0.0}
    refused(lambda: torch.nn.functional.batch_norm(torch.from_numpy(x), None, None, **options))
    assert (fn.batch_norm(x, bias=np.full(1, 3.0), **options) == 3).all()


@row("Momentum beyond 0 to 1")
def _(torch: Any) -> None:
    theirs = torch.nn.BatchNorm1d(6, momentum=5.0)
    theirs(torch.from_numpy(1e-3 * X.astype("f4")))
    assert theirs.running_var.max() < 0
    for momentum in (5.0, -0.1, np.nan):
        refused(lambda m=momentum: fn.nn.BatchNorm1d(6, momentum=m))
        own = fn.nn.BatchNorm1d(6)
        own.momentum = momentum
        refused(lambda m=own: m(X))
        assert (own.running_var == 1).all()


@row("Empty input")
def _(torch: Any) -> None:
    refused(lambda: torch.nn.functional.instance_norm(torch.ones(0, 3, 1)))
    assert fn.instance_norm(np.ones((0, 3, 1))).shape == (0, 3, 1)
    assert torch.nn.functional.batch_norm(torch.ones(0), None, None, training=True).shape == (0,)
    refused(lambda: fn.batch_norm(np.ones(0), training=True))


@row("Integers and booleans")
def _(torch: Any) -> None:
    refused(lambda: torch.nn.functional.layer_norm(torch.arange(6), (6,)), RuntimeError)
    assert fn.layer_norm(np.arange(6), 6).dtype == np.float64


@row("Weights of other shapes")
def _(torch: Any) -> None:
    w = np.ones((4, 1, 5))
    refused(
        lambda: torch.nn.functional.layer_norm(torch.from_numpy(X), (5,), torch.from_numpy(w)),
        RuntimeError,
    )
    np.testing.assert_array_equal(fn.layer_norm(X, 5, w), fn.layer_norm(X, 5))


@row("Lengths other than Euclid's")
def _(torch: Any) -> None:
    right = torch.nn.functional.normalize(torch.from_numpy(X), p=2.0, dim=1).numpy()
    # 6 squares, a root and a quotient of numbers up to 1
    np.testing.assert_allclose(fn.l2_normalize(X, 1), right, rtol=0, atol=16 * 2.0**-53)


@row("Even windows")
def _(torch: Any) -> None:
    x = np.array([[[1.0], [0.0], [0.0], [0.0]]])
    seen = fn.local_response_norm(x[:, ::1] + 1e-9, 2, alpha=1.0) / (x + 1e-9)
    right = torch.nn.functional.local_response_norm(torch.from_numpy(x + 1e-9), 2, alpha=1.0)
    np.testing.assert_allclose(seen, right.numpy() / (x + 1e-9), rtol=1e-6)
    assert (seen[0, :2] < 0.9).all()  # the window of channel 1 has channel 0; ONNX's has channel 2
    assert (seen[0, 2:] > 0.9).all()


@row("Running variance")
def _(torch: Any) -> None:
    running = np.zeros(6), np.ones(6)
    fn.batch_norm(X, *running, training=True, momentum=1.0)
    np.testing.assert_allclose(running[1], X.var((0, 2), ddof=1), rtol=1e-14)


@row("Channels of InstanceNorm")
def _(torch: Any) -> None:
    with pytest.warns(UserWarning, match="num_features"):
        torch.nn.InstanceNorm1d(3)(torch.from_numpy(X))
    refused(lambda: fn.nn.InstanceNorm1d(3)(X))


@row("Counts of batches")
def _(torch: Any) -> None:
    for count in (np.nan, 2.5, -1, 2**63, np.inf):
        own = fn.nn.BatchNorm(2)
        before = own.state_dict()
        state = before | {"weight": np.full(2, 7.0), "num_batches_tracked": np.float64(count)}
        refused(lambda m=own, s=state: m.load_state_dict(s))
        assert all((own.state_dict()[k] == v).all() for k, v in before.items())
    theirs = torch.nn.BatchNorm1d(2)
    theirs.load_state_dict(theirs.state_dict() | {"num_batches_tracked": torch.tensor(-1)})
    assert theirs.num_batches_tracked == -1


@row("Old states of InstanceNorm")
def _(torch: Any) -> None:
    old = {"running_mean": np.zeros(3)}
    theirs = {k: torch.from_numpy(v) for k, v in old.items()}
    refused(lambda: torch.nn.InstanceNorm1d(3).load_state_dict(theirs, strict=False), RuntimeError)
    refused(lambda: fn.nn.InstanceNorm1d(3).load_state_dict(old))
    assert fn.nn.InstanceNorm1d(3).load_state_dict(old, strict=False) == ([], ["running_mean"])


@row("Nothing to attend to")
def _(torch: Any) -> None:
    x = np.full((1, 3), -np.inf)
    assert torch.softmax(torch.from_numpy(x), -1).isnan().all()
    assert (fn.nn.softmax(x) == 0).all()


@row("Fewer queries than keys")
def _(torch: Any) -> None:
    q, k = np.ones((1, 2)), np.ones((3, 2))
    v = np.array([[1.0], [2.0], [6.0]])
    given = (torch.from_numpy(a) for a in (q, k, v))
    theirs = torch.nn.functional.scaled_dot_product_attention(*given, is_causal=True)
    assert theirs.item() == 1
    assert fn.nn.attention(q, k, v, causal=True)[0].item() == pytest.approx(3.0)


@row("Masked arrays")
def _(torch: Any) -> None:
    x = np.ma.masked_equal([1.0, 3.0, 9.0], 9.0)
    assert np.ma.isMaskedArray(x - x.mean())
    np.testing.assert_array_equal(np.asarray(fn.layer_norm(x, 3, eps=0.0)), [-1.0, 1.0, 7.0])
    assert type(fn.layer_norm(x, 3)) is np.ndarray


@row("Missing values")
def _(torch: Any) -> None:
    x = np.array([1.0, np.nan, 3.0])
    assert np.isnan(fn.moments(x)[0])
    assert fn.moments(x, where=~np.isnan(x))[0] == 2
    pandas = pytest.importorskip("pandas")
    series = pandas.Series(x)
    assert series.mean() == 2
    assert np.isnan(fn.moments(series)[0])
    assert fn.moments(series, where=series.notna())[0] == 2


@row("Constant data")
def _(torch: Any) -> None:
    stats = pytest.importorskip("scipy.stats")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.isnan(stats.zscore(np.full(4, 0.1))).all()
    assert (fn.standardize(np.full(4, 0.1)) == 0).all()
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    assert (preprocessing.scale(np.full(4, 0.1)) == 0).all()


@row("No degrees of freedom")
def _(torch: Any) -> None:
    x = np.arange(5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.var(x, ddof=5) == np.var(x, ddof=6) == np.inf
        assert np.isnan(np.var(x[:1], ddof=1))
    for n, ddof in ((5, 5), (5, 6), (1, 1)):
        assert np.isnan(fn.moments(x[:n], ddof=ddof)[1])


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str, torch: Any) -> None:
    ROWS[name](torch)
