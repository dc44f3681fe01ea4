"""How large errors are where the mean is large against the spread, of every library.

    python -m benchmarks.accuracy           # seconds; prints a table and keeps it in results/
    python -m benchmarks.accuracy --short   # a look that keeps nothing

Rows of 1024 float32 numbers of standard deviation 1 about a mean, normalised over the row. What is
right is computed in long double from the numbers as they are stored, so that storing them costs
nobody anything. The error is the largest of any element, in standard deviations: no weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastnorm import _reference
from fastnorm._bench import peers
from fastnorm._bench.cases import Case, Data

from . import kept

SHAPE = (256, 1024)
EXPONENTS = range(8)
PEERS = [name for name in peers.PEERS if name != "torch.compile"]


def rows_about(mean: float) -> np.ndarray[Any, Any]:
    """The same random numbers, lifted."""
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    return (mean + noise).astype(np.float32)


def error(name: str, case: Case, data: Data, exact: np.ndarray[Any, Any]) -> float | None:
    """The largest of any element; None where the library is absent, NaN where a result is."""
    try:
        peer = peers.PEERS[name](case, data)
        with peer.around():
            (result, *_) = peer.answer(peer.call())
    except peers.Absent as reason:
        kept.say(f"{name}: {reason}")
        return None
    return float(np.max(abs(result - exact)))


def measured() -> list[dict[str, Any]]:
    """One row for each mean."""
    case = Case("layer_norm (normalized_shape)", SHAPE)
    width = SHAPE[1:]
    ones, zeros = np.ones(width, np.float32), np.zeros(width, np.float32)
    parameters = {"normalized_shape": width, "weight": ones, "bias": zeros}
    rows = []
    for exponent in EXPONENTS:
        x = rows_about(10.0**exponent)
        exact = _reference.layer_norm(x, dtype=np.longdouble, **parameters)
        found = {name: error(name, case, Data(x, parameters), exact) for name in PEERS}
        errors = {name: each for name, each in found.items() if each is not None}
        rows.append({"mean_over_std": 10**exponent, "errors": errors})
    return rows


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """A page: the errors by library."""
    names = list(rows[0]["errors"])
    page = [
        f"The largest error of layer_norm {SHAPE[0]}x{SHAPE[1]} float32, in standard deviations.",
        "",
        f"| mean / std | {' | '.join(names)} |",
        f"| ---: | {' | '.join('---:' for _ in names)} |",
    ]
    for row in rows:
        cells = (f"{row['errors'][name]:.1e}" for name in names)
        page.append(f"| {row['mean_over_std']:.0e} | {' | '.join(cells)} |")
    return page


def main() -> int:
    given = kept.parser("accuracy", __doc__).parse_args()
    given.force = True  # others on the machine change no bit
    facts, rows = kept.about(), measured()
    kept.keep("accuracy", facts, rows, lines(rows), given)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
