"""Bad input: the error says what came in and what to write instead, and nothing is touched."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import fastnorm as fn

from .helpers import data

X = data((4, 8, 5, 6), np.float32)
ZERO, ONE = np.zeros(8, np.float32), np.ones(8, np.float32)

CASES: list[tuple[str, type[Exception], str, Any]] = [
    (
        "no divisor",
        ValueError,
        "num_groups=3 .*8 channels.*1, 2, 4, 8",
        lambda: fn.group_norm(X, 3),
    ),
    ("no groups", ValueError, "num_groups=0", lambda: fn.group_norm(X, 0)),
    ("half a group", TypeError, "num_groups is 2.5", lambda: fn.group_norm(X, 2.5)),
    (
        "weight",
        ValueError,
        r"weight has shape \(7,\).*\(8,\)",
        lambda: fn.group_norm(X, 2, ONE[:7]),
    ),
    (
        "bias",
        ValueError,
        r"bias has shape \(3,\)",
        lambda: fn.batch_norm(X, ZERO, ONE, ONE, ONE[:3]),
    ),
    ("row weight", ValueError, r"weight has shape \(5,\)", lambda: fn.layer_norm(X, 6, ONE[:5])),
    ("trailing", ValueError, r"normalized_shape=\(5,\).*axis=", lambda: fn.layer_norm(X, (5,))),
    ("too long", ValueError, "normalized_shape", lambda: fn.rms_norm(X, (1, 4, 8, 5, 6))),
    ("neither", ValueError, "neither of normalized_shape and axis", lambda: fn.layer_norm(X)),
    ("both", ValueError, "both of normalized_shape and axis", lambda: fn.rms_norm(X, 6, axis=-1)),
    ("axis", ValueError, "axis=4 .*-4 to 3", lambda: fn.layer_norm(X, axis=4)),
    ("axis twice", ValueError, r"axis=\(1, -3\)", lambda: fn.layer_norm(X, axis=(1, -3))),
    ("no axes", ValueError, r"axis=\(\)", lambda: fn.layer_norm(X, axis=())),
    ("channel axis", ValueError, "channel_axis=9", lambda: fn.group_norm(X, 2, channel_axis=9)),
    ("samples", ValueError, r"x\[np.newaxis\]", lambda: fn.instance_norm(X, channel_axis=0)),
    ("one axis", ValueError, "at least 2 dimensions", lambda: fn.group_norm(X[0, 0, 0], 1)),
    ("scalar", ValueError, "at least 1 dimension", lambda: fn.layer_norm(np.float32(1), axis=-1)),
    ("complex", TypeError, "complex64.*astype", lambda: fn.layer_norm(X.astype("c8"), 6)),
    ("object", TypeError, "object", lambda: fn.rms_norm(X.astype(object), 6)),
    ("string", TypeError, "<U", lambda: fn.group_norm(X.astype(str), 2)),
    ("long double", TypeError, "float128|longdouble", lambda: fn.rms_norm(X.astype("g"), 6)),
    ("complex weight", TypeError, "weight.*complex", lambda: fn.group_norm(X, 2, ONE * 1j)),
    ("eps", ValueError, "eps is -1", lambda: fn.layer_norm(X, 6, eps=-1.0)),
    ("nan eps", ValueError, "eps is nan", lambda: fn.rms_norm(X, 6, eps=float("nan"))),
    ("where", TypeError, "where.*astype", lambda: fn.layer_norm(X, 6, where=X)),
    ("where shape", ValueError, "where.*broadcasts", lambda: fn.rms_norm(X, 6, where=X[:3] > 0)),
    (
        "residual",
        ValueError,
        r"residual has shape \(5, 6\)",
        lambda: fn.rms_norm(X, 6, residual=X[0, 0]),
    ),
    ("activation", ValueError, "'swish'.*'silu'", lambda: fn.layer_norm(X, 6, activation="swish")),
    ("callable", ValueError, "activation", lambda: fn.layer_norm(X, 6, activation=np.tanh)),
    ("no statistics", ValueError, "training=True", lambda: fn.batch_norm(X)),
    ("half of them", ValueError, "running_var", lambda: fn.batch_norm(X, ZERO)),
    (
        "not the input's",
        ValueError,
        "use_input_stats=True",
        lambda: fn.instance_norm(X, use_input_stats=False),
    ),
    (
        "running",
        ValueError,
        r"running_mean has shape \(4,\)",
        lambda: fn.batch_norm(X, ZERO[:4], ONE),
    ),
    (
        "a list",
        TypeError,
        "running_mean is a list",
        lambda: fn.batch_norm(X, [0.0] * 8, training=True),
    ),
    (
        "integers",
        TypeError,
        "running_var has dtype",
        lambda: fn.batch_norm(X, ZERO, np.ones(8, int), training=True),
    ),
    ("size", ValueError, "size is 0", lambda: fn.local_response_norm(X, 0)),
    ("lengths", ValueError, r"g has shape \(3,\)", lambda: fn.weight_norm(X, np.ones(3))),
    ("alpha", ValueError, "alpha has shape", lambda: fn.dynamic_tanh(X, ONE)),
    ("sum", ValueError, "residual has shape", lambda: fn.add_rms_norm(X, X[0], 6)),
    ("threads", ValueError, "num_threads is 0", lambda: fn.set_num_threads(0)),
    ("backend", ValueError, "'fast'.*'cython'", lambda: fn.set_backend("fast")),
    ("config", ValueError, "'dicts'", lambda: fn.show_config("json")),
]


@pytest.mark.parametrize(
    ("error", "words", "bad"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_bad_input(error: type[Exception], words: str, bad: Any) -> None:
    with pytest.raises(error) as caught:
        bad()
    message = str(caught.value)
    assert re.search(words, message, re.DOTALL), message
    # what was expected, or what to use or write instead
    assert re.search("expected|use|write|must be|updated", message), message


def outs() -> list[tuple[str, type[Exception], Any]]:
    locked = np.empty_like(X)
    locked.flags.writeable = False
    once = np.lib.stride_tricks.as_strided(np.zeros(X.size, X.dtype), X.shape, (4, 8, 4, 16))
    between = (2 * X.size, X.size, *(np.array(X.strides[2:]) // 4 * 2))  # other bytes of others
    torn = np.lib.stride_tricks.as_strided(
        np.zeros(16 * X.size, X.dtype), X.shape, [int(n) for n in between]
    )
    return [
        (
            "one row for all",
            ValueError,
            np.lib.stride_tricks.as_strided(
                np.zeros(X.shape[1:], X.dtype), X.shape, (0, *X.strides[1:])
            ),
        ),
        ("shared", ValueError, once),
        ("torn", ValueError, torn),
        ("shape", ValueError, np.empty((4, 8, 5, 5), np.float32)),
        ("dtype", TypeError, np.empty(X.shape)),
        ("read-only", ValueError, locked),
        ("list", TypeError, X.tolist()),
    ]


@pytest.mark.parametrize(("error", "out"), [o[1:] for o in outs()], ids=[o[0] for o in outs()])
@pytest.mark.parametrize(
    "call",
    [
        lambda out, m, v: fn.batch_norm(X, m, v, training=True, out=out),
        lambda out, m, v: fn.instance_norm(X, m, v, out=out),
        lambda out, m, v: fn.group_norm(X, 2, out=out),
        lambda out, m, v: fn.layer_norm(X, 6, out=out),
        lambda out, m, v: fn.rms_norm(X, 6, out=out),
        lambda out, m, v: fn.l2_normalize(X, out=out),
    ],
)
def test_a_bad_out_touches_nothing(call: Any, error: type[Exception], out: Any) -> None:
    mean, var = ZERO.copy(), ONE.copy()
    before = np.array(out, copy=True)
    with pytest.raises(error, match=r"out .*expected.*write"):
        call(out, mean, var)
    np.testing.assert_array_equal(mean, ZERO)
    np.testing.assert_array_equal(var, ONE)
    np.testing.assert_array_equal(out, before)


@pytest.mark.parametrize(
    ("shape", "options"),
    [((1, 8), {}), ((1, 8, 1, 1), {}), ((1, 1, 8), {"channel_axis": -1})],
    ids=str,
)
def test_one_value_per_channel(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    x, mean, var = data(shape, np.float32), ZERO.copy(), ONE.copy()
    out = np.full_like(x, 7)
    with pytest.raises(ValueError, match=r"one value per channel.*at least 2"):
        fn.batch_norm(x, mean, var, training=True, out=out, **options)
    assert (mean == 0).all()
    assert (var == 1).all()
    assert (out == 7).all()


@pytest.mark.parametrize("where", ["NumPy", "Dask", "Numba"])
def test_one_value_per_statistic_where_pytorch_refuses_it(where: str) -> None:
    """Instance norm of one position; group norm where the whole batch is one value per group."""
    instance, group = fn.instance_norm, fn.group_norm
    if where == "Numba":
        numba = pytest.importorskip("numba")
        instance = numba.njit(lambda x: fn.instance_norm(x))
        group = numba.njit(lambda x, groups: fn.group_norm(x, groups))
    make = np.ones
    if where == "Dask":
        make = lambda shape: pytest.importorskip("dask.array").ones(shape, chunks=1)  # noqa: E731
    for shape in ((2, 3), (1, 3, 1), (2, 3, 1, 1)):
        with pytest.raises(ValueError, match="at least 2"):
            instance(make(shape))
    for shape in ((1, 3), (1, 3, 1, 1)):
        with pytest.raises(ValueError, match="at least 2"):
            group(make(shape), 3)
        assert not np.any(group(make(shape), 1))
    assert not np.any(group(make((2, 3)), 3))
    assert not np.any(instance(make((1, 3, 2))))
    for empty in ((0, 3, 1), (0, 3, 2), (2, 3, 0)):
        assert instance(make(empty)).shape == group(make(empty), 3).shape == empty
    if where == "NumPy":
        running = np.zeros(3), np.ones(3)
        assert not np.any(instance(make((2, 3, 1)), *running, use_input_stats=False) - 1 > 1e-5)
        one = np.arange(4) < np.array([[[1]], [[4]]])  # what a mask leaves may be one
        assert instance(make((2, 3, 4)), where=one).shape == (2, 3, 4)
        with pytest.raises(ValueError, match="at least 2"):
            instance(make((2, 3, 4)), *running, where=one)


def test_locked_running_statistics() -> None:
    mean, var, out = ZERO.copy(), ONE.copy(), np.full_like(X, 7)
    var.flags.writeable = False
    with pytest.raises(ValueError, match="running_var is read-only"):
        fn.batch_norm(X, mean, var, training=True, out=out)
    assert (mean == 0).all()
    assert (out == 7).all()
    fn.batch_norm(X, mean, var)  # only read in inference
