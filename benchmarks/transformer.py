"""A stack of transformer blocks, and PyTorch's: a forward pass, and a process up to its first.

    python -m benchmarks.transformer           # a minute; prints a table and keeps it in results/
    python -m benchmarks.transformer --short   # a look, which keeps nothing

Six layers of 512 numbers and 8 heads, float32, a batch of 8 sequences of 128, inference. Both have
the same weights and the same number of threads (FASTNORM_NUM_THREADS); their answers are compared
first. PyTorch runs under `torch.inference_mode`, where its encoder has a path of its own.

NumPy's products are those of its OpenBLAS, which takes the variables OPENBLAS_CORETYPE and
OPENBLAS_L2_SIZE instead of what the processor is: unset both. What it runs with is kept, too.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np

import fastnorm as fn
from fastnorm._bench.timing import Contender, compete, turns

from . import kept

TURN = 0.5  # seconds: some calls
LAYERS, WIDTH, HEADS, SHAPE = 6, 512, 8, (8, 128, 512)

# A process each, timed from outside.
FIRST = {
    "fastnorm": f"""
import numpy as np, fastnorm as fn
m = fn.nn.TransformerEncoder({LAYERS}, {WIDTH}, {HEADS}, rng=0).eval()
m(np.zeros({SHAPE}, np.float32))
""",
    "torch": f"""
import torch
layer = torch.nn.TransformerEncoderLayer({WIDTH}, {HEADS}, {4 * WIDTH}, activation="gelu",
                                         batch_first=True, norm_first=True)
m = torch.nn.TransformerEncoder(layer, {LAYERS}, torch.nn.LayerNorm({WIDTH}),
                                enable_nested_tensor=False).eval()
with torch.inference_mode():
    m(torch.zeros({SHAPE}))
""",
}


def pair(torch: Any, norm_first: bool) -> tuple[Any, Any]:
    """Ours and PyTorch's, with the same weights."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(
        WIDTH, HEADS, 4 * WIDTH, activation="gelu", batch_first=True, norm_first=norm_first
    )
    norm = torch.nn.LayerNorm(WIDTH) if norm_first else None
    theirs = torch.nn.TransformerEncoder(layer, LAYERS, norm, enable_nested_tensor=False).eval()
    ours = fn.nn.TransformerEncoder(
        LAYERS, WIDTH, HEADS, placement="pre" if norm_first else "post"
    ).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def forward(torch: Any, placement: str, seconds: float) -> dict[str, float]:
    """Seconds of a forward pass, by library."""
    x = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    tensor = torch.from_numpy(x)
    ours, theirs = pair(torch, placement == "pre")
    with torch.inference_mode():
        # of order 1, after some hundred roundings
        np.testing.assert_allclose(ours(x), theirs(tensor).numpy(), rtol=0, atol=1e-4)
    contenders = {
        "fastnorm": Contender(lambda: ours(x)),
        "torch": Contender(lambda: theirs(tensor), torch.inference_mode),
    }
    compete(contenders, seconds=seconds)
    return {name: c.seconds for name, c in contenders.items()}


def first(rounds: int) -> dict[str, float]:
    """Seconds of a process that imports the library, makes an encoder and runs it once."""
    times: dict[str, list[float]] = {name: [] for name in FIRST}
    environment = os.environ | {"OMP_NUM_THREADS": str(fn.get_num_threads())}
    # as installed packages have it; the first round, which is not counted, writes ours
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    for order in turns(list(FIRST), rounds + 1):
        for name in order:
            start = time.perf_counter()
            command = [sys.executable, "-c", FIRST[name]]
            subprocess.run(command, check=True, env=environment)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def products() -> str:
    """What NumPy's BLAS runs as, inside the limits of a `threadpool_limits`."""
    from threadpoolctl import threadpool_info

    (found, *_) = [p for p in threadpool_info() if p["user_api"] == "blas"]
    kind = found.get("architecture", found["internal_api"])
    return f"{found['internal_api']} for {kind}, threads: {found['num_threads']}"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each row: milliseconds of both, and how many times as long PyTorch takes."""
    lines = ["| | fastnorm | PyTorch | PyTorch over fastnorm |", "| --- | --- | --- | --- |"]
    for row in rows:
        ours, theirs = (row["times"][library] * 1e3 for library in ("fastnorm", "torch"))
        lines.append(f"| {row['what']} | {ours:.0f} ms | {theirs:.0f} ms | {theirs / ours:.2f} |")
    return lines


def main() -> None:
    """Print and keep the table."""
    import torch
    from threadpoolctl import threadpool_limits

    given = kept.parser("transformer", __doc__).parse_args()
    seconds, rounds = (TURN / 10, 1) if given.short else (TURN, 15)
    threads = fn.get_num_threads()
    torch.set_num_threads(threads)
    facts = kept.about()
    rows: list[dict[str, Any]] = []
    with threadpool_limits(threads, "blas"):
        facts["versions"]["BLAS"] = products()
        for placement in ("pre", "post"):
            what = f"a forward pass, {placement.capitalize()}-LN"
            rows.append({"what": what, "times": forward(torch, placement, seconds)})
    what = "a process that imports the library, makes the encoder and runs it once"
    rows.append({"what": what, "times": first(rounds)})
    kept.keep("transformer", facts, rows, table(rows), given)


if __name__ == "__main__":
    main()
