"""What has been found, as a table, a line, JSON's numbers and a picture."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fastnorm._files.histogram import Histogram
from fastnorm._files.names import escaped


def summary(moments: Any, scale: float) -> dict[str, Any]:
    """Return count, mean, var and std of each channel, of numbers divided by `scale`."""
    mean, var, std = _scaled(moments, scale)
    return {"count": np.asarray(moments.count), "mean": mean, "var": var, "std": std}


def _scaled(moments: Any, scale: float) -> tuple[Any, Any, Any]:
    """Mean, variance and standard deviation, as arrays, of numbers divided by `scale`."""
    with np.errstate(all="ignore"):
        mean, var, std = moments.mean / scale, moments.var() / scale / scale, moments.std() / scale
    return np.asarray(mean), np.asarray(var), np.asarray(std)


def not_finite_channels(moments: Any, scale: float) -> list[str]:
    """Say of each channel whose mean and variance are not finite numbers what is wrong."""
    means, var, _ = _scaled(moments, scale)
    counts = np.asarray(moments.count)
    wrong = ~(np.isfinite(means) & np.isfinite(var))
    lines = []
    for place in map(tuple, np.argwhere(wrong)):
        name = f"channel {','.join(map(str, place))}" if place else "all numbers"
        if counts[place] == 0:
            lines.append(f"{name}: there are no numbers to take a mean of")
        elif np.isfinite(means[place]):
            lines.append(f"{name}: the variance is beyond the range of floats")
        else:
            lines.append(f"{name}: the mean is {means[place]}")
    return lines


def normalize_line(moments: Any, scale: float) -> str:
    """Return ``Normalize(mean=[...], std=[...])``, as it is written in a training script."""

    def numbers(values: Any) -> str:
        return ", ".join(f"{v:.6g}" for v in np.ravel(values))

    mean, _, std = _scaled(moments, scale)
    return f"Normalize(mean=[{numbers(mean)}], std=[{numbers(std)}])"


def table(groups: Mapping[str, Any], total: Any, scale: float) -> Iterator[str]:
    """Yield a line for each group and channel, and for all groups together where there are some."""
    named = [(escaped(name), moments) for name, moments in sorted(groups.items())]
    if len(named) > 1:
        named.append(("all", total))
    first = 0 if any(name for name, _ in named) else 1

    def lines() -> Iterator[tuple[str, ...]]:
        yield ("folder", "channel", "count", "mean", "std")[first:]
        for name, moments in named:
            mean, _, std = _scaled(moments, scale)
            counts = np.asarray(moments.count)
            for place in np.ndindex(mean.shape):
                numbers = f"{counts[place]:,}", f"{mean[place]:.9g}", f"{std[place]:.9g}"
                yield (name, ",".join(map(str, place)), *numbers)[first:]

    # Made twice, as millions of lines would take gigabytes.
    widths: list[int] = []
    for line in lines():
        widths = [max(w, len(c)) for w, c in zip(widths or [0] * len(line), line)]
    for line in lines():
        yield "  ".join(
            c.ljust(w) if i + first == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths))
        )


def plot(histogram: Histogram, moments: Any, scale: float, kind: str = "png") -> bytes:
    """Draw each channel's histogram, with its mean and standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    edges = histogram.edges / scale
    colours = ("tab:red", "tab:green", "tab:blue") if len(histogram.counts) == 3 else None
    mean, _, std = _scaled(moments, scale)
    means, stds = np.ravel(mean), np.ravel(std)
    for channel, counts in enumerate(histogram.counts):
        colour = colours[channel] if colours else f"C{channel % 10}"
        label = f"{channel}: mean {means[channel]:.4g}, std {stds[channel]:.4g}"
        density = counts / max(counts.sum(), 1) / np.diff(edges)
        axes.stairs(density, edges, color=colour, label=label)
        axes.axvline(means[channel], color=colour, linestyle=":", linewidth=1)
    axes.set_xlabel("value" if scale == 1 else f"value / {scale:g}")
    axes.set_ylabel("density")
    if len(means) <= 16:
        axes.legend(title="channel")
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=120)
    return picture.getvalue()
