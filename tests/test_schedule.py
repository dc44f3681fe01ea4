"""How passes are carried out, decided without running a kernel."""

from __future__ import annotations

import ast
import itertools
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import _core, machine, schedule
from fastnorm.layout import Layout, describe
from fastnorm.machine import MODELS, Machine
from fastnorm.runtime import on_machine
from fastnorm.schedule import (
    BACKWARD_FEW_TASKS,
    BACKWARD_MAX_PLANES,
    BACKWARD_MIN_RUN,
    BLOCK,
    MIN_RUN,
    NON_TEMPORAL_MIN_RUN,
    SPLIT_BLOCKS,
    backward_schedule,
    forward_schedule,
)

from .helpers import BF16, F16, F32, F64

THREADS = (1, 2, 3, 8, 64)


def laid_out(
    shape: tuple[int, ...], reduced: tuple[bool, ...], strides: dict[str, tuple[int, ...]]
) -> Layout | None:
    """The layout of operands, x first, by their strides in elements."""
    return describe(tuple((name, shape, own, 1) for name, own in strides.items()), reduced)


def walk(
    shape: tuple[int, ...],
    reduced: str,
    *,
    channels_last: bool = False,
    weight: str = "",
    gradients: bool = True,
    **more: bool,
) -> Layout:
    """A layout of an array: which of its axes are reduced ("r") or kept ("k"), and have weights."""
    order = (0, *range(2, len(shape)), 1) if channels_last else range(len(shape))
    steps, step = [0] * len(shape), 1
    for axis in reversed(tuple(order)):
        steps[axis], step = step, step * shape[axis]
    full = tuple(steps)
    kept = tuple(axis == "k" for axis in reduced)

    def own(chosen: tuple[bool, ...]) -> tuple[int, ...]:
        strides, n = [0] * len(shape), 1
        for axis in reversed(range(len(shape))):
            if chosen[axis]:
                strides[axis], n = n, n * shape[axis]
        return tuple(strides)

    strides = {name: full for name, there in ({"x": True, "y": True} | more).items() if there}
    if weight:
        strides |= {name: own(tuple(axis == "w" for axis in weight)) for name in ("weight", "bias")}
        if gradients:
            strides |= {"factor": strides["weight"], "dweight": strides["weight"]}
    strides["stats"] = own(kept)
    found = laid_out(shape, tuple(axis == "r" for axis in reduced), strides)
    assert found is not None
    return found


def dtypes(layout: Layout, dtype: Any = F32) -> schedule.Dtypes:
    real = F64 if dtype == F64 else F32
    kinds = {"mask": np.dtype(bool), "weight": real, "bias": real}
    names = [n for n in layout.strides if n not in ("stats", "factor", "dweight")]
    return tuple((name, kinds.get(name, np.dtype(dtype))) for name in names)


def layer(rows: int, n: int, **more: bool) -> Layout:
    return walk((rows, n), "kr", weight="-w", **more)


