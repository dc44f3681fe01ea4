"""The example of docs/digits.rst: its layers, and its finding in reduced form."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.signal import correlate2d
from threadpoolctl import threadpool_limits

import fastnorm as fn

from .helpers import ROOT

pytestmark = pytest.mark.slow

Array = np.ndarray[Any, Any]

EXAMPLE = ROOT / "docs" / "examples" / "digits.py"

if not EXAMPLE.exists():  # the tests of a wheel come without docs/
    pytest.skip("no docs/examples here", allow_module_level=True)
pytest.importorskip("sklearn")

SEEDS = range(3)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The matrices are small, and on a busy machine threads wait for each other."""
    with threadpool_limits(1, "blas"), fn.threads(1):
        yield


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("example_digits", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


digits = load_example()


# --- Layers ---------------------------------------------------------------------------------------

# Networks for single calls, by network and norm.
KINDS = [(name, norm) for name in digits.STRIDES for norm in digits.NORMS]


def slopes(loss: Callable[[], float], array: Array, where: Array, step: float) -> Array:
    """Central differences at some flat places of an array, which may be float32.

    The step is divided by as it was after rounding, so that rounding it costs nothing.
    """
    found = []
    for place in where:
        kept = array.flat[place]
        array.flat[place] = kept + array.dtype.type(step)
        above, high = loss(), float(array.flat[place])
        array.flat[place] = kept - array.dtype.type(step)
        below, low = loss(), float(array.flat[place])
        array.flat[place] = kept
        found.append((above - below) / (high - low))
    return np.array(found)


def assert_gradients(m: Any, x: Array, loss: Callable[[], float], dx: Array, step: float) -> None:
    """Compare dx and `m.grad` with differences, at 20 places of each array.

    `loss` is computed in float64. With a third derivative of about 1 the differences are off by
    step^2; what is left is float64's rounding, 1e-15 / step. Gradients of float32 parameters are
    float32, rounded once: 6e-8. The tolerance is 1e-5 of the largest slope.
    """
    rng = np.random.default_rng(1)
    pairs = {"x": (x, dx)} | {name: (p, m.grad[name]) for name, p in m.parameters().items()}
    for name, (array, gradient) in pairs.items():
        where = rng.choice(array.size, min(20, array.size), replace=False)
        right = slopes(loss, array, where, step)
        largest = max(abs(right).max(), 1e-3)
        np.testing.assert_allclose(
            gradient.flat[where], right, rtol=0, atol=1e-5 * largest, err_msg=name
        )


LAYERS: dict[str, Callable[[np.random.Generator], Any]] = {
    "conv": lambda rng: digits.Conv(8, 5, 1, rng),
    "conv, stride 2": lambda rng: digits.Conv(8, 5, 2, rng),
    "relu": lambda rng: digits.ReLU(),
    "pool": lambda rng: digits.Pool(),
    "linear": lambda rng: digits.Linear(8, 5, rng),
    "batch": lambda rng: digits.NORMS["batch"](8)[0],
    "group": lambda rng: digits.NORMS["group"](8)[0],
    "layer": lambda rng: digits.NORMS["layer"](8)[0],
}


@pytest.mark.parametrize("size", [(4, 4), (5, 6)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_a_layer(name: str, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    m = LAYERS[name](rng)
    for p in m.parameters().values():
        p[...] += 0.5 * rng.standard_normal(p.shape)
    x = rng.standard_normal((3, 8) if name == "linear" else (3, *size, 8))
    x += 0.1 * np.sign(x)  # the step does not cross the kink of a ReLU
    y = m(x)
    dy = rng.standard_normal(y.shape)
    m.zero_grad()
    dx = m.backward(dy)
    assert dx.shape == x.shape
    assert dx.dtype == np.float64
    assert_gradients(m, x, lambda: float((m(x) * dy).sum()), dx, 1e-3)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (5, 4), (2, 2), (1, 1)], ids=str)
def test_conv_is_a_convolution(size: tuple[int, int], stride: int) -> None:
    rng = np.random.default_rng(0)
    m = digits.Conv(3, 4, stride, rng)
    x = rng.standard_normal((2, *size, 3))
    kernels = m.parameters()["weight"].astype(float).reshape(3, 3, 3, 4)
    right = [
        [sum(correlate2d(image[..., c], kernels[..., c, k], "same") for c in range(3))
         for k in range(4)]
        for image in x
    ]  # fmt: skip
    right = np.moveaxis(np.array(right), 1, -1)[:, ::stride, ::stride]
    # sums of 27 products of order 1, in float64
    np.testing.assert_allclose(m(x), right, rtol=0, atol=1e-13)


def test_cross_entropy() -> None:
    rng = np.random.default_rng(0)
    scores, right = rng.standard_normal((4, 10)), np.array([3, 0, 9, 3])
    loss, gradient = fn.nn.cross_entropy(scores, right)
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert loss == pytest.approx(-np.log(p[np.arange(4), right]).mean(), rel=1e-13)
    there = slopes(lambda: fn.nn.cross_entropy(scores, right)[0], scores, np.arange(40), 1e-4)
    np.testing.assert_allclose(gradient.ravel(), there, rtol=0, atol=1e-8)
    assert fn.nn.cross_entropy(scores + 1e4, right)[0] == pytest.approx(loss)


@pytest.mark.parametrize(("name", "norm"), KINDS)
def test_gradients_of_a_network(name: str, norm: str) -> None:
    """The sum of the layers: the gradient along a direction in which everything moves."""
    rng = np.random.default_rng(0)
    network = digits.Network(digits.STRIDES[name], norm, rng)
    x, right = rng.standard_normal((6, 8, 8, 1)), rng.integers(10, size=6)

    def loss() -> float:
        found: float = fn.nn.cross_entropy(network(x), right)[0]
        return found

    network.backward(fn.nn.cross_entropy(network(x), right)[1])
    step, expected = 2.0**-20, 0.0
    ends: list[list[Array]] = [[], []]
    arrays = [(p, m.grad[k]) for m in network.layers for k, p in m.parameters().items()]
    for p, gradient in arrays:
        move = step * np.sign(rng.standard_normal(p.shape)).astype(np.float32)
        for end, moved in zip(ends, (p - move, p + move)):
            end.append(moved)
        # as it is after rounding
        expected += float((gradient * (ends[1][-1].astype(float) - ends[0][-1])).sum())
    losses = []
    for end in ends:
        for (p, _), moved in zip(arrays, end):
            p[...] = moved
        losses.append(loss())
    # One of some thousand ReLUs may open within the step and add about its share, far below 1 %
    # of what random signs make of a gradient: its length.
    length = sum(float((gradient.astype(float) ** 2).sum()) for _, gradient in arrays) ** 0.5
    assert losses[1] - losses[0] == pytest.approx(expected, abs=1e-2 * 2 * step * length)


# --- Training -------------------------------------------------------------------------------------


@lru_cache
def trained(name: str, norm: str, batch_size: int, seed: int) -> tuple[float, list[float]]:
    """Accuracy on the test images and the loss of each epoch, after two epochs."""
    training, test = digits.load()
    rng = np.random.default_rng(seed)
    network = digits.Network(digits.STRIDES[name], norm, rng)
    losses = digits.train(network, training, batch_size, 2, rng)
    return digits.accuracy(network, test), losses


def test_data() -> None:
    training, test = digits.load()
    assert training.images.shape == (898, 8, 8, 1)
    assert test.images.shape == (899, 8, 8, 1)
    assert training.images.dtype == test.images.dtype == np.float32
    assert abs(training.images.mean(dtype=float)) < 1e-6
    assert abs(training.images.std(dtype=float) - 1) < 1e-6
    assert set(training.digits) == set(test.digits) == set(range(10))


@pytest.mark.parametrize("norm", digits.NORMS)
def test_training_learns(norm: str) -> None:
    """Guessing finds a tenth. The worst of 8 seeds: 0.87 with group norm, 0.91 with batch norm."""
    found, losses = trained("narrow", norm, 32, 0)
    assert found > 0.8
    assert losses[1] < losses[0] / 2


def test_a_seed_decides_everything() -> None:
    """But for rounding, which BLAS need not repeat: 1e-7, magnified by few steps of training."""
    once, again = (list(digits.study([128], 2, 1)) for _ in range(2))
    losses = np.array([r.loss for r in once])
    np.testing.assert_allclose([r.loss for r in again], losses, rtol=1e-3)
    assert [r.accuracy for r in again] == pytest.approx([r.accuracy for r in once], abs=0.01)
    assert (abs(losses[::2] / losses[1::2] - 1) > 2e-3).all()  # the seeds in turns


def test_an_image_is_read_by_itself() -> None:
    """Batch norm uses its running statistics: one pixel of one image would have no variance."""
    training, test = digits.load()
    rng = np.random.default_rng(0)
    network = digits.Network(digits.STRIDES["narrow"], "batch", rng)
    digits.train(network, training, 32, 1, rng)
    some = [digits.Data(test.images[i : i + 1], test.digits[i : i + 1]) for i in range(40)]
    alone = np.mean([digits.accuracy(network, image) for image in some])
    together = digits.accuracy(network, digits.Data(test.images[:40], test.digits[:40]))
    assert alone == pytest.approx(together, abs=0.03)  # one image, should it be a tie


def test_norms_start_alike_and_see_the_same_batches() -> None:
    first = [digits.Network((2, 2, 2), norm, np.random.default_rng(3)) for norm in digits.NORMS]
    for other in first[1:]:
        pairs = [
            [m.parameters()["weight"] for m in net.layers if isinstance(m, digits.Conv)]
            for net in (first[0], other)
        ]
        for a, b in zip(*pairs):
            np.testing.assert_array_equal(a, b)


def test_batch_norm_falls_off_and_group_norm_does_not() -> None:
    """The finding of Wu and He, where the last norm of a batch of two sees two numbers a channel.

    Over 8 seeds, batch norm reads 0.91 to 0.92 of the images rightly with batches of 32 and 0.32 to
    0.44 with batches of 2; group norm 0.87 to 0.90 and 0.91 to 0.93. With two numbers a channel no
    other outcome is to be expected: they become -1 and 1, whatever they were.
    """
    found = {
        (norm, size): np.array([trained("narrow", norm, size, seed)[0] for seed in SEEDS])
        for norm in ("batch", "group")
        for size in (32, 2)
    }
    means = {kind: values.mean() for kind, values in found.items()}
    spreads = {kind: values.std(ddof=1) for kind, values in found.items()}
    assert means["batch", 32] > 0.85
    assert means["group", 2] > means["group", 32] - 0.03
    gap = means["group", 2] - means["batch", 2]
    assert gap > 0.2
    assert gap > 2 * (spreads["group", 2] + spreads["batch", 2])


def test_small_batches_disturb_training_before_they_cost_accuracy() -> None:
    """With 32 numbers a channel: a loss of 1.4 to 1.6, and 0.7 to 0.9 with group norm."""
    losses = {norm: trained("wide", norm, 2, 0)[1][-1] for norm in ("batch", "group")}
    assert losses["batch"] > 1.25 * losses["group"]


# --- The command ----------------------------------------------------------------------------------

SHORT = ["--epochs", "1", "--batch-sizes", "449", "128"]


def test_table_and_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "digits.png"
    assert digits.main([*SHORT, "--seeds", "2", "--plot", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert out.isascii()
    rows = [line.split() for line in out.splitlines()]
    for name, norm in KINDS:
        assert sum(row[:2] == [name, norm] for row in rows) == 2  # accuracy and loss
    assert out.count("+-") == 2 * 2 * len(KINDS)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert digits.main([*SHORT, "--seeds", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"] == fn.show_config("dicts")
    runs = found["runs"]
    kinds = [(r["network"], r["norm"], r["batch_size"], r["seed"]) for r in runs]
    assert kinds == [(*kind, size, 0) for kind in KINDS for size in (449, 128)]
    assert all(0 <= r["accuracy"] <= 1 and r["loss"] > 0 for r in runs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds must be 1 or more"),
        (["--epochs", "-1"], "--epochs and --seeds must be 1 or more"),
        (["--batch-sizes", "32", "1"], "--batch-sizes must be from 2"),
        (["--batch-sizes", "899"], "--batch-sizes must be from 2"),
        (["--plot", "nowhere/digits.png"], "there is no directory 'nowhere'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_arguments_that_cannot_be(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        digits.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
