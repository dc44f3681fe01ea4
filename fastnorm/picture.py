"""The picture of the demonstration: feature maps before and after each norm, times and errors."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

# Channels that are drawn, and the colours of their titles and histograms.
SHOWN = {"light": "#b45309", "red − green": "#be123c", "coarse stripes, 45°": "#0f766e"}
INK, FAINT, EDGE, SHARED, PLAIN = "#1f2937", "#6b7280", "#94a3b8", "#2563eb", "#f8fafc"
INCHES, DPI = (15.0, 13.4), 100
REACH = 3.0  # the colour scale reaches from minus so many spreads to so many
CONTENDERS = ("#2563eb", "#9ca3af", "#f59e0b")  # fastnorm's colour is that of what it computes


@dataclass(frozen=True)
class Row:
    """What is drawn of a norm."""

    name: str
    text: str
    samples: bool
    """Whether the samples share a statistic."""
    channels: int
    """How many channels share it."""
    y: Array
    milliseconds: Mapping[str, float]
    """Of a call, by who answers it."""


def draw(
    images: Array,
    x: Array,
    names: Sequence[str],
    rows: Sequence[Row],
    heading: str,
    errors: Mapping[str, float],
) -> bytes:
    """Draw the photographs, some of their channels before and after each norm, and who shares what.

    The block next to each norm is its whole input; the blue cells share a mean and a spread. Below
    are the times, and `errors` by who made them, under their `heading`. The picture is a PNG file.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    samples = (0, len(images) // 2)  # the first cut of each photograph
    channels = [names.index(name) for name in SHOWN]
    # columns: the text, the block, and for each sample a gap, a photograph or histogram, channels
    width = 2 + len(SHOWN)
    ratios = [0.95, 1.25] + [0.16, 1, *(1 for _ in SHOWN)] * len(samples)
    with rc_context({"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK}):
        figure = Figure(figsize=INCHES, facecolor="white")
        grid = figure.add_gridspec(
            1 + len(rows), len(ratios), width_ratios=ratios,
            left=0.015, right=0.988, bottom=0.285, top=0.909, wspace=0.06, hspace=0.09,
        )  # fmt: skip

        def cells(row: int, i: int) -> list[Any]:
            """The axes of one sample in one row."""
            first = 3 + width * i
            return [figure.add_subplot(grid[row, first + j]) for j in range(width - 1)]

        _write_heading(figure, x.shape)
        _write_label(figure.add_subplot(grid[0, 0]), "before", "N samples of\nC channels of\nH × W")
        _draw_block(figure.add_subplot(grid[0, 1]), x.shape, None)
        for i, sample in enumerate(samples):
            ax, *others = cells(0, i)
            _draw_image(ax, images[sample].transpose(1, 2, 0))
            for ax, channel, (name, colour) in zip(others, channels, SHOWN.items()):
                shown = _draw_image(ax, x[sample, channel] / x.std(), REACH)
                ax.set_title(name, fontsize=9, pad=5, color=colour)

        for i_row, row in enumerate(rows, start=1):
            text = "\n".join(fill(line, 21) for line in row.text.split("\n"))
            _write_label(figure.add_subplot(grid[i_row, 0]), row.name, text)
            _draw_block(figure.add_subplot(grid[i_row, 1]), x.shape, row)
            for i, sample in enumerate(samples):
                ax, *others = cells(i_row, i)
                _draw_histograms(ax, row.y[sample, channels], last=i_row == len(rows))
                for ax, channel in zip(others, channels):
                    _draw_image(ax, row.y[sample, channel], REACH)

        bar = figure.add_axes((0.5, 0.238, 0.3, 0.01))
        ticks = np.linspace(-REACH, REACH, 7)
        figure.colorbar(shown, bar, orientation="horizontal", extend="both", ticks=ticks)
        bar.set_title("in standard deviations; before a norm, in that of all numbers", fontsize=9)
        bar.tick_params(labelsize=8, length=2)
        _draw_times(figure.add_axes((0.05, 0.035, 0.5, 0.14)), rows)
        _draw_errors(figure.add_axes((0.66, 0.035, 0.31, 0.14)), heading, errors)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _write_heading(figure: Any, shape: tuple[int, ...]) -> None:
    n, c, h, w = shape
    figure.text(0.015, 0.970, "One block of numbers, five norms", fontsize=19, weight="bold")
    figure.text(
        0.015,
        0.946,
        f"{n} cuts of two photographs under {c} filters: feature maps of {h} × {w}. A norm "
        "subtracts a mean and divides by a spread, and the norms differ in which cells share them "
        "(blue).",
        fontsize=11,
        color=FAINT,
    )
    figure.text(
        0.015,
        0.232,
        "curves: how the three channels are distributed\n(square root of the share of the cells)",
        fontsize=9,
        color=FAINT,
        linespacing=1.4,
    )


def _write_label(ax: Any, name: str, text: str) -> None:
    ax.axis("off")
    ax.text(0, 0.93, name, fontsize=13, weight="bold", va="top")
    ax.text(0, 0.74, text, fontsize=9, va="top", color=FAINT, linespacing=1.35)


def _draw_times(ax: Any, rows: Sequence[Row]) -> None:
    """How long a call takes, of each norm and contender."""
    names = list(rows[0].milliseconds)
    width = 0.8 / len(names)
    for i, (name, colour) in enumerate(zip(names, CONTENDERS)):
        places = np.arange(len(rows)) + width * (i - (len(names) - 1) / 2)
        bars = ax.bar(places, [row.milliseconds[name] for row in rows], width, color=colour)
        bars.set_label(name)
        ax.bar_label(bars, fmt="%.1f", fontsize=8, color=FAINT, padding=2)
    longest = max(max(row.milliseconds.values()) for row in rows)
    ax.set(xticks=range(len(rows)), xticklabels=[row.name for row in rows])
    ax.set_ylim(0, 1.3 * longest)  # room for the legend
    ax.set_title("milliseconds of a call", fontsize=9)
    ax.legend(fontsize=8, frameon=False, ncols=len(names), loc="upper left")
    _plain(ax)


def _draw_errors(ax: Any, heading: str, errors: Mapping[str, float]) -> None:
    """The errors of data far from zero, in what the result is counted in: standard deviations."""
    names = list(errors)
    found = [error if np.isfinite(error) and error > 1e-8 else 1e-8 for error in errors.values()]
    bars = ax.barh(names, found, 0.6, color=CONTENDERS[: len(names)])
    ax.bar_label(bars, [f" {error:.0e}" for error in errors.values()], fontsize=8, color=FAINT)
    ax.set(xscale="log", xlim=(1e-8, max(1.0, 10 * max(found))))
    ax.set_xlabel("standard deviations, each line ten times the one before", fontsize=8)
    ax.set_title(fill(heading, 60), fontsize=9)
    ax.invert_yaxis()
    _plain(ax)


def _plain(ax: Any) -> None:
    ax.spines[["right", "top"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(EDGE)
    ax.tick_params(labelsize=8, length=2, color=EDGE, labelcolor=INK, which="both")
    ax.minorticks_off()


def _draw_image(ax: Any, values: Array, reach: float | None = None) -> Any:
    """A photograph (H, W, 3), or one channel in colours that reach from -reach to reach."""
    from matplotlib import colormaps

    ax.axis("off")
    if reach is None:
        return ax.imshow(values)
    # fewer colours than 256 look the same and take a third of the bytes less
    colours = colormaps["RdBu_r"].resampled(81)
    return ax.imshow(values, cmap=colours, vmin=-reach, vmax=reach, interpolation_stage="data")


def _draw_histograms(ax: Any, channels: Array, last: bool) -> None:
    """How the values of some channels (K, H, W) are distributed."""
    edges = np.linspace(-4, 4, 41)
    for values, colour in zip(channels, SHOWN.values()):
        # the square root shows the tails of a narrow peak
        heights = np.sqrt(np.histogram(values, edges)[0] / values.size)
        ax.stairs(heights, edges, color=colour, lw=1.1)
        ax.stairs(heights, edges, color=colour, alpha=0.12, fill=True)
    ax.axvline(0, color=FAINT, lw=0.5)
    ax.set(xlim=(-4, 4), ylim=(0, 1), xticks=(-3, 0, 3), yticks=[])
    ax.set_box_aspect(1)
    ax.spines[["left", "right", "top"]].set_visible(False)
    ax.spines["bottom"].set_color(EDGE)
    ax.tick_params(labelsize=8, length=2, pad=2, labelbottom=last, color=EDGE, labelcolor=FAINT)


def _draw_block(ax: Any, shape: tuple[int, ...], row: Row | None) -> None:
    """The input as a block of N x C x (H x W) cells; in blue, those that share one statistic."""
    from matplotlib.collections import PolyCollection

    n, c, positions = shape[0], shape[1], 8  # 8 stand for all H x W of them
    shared = np.zeros((n, c, positions), bool)
    if row is not None:
        shared[: n if row.samples else 1, c - row.channels :] = True

    def corner(sample: int, channel: int, position: int) -> tuple[float, float]:
        """Channels go to the right, positions down, samples backwards."""
        return channel + 0.6 * sample, 1.6 * (positions - position) + 0.6 * sample

    faces: Any = (
        (shared[0], lambda u, v: corner(0, u, v)),  # front
        (shared[:, :, 0], lambda u, v: corner(u, v, 0)),  # top
        (shared[:, -1], lambda u, v: corner(u, c, v)),  # right
    )
    squares = [
        [place(u, v), place(u + 1, v), place(u + 1, v + 1), place(u, v + 1)]
        for cells, place in faces
        for u, v in np.ndindex(cells.shape)
    ]
    blue = np.concatenate([cells.ravel() for cells, _ in faces])
    ax.add_collection(
        PolyCollection(
            squares,
            facecolors=np.where(blue, SHARED, PLAIN),
            edgecolors=np.where(blue, "#93b4f5", EDGE),
            lw=0.5,
        )
    )
    if row is None:
        style = {"fontsize": 9, "color": FAINT, "va": "center", "ha": "center"}
        ax.text(c / 2, -1.6, "C", **style)
        ax.text(-0.9, 0.8 * positions, "H × W", rotation=90, **style)
        ax.text(c + 0.3 * n + 1.3, 0.3 * n - 0.9, "N", **style)
    ax.set(
        aspect="equal", xlim=(-1.8, c + 0.6 * n + 0.4), ylim=(-2.4, 1.6 * positions + 0.6 * n + 0.4)
    )
    ax.axis("off")
