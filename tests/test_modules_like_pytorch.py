"""Modules as torch.nn's are, in what is rarely asked for, states that are wrong, and losses."""

from __future__ import annotations

import re
import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastnorm as fn

from .helpers import assert_same_bits, data
from .test_modules import CLOSE, SHAPE, assert_same_state, pair

CLASSES = [f"{kind}Norm{d}d" for kind in ("Batch", "Instance") for d in (1, 2, 3)]


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d"])
def test_tracking_switched_at_run_time(
    name: str, tracked: bool, momentum: float | None, torch: Any
) -> None:
    """Off: batch norm leaves what has been tracked as it is, and in inference still uses it."""
    options = {"affine": True, "track_running_stats": tracked, "momentum": momentum}
    ours, theirs = pair(torch, name, {"num_features": 8} | options)
    modes = [(True, tracked), (True, not tracked), (False, not tracked), (False, tracked)]
    for step, (training, tracking) in enumerate([*modes, (True, tracked), *modes[::-1]]):
        ours.train(training), theirs.train(training)
        ours.track_running_stats = theirs.track_running_stats = tracking
        x, dy = data(SHAPE, ratio=0.5, seed=step), data(SHAPE, seed=10 + step)
        tensor = torch.from_numpy(x).requires_grad_()
        if name == "InstanceNorm2d" and not tracked and not training and tracking:
            with pytest.raises(RuntimeError):
                theirs(tensor)
            with pytest.raises(ValueError, match="without running_mean"):
                ours(x)
            continue
        y = theirs(tensor)
        y.backward(torch.from_numpy(dy))
        np.testing.assert_allclose(ours(x), y.detach().numpy(), rtol=CLOSE, atol=CLOSE)
        np.testing.assert_allclose(ours.backward(dy), tensor.grad.numpy(), rtol=0, atol=64 * CLOSE)
        assert_same_state(ours, theirs, CLOSE)
    ours.reset_running_stats(), theirs.reset_running_stats()
    assert_same_state(ours, theirs, CLOSE)


