"""The demonstration: five norms over feature maps of photographs, timed, checked and drawn.

Two photographs that come with scikit-learn are convolved with sixteen fixed filters, as the first
layer of a network would do it. Each norm then runs in fastnorm, in plain NumPy and, where it is
installed, in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

import fastnorm as fn
from fastnorm import _reference
from fastnorm._bench.text import aligned
from fastnorm._bench.timing import Contender, compete
from fastnorm.picture import Row, draw

Array: TypeAlias = NDArray[Any]
Report: TypeAlias = Callable[[str], None]

EPS = 1e-5
GROUPS = 4
MEAN_OVER_STD = 1e4  # of the input that is hard to normalise

# --- Feature maps ---------------------------------------------------------------------------------

# What is cut out of each photograph of 427 x 640: (left, top, side). The first is drawn.
CUTS = {
    "china.jpg": ((0, 0, 427), (80, 20, 256), (380, 100, 256), (200, 171, 256)),
    "flower.jpg": ((95, 0, 427), (175, 40, 256), (0, 60, 256), (300, 171, 256)),
}

RADIUS = 10  # of every filter
LIGHT, RED_GREEN, YELLOW_BLUE = (0.3, 0.6, 0.1), (1.0, -1.0, 0.0), (0.5, 0.5, -1.0)


def photographs(size: int) -> Array:
    """Cut the samples out of scikit-learn's photographs: (8, 3, size, size) from 0 to 1."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    samples = []
    for name, cuts in CUTS.items():
        photograph = Image.fromarray(load_sample_image(name))
        for left, top, side in cuts:
            cut = photograph.crop((left, top, left + side, top + side))
            samples.append(np.asarray(cut.resize((size, size))))
    return np.stack(samples).transpose(0, 3, 1, 2) / 255


def filters() -> dict[str, Array]:
    """Make the sixteen filters (3, k, k), in groups of four that belong together."""
    y, x = np.mgrid[-RADIUS : RADIUS + 1, -RADIUS : RADIUS + 1]

    def blur(sigma: float) -> Array:
        bell: Array = np.exp(-(x**2 + y**2) / (2 * sigma**2))
        return bell / bell.sum()

    def stripes(wavelength: float, degrees: int) -> Array:
        """A Gabor filter that does not answer to plain areas."""
        along = x * np.cos(np.deg2rad(degrees)) + y * np.sin(np.deg2rad(degrees))
        bell = blur(0.4 * wavelength)
        wave = np.cos(2 * np.pi * along / wavelength)
        gabor = bell * (wave - (bell * wave).sum())
        return gabor / abs(gabor).sum()

    sobel = np.pad(np.outer([1, 2, 1], [-1, 0, 1]) / 8, RADIUS - 1)
    bank = {
        "light": (LIGHT, blur(0.7)),
        "blurred light": (LIGHT, blur(4)),
        "red − green": (RED_GREEN, blur(0.7)),
        "yellow − blue": (YELLOW_BLUE, blur(0.7)),
        "edges across": (LIGHT, sobel),
        "edges down": (LIGHT, sobel.T),
        "fine detail": (LIGHT, blur(0.7) - blur(1.4)),
        "coarse detail": (LIGHT, blur(2) - blur(4)),
    }
    for name, wavelength in (("fine", 4), ("coarse", 8)):
        for degrees in (0, 45, 90, 135):
            bank[f"{name} stripes, {degrees}°"] = LIGHT, stripes(wavelength, degrees)
    return {name: np.multiply.outer(colour, shape) for name, (colour, shape) in bank.items()}