def group(shape: tuple[int, ...], groups: int, **more: bool) -> Layout:
    n, c, *positions = shape
    size = int(np.prod(positions))
    return walk((n, groups, c // groups, size), "kkrr", weight="-ww-", **more)


def channels_last(n: int, c: int, size: int) -> Layout:
    """Batch norm of memory in which channels are neighbours."""
    return walk((n, c, size), "rkr", channels_last=True, weight="-w-")


FORWARD = {
    f"{name} {np.dtype(dtype).name}": (layout, dtypes(layout, dtype))
    for (name, layout), dtype in itertools.product(
        {
            "layer 8x768": layer(8, 768),
            "layer 4096x768": layer(4096, 768),
            "layer 3x70004": layer(3, 70_004),
            "group 8x256x32x32": group((8, 256, 32, 32), 32),
            "group 2x96x256": group((2, 96, 16, 16), 4),
            "group 1x512x64x64": group((1, 512, 64, 64), 32),
            "batch 48x384x81 channels-last": channels_last(48, 384, 81),
            "batch 4x2048x49 channels-last": channels_last(4, 2048, 49),
        }.items(),
        (F16, BF16, F32, F64),
    )
}


# --- Numeric blocking: the same everywhere --------------------------------------------------------


@pytest.mark.parametrize("name", FORWARD)
def test_what_decides_bits_is_the_same_on_every_machine(name: str) -> None:
    layout, types = FORWARD[name]
    others = [*MODELS.values(), Machine(always_non_temporal=True), Machine(l3=1 << 10)]
    others += [Machine().with_measured(dict.fromkeys(machine.MEASURED, n)) for n in (1, 1 << 40)]
    first, *rest = [asdict(forward_schedule(layout, types, m).blocking) for m in others]
    assert all(other == first for other in rest)
    back = (("dy", types[0][1]), ("dx", types[0][1]), *types)
    layout = replace(layout, strides={**layout.strides, "dx": layout.strides["x"]})
    first_back, *rest_back = [asdict(backward_schedule(layout, back, m).blocking) for m in others]
    assert all(other == first_back for other in rest_back)


def test_blocks_do_not_depend_on_the_batch() -> None:
    """So each sample has the bits that it has alone."""
    one, many = (
        asdict(forward_schedule(layout, dtypes(layout), MODELS["zen5"]).blocking)
        for layout in (group((1, 64, 64, 64), 4), group((64, 64, 64, 64), 4))
    )
    assert one == many


def test_threads_are_no_argument() -> None:
    """A cached call keeps its schedule, however many threads it is later allowed."""
    layout = layer(4096, 768)
    found = forward_schedule(layout, dtypes(layout), MODELS["zen5"])
    assert [found.threads(n) for n in THREADS] == list(THREADS)
    assert [found.sharing(n) for n in THREADS] == [
        "alone",
        *["dynamic"] * 2,
        *["dynamic", "static"],
    ]


# --- Tuning, on several machines ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "past"),
    [
        # from 13 of 32 parts of the last cache on, of which one of 480 MB that a socket shares
        # counts as none that is told
        (1663, set()),
        (1664, {"laptop"}),
        (2218, {"laptop"}),
        (2219, {"laptop", "avx2-server"}),
        (4437, {"laptop", "avx2-server"}),
        (4438, set(MODELS)),
    ],
)
def test_results_that_do_not_fit_go_past_the_caches(rows: int, past: set[str]) -> None:
    layout = layer(rows, 768)
    found = {
        n for n, m in MODELS.items() if forward_schedule(layout, dtypes(layout), m).non_temporal
    }
    assert found == past


def test_a_sum_and_its_norm_are_four_arrays() -> None:
    layout, alone = layer(2304, 768, addend=True, total=True), layer(2304, 768)
    found = forward_schedule(layout, dtypes(layout), MODELS["zen5"])
    assert found.non_temporal
    assert not forward_schedule(alone, dtypes(alone), MODELS["zen5"]).non_temporal


def test_short_runs_do_not_go_past_the_caches() -> None:
    """Lines of which only a part is stored non-temporally cost more."""
    n = NON_TEMPORAL_MIN_RUN // 4
    for length, past in ((n - 1, False), (n, True)):
        layout = walk((10_000_000 // length, 2, length), "kkr")
        assert forward_schedule(layout, dtypes(layout), MODELS["zen5"]).non_temporal is past


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_of_x_goes_past_the_caches_earlier(name: str) -> None:
    """dy and dx go through them, too: columns from a quarter of the last one on, rows later."""
    here = MODELS[name]
    for axes, parts in (("kr", 10), ("rk", 8)):
        least = -(-here.last_cache * parts // 32 // (768 * 4))
        for rows, past in ((least - 1, False), (least, True)):
            weight = "-w" if axes == "kr" else "-k"
            layout = walk((rows, 768), axes, weight=weight, y=False, dy=True, dx=True)
            assert backward_schedule(layout, dtypes(layout), here).non_temporal is past


# --- Paths ----------------------------------------------------------------------------------------

PLAIN = [
    (layer(4096, 768), F32, "rows"),
    (layer(4096, 768), BF16, "rows"),
    (layer(4096, 768), F16, "pipelined"),
    (layer(4096, 100), F32, "pipelined"),  # too short to go alone
    (layer(3, 100), F32, "rows"),  # but for a few
    (layer(64, BLOCK + 1), F32, "items"),
    (layer(4096, 768, mask=True), F32, "rows"),
    (layer(4096, 768, mask=True), F64, "items"),
    (layer(4096, 768, mask=True), BF16, "items"),
    (layer(4096, 768, mask=True, addend=True, total=True), F32, "items"),
    (layer(4096, 768, residual=True), F32, "pipelined"),
    (layer(4096, 768, addend=True, total=True), F32, "rows"),
    (group((8, 256, 32, 32), 32), F32, "items"),
    (group((8, 256, 16, 16), 32), F32, "pipelined"),
    (channels_last(8, 64, 100), F32, "items"),
]


@pytest.mark.parametrize(("layout", "dtype", "path"), PLAIN)
def test_paths(layout: Layout, dtype: Any, path: str) -> None:
    assert forward_schedule(layout, dtypes(layout, dtype), MODELS["zen5"]).path == path


def test_short_planes_of_doubles_that_lie_apart_are_copied_together() -> None:
    """Group norm of channels that are not neighbours: planes of a group, far from one another."""
    strides = {"x": (64 * 256, 256, 4 * 256, 1)}
    strides |= {"y": strides["x"], "stats": (4, 1, 0, 0)}
    layout = laid_out((8, 4, 16, 256), (False, False, True, True), strides)
    assert layout is not None
    found = {
        t: forward_schedule(layout, dtypes(layout, t), MODELS["zen5"]).path for t in (F32, F64)
    }
    assert found == {F32: "pipelined" if layout.dims[2] == 1 else "items", F64: "gathered"}


def group_lying(shape: tuple[int, ...], **orders: str) -> Layout | None:
    """Of group norm over (N, G, C, S), by the order of the axes of each operand in memory."""
    strides = {"x": "nkcs", "weight": "kc", "dweight": "kc", "stats": "nk"} | orders

    def steps(order: str) -> tuple[int, ...]:
        found, step = dict.fromkeys("nkcs", 0), 1
        for axis in reversed(order):
            found[axis], step = step, step * shape["nkcs".index(axis)]
        return tuple(0 if n == 1 else s for n, s in zip(shape, found.values()))

    lie = {name: steps(order) for name, order in strides.items()}
    return laid_out(shape, (False, False, True, True), lie)


BACK = {"y": False, "dy": True, "dx": True}
LONGEST = SPLIT_BLOCKS * BLOCK


@pytest.mark.parametrize(
    ("layout", "columns", "planes"),
    [
        # a group's planes follow one another
        (group((8, 64, 1, 2), 8), False, 8),
        (group((8, 64, 7, 7), 8, **BACK), False, 8),
        (group((1, LONGEST // 4, 2, 2), 1), False, LONGEST // 4),
        # of so many that each takes long
        (group((1, LONGEST // 4 + 1, 2, 2), 1), True, 1),
        # weights differ along planes, too
        (walk((8, 24, 9), "krr", weight="-ww"), False, 1),
        (walk((8, 24, 9), "krr", weight="--w"), True, 1),
        (walk((8, 24, 3, 5), "krrr", weight="-w-w"), True, 24),
        (walk((8, 24, 3, 5), "krrr", weight="-ww-"), True, 1),
        (walk((8, 24, 3, 5), "krrr", weight="-w--"), False, 24),
        # other groups or samples lie between them
        (walk((8, 64, MIN_RUN - 1), "rkr", weight="-w-"), True, 1),
        (walk((8, 64, MIN_RUN), "rkr", weight="-w-"), False, 8),
        (walk((8, 128, BACKWARD_MIN_RUN), "rkr", weight="-w-"), True, 1),
        (walk((8, 128, BACKWARD_MIN_RUN), "rkr", weight="-w-", **BACK), False, 8),
        (walk((8, 256, BACKWARD_MIN_RUN - 1), "rkr", weight="-w-", **BACK), True, 1),
        (walk((8, 128, 4, 4), "rkrr", weight="-w--", **BACK), False, 8),
        (walk((8, 127, 4, 4), "rkrr", weight="-w--", **BACK), True, 1),
        (walk((BACKWARD_MAX_PLANES, 128, 16), "rkr", **BACK), False, BACKWARD_MAX_PLANES),
        (walk((BACKWARD_MAX_PLANES + 1, 128, 16), "rkr", **BACK), True, 1),
        (walk((8, 4, 512, 16), "krkr", **BACK), True, 1),
        (walk((8, 128, 16), "rkr", weight="-ww", **BACK), True, 1),
        (walk((8, 24, 9), "krr", weight="-w-", channels_last=True), True, 1),
    ],
)
def test_short_planes(layout: Layout, columns: bool, planes: int) -> None:
    """Which are walked along, and which are columns."""
    assert (layout.columns, layout.dims[2]) == (columns, planes)


@pytest.mark.parametrize(
    ("weight", "neighbours", "shared"),
    [("-w-", 9, True), ("", 9, False), ("--w", 9, False), ("-ww", 9, False), ("ww-", 9, False)],
)
def test_planes_share_a_weight(weight: str, neighbours: int, shared: bool) -> None:
    """Channels of short planes are one row, with weights of their own too."""
    layout = walk((8, 24, 9), "rkr", weight=weight, gradients=False)
    assert (layout.columns, layout.neighbours, layout.shared) == (True, neighbours, shared)
    one_row = weight in ("-w-", "", "-ww")
    assert layout.dims == ((1, 1, 1, 8, 24 * 9) if one_row else (1, 24, 1, 8, 9))
    if shared:
        assert layout.strides["weight"] == layout.strides["stats"] == (0, 0, 0, 0, 1)
        for given in (False, True):
            found = schedule.forward_schedule(layout, dtypes(layout), Machine(), given=given)
            assert found.foldable


@pytest.mark.parametrize("name", ["y", "residual", "mask", "dy", "dx"])
@pytest.mark.parametrize("shape", [(3, 4, 5, 9), (1, 4, 5, 9), (3, 1, 5, 9)], ids=str)
def test_how_other_operands_lie_makes_no_columns(shape: tuple[int, ...], name: str) -> None:
    """Of short planes that follow one another: they are runs, or else copied to be runs."""
    right = group_lying(shape, **{name: "nkcs"})
    assert right is not None
    assert right.dims[2:] == (5, 9, 1)
    for order in itertools.permutations("nkcs"):
        found = group_lying(shape, **{name: "".join(order)})
        assert found is None or found.sums_as(right)
    apart = group_lying(shape, x="kcns", **{name: "nkcs"})
    assert apart is None or apart.columns is (shape[0] > 1)


def test_short_planes_of_few_groups_go_in_one_sweep() -> None:
    """In two, each plane costs more than its numbers do."""
    for size, path in ((49, "groups"), (81, "sweeps")):
        layout = walk((4, 1, 800, size), "kkrr", weight="-ww-", **BACK)
        found = backward_schedule(layout, dtypes(layout), MODELS["zen5"])
        assert (layout.dims[2:4], found.path) == ((800, size), path)


@pytest.mark.parametrize(
    ("shape", "weight", "dtype", "path"),
    [
        ((4096, 768), "-w", F32, "rows"),
        ((4096, 768), "-w", BF16, "rows"),
        ((4096, 768), "-w", F16, "items"),
        ((4096, 40_000), "-w", F32, "items"),  # of which L2 does not hold four
        ((2, 500_000), "-w", F32, "sweeps"),
    ],
)
def test_backward_paths_of_rows(shape: Any, weight: str, dtype: Any, path: str) -> None:
    layout = walk(shape, "kr", weight=weight, y=False, dy=True, dx=True)
    found = backward_schedule(layout, dtypes(layout, dtype), MODELS["zen5"])
    assert found.path == path
    assert found.sharing(1) == "alone"
    assert found.sharing(4) == ("split" if path == "sweeps" else "dynamic")


def test_given_statistics_take_no_path_that_sums() -> None:
    layout = layer(4096, 768)
    assert forward_schedule(layout, dtypes(layout), MODELS["zen5"], given=True).path == "items"


@pytest.mark.parametrize("activation", ["relu", len])
def test_an_activation_does_not_go_with_rows(activation: Any) -> None:
    layout = layer(2048, 768)
    found = forward_schedule(layout, dtypes(layout), MODELS["zen5"], activation=activation)
    assert found.path == "pipelined"
    assert found.direct is (activation == "relu")


# --- Threads --------------------------------------------------------------------------------------


def test_small_passes_run_alone() -> None:
    for rows, alone in ((42, True), (43, False)):  # of 128 kB
        layout = layer(rows, 768)
        found = forward_schedule(layout, dtypes(layout), MODELS["zen5"])
        assert (found.max_threads == 1) is alone
        assert found.sharing(2) == ("alone" if alone else "static")


def test_few_large_groups_are_split() -> None:
    n = SPLIT_BLOCKS * BLOCK
    layout = walk((3, 4 * n), "kr")
    found = forward_schedule(layout, dtypes(layout), MODELS["zen5"])
    assert found.blocking.splits == 4
    shared = {threads: found.sharing(threads) for threads in (1, 2, 3, 4)}
    assert shared == {1: "alone", 2: "split", 3: "dynamic", 4: "split"}


def test_parts_of_a_weight_are_few_enough_to_be_added_up() -> None:
    for rows in (8, 512, 100_000):
        layout = walk((rows, 768), "kr", weight="-w", y=False, dy=True, dx=True)
        found = backward_schedule(layout, dtypes(layout), MODELS["zen5"]).blocking
        assert 1 <= found.parts <= schedule.BACKWARD_PARTS
        assert found.parts * found.cells * 16 <= (2 << 20) + rows * 768 * 4 // 100
        assert not found.sweeps or found.owners * found.parts < BACKWARD_FEW_TASKS


# --- The constants --------------------------------------------------------------------------------


def test_every_size_is_a_whole_number_that_a_build_can_read() -> None:
    tree = ast.parse(Path(schedule.__file__).read_text(encoding="utf-8"))
    names = [
        node.targets[0].id
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    ]
    sizes = {n: getattr(schedule, n) for n in names if isinstance(getattr(schedule, n), int)}
    assert len(sizes) > 40
    assert all(name.isupper() and 0 < size < 1 << 31 for name, size in sizes.items())
    if _core.kernels is not None:  # what was built is of these
        assert _core.kernels.sizes() == " ".join(f"{name}={n}" for name, n in sizes.items())


@pytest.mark.parametrize("backward", ["", " --backward"])
def test_bfloat16_that_is_converted_on_the_way_goes_through_the_caches(backward: str) -> None:
    """Tiles, through which non-temporal stores go, take longer than they save."""
    (found,) = fn.explain(f"layer_norm 8192x4096 bfloat16{backward}", mode="dicts") or ()
    assert found["stores"] == "usual"
    with on_machine(Machine(always_non_temporal=True)):
        (found,) = fn.explain(f"layer_norm 64x4096 bfloat16{backward}", mode="dicts") or ()
    assert found["stores"] == "non-temporal"


# --- The machine ----------------------------------------------------------------------------------


def files_of(root: Path, caches: dict[str, dict[str, str]]) -> Path:
    for index, files in caches.items():
        folder = root / machine.CACHES / index
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text + "\n")
    return root


def test_caches_are_found(tmp_path: Path) -> None:
    root = files_of(
        tmp_path,
        {
            "index0": {"level": "1", "type": "Data", "size": "48K", "shared_cpu_list": "0"},
            "index1": {"level": "1", "type": "Instruction", "size": "32K"},
            "index2": {"level": "2", "type": "Unified", "size": "2048K", "shared_cpu_list": "0"},
            "index3": {"level": "3", "type": "Unified", "size": "480M", "shared_cpu_list": "0-3,8"},
        },
    )
    found = machine.found(root)
    assert (found.l1, found.l2, found.l3, found.l3_cores) == (48 << 10, 2 << 20, 480 << 20, 5)
    assert found.caches == {"L1": 48 << 10, "L2": 2 << 20, "L3": 480 << 20}


@pytest.mark.parametrize("size", ["", "K", "many", "0K"])
def test_what_the_system_does_not_tell_is_0(tmp_path: Path, size: str) -> None:
    root = files_of(tmp_path, {"index3": {"level": "3", "type": "Unified", "size": size}})
    found = machine.found(root)
    assert found.caches == {}
    assert found.last_cache == machine.LAST_CACHE_BYTES


def test_a_machine_can_be_said(tmp_path: Path) -> None:
    own = Machine(l1=1, l2=2, l3=3, cores=7)
    file = tmp_path / "machine.txt"
    file.write_text("# a laptop\nl2 = 1280K  # each\n\nl3=12M\nl3_cores=8\n")
    expected = {
        "": own,
        "zen5": replace(MODELS["zen5"], cores=7),
        "zen5, l2=512K ,cores=2": replace(MODELS["zen5"], l2=512 << 10, cores=2),
        str(file): Machine(1, 1280 << 10, 12 << 20, 8, 7),
        "system": own,
        "system, wake_bytes=2M": replace(own, wake_bytes=2 << 20),
    }
    for text, right in expected.items():
        assert asdict(machine.of_text(text, own)) == asdict(right)


@pytest.mark.parametrize("text", ["zen", "l2=", "l2=2X", "l4=1M", "cores=0", "l3_cores=0", "l2=-1"])
def test_a_machine_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="FASTNORM_MACHINE has"):
        machine.of_text(text, Machine())