@pytest.mark.parametrize(
    "shape",
    [
        (6,),
        (2, 6),
        (6, 4),
        (2, 6, 4),
        (6, 4, 3),
        (2, 6, 4, 3),
        (6, 4, 3, 2),
        (2, 6, 4, 3, 2),
        (1, 2, 6, 4, 3, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CLASSES)
def test_numbers_of_dimensions(name: str, shape: tuple[int, ...], torch: Any) -> None:
    ours, theirs = (
        getattr(fn.nn, name)(6, dtype="f8"),
        getattr(torch.nn, name)(6, dtype=torch.double),
    )
    x = data(shape)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a wrong number of channels: docs/differences.rst
            right = theirs(torch.from_numpy(x)).detach().numpy()
    except (ValueError, RuntimeError, UserWarning) as error:
        words = str(error) if "input (got" in str(error) else "channels on axis"
        with pytest.raises(ValueError, match=re.escape(words)):
            ours(x)
    else:
        np.testing.assert_allclose(ours(x), right, rtol=CLOSE, atol=CLOSE)
        assert ours.backward(x).shape == shape


def test_one_sample_without_a_batch_axis(torch: Any) -> None:
    options = {"num_features": 8, "affine": True, "track_running_stats": True}
    ours, theirs = pair(torch, "InstanceNorm1d", options)
    for training in (True, False):
        ours.train(training), theirs.train(training)
        x, dy = data((8, 5), ratio=2.0), data((8, 5), seed=1)
        tensor = torch.from_numpy(x).requires_grad_()
        theirs(tensor).backward(torch.from_numpy(dy))
        np.testing.assert_allclose(ours(x), theirs(tensor).detach().numpy(), rtol=CLOSE, atol=CLOSE)
        theirs(tensor), ours(x.tolist()), ours(x)
        np.testing.assert_allclose(ours.backward(dy), tensor.grad.numpy(), rtol=0, atol=64 * CLOSE)
    with pytest.raises(ValueError, match=r"dy has shape \(1, 8, 5\)"):
        ours.backward(dy[np.newaxis])
    last = fn.nn.InstanceNorm1d(8, channel_axis=-1)
    np.testing.assert_array_equal(last(x.T), fn.nn.InstanceNorm1d(8)(x).T)


def test_what_a_module_does_not_have_is_none() -> None:
    for m, names in (
        (fn.nn.LayerNorm(4, elementwise_affine=False), ("weight", "bias")),
        (fn.nn.LayerNorm(4, bias=False), ("bias",)),
        (fn.nn.RMSNorm(4), ("bias",)),
        (fn.nn.GroupNorm(1, 3, bias=False), ("bias",)),
        (fn.nn.GroupNorm(1, 3, affine=False), ("weight", "bias")),
        (fn.nn.BatchNorm(3, bias=False), ("bias",)),
        (fn.nn.InstanceNorm(3, affine=True, bias=False), ("bias",)),
        (fn.nn.InstanceNorm(3), ("weight", "bias", "running_mean", "running_var")),
        (fn.nn.BatchNorm(3, track_running_stats=False), ("running_var", "num_batches_tracked")),
    ):
        for name in names:
            assert getattr(m, name) is None
            assert name not in m.state_dict()
            setattr(m, name, None)
            with pytest.raises(ValueError, match=f"has no {name}"):
                setattr(m, name, np.ones(3))
    with pytest.raises(AttributeError, match="'wait'"):
        _ = fn.nn.LayerNorm(4).wait  # type: ignore[attr-defined]


def test_a_part_that_is_taken_away(torch: Any) -> None:
    ours, theirs = pair(torch, "BatchNorm2d", {"num_features": 8})
    for name in ("bias", "running_mean", "running_var"):
        setattr(ours, name, None), setattr(theirs, name, None)
    x = data(SHAPE)
    right = theirs.eval()(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(ours.eval()(x), right, rtol=CLOSE, atol=CLOSE)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert list(ours.grad) == ["weight"]


def test_strict(torch: Any) -> None:
    weight = np.full(8, 2.0, np.float32)
    for name in ("BatchNorm1d", "LayerNorm"):
        ours, theirs = getattr(fn.nn, name)(8), getattr(torch.nn, name)(8)
        found = ours.load_state_dict({"weight": weight, "other": weight}, strict=False)
        right = theirs.load_state_dict(
            {"weight": torch.from_numpy(weight), "other": torch.ones(1)}, strict=False
        )
        assert found.missing_keys == right.missing_keys
        assert found.unexpected_keys == right.unexpected_keys == ["other"]
        assert_same_bits(ours.weight, weight)
        with pytest.raises(ValueError, match=r"weight has shape \(7,\)"):
            ours.load_state_dict({"weight": weight[1:]}, strict=False)
        with pytest.raises(ValueError, match=r"does not know \['other'\].*strict=False"):
            ours.load_state_dict({"other": weight})
    assert fn.nn.RMSNorm(8).load_state_dict({"weight": weight}) == ([], [])


HOSTILE: list[Any] = [
    None, "ones", ["a"] * 8, object(), [None] * 8, [[1, 2], [3]], np.ones(8, object), np.ones(7),
    np.ones(8) * 1j, np.zeros(8, "M8[s]"), np.zeros(8, [("a", "f4")]), b"1234",
    np.ones(8, "S3"), np.broadcast_to(np.float32(1), (1 << 40,)), np.ones((8, 1)), 1.0,
    {"a": 1}, np.ones(8, "V4"),
]  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE, ids=lambda v: f"{type(v).__name__} {v!s:.20}")
@pytest.mark.parametrize("key", ["weight", "running_var", "num_batches_tracked"])
def test_hostile_states_change_nothing(key: str, value: Any) -> None:
    if key == "num_batches_tracked" and isinstance(value, float):
        value = -value
    m = fn.nn.BatchNorm(8)
    before = m.state_dict()
    state = {k: v + 1 for k, v in before.items()} | {key: value}
    for strict in (True, False):
        with pytest.raises((ValueError, TypeError), match=key):
            m.load_state_dict(state, strict=strict)
    with pytest.raises((ValueError, TypeError), match=key):
        setattr(m, key, np.nan if value is None else value)
    for k, v in before.items():
        assert_same_bits(m.state_dict()[k], v)


def test_states_that_are_no_states() -> None:
    m = fn.nn.BatchNorm(8)
    for state in (None, 5, "weight", [("weight", np.ones(8))]):
        with pytest.raises(TypeError, match="expected arrays by name"):
            m.load_state_dict(state)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not know"):
        m.load_state_dict(m.state_dict() | {5: np.ones(8), None: np.ones(8)})  # type: ignore[dict-item]
    m.weight.flags.writeable = False
    with pytest.raises(ValueError, match="weight of this module is read-only"):
        m.load_state_dict(m.state_dict() | {"bias": np.ones(8)})
    assert not m.bias.any()


def test_states_of_other_dtypes(torch: Any) -> None:
    """Beyond the range they become infinite, as in PyTorch, and nothing warns."""
    right = np.array([0.5, -1.5, 1e300, -np.inf, np.nan, 0.0, 3.0, 256.0])
    theirs = torch.nn.LayerNorm(8, bias=False)
    for value in (
        right,
        right.tolist(),
        right.astype(">f8"),
        right.astype(np.longdouble),
        torch.from_numpy(right).requires_grad_(),
        torch.nn.Parameter(torch.from_numpy(right)),
    ):
        m = fn.nn.LayerNorm(8, bias=False)
        m.load_state_dict({"weight": value})
        theirs.load_state_dict({"weight": torch.from_numpy(right)})
        np.testing.assert_array_equal(m.weight, theirs.weight.detach().numpy())
        m.weight = value
    small = right[[0, 1, 3, 4, 5, 6, 7, 0]]
    for value in (
        torch.from_numpy(small).bfloat16(),
        torch.nn.Parameter(torch.from_numpy(small).bfloat16()),
        small.astype(ml_dtypes.bfloat16),
        torch.from_numpy(small).half(),
    ):
        m.load_state_dict({"weight": value})
        np.testing.assert_array_equal(m.weight, small.astype("f4"))
        half = fn.nn.LayerNorm(8, bias=False, dtype=ml_dtypes.bfloat16)
        half.load_state_dict({"weight": value})
        np.testing.assert_array_equal(half.weight.astype("f4"), small.astype("f4"))
    m.load_state_dict({"weight": np.arange(8) > 3})
    assert m.weight.sum() == 4


def test_a_state_of_views_of_the_module_itself() -> None:
    m = fn.nn.LayerNorm(8)
    m.weight, m.bias = np.arange(8), np.arange(8) + 10
    m.load_state_dict({"weight": m.bias[::-1], "bias": m.weight})
    np.testing.assert_array_equal(m.weight, np.arange(18, 10, -1) - 1)
    np.testing.assert_array_equal(m.bias, np.arange(8))


def test_counts_of_batches() -> None:
    m = fn.nn.BatchNorm(8, momentum=None)
    m.load_state_dict(m.state_dict() | {"num_batches_tracked": np.array([3.0])})  # before 0.4
    assert m.num_batches_tracked == 3
    m.num_batches_tracked[...] = -1
    with pytest.raises(ValueError, match="num_batches_tracked is -1"):
        m(data(SHAPE))
    m.reset_running_stats()
    batches = [data(SHAPE, ratio=3.0, seed=i) for i in range(5)]
    for x in batches:
        m(x)
    np.testing.assert_allclose(
        m.running_mean, np.mean([x.mean((0, 2, 3)) for x in batches], 0), rtol=1e-5
    )
    assert m.num_batches_tracked == 5


@pytest.mark.parametrize("momentum", [5, -0.1, np.nan, np.inf, "0.1", [0.1]], ids=str)
@pytest.mark.parametrize("name", ["BatchNorm", "InstanceNorm"])
def test_momentum_is_a_share(name: str, momentum: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="momentum"):
        getattr(fn.nn, name)(8, momentum=momentum)
    m = getattr(fn.nn, name)(8, track_running_stats=True)
    m(data(SHAPE))
    before = m.state_dict()
    m.momentum = momentum
    with pytest.raises((ValueError, TypeError), match="momentum"):
        m(data(SHAPE))
    for k, v in before.items():
        assert_same_bits(m.state_dict()[k], v)


def test_dtypes_of_parameters() -> None:
    assert fn.nn.LayerNorm(8, dtype=None).weight.dtype == np.float32
    for dtype in ("flaot32", 5, "int32", "c8", object):
        with pytest.raises(TypeError, match="for parameters"):
            fn.nn.LayerNorm(8, dtype=dtype)


def test_masked_arrays() -> None:
    """Exact statistics leave masked elements out."""
    hidden = np.broadcast_to(np.arange(5) > np.arange(6)[:, None, None], (6, 8, 5))
    x = np.ma.masked_array(data((6, 8, 5), ratio=2.0), hidden)
    m = fn.nn.BatchNorm(8, dtype="f8")
    fn.nn.recalibrate(m, [x[:2], x[2:]])
    np.testing.assert_allclose(m.running_mean, x.mean((0, 2)), rtol=1e-12)
    np.testing.assert_allclose(m.running_var, x.var((0, 2), ddof=1), rtol=1e-12)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "m",
    [
        fn.nn.BatchNorm(8, dtype="f8"),
        fn.nn.BatchNorm(8, dtype="f8", track_running_stats=False, affine=False),
        fn.nn.InstanceNorm(8, dtype="f8", affine=True),
        fn.nn.InstanceNorm1d(8, dtype="f8", track_running_stats=True),
        fn.nn.GroupNorm(2, 8, dtype="f8"),
        fn.nn.LayerNorm(5, dtype="f8"),
        fn.nn.RMSNorm((8, 5), dtype="f8"),
    ],
    ids=repr,
)
def test_gradients_of_masked_arrays(m: Any, training: bool) -> None:
    """Differences of results of masked arrays; one sample without its batch axis, too."""
    m.train(training)
    hidden = np.random.default_rng(3).random((2, 8, 5)) < 0.3
    hidden[:, :, :2] = False
    x, dy = data((2, 8, 5)), data((2, 8, 5), seed=1)
    if "1d" in type(m).__name__:
        x, dy, hidden = x[0], dy[0], hidden[0]
    m.zero_grad()
    y = m(np.ma.array(x, mask=hidden))
    assert type(y) is np.ndarray
    dx = m.backward(dy)
    assert type(dx) is np.ndarray
    # h^2 and epsilon / h, times what third derivatives of 80 terms of size 4 or so add up to
    h, least = 1e-5, 1e-6
    direction = data(x.shape, seed=2)
    state = m.state_dict()
    up, down = (m(np.ma.array(x + s * direction, mask=hidden)) for s in (h, -h))
    slope = (dy * (up - down)).sum() / (2 * h)
    m.load_state_dict(state)
    np.testing.assert_allclose((dx * direction).sum(), slope, rtol=least, atol=least)
    plain = m.backward(dy) if m(x) is not None else None
    own = training or not getattr(m, "track_running_stats", False)
    assert np.array_equal(dx, plain) != own


def test_sums_of_gradients_do_not_warn() -> None:
    m = fn.nn.LayerNorm(8, dtype="f2")
    x = np.full((4, 8), 1000.0)
    m(x)
    for _ in range(20):
        m.backward(x)
    assert np.isinf(m.grad["bias"]).all()


# --- Losses, optimizer, attention -----------------------------------------------------------------


@pytest.mark.parametrize("ignore", [-100, 2, 255])
def test_ignored_classes(ignore: int, torch: Any) -> None:
    rng = np.random.default_rng(0)
    for n, classes, share in ((1, 3, 0.0), (50, 7, 0.3), (50, 7, 1.0), (0, 3, 0.0)):
        scores, target = rng.standard_normal((n, classes)), rng.integers(classes, size=n)
        target[rng.random(n) < share] = ignore
        tensor = torch.from_numpy(scores).requires_grad_()
        right = torch.nn.functional.cross_entropy(
            tensor, torch.from_numpy(target), ignore_index=ignore
        )
        right.backward()
        loss, gradient = fn.nn.cross_entropy(scores, target, ignore_index=ignore)
        np.testing.assert_allclose(loss, right.item(), rtol=CLOSE)
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=0, atol=CLOSE)
    small = np.array([1, ignore % 256], np.uint8)
    if ignore == 255:
        assert fn.nn.cross_entropy(np.zeros((2, 3)), small, ignore_index=255)[0] == np.log(3)