def convolve(images: Array, kernels: Array) -> Array:
    """Convolve (N, R, H, W) with (C, R, k, k), reflected at the edges: (N, C, H, W) float32."""
    radius = kernels.shape[-1] // 2
    around = ((0, 0), (0, 0), (radius, radius), (radius, radius))
    padded = np.pad(images, around, mode="reflect")
    shape = padded.shape[-2:]
    spectra = np.einsum("nrhw,crhw->nchw", np.fft.rfft2(padded), np.fft.rfft2(kernels, s=shape))
    inside = np.fft.irfft2(spectra, s=shape)[..., 2 * radius :, 2 * radius :]
    return inside.astype(np.float32, order="C")


# --- The norms ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Norm:
    """One norm, the same in fastnorm, in the reference, in plain NumPy and in PyTorch."""

    name: str
    each: str
    """What has a statistic of its own."""
    over: str
    """The axes that share it."""
    takeaway: str
    """What to see in its row."""
    samples: bool
    """Whether the samples share it; positions always do."""
    channels: int
    """How many of the sixteen channels share it."""
    arguments: Mapping[str, Any]
    """Keyword arguments of fastnorm's function."""
    numpy: Callable[[Array], Array]
    torch: Callable[[Any, Any], Any]
    """A function of torch.nn.functional and x."""

    @property
    def function(self) -> str:
        """The function's name in fastnorm and in the reference."""
        return f"{self.name}_norm"


def _numpy_norm(x: Array, axes: tuple[int, ...]) -> Array:
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return (x - mean) / np.sqrt(var + np.float32(EPS))


def _numpy_group_norm(x: Array) -> Array:
    return _numpy_norm(x.reshape(len(x), GROUPS, -1), (2,)).reshape(x.shape)


def _numpy_rms_norm(x: Array) -> Array:
    square = (x * x).mean((1, 2, 3), keepdims=True)
    return x / np.sqrt(square + np.float32(EPS))


NORMS = (
    Norm(
        "batch",
        each="channel",
        over="N, H, W",
        takeaway="Samples share a scale: a result depends on the others.",
        samples=True,
        channels=1,
        arguments={"training": True},
        numpy=lambda x: _numpy_norm(x, (0, 2, 3)),
        torch=lambda F, x: F.batch_norm(x, None, None, training=True, eps=EPS),
    ),
    Norm(
        "layer",
        each="sample",
        over="C, H, W",
        takeaway="A sample's strong channels stay the strong ones.",
        samples=False,
        channels=16,
        arguments={"axis": (1, 2, 3)},
        numpy=lambda x: _numpy_norm(x, (1, 2, 3)),
        torch=lambda F, x: F.layer_norm(x, x.shape[1:], eps=EPS),
    ),
    Norm(
        "instance",
        each="channel of a sample",
        over="H, W",
        takeaway="Every channel gets the same contrast.",
        samples=False,
        channels=1,
        arguments={},
        numpy=lambda x: _numpy_norm(x, (2, 3)),
        torch=lambda F, x: F.instance_norm(x, eps=EPS),
    ),
    Norm(
        "group",
        each="4 channels of a sample",
        over="C/4, H, W",
        takeaway="Strong and weak are kept within four channels only.",
        samples=False,
        channels=16 // GROUPS,
        arguments={"num_groups": GROUPS},
        numpy=_numpy_group_norm,
        torch=lambda F, x: F.group_norm(x, GROUPS, eps=EPS),
    ),
    Norm(
        "rms",
        each="sample (no mean)",
        over="C, H, W",
        takeaway="As layer, but zero stays zero.",
        samples=False,
        channels=16,
        arguments={"axis": (1, 2, 3)},
        numpy=_numpy_rms_norm,
        torch=lambda F, x: F.rms_norm(x, x.shape[1:], eps=EPS),
    ),
)
STEPS = len(NORMS) + 3  # of run: what it reports


def contenders(norm: Norm, x: Array, torch: Any) -> dict[str, Callable[[], Array]]:
    """Return the calls to compare, by name."""
    function = getattr(fn, norm.function)
    calls: dict[str, Callable[[], Array]] = {
        "fastnorm": lambda: function(x, eps=EPS, **norm.arguments),
        "numpy": lambda: norm.numpy(x),
    }
    if torch is not None:
        tensor = torch.from_numpy(x)
        calls["torch"] = lambda: norm.torch(torch.nn.functional, tensor).numpy()
    return calls


