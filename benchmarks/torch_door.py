"""How many times as long fastnorm.torch takes as PyTorch: calls without gradients, and training.

    python -m benchmarks.torch_door           # 1 minute; prints a table and keeps it in results/
    python -m benchmarks.torch_door --short   # a look that keeps nothing

Tensors in both, one thread. Asked of a call without gradients of 8x768: 0.77 at most; of forward
and backward from 256 kB on: 1.0 at most, and 0.5 as the geometric mean.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

import fastnorm as fn
import fastnorm.torch as fnt
from fastnorm._bench import text
from fastnorm._bench.timing import BLOCK, ROUNDS, Contender, compete

from . import kept

# Of two kinds: (rows, numbers), and (samples, channels, height, width).
ROWS = ((8, 768), (64, 768), (1024, 768), (4096, 768))
IMAGES = ((2, 64, 8, 8), (8, 64, 32, 32), (8, 256, 32, 32))
ASKED = {"small": 1 / 1.3, "training": 1.0}

Call = Callable[[Any, Any, Any], Any]

LAYER: tuple[Call, Call] = (
    lambda x, w, b: fnt.layer_norm(x, x.shape[-1], w, b),
    lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b),
)
RMS: tuple[Call, Call] = (
    lambda x, w, b: fnt.rms_norm(x, x.shape[-1], w),
    lambda x, w, b: F.rms_norm(x, x.shape[-1:], w),
)
GROUP: tuple[Call, Call] = (
    lambda x, w, b: fnt.group_norm(x, 32, w, b),
    lambda x, w, b: F.group_norm(x, 32, w, b),
)
BATCH: tuple[Call, Call] = (
    lambda x, w, b: fnt.batch_norm(x, None, None, w, b, True),
    lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
)
INSTANCE: tuple[Call, Call] = (
    lambda x, w, b: fnt.instance_norm(x, None, None, w, b),
    lambda x, w, b: F.instance_norm(x, None, None, w, b),
)
BY_SHAPE = (
    (ROWS, {"layer_norm": LAYER, "rms_norm": RMS}),
    (IMAGES, {"group_norm": GROUP, "batch_norm": BATCH, "instance_norm": INSTANCE}),
)
CASES = [
    (f"{name} {'x'.join(map(str, shape))}", calls, shape)
    for shapes, norms in BY_SHAPE
    for shape in shapes
    for name, calls in norms.items()
]


def training(call: Call, x: Any, w: Any, b: Any, dy: Any) -> Callable[[], Any]:
    """Forward and backward, gradients of x, weight and bias."""
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    used = leaves[:2] if call in RMS else leaves
    return lambda: torch.autograd.grad(call(*leaves), used, dy)


def measured(calls: tuple[Call, Call], shape: tuple[int, ...], **how: Any) -> dict[str, Any]:
    """Seconds of fastnorm and of PyTorch, without gradients and with them."""
    random = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=random) for _ in range(2))
    w, b = torch.ones(shape[1]), torch.zeros(shape[1])
    found: dict[str, Any] = {}
    for what in ("inference", "training"):
        contenders = {
            name: Contender(
                training(call, x, w, b, dy)
                if what == "training"
                else lambda call=call: call(x, w, b)
            )
            for name, call in zip(("fastnorm", "torch"), calls)
        }
        compete(contenders, **how)
        found[what] = {name: each.seconds for name, each in contenders.items()}
    return found


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """A page: how many times as long as PyTorch's."""
    page = [
        "How many times as long fastnorm.torch takes as PyTorch, on tensors, one thread.",
        "",
        "| case | PyTorch | fastnorm | PyTorch, trained | fastnorm, trained |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = []
        for what in ("inference", "training"):
            asked = ASKED["small" if what == "inference" and row["small"] else "training"]
            ratio = row[what]["fastnorm"] / row[what]["torch"]
            cells += [text.seconds(row[what]["torch"]), kept.marked(ratio, asked)]
        page.append(f"| {row['case']} | {' | '.join(cells)} |")
    return page


def main() -> int:
    given = kept.parser("torch_door", __doc__).parse_args()
    fn.set_num_threads(1)
    torch.set_num_threads(1)
    facts, rows = kept.about(), []
    for case, calls, shape in CASES:
        kept.say(case)
        how = {"rounds": 3 if given.short else ROUNDS, "seconds": BLOCK / (3 if given.short else 1)}
        row = measured(calls, shape, **how)
        rows.append({"case": case, "small": shape == ROWS[0]} | row)
    kept.keep("torch_door", facts, rows, lines(rows), given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
