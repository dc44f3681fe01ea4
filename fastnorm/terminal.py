"""What programs tell: results on stdout, messages and progress on stderr."""

from __future__ import annotations

import json
import math
import sys
from importlib.util import find_spec
from types import TracebackType
from typing import Any

from fastnorm._files.names import escaped, say

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


def say_json(result: Any) -> None:
    """Print JSON that every parser takes, which has no NaN and no infinity."""
    say(json.dumps(_finite(result), indent=2, allow_nan=False), sys.stdout)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


# --- What is told on stderr -----------------------------------------------------------------------


def warn(text: str) -> None:
    """Print a message on stderr."""
    say(f"fastnorm: {escaped(text)}", sys.stderr)


def lacks(extra: str, *modules: str) -> bool:
    """Whether a library of `extra`, or of it one of `modules`, is missing; say what to install."""
    wanted = {m: name for m, name in EXTRAS[extra].items() if m in modules or not modules}
    missing = [name for module, name in wanted.items() if find_spec(module) is None]
    if missing:
        names = " and ".join(missing)
        warn(f"this needs {names}: install with pip install 'fastnorm-kernels[{extra}]'")
    return bool(missing)


class Progress:
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

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._write("")

    def _write(self, line: str) -> None:
        if self._visible:
            # to the start of the line, and delete to its end
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


class Rate:
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

    def __enter__(self) -> Rate:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
