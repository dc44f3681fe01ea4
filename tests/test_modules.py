"""Modules: PyTorch's behaviour and state, and gradients that add up."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastnorm as fn

from .helpers import F32, Array, assert_same_bits, channels_last, data, epsilon

pytestmark = pytest.mark.usefixtures("backend")

SHAPE = (6, 8, 5, 4)

# Every module with every choice of its options: a name, arguments, the shape of x.
CHOICES: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    (name, {"num_features": 8} | dict(zip(("affine", "track_running_stats", "momentum"), v)), SHAPE)
    for name in ("BatchNorm2d", "InstanceNorm2d")
    for v in itertools.product((True, False), (True, False), (0.1, 0.7, 0.0, 1.0, None))
]
CHOICES += [
    ("BatchNorm1d", {"num_features": 8}, (9, 8)),
    ("BatchNorm1d", {"num_features": 8}, (9, 8, 3)),
    ("BatchNorm3d", {"num_features": 8}, (3, 8, 2, 3, 2)),
    ("InstanceNorm1d", {"num_features": 8, "affine": True}, (3, 8, 7)),
    ("InstanceNorm3d", {"num_features": 8, "affine": True}, (3, 8, 2, 3, 2)),
    *(("GroupNorm", {"num_groups": g, "num_channels": 8, "affine": a}, SHAPE)
      for g in (1, 2, 8) for a in (True, False)),
    *(("LayerNorm", {"normalized_shape": s, "elementwise_affine": a, "bias": b}, SHAPE)
      for s in (4, (5, 4), (8, 5, 4)) for a in (True, False) for b in (True, False)),
    *(("RMSNorm", {"normalized_shape": s, "elementwise_affine": a, "eps": e}, SHAPE)
      for s in (4, (5, 4)) for a in (True, False) for e in (None, 1e-3)),
]  # fmt: skip

every_choice = pytest.mark.parametrize(("name", "options", "shape"), CHOICES, ids=str)
NAMES = sorted({name for name, _, _ in CHOICES})


def pair(torch: Any, name: str, options: dict[str, Any], dtype: str = "float64") -> tuple[Any, Any]:
    """Our module and PyTorch's, with the same random parameters."""
    ours = getattr(fn.nn, name)(**options, dtype=dtype)
    theirs = getattr(torch.nn, name)(**options, dtype=getattr(torch, dtype))
    rng = np.random.default_rng(3)
    for key, value in ours.parameters().items():
        value[...] = 1 + rng.standard_normal(value.shape) / 4
        theirs.get_parameter(key).data = torch.from_numpy(value.copy())
    return ours, theirs


def assert_same_state(ours: Any, theirs: Any, rtol: float) -> None:
    state, right = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(right)
    for key, value in right.items():
        np.testing.assert_allclose(state[key], value.numpy(), rtol=rtol, atol=rtol, err_msg=key)
        assert state[key].dtype == value.numpy().dtype
        assert state[key].shape == tuple(value.shape)


# 64 roundings of float64 of numbers up to 16: nothing here takes more steps, PyTorch's sums of a
# few hundred terms included
CLOSE = 64 * 16 * 2.0**-53


@every_choice
def test_behaves_like_pytorch(
    name: str, options: dict[str, Any], shape: tuple[int, ...], torch: Any
) -> None:
    """Four steps of training, two of inference, one of training: results, gradients and state."""
    ours, theirs = pair(torch, name, options)
    for step, mode in enumerate((True, True, True, True, False, False, True)):
        ours.train(mode), theirs.train(mode)
        x, dy = data(shape, ratio=0.5, seed=step), data(shape, seed=10 + step)
        tensor = torch.from_numpy(x).requires_grad_()
        result = theirs(tensor)
        result.backward(torch.from_numpy(dy))
        np.testing.assert_allclose(ours(x), result.detach().numpy(), rtol=CLOSE, atol=CLOSE)
        # rstd of inference can be 3, dy reaches 30
        np.testing.assert_allclose(ours.backward(dy), tensor.grad.numpy(), rtol=0, atol=64 * CLOSE)
        for key, parameter in theirs.named_parameters():
            # up to 7 steps of up to 192 terms add up in there
            np.testing.assert_allclose(
                ours.grad[key], parameter.grad.numpy(), rtol=0, atol=64 * CLOSE, err_msg=key
            )
        assert_same_state(ours, theirs, CLOSE)


@every_choice
def test_state_goes_to_pytorch_and_back(
    name: str, options: dict[str, Any], shape: tuple[int, ...], torch: Any
) -> None:
    ours, theirs = pair(torch, name, options, "float32")
    ours(data(shape, F32))
    state = ours.state_dict()
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
    again = getattr(fn.nn, name)(**options)
    again.load_state_dict(theirs.state_dict())
    assert list(again.state_dict()) == list(theirs.state_dict())
    for key, value in state.items():
        assert_same_bits(again.state_dict()[key], value)
    x = data(shape, F32, seed=4)
    assert_same_bits(again.eval()(x), ours.eval()(x))