def exactly(norm: Norm, x: Array) -> Array:
    """Return what is right, to float64."""
    y: Array = getattr(_reference, norm.function)(x, eps=EPS, **norm.arguments)
    return y


# --- Times and errors -----------------------------------------------------------------------------


def ulps(y: Array, exact: Array) -> float:
    """Measure the largest error in float32 units in the last place.

    The unit is that of the exact result; below 2^-20 it is the unit of 2^-20.
    """
    unit = np.spacing(np.maximum(abs(exact), 2.0**-20).astype(np.float32))
    return float(np.max(abs(y - exact) / unit))


@dataclass(frozen=True)
class Comparison:
    """One norm's row of the table; the mappings are by contender."""

    norm: str
    each: str
    over: str
    milliseconds: dict[str, float]
    times_as_long: dict[str, float]
    """As fastnorm."""
    ulps: dict[str, float]
    """The largest error, as `ulps` counts it."""


@dataclass(frozen=True)
class Offset:
    """Errors of a norm of feature maps that are far from 0; the mappings are by contender."""

    norm: str
    mean_over_std: float
    ulps: dict[str, float]
    largest_error: dict[str, float]


def compare(norm: Norm, x: Array, torch: Any, rounds: int) -> Comparison:
    """Check and then time a norm."""
    calls, exact = contenders(norm, x, torch), exactly(norm, x)
    errors = {name: ulps(call(), exact) for name, call in calls.items()}
    turns = {name: Contender(call) for name, call in calls.items()}
    compete(turns, rounds)
    times = {name: 1e3 * contender.seconds for name, contender in turns.items()}
    ratios = {name: time / times["fastnorm"] for name, time in times.items()}
    return Comparison(norm.name, norm.each, norm.over, times, ratios, errors)


def far_from_zero(norm: Norm, x: Array, torch: Any) -> Offset:
    """Lift each channel of each sample by many of its standard deviations, and normalise that."""
    lifted = x + np.float32(MEAN_OVER_STD) * x.std((2, 3), keepdims=True)
    exact = exactly(norm, lifted)
    results = {name: call() for name, call in contenders(norm, lifted, torch).items()}
    return Offset(
        norm.name,
        MEAN_OVER_STD,
        {name: ulps(y, exact) for name, y in results.items()},
        {name: float(np.max(abs(y - exact))) for name, y in results.items()},
    )


# --- The result -----------------------------------------------------------------------------------

TITLES = {"fastnorm": "fastnorm", "numpy": "NumPy", "torch": "PyTorch"}


