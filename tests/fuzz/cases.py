"""What a call is made of: cases, which JSON can hold, and how hypothesis draws them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from fastnorm.arguments import ACTIVATIONS
from fastnorm.operations import CHANNEL_FEATURES, OPERATIONS, SHARED, Operation

Case = dict[str, Any]


# --- Operations: those of the table, and others that it does not list -----------------------------


def _other(label: str, *features: str, name: str = "", **more: Any) -> Operation:
    return Operation(
        label=label,
        name=name or label,
        description="",
        build=lambda r: {},
        linked=lambda ndim, channel: (),  # or the axes that a case tells, see `operation_of`
        features=frozenset(features),
        **more,
    )


# These take any axes: a case says which.
AXES = (
    "layer_norm (axis)",
    "rms_norm (axis)",
    "l2_normalize",
    "standardize",
    "moments",
    "Moments.update",
)
OTHERS = (
    _other(
        "rms_norm (axis)",
        *SHARED,
        "per_sample",
        name="rms_norm",
        stats=("rstd",),
        backward_keywords=("axis", "weight"),
    ),
    _other("instance_norm (given)", *CHANNEL_FEATURES, name="instance_norm", min_ndim=2),
    _other("moments", "where"),
    _other("Moments.update", "where"),
    _other("activate", "activation", "out"),
)
BY_LABEL: dict[str, Operation] = {op.label: op for op in (*OPERATIONS, *OTHERS)}

# --- Sizes and numbers ----------------------------------------------------------------------------

# About every length at which a kernel, of Cython's or Numba's, does something else: its lanes,
# blocks, tiles and pieces. `test_fuzz.py` reads them from schedule.py.
STEPS = tuple(1 << n for n in range(2, 19))
LONG_BLOCK = 27_700  # of float32 that a block of a run in place once had
SIZES = sorted(
    {1, 2, 3, 5, 6, 7, 11, 13, 1 << 20, (1 << 20) + 1, LONG_BLOCK - 1, LONG_BLOCK, LONG_BLOCK + 1}
    | {n + d for n in STEPS for d in (-1, 0, 1)}
)
SIDES = (2, 3, 7, 8, 15, 16, 17, 28, 31, 56, 64, 65, 112, 127, 224, 256, 333)
# Elements of x, at most, and how often of a hundred.
BUDGETS = ((300, 55), (3_000, 25), (30_000, 12), (140_000, 6), (1_100_000, 2))

FLOATS = ("float32", "float64", "float16", "bfloat16")
INTEGERS = ("uint8", "int8", "uint16", "int16", "int32", "uint32", "int64", "uint64", "bool")
# Not one of which is supported, whatever NumPy takes them for.
STRANGERS = (
    *(n for n, t in vars(ml_dtypes).items() if isinstance(t, type) and issubclass(t, np.generic)),
    "longdouble", "complex64", "datetime64[s]", "S4",
)  # fmt: skip
STRANGERS = tuple(name for name in STRANGERS if name not in FLOATS)

PLACES = ("x", "x", "x", "weight", "bias", "residual", "dy", "dy", "running_mean")

BAD = (
    "nan", "inf", "-inf", "max", "-max", "1e31", "-3e38", "1e38", "1e-38", "1e-33", "1e300",
    "1e-300", "least",
)  # fmt: skip
OTHER_OPERANDS = (
    "weight",
    "bias",
    "residual",
    "running_mean",
    "running_var",
    "dy",
)  # others where such are
TARGETS = ("x", "residual", "weight", "bias", "where", "shifted", "reversed")  # what out may be
VALUES = ("normal", "offset", "constant", "two", "scales", "huge", "tiny", "subnormal", "range")


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))


# --- Drawing --------------------------------------------------------------------------------------

# Takes one of a list: `random.Random(seed).choice`, or what hypothesis draws.
Choose = Callable[[Sequence[Any]], Any]

DIGIT = range(16)


def one_in(choose: Choose, share: int) -> bool:
    return bool(choose(range(share)) == share - 1)


def often(choose: Choose, value: Any, others: Sequence[Any], share: int) -> Any:
    """`value`, but one time in so many one of the others."""
    return choose(others) if one_in(choose, share) else value


def some(choose: Choose, least: int, most: int, options: Sequence[Any]) -> list[Any]:
    return [choose(options) for _ in range(choose(range(least, most + 1)))]


def layout(choose: Choose, *, output: bool = False) -> dict[str, Any]:
    """How an array lies in memory, as `arenas.place` takes it."""
    if one_in(choose, 3):
        return {"front": True} if one_in(choose, 2) else {}
    found: dict[str, Any] = {}
    if one_in(choose, 2):
        found["order"] = choose(["last", "F", "swapped"])
    if one_in(choose, 4):
        found["front"] = True
    kinds = [
        "plain",
        "step",
        "pad",
        "pad",
        "flip",
        "flip",
        "odd",
        "odd",
        "extra",
        "misaligned",
        "swap",
    ]
    if not output:
        kinds += ["repeated", "windows", "locked"]
    kind = choose(kinds)
    if kind in ("step", "pad", "repeated"):
        found["axis"] = choose(range(5))
    if kind == "flip":
        found["flip"] = some(choose, 1, 2, range(5))
    elif kind == "odd":
        found["odd"] = choose([1, 2, 4, -3, 8, 1 << 40])
        if one_in(choose, 2):
            found["axis"], found["step"] = choose(range(5)), 2
    elif kind in ("step", "pad"):
        found[kind] = choose([2, 3])
    elif kind == "extra":
        found["extra"] = choose([1, 2, 4, 8])
    elif kind not in ("plain", "repeated"):
        found[kind] = True
    if kind == "repeated":
        found[kind] = True
    return found


def shape(choose: Choose, least: int, most: int, largest: int) -> list[int]:
    """Sizes of `least` to `most` axes; one of them is long half the time."""
    ndim = choose(range(least, max(least, most) + 1))
    budget = choose([n for n, share in BUDGETS if n <= largest for _ in range(share)])
    if ndim == 4 and one_in(choose, 2):  # images
        sides = [n for n in SIDES if n * n <= budget]
        height, width = choose(sides), choose(sides)
        budget //= height * width
        return [choose([n for n in SIZES[:8] if n <= max(budget, 1)]) for _ in range(2)] + [
            height,
            width,
        ]
    found = [1] * ndim
    axes = list(range(ndim))
    while axes:
        axis = axes.pop(choose(range(len(axes))))
        fitting = [n for n in SIZES if n <= budget]
        if one_in(choose, 2):
            fitting = fitting[-8:] if len(axes) == ndim - 1 else fitting[:8]
        found[axis] = choose(fitting)
        budget //= found[axis]
    if one_in(choose, 40):
        found[choose(range(ndim))] = 0
    return found


def draw(
    choose: Choose,
    dtypes: Sequence[str] = FLOATS,
    *,
    functions: bool = False,
    largest: int = 2_000_000,
) -> Case:
    """One call, on an x of at most `largest` elements or so."""
    op = BY_LABEL[choose(list(BY_LABEL))]
    case: Case = {"op": op.label}
    case["seed"] = sum(choose(DIGIT) << 4 * place for place in range(8))
    case["shape"] = shape(choose, max(op.min_ndim, 1), 5 if op.label in AXES else 4, largest)
    case["dtype"] = choose(dtypes)
    if dtypes == FLOATS:
        case["dtype"] = often(choose, case["dtype"], INTEGERS, 12)
    if one_in(choose, 40):
        case["stranger"] = [choose(PLACES), choose(STRANGERS)]
    case["layout"] = layout(choose)
    case["values"] = often(choose, "normal", VALUES, 2)
    case["ratio"] = choose([0.0, 1.0, 3.0, 63.0, 65.0, 1e4])
    case["bad"] = []
    if one_in(choose, 3):
        for name in some(choose, 1, 3, BAD):
            place = sum(choose(DIGIT) << 4 * place for place in range(6)) / 2**24
            case["bad"].append([name, place])
    case["bad elsewhere"] = []
    if one_in(choose, 8):
        place = choose(DIGIT) / 16
        case["bad elsewhere"] = [[choose(OTHER_OPERANDS), choose(BAD), place] for _ in range(2)]
    case["threads"] = choose([[1, 2, 8], [2, 1, 8], [8, 2, 1], [1, 8, 1]])
    case["past"] = choose([[], [1], [2], [0, 1]])  # calls with non-temporal stores
    case["known"] = one_in(choose, 2)  # a plain call of this shape was made before
    case["eps"] = choose([1e-5, 0.0, 1e-12, 1.0, None])
    if op.label in AXES:
        case["axis"] = some(choose, 1, 3, range(5))
    if "channel_axis" in op.features:
        case["channel_axis"] = choose([1, -1, 2])
    if op.grouped:
        case["groups"] = choose(range(24))
    if op.label.startswith(("layer_norm (n", "rms_norm", "add_")):
        case["trailing"] = often(choose, 1, [2, 3], 4)
    kinds = ["shared", "shared", None]
    kinds += ["per sample", "full", "some axes"] if "per_sample" in op.features else []
    for name in ("weight", "bias"):
        case[name] = choose(kinds)
        case[f"{name} axes"] = some(choose, 1, 3, range(5))
        case[f"{name} layout"] = layout(choose)
        case[f"{name} dtype"] = often(choose, None, dtypes, 3)
    if op.name in ("batch_norm", "instance_norm"):
        case["running"] = choose([None, "float32", "float64"])
    case["weight scale"] = often(choose, 1.0, [1e-32, 1e-39, 1e30, 1e37, 0.0], 6)
    case["weight scale here and there"] = one_in(choose, 2)  # others keep theirs
    if op.name == "rms_norm":
        case["weight_offset"] = often(choose, 0.0, [1.0], 4)
    if "where" in op.features:
        masks = ["full", "last axis", "some axes", "nothing", "everything"]
        case["where"] = often(choose, None, masks, 4)
        case["where axes"] = some(choose, 1, 3, range(5))
        case["where layout"] = layout(choose)
    if "residual" in op.features or op.outputs > 1:
        case["residual"] = choose([None, *dtypes, "x"])
        case["residual layout"] = layout(choose)
    if "activation" in op.features:
        choice = [*ACTIVATIONS, *(["function"] if functions else [])]
        case["activation"] = often(choose, None, choice, 2)
    if "out" in op.features:
        case["out"] = choose([None, "own"])
        case["out"] = often(choose, case["out"], TARGETS, 2)
        case["out layout"] = layout(choose, output=True)
        case["shift"] = choose([1, -1, 3, 64, -1000])
    if "return_stats" in op.features:
        case["return_stats"] = one_in(choose, 3)
    if op.label in ("standardize", "moments", "Moments.update"):
        case["ddof"] = choose([0, 1])
    if op.backward:
        case["backward"] = one_in(choose, 2)
        case["dy dtype"] = often(choose, None, dtypes, 2)
        case["dy scale"] = often(choose, 1.0, [1e38, 1e38, 1e30, 1e-30, 1e-38, 0.0], 3)
        case["dy layout"] = case["layout"] if one_in(choose, 2) else layout(choose)
        case["statistics layout"] = layout(choose)
        case["through"] = one_in(choose, 2)  # what was added and activated
    if op.elementwise_backward:
        case["backward"] = one_in(choose, 2)
        case["dy dtype"] = often(choose, None, dtypes, 3)
        case["dy layout"] = case["layout"] if one_in(choose, 2) else layout(choose)
    if one_in(choose, 2):
        _make_plain(choose, case, op)
    return case


def _make_plain(choose: Choose, case: Case, op: Operation) -> None:
    """As most calls are: the second of its kind is answered from the cache."""
    for name in [name for name in case if name.endswith("layout")]:
        case[name] = often(choose, {}, [{"order": "F"}, {"order": "last"}], 2)
    case.pop("stranger", None)
    same = case["dtype"] if case["dtype"] in FLOATS else None
    plain = {
        "values": "normal",
        "bad": [],
        "bad elsewhere": [],
        "where": often(choose, None, ["full", "last axis", "some axes"], 4),
        "past": often(choose, [], [[1], [0, 1]], 4),
        "out": often(choose, None, ["own", "x", "residual"], 3),
        "residual": choose([None, "x", same]),
        "running": often(choose, None, ["float32", "float64"], 3),
    }
    plain |= {f"{n} dtype": often(choose, None, FLOATS, 8) for n in ("weight", "bias", "dy")}
    case |= {name: value for name, value in plain.items() if name in case}
    if "per_sample" in op.features:
        case["weight"] = choose(["full", "per sample", "some axes", "shared"])


def cases(**options: Any) -> Any:
    """The same as a strategy of hypothesis: it takes 17 ms for one, and draws many twice."""
    from hypothesis import strategies as st

    return st.composite(lambda get: draw(lambda every: get(st.sampled_from(every)), **options))()
