"""What programs tell: results on stdout, messages and progress on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any

import numpy as np

from fastnorm._files.names import CannotUse, escaped, say

# The extra in pyproject.toml, and what it brings: {import: distribution}.
EXTRAS = {
    "demo": {"matplotlib": "matplotlib", "PIL": "pillow", "sklearn": "scikit-learn"},
    "stats": {
        "PIL": "pillow",
        "h5py": "h5py",
        "matplotlib": "matplotlib",
        "tifffile": "tifffile",
        "tqdm": "tqdm",
        "zarr": "zarr",
    },
    "dask": {"dask": "dask", "distributed": "distributed"},
}


# --- Results on stdout ----------------------------------------------------------------------------


_BLOCK = 4096  # numbers whose text is made at once


def say_json(result: Any) -> None:
    """Print JSON that every parser takes, which has no NaN and no infinity.

    In pieces: the text of an array of millions would take gigabytes.
    """
    for piece in _pieces(result, "\n"):
        print(piece, end="", file=sys.stdout)
    print(file=sys.stdout)


def _pieces(value: Any, line: str) -> Iterator[str]:
    """JSON of dictionaries, lists and arrays, whose lines begin with `line`."""
    within = line + "  "
    value = value.item() if isinstance(value, np.ndarray) and not value.ndim else value
    if isinstance(value, dict) and value:
        for number, (key, item) in enumerate(value.items()):
            yield f"{',' if number else '{'}{within}{json.dumps(key)}: "
            yield from _pieces(item, within)
        yield line + "}"
    elif isinstance(value, list | tuple | np.ndarray) and len(value):
        for start in range(0, len(value), _BLOCK):
            yield f"{',' if start else '['}{within}"
            block = value[start : start + _BLOCK]
            if any(isinstance(item, dict | list | tuple | np.ndarray) for item in block):
                for number, item in enumerate(block):
                    yield f",{within}" if number else ""
                    yield from _pieces(item, within)
            else:
                numbers = [_plain(item) for item in block]
                yield json.dumps(numbers, separators=(f",{within}", ": "))[1:-1]
        yield line + "]"
    else:
        yield json.dumps(_plain(value))


def _plain(value: Any) -> Any:
    """A number of NumPy as one of Python, and None for what is none."""
    item = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    return None if isinstance(item, float) and not math.isfinite(item) else item


# --- What is told on stderr -----------------------------------------------------------------------


def warn(text: str) -> None:
    """Print a message on stderr."""
    say(f"fastnorm: {escaped(text)}", sys.stderr)


def require(extra: str, *modules: str) -> None:
    """Refuse to go on without the libraries of `extra`, or of these `modules`; say what to type."""
    wanted = {m: name for m, name in EXTRAS[extra].items() if m in modules or not modules}
    missing = [name for module, name in wanted.items() if find_spec(module) is None]
    if missing:
        names = " and ".join(missing)
        raise CannotUse(f"this needs {names}: install with pip install 'fastnorm-kernels[{extra}]'")


class Progress(AbstractContextManager["Progress"]):
    """A bar on stderr while the ``with`` block runs; nothing where stderr is no terminal."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._done = 0
        self._visible = sys.stderr.isatty()

    def __call__(self, step: str) -> None:
        """Show that `step` begins."""
        width = 24
        bar = "#" * (width * self._done // self._steps)
        self._write(f"[{bar:-<{width}}] {step}")
        self._done += 1

    def __exit__(self, *error: object) -> None:
        self._write("")

    def _write(self, line: str) -> None:
        if self._visible:
            # to the start of the line, and delete to its end
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


class Rate(AbstractContextManager["Rate"]):
    """A bar on stderr with the rate and the time left; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        self.total, self.unit = 0, "part"
        self._bar: Any = None

    def begin(self, total: int, unit: str) -> None:
        """Show a bar for so many parts."""
        self.total, self.unit = total, unit
        if sys.stderr.isatty() and find_spec("tqdm") is not None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=unit, leave=False, dynamic_ncols=True)

    def advance(self, parts: int) -> None:
        """Show that so many more are done."""
        if self._bar is not None:
            self._bar.update(parts)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