@dataclass(frozen=True)
class Result:
    """What the demonstration found."""

    versions: dict[str, str]
    threads: int
    shape: tuple[int, ...]
    norms: list[Comparison]
    offset: Offset

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it: an error that is not a number becomes None."""
        found: dict[str, Any] = _storable(asdict(self))
        return found

    def to_text(self) -> str:
        """Return it as a table for a terminal, in plain ASCII."""
        names = list(self.versions)
        what = [
            ["", "norm", *(row.norm for row in self.norms)],
            ["", "a statistic for each", *(row.each for row in self.norms)],
            ["", "over", *(row.over for row in self.norms)],
        ]
        times = [
            [[TITLES[name], "ms", *(f"{row.milliseconds[name]:.2f}" for row in self.norms)]]
            for name in names
        ]
        for name, block in zip(names[1:], times[1:]):
            block.append(["", "times", *(f"{row.times_as_long[name]:.1f}" for row in self.norms)])
        errors = [
            [TITLES[name], "steps", *(_short(row.ulps[name]) for row in self.norms)]
            for name in names
        ]
        size = 4e-6 * np.prod(self.shape)
        offset = [
            f"{TITLES[name]} {_short(self.offset.ulps[name])} steps"
            f" ({self.offset.largest_error[name]:.1e})"
            for name in names
        ]
        return "\n".join(
            [
                f"Feature maps of two photographs: {self.shape} float32, {size:.1f} MB",
                ", ".join(f"{TITLES[n]} {version}" for n, version in self.versions.items())
                + f"; threads: {self.threads} (NumPy: 1)",
                "",
                *_aligned([what, *times, errors]),
                "",
                "ms: the median for one call. times: as long as fastnorm takes. steps: the largest",
                "error, in steps from one float32 number to the next, at the exact result (below",
                "2^-20 in the steps there). Half a step is what rounding costs.",
                "",
                *(f"{norm.name + ':':10}{norm.takeaway}" for norm in NORMS),
                "",
                (
                    f"Every channel lifted by {self.offset.mean_over_std:,.0f} of its standard "
                    f"deviations, then {self.offset.norm} norm; largest error:"
                ),
                ", ".join(offset),
            ]
        )


def _storable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _storable(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _short(number: float) -> str:
    return f"{number:.0e}" if number >= 1e4 else f"{number:.1f}"


def _aligned(blocks: Sequence[Sequence[Sequence[str]]]) -> list[str]:
    """Lines of a table of blocks of columns; the first block is aligned to the left."""
    sides = "<" + ">" * len(blocks)
    parts = [aligned([*zip(*block)], side) for side, block in zip(sides, blocks)]
    return [" | ".join(line).rstrip() for line in zip(*parts)]


@contextmanager
def _pytorch(threads: int) -> Iterator[Any]:
    """PyTorch with so many threads; None where it is absent or has no rms_norm (before 2.4)."""
    torch: Any = None
    if find_spec("torch") is not None:
        # a broken installation is as good as none
        with suppress(ImportError, OSError):
            torch = import_module("torch")
    if torch is None or not hasattr(torch.nn.functional, "rms_norm"):
        yield None
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            yield torch
    finally:
        torch.set_num_threads(before)


def run(
    size: int = 256, threads: int | None = None, report: Report = lambda step: None
) -> tuple[Result, bytes]:
    """Do all of it, on (8, 16, size, size) numbers: times and errors, and a PNG file.

    The threads are those of fastnorm and of PyTorch; None is what fastnorm uses anyway. `report` is
    called `STEPS` times, with what is begun.
    """
    threads = fn.get_num_threads() if threads is None else threads
    rounds = 5 if size >= 128 else 1
    with fn.threads(threads), _pytorch(threads) as torch:
        report("feature maps")
        images, bank = photographs(size), filters()
        x = convolve(images, np.stack(list(bank.values())))
        rows = []
        for norm in NORMS:
            report(f"{norm.name} norm")
            rows.append(compare(norm, x, torch, rounds))
        report("a large offset")
        offset = far_from_zero(next(n for n in NORMS if n.name == "instance"), x, torch)
        versions = {"fastnorm": fn.__version__, "numpy": np.__version__}
        if torch is not None:
            versions["torch"] = str(torch.__version__)
        report("picture")
        shown = [
            Row(
                norm.name,
                f"for each {norm.each}\nover {norm.over}\n{norm.takeaway}",
                norm.samples,
                norm.channels,
                contenders(norm, x, None)["fastnorm"](),
                {TITLES[name]: time for name, time in found.milliseconds.items()},
            )
            for norm, found in zip(NORMS, rows)
        ]
        errors = {TITLES[name]: error for name, error in offset.largest_error.items()}
        heading = (
            f"largest error of {offset.norm} norm, each channel lifted by "
            f"{offset.mean_over_std:,.0f} standard deviations"
        )
        picture = draw(images, x, list(bank), shown, heading, errors)
    return Result(versions, threads, x.shape, rows, offset), picture
