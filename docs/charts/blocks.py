"""Draws the block of numbers, with the cells in blue that share a mean and a spread: SVG files.

``python docs/charts/blocks.py`` writes docs/_static/blocks and the logo. Which cells share a
statistic is asked of fastnorm/operations.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastnorm.operations import OPERATIONS

FOLDER = Path(__file__).resolve().parent.parent / "_static" / "blocks"
SAMPLES, CHANNELS, POSITIONS = SHAPE = (4, 6, 5)
CELL, BACK = 16, 9  # pixels: the side of a cell, and how far the next sample lies behind
MARGIN = 22
COLOURS = """<style>
.plain { fill: #f8fafc; stroke: #94a3b8 } .blue { fill: #2563eb; stroke: #bfd3fb }
text { fill: #4b5563; font: 13px system-ui, sans-serif; text-anchor: middle }
.title { fill: #111827; font-size: 17px; font-weight: 600 }
@media (prefers-color-scheme: dark) {
.plain { fill: #273244; stroke: #64748b } .blue { fill: #60a5fa; stroke: #1e3a5f }
text { fill: #cbd5e1 } .title { fill: #f1f5f9 } }
</style>"""

# The cells of which operation, with which arguments, are blue in which file; and what they share.
NORMS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "batch": ("batch_norm (training)", {}, "batch norm", "a channel, all samples"),
    "layer": ("group_norm", {"num_groups": 1}, "layer norm", "a sample, all channels"),
    "instance": ("instance_norm", {}, "instance norm", "a channel of a sample"),
    "group": ("group_norm", {"num_groups": 2}, "group norm", "a group of channels"),
    "token": ("layer_norm (axis)", {}, "layer norm, RMS norm", "a token, its features"),
}


def shared(label: str, arguments: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Which elements share the statistic of the last channel's first position in sample 0."""
    operation = next(op for op in OPERATIONS if op.label == label)
    ids = operation.group_ids(SHAPE, **arguments)
    blue: np.ndarray[Any, Any] = ids == ids[0, -1, 0]
    return blue


def block(blue: np.ndarray[Any, Any], left: float = 0.0, top: float = 0.0) -> Iterator[str]:
    """Draw the cells that are seen: the front, the top and the right side."""
    samples, channels, _positions = blue.shape

    def corner(sample: int, channel: int, position: int) -> str:
        x = left + CELL * channel + BACK * sample
        y = top + CELL * position + BACK * (samples - sample)
        return f"{x:g},{y:g}"

    Corner = Callable[[int, int], str]
    faces: tuple[tuple[np.ndarray[Any, Any], Corner], ...] = (
        (blue[0], lambda u, v: corner(0, u, v)),
        (blue[:, :, 0], lambda u, v: corner(u, v, 0)),
        (blue[:, -1], lambda u, v: corner(u, channels, v)),
    )
    for cells, place in faces:
        for u, v in np.ndindex(cells.shape):
            corners = (place(u, v), place(u + 1, v), place(u + 1, v + 1), place(u, v + 1))
            kind = "blue" if cells[u, v] else "plain"
            yield f'<polygon class="{kind}" points="{" ".join(corners)}"/>'


def size(shape: tuple[int, ...]) -> tuple[int, int]:
    """The width and height of a block."""
    samples, channels, positions = shape
    return CELL * channels + BACK * samples, CELL * positions + BACK * samples


def svg(width: float, height: float, name: str, body: list[str]) -> str:
    """A picture with a name for those who do not see it."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" role="img" aria-label="{name}">'
    )
    return "\n".join([head, COLOURS, *body, "</svg>"]) + "\n"


def single(key: str) -> str:
    """One norm's block, with the names of its sides."""
    label, arguments, name, over = NORMS[key]
    width, height = size(SHAPE)
    sides = [
        (MARGIN + CELL * CHANNELS / 2, height + 16, "C"),
        (10, BACK * SAMPLES + CELL * POSITIONS / 2 + 4, "P"),
        (MARGIN + width - BACK * SAMPLES / 2 + 9, height - BACK * SAMPLES / 2 + 9, "N"),
    ]
    body = list(block(shared(label, arguments), MARGIN, 2))
    body += [f'<text x="{x:g}" y="{y:g}">{text}</text>' for x, y, text in sides]
    return svg(width + MARGIN + 12, height + 22, f"{name}: {over} share a mean and a spread", body)


def overview() -> str:
    """Four norms beside each other."""
    width, height = size(SHAPE)
    step, body, names = width + 56, [], []
    for i, key in enumerate(("batch", "layer", "instance", "group")):
        label, arguments, name, over = NORMS[key]
        body += block(shared(label, arguments), 28 + step * i, 34)
        middle = 28 + step * i + width / 2
        body.append(f'<text class="title" x="{middle:g}" y="20">{name}</text>')
        body.append(f'<text x="{middle:g}" y="{34 + height + 22}">{over}</text>')
        names.append(f"{name}: {over}")
    title = f"The cells that share a mean and a spread. {'; '.join(names)}"
    return svg(step * 4, 34 + height + 30, title, body)


def logo() -> str:
    """A small block, of which one channel is blue."""
    blue = np.zeros((2, 3, 3), bool)
    blue[:, -1] = True
    width, height = size(blue.shape)
    return svg(width + 4, height + 4, "fastnorm", list(block(blue, 2, 2)))


def pictures() -> dict[str, str]:
    """Every file's name and text."""
    return {f"{key}.svg": single(key) for key in NORMS} | {
        "norms.svg": overview(),
        "logo.svg": logo(),
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in pictures().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
