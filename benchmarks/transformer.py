"""A stack of transformer blocks, and PyTorch's: a forward pass, and a process up to its first.

    python -m benchmarks.transformer

Six layers of 512 numbers and 8 heads, float32, a batch of 8 sequences of 128, inference. Both have
the same weights and the same number of threads (FASTNORM_NUM_THREADS); their answers are compared
first. PyTorch runs under `torch.inference_mode`, where its encoder has a path of its own.

NumPy's products are those of its OpenBLAS, which takes the variables OPENBLAS_CORETYPE and
OPENBLAS_L2_SIZE instead of what the processor is: unset both. What it runs with is printed.
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
from fastnorm._bench import machine
from fastnorm._bench.timing import Contender, compete, turns

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


def forward(torch: Any, placement: str) -> dict[str, float]:
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
    compete(contenders, seconds=TURN)
    return {name: c.seconds for name, c in contenders.items()}


def first(rounds: int = 15) -> dict[str, float]:
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


def main() -> None:
    """Print both tables."""
    import torch
    from threadpoolctl import threadpool_info, threadpool_limits

    threads = fn.get_num_threads()
    torch.set_num_threads(threads)
    print(f"{machine.processor()}, threads: {threads}")
    with threadpool_limits(threads, "blas"):
        for pool in threadpool_info():
            if pool["internal_api"] == "openblas":
                print(f"NumPy's BLAS: {pool['architecture']}, threads: {pool['num_threads']}")
        print(f"\n{'':30} {'fastnorm':>9} {'torch':>9}   torch / fastnorm")
        for placement in ("pre", "post"):
            show(f"forward, {placement}", forward(torch, placement))
    show("import and first forward, pre", first())


def show(name: str, times: dict[str, float]) -> None:
    """Print a row."""
    ours, theirs = (times[library] * 1e3 for library in ("fastnorm", "torch"))
    print(f"{name:30} {ours:6.0f} ms {theirs:6.0f} ms   {theirs / ours:.2f}", flush=True)


if __name__ == "__main__":
    main()
