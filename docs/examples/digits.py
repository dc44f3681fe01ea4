"""Batch norm needs a batch: a network learns from small batches with three norms and with none.

Wu and He, "Group Normalization" (2018, arXiv:1803.08494), trained ResNet-50 on ImageNet with 32,
16, 8, 4 and 2 images per GPU. From 32 to 2 the error of batch norm rose from 23.6 to 34.7 %; that
of group norm stayed at 24.1 %. This is their experiment in small: a convolutional network learns
the handwritten digits that come with scikit-learn, with batch, group and layer norm and with no
norm. All else is the same, the first weights and the order of the images included.

A batch of two images is more than two numbers, because a channel's statistics also run over its
positions. So there are two networks. They have the same weights and differ in their strides: in
"wide" the last norm sees maps of 4 x 4 pixels, 32 numbers in a batch of two; in "narrow" it sees
single pixels, two numbers.

The networks are NumPy and fastnorm.nn. Arrays are channels-last, (N, H, W, C), which makes a
convolution one matrix product.

    python docs/examples/digits.py --plot digits.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

import fastnorm as fn

Array: TypeAlias = NDArray[Any]

# --- The networks ---------------------------------------------------------------------------------

GROUPS = 4
CHANNELS = (16, 32, 32)
STRIDES = {"wide": (1, 2, 1), "narrow": (2, 2, 2)}

# What stands between a convolution and its ReLU, for a number of channels.
NORMS: dict[str, Callable[[int], list[Any]]] = {
    "batch": lambda channels: [fn.nn.BatchNorm(channels, channel_axis=-1)],
    "group": lambda channels: [fn.nn.GroupNorm(GROUPS, channels, channel_axis=-1)],
    # One group: statistics over (H, W, C), a weight and a bias for each channel. This is the layer
    # norm of Wu and He. fn.nn.LayerNorm((H, W, C)) has the same statistics, and a weight and a bias
    # for each channel of each pixel: more parameters than its rivals.
    "layer": lambda channels: [fn.nn.GroupNorm(1, channels, channel_axis=-1)],
    "none": lambda channels: [],
}


class Network:
    """Three times convolution, norm and ReLU; the mean over positions; one score for each digit."""

    def __init__(self, strides: Sequence[int], norm: str, rng: np.random.Generator) -> None:
        self.layers: list[Any] = []
        inputs = 1
        for outputs, stride in zip(CHANNELS, strides):
            self.layers += [Conv(inputs, outputs, stride, rng), *NORMS[norm](outputs), ReLU()]
            inputs = outputs
        self.layers += [Pool(), Linear(inputs, 10, rng)]

    def __call__(self, x: Array) -> Array:
        """Return ten scores for each image."""
        for layer in self.layers:
            x = layer(x)
        return x

    def backward(self, dy: Array) -> None:
        """Set the gradient of every parameter, from that of the last result."""
        for layer in reversed(self.layers):
            layer.zero_grad()
            dy = layer.backward(dy)

    def eval(self) -> None:
        """Compute as in inference from now on: batch norm uses its running statistics."""
        for layer in self.layers:
            layer.eval()


# --- The layers -----------------------------------------------------------------------------------


class Layer:
    """What a layer has in common with the norms of fastnorm.nn.

    Calling it computes the result. `backward` turns the gradient of that result into the gradient
    of the input, and adds those of the parameters to `grad`.
    """

    def __init__(self, **parameters: Array) -> None:
        self._parameters = {name: p.astype(np.float32) for name, p in parameters.items()}
        self.zero_grad()

    def parameters(self) -> dict[str, Array]:
        """Return the parameters by name, to be changed in place."""
        return self._parameters

    def zero_grad(self) -> None:
        """Set the gradients to zero."""
        self.grad = {name: np.zeros_like(p) for name, p in self._parameters.items()}

    def eval(self) -> None:
        """Do nothing: inference is like training."""


class Linear(Layer):
    """y = x W + b."""

    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator) -> None:
        weight = rng.normal(0, (1 / inputs) ** 0.5, (inputs, outputs))
        super().__init__(weight=weight, bias=np.zeros(outputs))

    def __call__(self, x: Array) -> Array:
        """Multiply and add."""
        self.x = x
        return x @ self._parameters["weight"] + self._parameters["bias"]

    def backward(self, dy: Array) -> Array:
        """Return dx = dy W'; dW = x' dy."""
        self.grad["weight"] += self.x.T @ dy
        self.grad["bias"] += dy.sum(0)
        return dy @ self._parameters["weight"].T


class Conv(Layer):
    """A convolution of 3 x 3 pixels, padded with zeros: a linear layer of every patch."""

    def __init__(self, inputs: int, outputs: int, stride: int, rng: np.random.Generator) -> None:
        # half of the ReLUs are shut: twice the variance (He and others, 2015)
        weight = rng.normal(0, (2 / (9 * inputs)) ** 0.5, (9 * inputs, outputs))
        super().__init__(weight=weight, bias=np.zeros(outputs))
        self.stride = stride

    def __call__(self, x: Array) -> Array:
        """Gather the patches, (N H W, 9 C), and multiply them by the weight."""
        n, h, w, c = x.shape
        padded = np.zeros((n, h + 2, w + 2, c), x.dtype)
        padded[:, 1:-1, 1:-1] = x
        patches = sliding_window_view(padded, (3, 3), (1, 2))[:, :: self.stride, :: self.stride]
        self.shape, (n, h, w, *_) = padded.shape, patches.shape
        self.patches = patches.transpose(0, 1, 2, 4, 5, 3).reshape(n * h * w, 9 * c)
        y: Array = self.patches @ self._parameters["weight"] + self._parameters["bias"]
        return y.reshape(n, h, w, -1)

    def backward(self, dy: Array) -> Array:
        """Send the gradient of each patch back to where the patch came from."""
        n, h, w, outputs = dy.shape
        dy = dy.reshape(n * h * w, outputs)
        self.grad["weight"] += self.patches.T @ dy
        self.grad["bias"] += dy.sum(0)
        dpatches = (dy @ self._parameters["weight"].T).reshape(n, h, w, 3, 3, -1)
        dpadded, s = np.zeros(self.shape, dy.dtype), self.stride
        for i, j in np.ndindex(3, 3):
            dpadded[:, i : i + s * h : s, j : j + s * w : s] += dpatches[:, :, :, i, j]
        return dpadded[:, 1:-1, 1:-1]


class ReLU(Layer):
    """y = max(x, 0)."""

    def __call__(self, x: Array) -> Array:
        """Let through what is positive."""
        self.open = x > 0
        return x * self.open

    def backward(self, dy: Array) -> Array:
        """Let through what went through."""
        return dy * self.open


class Pool(Layer):
    """The mean of each channel over all positions."""

    def __call__(self, x: Array) -> Array:
        """Average over the positions."""
        self.shape = x.shape
        return x.mean((1, 2))

    def backward(self, dy: Array) -> Array:
        """Give each position its share."""
        _, h, w, _ = self.shape
        return np.broadcast_to(dy[:, None, None] / (h * w), self.shape)


# --- Training -------------------------------------------------------------------------------------

RATE, RATE_BATCH = 0.1, 32  # the learning rate is proportional to the batch size, as in the paper
MOMENTUM = 0.9


@dataclass(frozen=True)
class Data:
    """Images (N, 8, 8, 1), and the digits they show."""

    images: Array
    digits: Array


def load() -> tuple[Data, Data]:
    """Return training and test data: the first half of scikit-learn's digits and the second.

    They are not shuffled: neighbours seem to be by one hand, and the test is to be on others.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    half = len(found.target) // 2
    seen = found.images[:half]
    images = ((found.images - seen.mean()) / seen.std()).astype(np.float32)[..., None]
    return Data(images[:half], found.target[:half]), Data(images[half:], found.target[half:])