@pytest.mark.parametrize(
    ("scores", "target", "error", "words"),
    [
        (np.ones((2, 3)), [3, 0], ValueError, "class 3, expected 0 to 2, or -100"),
        (np.ones((2, 3)), [-1, 0], ValueError, "class -1, expected 0 to 2"),
        (np.ones((2, 3)), [-101, 0], ValueError, "class -101"),
        (np.ones((2, 3)), [1.0, 0.0], ValueError, "dtype float64.*integers"),
        (np.ones((2, 3)), None, TypeError, "target is None"),
        (np.ones((2, 3)), [True, False], ValueError, "dtype bool"),
        (np.ones((2, 3)), [1, 0, 1], ValueError, r"moveaxis"),
        (np.ones(()), 1, ValueError, "scores of shape"),
        (np.ones((2, 0)), [0, 0], ValueError, "class 0"),
        ("ab", [0], TypeError, "scores has dtype"),
        (None, [0], TypeError, "scores is None"),
    ],
    ids=str,
)
def test_wrong_classes(scores: Any, target: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        fn.nn.cross_entropy(scores, target)


def test_adam_refuses_what_it_cannot_change() -> None:
    p = {"w": np.ones(3)}
    wrong: list[tuple[Any, dict[str, Any], Any]] = [
        ([1.0], {}, TypeError), (None, {}, TypeError), ({"w": [1.0]}, {}, TypeError),
        ({"w": np.ones(3, int)}, {}, TypeError), (p, {"lr": -1}, ValueError),
        (p, {"lr": np.nan}, ValueError), (p, {"eps": np.inf}, ValueError),
        (p, {"betas": 0.9}, ValueError), (p, {"betas": (0.9,)}, ValueError),
        (p, {"betas": (0.9, 1.0)}, ValueError), (p, {"betas": ("a", "b")}, ValueError),
    ]  # fmt: skip
    for parameters, options, error in wrong:
        with pytest.raises(error):
            fn.nn.Adam(parameters, **options)
    adam = fn.nn.Adam(p | {"b": np.ones(1)})
    for gradient, error in (
        (np.ones(1), ValueError), (None, TypeError), (np.ones(3) * 1j, TypeError),
    ):  # fmt: skip
        with pytest.raises(error, match="gradient"):
            adam.step({"b": np.ones(1), "w": gradient})
    with pytest.raises(KeyError):
        adam.step({"w": np.ones(3)})
    assert (p["w"] == 1).all()
    assert (adam.parameters["b"] == 1).all()
    assert adam._steps == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda nn: nn.linear(1.0, np.ones((2, 3))), "linear got x of shape"),
        (lambda nn: nn.linear(np.ones(3), np.ones((2, 3)), np.ones(3)), "bias has shape"),
        (lambda nn: nn.linear(np.ones(3), np.ones((2, 3)), ["a", "b"]), "bias has dtype"),
        (lambda nn: nn.softmax(1.0), "at least 1 dimension"),
        (lambda nn: nn.softmax(None), "x is None"),
        (lambda nn: nn.attention(*np.ones((3, 2, 3)), np.ones((3, 3))), "mask has shape"),
        (lambda nn: nn.attention(*np.ones((3, 2, 3)), np.ones((2, 2), int)), "mask has dtype"),
        (lambda nn: nn.attention(np.ones((2, 2, 3)), *np.ones((2, 3, 2, 3))), "leading axes"),
        (lambda nn: nn.activation_backward(*np.ones((3, 2)), ["relu"]), "activation is"),
        (lambda nn: nn.activation_backward(*np.ones((2, 2)), [1.0], "relu"), "of different shapes"),
        (lambda nn: nn.activation_backward("a", *np.ones((2, 2)), "relu"), "dy has dtype"),
        (lambda nn: nn.softmax_backward(np.ones(3), np.ones((2, 3))), "of different shapes"),
        (lambda nn: nn.softmax_backward(1.0, 1.0), "at least 1 dimension"),
        (lambda nn: nn.softmax_backward(None, np.ones(3)), "dy is None"),
        (lambda nn: nn.attention_backward(*np.ones((5, 2, 3))), "attention_backward got"),
        (lambda nn: nn.attention_backward("a", *np.ones((4, 2, 2))), "dy has dtype"),
        (lambda nn: nn.TransformerBlock(8, 2, placement=np.ones(2)), "placement is"),
        (lambda nn: nn.TransformerBlock(8, 2, norm=None), "norm is None"),
        (lambda nn: nn.TransformerBlock(8, 2, activation=np.tanh), "activation is"),
        (lambda nn: nn.TransformerBlock("8", 2), "d_model is '8'"),
        (lambda nn: nn.TransformerBlock(8, 2, dtype="flaot"), "for parameters"),
        (lambda nn: nn.TransformerEncoder(0, 8, 2), "num_layers is 0"),
    ],
)
def test_wrong_arguments_of_layers(call: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        call(fn.nn)


_ROWS = np.ones((2, 3))
MASKABLE: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (fn.nn.linear, {"x": _ROWS, "weight": np.ones((4, 3)), "bias": np.ones(4)}),
    "softmax": (fn.nn.softmax, {"x": _ROWS}),
    "softmax_backward": (fn.nn.softmax_backward, {"dy": _ROWS, "y": _ROWS}),
    "attention": (
        fn.nn.attention,
        {"query": _ROWS, "key": _ROWS, "value": _ROWS, "mask": np.zeros((2, 2))},
    ),
    "attention_backward": (
        fn.nn.attention_backward,
        {"dy": _ROWS, "query": _ROWS, "key": _ROWS, "value": _ROWS, "weights": np.ones((2, 2))},
    ),
    "activation_backward": (
        lambda **given: fn.nn.activation_backward(**given, activation="silu"),
        {"dy": _ROWS, "x": _ROWS, "y": _ROWS},
    ),
    "activate": (lambda bias: fn.nn.activate(_ROWS, "relu", bias), {"bias": np.ones(3)}),
    "cross_entropy": (fn.nn.cross_entropy, {"scores": _ROWS, "target": np.array([0, 2])}),
    "TransformerBlock": (
        fn.nn.TransformerBlock(4, 2, rng=0),
        {
            "x": np.ones((2, 3, 4)),
            "src_mask": np.zeros((3, 3)),
            "src_key_padding_mask": np.zeros((2, 3), bool),
        },
    ),
    "TransformerEncoder": (
        fn.nn.TransformerEncoder(1, 4, 2, rng=0),
        {"x": np.ones((2, 3, 4)), "mask": np.zeros((3, 3), bool)},
    ),
    "load_state_dict": (
        lambda **state: fn.nn.LayerNorm(3).load_state_dict(state),
        {"weight": np.ones(3), "bias": np.ones(3)},
    ),
    "Adam.step": (
        lambda **gradients: fn.nn.Adam({n: g.copy() for n, g in gradients.items()}).step(gradients),
        {"weight": np.ones(3)},
    ),
    "Adam": (lambda parameter: fn.nn.Adam({"parameter": parameter}), {"parameter": np.ones(3)}),
}


