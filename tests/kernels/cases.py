"""What check_kernels.c includes: the sizes of kernels, and layouts with the schedules of passes."""

from __future__ import annotations

import runpy
from itertools import product
from pathlib import Path
from typing import Any

from fastnorm._reference import IN_KERNELS
from fastnorm.layout import Layout
from fastnorm.machine import Machine
from fastnorm.schedule import (
    BackwardSchedule,
    ForwardSchedule,
    backward_schedule,
    forward_schedule,
)
from tests.helpers import BF16, F16, F32, F64, ROOT

ALWAYS_NON_TEMPORAL = Machine(always_non_temporal=True)

# Dimensions a, b, p, s and c, neighbours, and the strides of x and of a weight.
LAYOUTS: dict[str, tuple[tuple[int, ...], int, tuple[int, ...], tuple[int, ...]]] = {
    "rows": ((9, 5, 1, 300, 1), 1, (1500, 300, 0, 1, 0), (0, 0, 0, 1, 0)),
    "short rows": ((3, 11, 1, 19, 1), 1, (209, 19, 0, 1, 0), (0, 0, 0, 1, 0)),
    "long rows": ((1, 2, 1, 9001, 1), 1, (0, 9010, 0, 1, 0), (0, 0, 0, 1, 0)),
    "groups of planes": ((2, 3, 4, 35, 1), 1, (420, 140, 35, 1, 0), (0, 4, 1, 0, 0)),
    "planes apart": ((3, 5, 4, 50, 1), 1, (250, 50, 750, 1, 0), (0, 1, 0, 0, 0)),
    "long planes": ((2, 2, 3, 70000, 1), 1, (420000, 210000, 70000, 1, 0), (0, 3, 1, 0, 0)),
    "columns": ((1, 1, 3, 40, 21), 1, (0, 0, 840, 21, 1), (0, 0, 0, 0, 1)),
    "groups of columns": ((2, 1, 2, 50, 24), 4, (2400, 0, 1200, 24, 1), (0, 0, 0, 0, 1)),
    "many columns": ((1, 1, 1, 30, 700), 1, (0, 0, 0, 700, 1), (0, 0, 0, 1, 0)),
    "many rows": ((1, 1, 1, 5000, 16), 1, (0, 0, 0, 16, 1), (0, 0, 0, 0, 1)),
}
STORAGES = {"F32": F32, "BF16": BF16, "F16": F16, "F64": F64}
# As the fields of Options: centred, weighted, biased, residual, threads, scaling and activation.
OPTIONS: list[tuple[int, int, int, int, int, str, str]] = [
    (1, 1, 1, 0, 1, "RSTD", "IDENTITY"),
    (1, 0, 0, 0, 3, "RSTD", "IDENTITY"),
    (0, 1, 0, 0, 2, "RSTD", "IDENTITY"),
    (0, 0, 0, 0, 1, "NORM", "IDENTITY"),
    (1, 1, 1, 1, 2, "RSTD", "RELU"),
    *((1, 1, 1, 0, 1, "RSTD", name.upper()) for name in IN_KERNELS if name != "relu"),
]


def fields(**values: Any) -> str:
    """An initialiser of a structure of C's."""
    found = ((name, int(v) if isinstance(v, bool) else v) for name, v in values.items())
    return "{" + ", ".join(f".{name} = {value}" for name, value in found) + "}"


def of_forward(found: ForwardSchedule) -> str:
    """As `follow` in _core/bindings.pxi has it."""
    own = ("width", "chunks", "items", "foldable", "tabulated", "non_temporal", "direct")
    own += ("direct_non_temporal", "max_threads", "small", "releases_gil")
    blocking = ("length", "block", "split_length", "splits", "bf16_direct")
    values = {name: getattr(found, name) for name in own}
    values |= {name: getattr(found.blocking, name) for name in blocking}
    return fields(**values, walk=f"WALK_{found.path.upper()}")


def of_backward(found: BackwardSchedule) -> str:
    """As `follow_back` has it."""
    own = ("non_temporal", "bf16_direct", "convert_weight", "together", "few_owners", "max_threads")
    own += ("small",)
    blocking = ("length", "width", "chunks", "inside", "owners", "sharers", "span", "segments")
    blocking += ("plane_segments", "cell_p", "cell_s", "cell_c", "cells", "parts", "sweeps")
    values = {name: getattr(found, name) for name in own}
    values |= {name: getattr(found.blocking, name) for name in blocking}
    values |= dict(zip(("own_a", "own_b", "own_c"), found.blocking.own))
    values["keep_cells"] = not (found.blocking.sweeps and found.blocking.inside)
    path = {"whole_rows": found.path == "rows", "whole_groups": found.path == "groups"}
    return fields(**values, **path)


def cases() -> str:
    """The header with all of them."""
    layouts, found = [], []
    for i, (name, (dims, neighbours, x, w)) in enumerate(LAYOUTS.items()):
        columns = dims[4] > 1
        numbers = [*dims, neighbours, int(columns)]
        strides = ", ".join("{" + ", ".join(map(str, steps)) + "}" for steps in (x, w))
        layouts.append(f'{{"{name}", {", ".join(map(str, numbers))}, {strides}}}')
        full = dict.fromkeys(("x", "y", "residual", "dy", "dx"), x)
        weights = dict.fromkeys(("weight", "bias", "factor", "dweight"), w)
        layout = Layout(columns, dims, neighbours, full | weights | {"stats": (1, 1, 0, 0, 1)})
        for storage, here, options in product(STORAGES, (Machine(), ALWAYS_NON_TEMPORAL), OPTIONS):
            _, weighted, biased, residual, *_, activation = options
            dtype = STORAGES[storage]
            real = F64 if dtype == F64 else F32
            of_x = [("x", dtype), ("y", dtype)] + [("residual", dtype)] * residual
            of_w = [("weight", real)] * weighted
            forward = forward_schedule(
                layout,
                (*of_x, *of_w, *[("bias", real)] * biased),
                here,
                activation=None if activation == "IDENTITY" else activation,
            )
            back = backward_schedule(
                layout, (("x", dtype), ("dy", dtype), ("dx", dtype), *of_w), here
            )
            asked = ", ".join(map(str, (storage, *options)))
            found.append(f"{{{i}, {{{asked}}}, {of_forward(forward)}, {of_backward(back)}}}")
    tables = {"Layout LAYOUTS": layouts, "Case CASES": found}
    return "".join(
        f"static const {name}[] = {{\n" + ",\n".join(rows) + "\n};\n"
        for name, rows in tables.items()
    )


def write(folder: Path) -> None:
    """Both headers."""
    sizes = runpy.run_path(str(ROOT / "setup.py"))["sizes_header"]()
    (folder / "sizes.h").write_text(sizes, encoding="utf-8")
    (folder / "cases.h").write_text(cases(), encoding="utf-8")