def train(
    network: Network, data: Data, batch_size: int, epochs: int, rng: np.random.Generator
) -> list[float]:
    """Train by gradient descent with momentum; return the mean loss of each epoch.

    The learning rate falls to zero along a straight line. Images that do not fill a last batch sit
    out the epoch.
    """
    moving = [(layer, name) for layer in network.layers for name in layer.parameters()]
    velocities = [np.zeros_like(layer.grad[name]) for layer, name in moving]
    batches = len(data.images) // batch_size
    losses = np.empty((epochs, batches))
    for epoch in range(epochs):
        order = rng.permutation(len(data.images))
        for i in range(batches):
            chosen = order[i * batch_size : (i + 1) * batch_size]
            scores = network(data.images[chosen])
            loss, gradient = fn.nn.cross_entropy(scores, data.digits[chosen])
            losses[epoch, i] = loss
            network.backward(gradient)
            left = 1 - (epoch * batches + i) / losses.size
            rate = RATE * batch_size / RATE_BATCH * left
            for (layer, name), velocity in zip(moving, velocities):
                velocity *= MOMENTUM
                velocity += layer.grad[name]
                layer.parameters()[name] -= rate * velocity
    return [float(loss) for loss in losses.mean(1)]


def accuracy(network: Network, data: Data) -> float:
    """Return the share of images that are read rightly."""
    network.eval()
    return float(np.mean(network(data.images).argmax(1) == data.digits))