@pytest.mark.parametrize("name", MASKABLE)
def test_masks_of_np_ma_where_there_are_no_statistics(name: str) -> None:
    """Nothing can stand for what is hidden: it is refused, never read."""
    function, given = MASKABLE[name]
    function(**given)
    for argument, value in given.items():
        seen = function(**given | {argument: np.ma.array(value)})  # with nothing hidden
        assert not np.ma.isMaskedArray(seen[0] if isinstance(seen, tuple) else seen)
        hidden = np.ma.array(value)
        hidden[(0,) * value.ndim] = np.ma.masked
        with pytest.raises((ValueError, TypeError), match=f"{argument}.* masked array") as caught:
            function(**given | {argument: hidden})
        assert "filled(" in str(caught.value)
    with pytest.raises(ValueError, match="masked array that hides 1"):
        fn.nn.LayerNorm(2).weight = np.ma.array([1.0, 2.0], mask=[True, False])


LEAST = np.finfo(np.float64).min


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("least", [-np.inf, LEAST, np.finfo("f4").min], ids=str)
@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_masks_of_floats_mean_what_masks_of_booleans_do(
    dtype: str, least: float, causal: bool
) -> None:
    """Masks of the least number, also two of them on one place, hide as -inf does; none warns."""
    rng = np.random.default_rng(0)
    m = fn.nn.TransformerBlock(8, 2, causal=causal, rng=0)
    x = rng.standard_normal((3, 5, 8)).astype(dtype)
    hidden, padding = rng.random((5, 5)) < 0.3, rng.random((3, 5)) < 0.3
    hidden[:, 0] = padding[:, 0] = False  # everybody sees the first
    right = m(x, hidden, padding)
    y = m(x, np.where(hidden, least, 0.0), np.where(padding, least, 0.0))
    assert_same_bits(y, right)
    m.backward(y)


def test_a_block_in_half_precision_overflows_silently() -> None:
    for mode in (True, False):
        m = fn.nn.TransformerEncoder(2, 8, 2, final_norm=False, rng=0).train(mode)
        x = np.where(np.random.default_rng(0).random((2, 3, 8)) < 0.5, 65504, -65504)
        x = x.astype(np.float16)
        m.layers[0].parameters()["linear2.weight"][...] = 1e4
        y = m(x)
        assert y.dtype == np.float16
        assert np.isinf(y).any()
        assert m.backward(x).dtype == np.float16
