"""Norms of lengths, weights and responses beside PyTorch, which composes most of them.

    python -m benchmarks.related [WORD ...]

Driven by the table of operations: each is called as its tests call it, on float32, with the table's
expression in PyTorch under `torch.inference_mode` and as many threads. Answers are compared first.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

import fastnorm as fn
from fastnorm._bench.operations import OPERATIONS, Operation
from fastnorm._bench.timing import Contender, compete

IMAGES = ((8, 64, 14, 14), (32, 64, 56, 56))
ROWS = ((8, 768), (4096, 768))
WEIGHTS = ((64, 64, 3, 3), (512, 256, 3, 3))
SHAPES = {
    "l2_normalize": ROWS,
    "dynamic_tanh": ROWS,
    "standardize": ROWS,
    "weight_norm": WEIGHTS,
    "weight_standardize": WEIGHTS,
    "global_response_norm": IMAGES,
    "local_response_norm": IMAGES,
}


def pair(torch: Any, op: Operation, shape: tuple[int, ...]) -> dict[str, Contender]:
    """Ours and PyTorch's, which say the same."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, np.float32)
    p = op.parameters(shape, np.float32, rng)
    ours, theirs = getattr(fn, op.name), op.torch
    assert theirs is not None, f"{op.name} has no expression in PyTorch"
    tensor, q = torch.from_numpy(x), op.to_torch(p)
    with torch.inference_mode():
        # 16 roundings of numbers of order 1
        np.testing.assert_allclose(ours(x, **p), theirs(tensor, **q).numpy(), rtol=1e-5, atol=1e-5)
    return {
        "fastnorm": Contender(lambda: ours(x, **p)),
        "PyTorch": Contender(lambda: theirs(tensor, **q), torch.inference_mode),
    }


def main(words: list[str]) -> None:
    import torch

    torch.set_num_threads(fn.get_num_threads())
    print("| case | fastnorm, µs | PyTorch, µs | times |\n|---|---|---|---|")
    ratios = []
    for op in OPERATIONS:
        for shape in SHAPES.get(op.name, ()):
            case = f"{op.name} {'x'.join(map(str, shape))}"
            if words and not any(word in case for word in words):
                continue
            contenders = pair(torch, op, shape)
            compete(contenders)
            ours, theirs = (c.seconds * 1e6 for c in contenders.values())
            ratios.append(theirs / ours)
            print(f"| {case} | {ours:.1f} | {theirs:.1f} | {ratios[-1]:.2f} |")
    mean = float(np.exp(np.mean(np.log(ratios))))
    print(f"\n{len(ratios)} cases: geometric mean {mean:.2f}, least {min(ratios):.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