# --- The study ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One network, trained and tested."""

    network: str
    norm: str
    batch_size: int
    seed: int
    accuracy: float
    """On the test images."""
    loss: float
    """Of the last epoch of training."""


def study(batch_sizes: Sequence[int], seeds: int, epochs: int) -> Iterator[Run]:
    """Train and test every network, with every norm, at every batch size, from every seed.

    The seed sets the first weights and the order of the images.
    """
    training, test = load()
    for name, norm, batch_size, seed in product(STRIDES, NORMS, batch_sizes, range(seeds)):
        rng = np.random.default_rng(seed)
        network = Network(STRIDES[name], norm, rng)
        losses = train(network, training, batch_size, epochs, rng)
        yield Run(name, norm, batch_size, seed, accuracy(network, test), losses[-1])


def spread(
    runs: Sequence[Run], kind: tuple[str, str, int], value: Callable[[Run], float]
) -> tuple[float, float]:
    """Return mean and standard deviation over the seeds of one network, norm and batch size."""
    values = [value(r) for r in runs if (r.network, r.norm, r.batch_size) == kind]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else np.nan


def table(runs: Sequence[Run], value: Callable[[Run], float], digits: int) -> str:
    """Return mean and standard deviation, a row for each network and norm."""
    batch_sizes = list(dict.fromkeys(r.batch_size for r in runs))
    rows = [["network", "norm", *(f"batch {size}" for size in batch_sizes)]]
    for network, norm in dict.fromkeys((r.network, r.norm) for r in runs):
        found = (spread(runs, (network, norm, size), value) for size in batch_sizes)
        cells = (f"{mean:.{digits}f} +- {deviation:.{digits}f}" for mean, deviation in found)
        rows.append([network, norm, *(cell.removesuffix(" +- nan") for cell in cells)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(f"{text:<{w}}" for text, w in zip(row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw test error and training loss against the batch size."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    styles = {
        "batch": ("#dc2626", "o"),
        "group": ("#2563eb", "s"),
        "layer": ("#0f766e", "^"),
        "none": ("#6b7280", "D"),
    }
    titles = {
        "wide": "wide: last norm over 4 × 4 pixels",
        "narrow": "narrow: last norm over single pixels",
    }
    quantities: dict[str, tuple[Callable[[Run], float], Sequence[float]]] = {
        "test error, %": (lambda r: 100 * (1 - r.accuracy), (2, 5, 10, 20, 50)),
        "training loss, last epoch": (lambda r: r.loss, (0.001, 0.01, 0.1, 1)),
    }
    batch_sizes = sorted({r.batch_size for r in runs}, reverse=True)
    with rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(7.6, 5.6), layout="constrained")
        grid = figure.subplots(2, len(STRIDES), sharex=True, sharey="row")
        for row, (label, (value, ticks)) in zip(grid, quantities.items()):
            for ax, network in zip(row, STRIDES):
                for i, (norm, (colour, marker)) in enumerate(styles.items()):
                    found = [spread(runs, (network, norm, size), value) for size in batch_sizes]
                    means, deviations = zip(*found)
                    aside = 1.06 ** (1.5 - i)  # so that the bars do not hide each other
                    ax.errorbar(
                        np.multiply(batch_sizes, aside), means, deviations, label=norm,
                        color=colour, marker=marker, ms=4, lw=1.3, elinewidth=1, capsize=2,
                    )  # fmt: skip
                ax.set_xscale("log", base=2)
                ax.set_yscale("log")
                ax.set_xticks(batch_sizes, map(str, batch_sizes))
                ax.set_yticks(ticks, map(str, ticks))
                ax.xaxis.set_minor_locator(NullLocator())
                ax.yaxis.set_minor_locator(NullLocator())
                ax.grid(axis="y", color="#e5e7eb")
                ax.spines[["top", "right"]].set_visible(False)
            row[0].set_ylabel(label)
        for ax, network in zip(grid[0], STRIDES):
            ax.set_title(titles[network], fontsize=10)
        for ax in grid[1]:
            ax.set_xlabel("batch size")
        grid[0, 0].invert_xaxis()  # shared: all of them
        grid[0, 0].legend(
            title="norm", alignment="left", title_fontproperties={"weight": "bold"},
            frameon=False, ncols=2, loc="upper left",
        )  # fmt: skip
        figure.savefig(path, dpi=110)


# --- The command line -----------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study and print what came out."""
    parser = argparse.ArgumentParser(
        description="Train a small network on digits with three norms and none, on small batches."
    )
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--epochs", default=10, help="of each training (default: 10)", **number)
    parser.add_argument("--seeds", default=3, help="trainings of each kind (default: 3)", **number)
    parser.add_argument(
        "--batch-sizes", default=[32, 8, 2], nargs="+", help="2 or more (default: 32 8 2)", **number
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the result into a file")
    parser.add_argument("--json", action="store_true", help="print every training as JSON")
    given = parser.parse_args(argv)
    if min(given.epochs, given.seeds) < 1:
        parser.error("--epochs and --seeds must be 1 or more")
    if given.plot and not given.plot.parent.is_dir():
        parser.error(f"--plot: there is no directory '{given.plot.parent}'")
    if not 2 <= min(given.batch_sizes) <= max(given.batch_sizes) <= len(load()[0].digits):
        parser.error("--batch-sizes must be from 2 to the number of training images")

    runs = []
    of = len(STRIDES) * len(NORMS) * len(given.batch_sizes) * given.seeds
    for done in study(given.batch_sizes, given.seeds, given.epochs):
        runs.append(done)
        if sys.stderr.isatty():
            print(f"\r{len(runs)} of {of}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)

    if given.json:
        found = {"machine": fn.show_config("dicts"), "runs": [asdict(r) for r in runs]}
        print(json.dumps(found, indent=1))
    else:
        print(f"mean and standard deviation over seeds: {given.seeds}, epochs: {given.epochs}\n")
        print(f"test accuracy, %\n{table(runs, lambda r: 100 * r.accuracy, 1)}\n")
        print(f"training loss of the last epoch\n{table(runs, lambda r: r.loss, 4)}")
    if given.plot:
        draw(runs, given.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