def test_a_model_saved_by_pytorch(torch: Any, tmp_path: Any) -> None:
    path = tmp_path / "model.pt"
    theirs = torch.nn.BatchNorm2d(8, momentum=None)
    theirs(torch.randn(4, 8, 3, 3))
    torch.save(theirs.state_dict(), path)
    ours = fn.nn.BatchNorm2d(8, momentum=None)
    ours.load_state_dict(torch.load(path))
    assert ours.num_batches_tracked == 1
    assert ours.num_batches_tracked.dtype == np.int64
    assert_same_state(ours, theirs, 0.0)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", ["BatchNorm", "InstanceNorm"])
def test_fifty_steps_stay_within_rounding(name: str, momentum: float | None) -> None:
    """A float32 module, and the same in float64, through 50 steps of training."""
    options = {"num_features": 8, "momentum": momentum, "affine": True, "track_running_stats": True}
    single, double = (getattr(fn.nn, name)(**options, dtype=t) for t in ("f4", "f8"))
    for step in range(50):
        x = data(SHAPE, F32, ratio=3.0, seed=step)
        y, right = single(x), double(x.astype(np.float64))
        # three roundings of the step, and those of weight and bias (which stay what they are)
        assert (abs(y - right) <= 4 * epsilon(F32) * np.maximum(abs(right), 1)).all()
        for key in ("running_mean", "running_var"):
            # Each step rounds to half a unit and keeps 1 - momentum of what was there: at 0.1 that
            # sums to 5 units. A cumulative average keeps (k - 1)/k of it: to step/4 units.
            units = 5 if momentum else max(step / 4, 1)
            a, b = getattr(single, key), getattr(double, key)
            largest = np.maximum(abs(b), 8 * 4.0)  # what has been averaged reaches this
            assert (abs(a - b) <= units * epsilon(F32) * largest).all(), (key, step)
    single.eval(), double.eval()
    x = data(SHAPE, F32, ratio=3.0, seed=99)
    y, right = single(x), double(x.astype(np.float64))
    spread = 1 / np.sqrt(double.running_var.min())
    moved = 13 * epsilon(F32) * 32 * spread * max(1, abs(right).max())
    assert abs(y - right).max() <= moved


@every_choice
def test_gradients_add_up_until_they_are_zeroed(
    name: str, options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    m = getattr(fn.nn, name)(**options)
    x, dy = data(shape, F32), data(shape, F32, seed=1)
    m(x)
    m.backward(dy)
    once = {k: g.copy() for k, g in m.grad.items()}
    m.backward(dy)
    assert m.grad.keys() == m.parameters().keys()
    for key, gradient in m.grad.items():
        assert gradient.dtype == m.parameters()[key].dtype
        np.testing.assert_array_equal(gradient, 2 * once[key])
        assert gradient.any()
    kept = m.grad.copy()
    m.zero_grad()
    assert all(g is kept[k] and not g.any() for k, g in m.grad.items())


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles(name: str) -> None:
    _, options, shape = next(c for c in CHOICES if c[0] == name)
    m = getattr(fn.nn, name)(**options)
    x = data(shape, F32)
    m(x)
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert twin.state_dict().keys() == m.state_dict().keys()
        assert_same_bits(twin.eval()(x), copy.deepcopy(m).eval()(x))
        assert repr(twin) == repr(m)
    with pytest.raises(RuntimeError, match="no call"):
        pickle.loads(pickle.dumps(m)).backward(x)
    # what repr shows is what makes another
    assert repr(eval(repr(m), vars(fn.nn))) == repr(m)


def test_modules_and_functions_agree() -> None:
    x = data(SHAPE, F32, 2.0)
    assert_same_bits(fn.nn.GroupNorm(2, 8)(x), fn.group_norm(x, 2, np.ones(8), np.zeros(8)))
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    for m in (fn.nn.BatchNorm(8), fn.nn.InstanceNorm(8, affine=True), fn.nn.GroupNorm(2, 8)):
        other = copy.deepcopy(m)
        other.channel_axis = -1
        y, z = m(channels_last(x)), other(last)
        assert_same_bits(np.moveaxis(z, -1, 1), y)
        assert_same_bits(np.moveaxis(other.backward(z), -1, 1), m.backward(y))
        for key, value in m.state_dict().items():
            assert_same_bits(value, other.state_dict()[key])


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float64"])
def test_data_and_parameters_of_different_dtypes(dtype: Any) -> None:
    m = fn.nn.LayerNorm(4)
    x = data(SHAPE, dtype)
    y = m(x)
    assert y.dtype == m.backward(y).dtype == x.dtype
    assert m.grad["weight"].dtype == np.float32
    with pytest.raises(TypeError, match="int32"):
        fn.nn.LayerNorm(4, dtype="int32")
    assert fn.nn.RMSNorm(4, dtype=dtype).weight.dtype == np.dtype(dtype)


def test_empty_batches() -> None:
    for m in (fn.nn.BatchNorm(8), fn.nn.InstanceNorm(8, affine=True), fn.nn.GroupNorm(2, 8)):
        for mode in (True, False):
            y = m.train(mode)(np.zeros((0, 8, 3), np.float32))
            assert y.shape == m.backward(y).shape == (0, 8, 3)
    tracked = fn.nn.InstanceNorm(8, track_running_stats=True).eval()
    assert tracked.backward(tracked(np.zeros((0, 8, 3), np.float32))).shape == (0, 8, 3)


def test_a_module_without_a_pass_cannot_be_made() -> None:
    class Half(fn.nn.Module):
        def _forward(self, x: Any) -> Any:
            return x, x

    with pytest.raises(TypeError, match="_backward"):
        Half()  # type: ignore[abstract]


def test_resetting() -> None:
    m, fresh = fn.nn.BatchNorm(8), fn.nn.BatchNorm(8)
    m(data(SHAPE, F32))
    m.weight = np.arange(8)
    m.reset_running_stats()
    np.testing.assert_array_equal(m.running_var, np.ones(8))
    np.testing.assert_array_equal(m.weight, np.arange(8))
    m.reset_parameters()
    for key, value in fresh.state_dict().items():
        assert_same_bits(m.state_dict()[key], value)


def test_attributes_are_the_arrays_themselves() -> None:
    m = fn.nn.BatchNorm(8)
    weight = m.parameters()["weight"]
    m.weight = np.full(8, 2.0)
    assert m.weight is weight
    assert weight[0] == 2
    with pytest.raises(ValueError, match=r"weight has shape \(3,\), expected \(8,\)"):
        m.weight = np.ones(3)
    with pytest.raises(AttributeError, match="'wait'"):
        _ = m.wait
    state = m.state_dict()
    state["weight"][...] = 5
    assert weight[0] == 2


WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("BatchNorm", {"num_features": 0}, ValueError, "num_features is 0"),
    ("BatchNorm", {"num_features": 8, "eps": -1}, ValueError, "eps is -1"),
    ("InstanceNorm", {"num_features": 2.5}, TypeError, "num_features is 2.5"),
    ("GroupNorm", {"num_groups": 3, "num_channels": 8}, ValueError, "does not divide the 8"),
    ("LayerNorm", {"normalized_shape": ()}, ValueError, "normalized_shape is empty"),
    ("LayerNorm", {"normalized_shape": (3, -1)}, ValueError, "normalized_shape is -1"),
    ("RMSNorm", {"normalized_shape": 4, "eps": np.inf}, ValueError, "eps is inf"),
]


@pytest.mark.parametrize(("name", "options", "error", "words"), WRONG, ids=str)
def test_wrong_options(name: str, options: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        getattr(fn.nn, name)(**options)


def test_wrong_input_changes_nothing() -> None:
    m = fn.nn.BatchNorm(8)
    before = m.state_dict()
    for x, words in (
        (np.ones((4, 7, 3)), "7 channels on axis 1, expected 8"),
        (np.ones(8), r"\(8,\), expected \(N, C, ...\)"),
        (np.ones((1, 8)), "at least 2"),
    ):
        with pytest.raises(ValueError, match=words):
            m(x)
    with pytest.raises(RuntimeError, match="no call"):
        m.backward(np.ones((4, 8, 3)))
    m.eval()(np.ones((4, 8, 3)))
    with pytest.raises(ValueError, match="dy has shape"):
        m.backward(np.ones((4, 8, 2)))
    with pytest.raises(ValueError, match="7 channels on axis 1, expected 8"):
        fn.nn.GroupNorm(2, 8)(np.ones((4, 7, 3)))
    assert not m.grad["weight"].any()
    for key, value in before.items():
        assert_same_bits(m.state_dict()[key], value)


def _state(**changes: Any) -> dict[str, Array]:
    state = fn.nn.BatchNorm(8).state_dict() | changes
    return {k: v for k, v in state.items() if v is not None}


@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        (_state(weight=None), ValueError, r"misses \['weight'\]"),
        (_state(other=np.ones(8)), ValueError, r"does not know \['other'\]"),
        (_state(running_var=np.ones(7)), ValueError, r"running_var has shape \(7,\)"),
        (_state(running_var=np.ones(8) * 1j), TypeError, "complex128"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(state: Any, error: Any, words: str) -> None:
    m = fn.nn.BatchNorm(8)
    before = m.state_dict()
    with pytest.raises(error, match=words):
        m.load_state_dict(state | {"bias": np.full(8, 3.0)})
    for key, value in before.items():
        assert_same_bits(m.state_dict()[key], value)


def test_a_state_without_a_count_of_batches() -> None:
    """PyTorch before 0.4.1 wrote none, and PyTorch still loads it."""
    m = fn.nn.BatchNorm(8)
    m.load_state_dict(_state(num_batches_tracked=None, weight=np.full(8, 2.0)))
    assert m.num_batches_tracked == 0
    assert m.weight[0] == 2
