"""The GPU's kernels, PyTorch's and a device copy; makes a table where there is a GPU.

    python -m benchmarks.cuda                  # writes benchmarks/results/<GPU>-cuda.md and .json
    python -m benchmarks.cuda --folder /tmp    # elsewhere

Contenders take turns in blocks of at least 30 ms between two events on one stream; a time is the
median of the blocks. Their answers are compared first. GB/s counts what has to be read and written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK_MS, TURNS = 30.0, 15
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """One call: `make(torch, fn)` gives what fastnorm runs, what PyTorch runs, and the input."""

    label: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[Any, Any, Any], tuple[Callable[[], Any], Callable[[], Any]]]
    streams: int = 2  # tensors of the size of x that have to pass through memory
    channels_last: bool = False


def layer(torch: Any, fn: Any, x: Any) -> Any:
    w, b = (torch.ones(x.shape[-1], dtype=x.dtype, device=x.device) for _ in range(2))
    peer = torch.nn.functional.layer_norm
    return lambda: fn.layer_norm(x, x.shape[-1], w, b), lambda: peer(x, x.shape[-1:], w, b)


def rms(torch: Any, fn: Any, x: Any) -> Any:
    w = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
    peer = torch.nn.functional.rms_norm
    return lambda: fn.rms_norm(x, x.shape[-1], w), lambda: peer(x, x.shape[-1:], w)


def add_rms(torch: Any, fn: Any, x: Any) -> Any:
    w, r = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device), x.clone()

    def peer() -> Any:
        total = x + r
        return torch.nn.functional.rms_norm(total, x.shape[-1:], w), total

    return lambda: fn.add_rms_norm(x, r, x.shape[-1], w), peer


def group(torch: Any, fn: Any, x: Any) -> Any:
    w, b = (torch.ones(x.shape[1], dtype=x.dtype, device=x.device) for _ in range(2))
    peer = torch.nn.functional.group_norm
    return lambda: fn.group_norm(x, 32, w, b), lambda: peer(x, 32, w, b)


def group_silu(torch: Any, fn: Any, x: Any) -> Any:
    w, b = (torch.ones(x.shape[1], dtype=x.dtype, device=x.device) for _ in range(2))
    norm, silu = torch.nn.functional.group_norm, torch.nn.functional.silu
    ours = lambda: fn.group_norm(x, 32, w, b, activation="silu")  # noqa: E731
    return ours, lambda: silu(norm(x, 32, w, b))


def batch(torch: Any, fn: Any, x: Any) -> Any:
    w, b = (torch.ones(x.shape[1], dtype=torch.float32, device=x.device) for _ in range(2))
    m, v = torch.zeros_like(w), torch.ones_like(w)
    peer = torch.nn.functional.batch_norm
    ours = lambda: fn.batch_norm(x, m.clone(), v.clone(), w, b, True)  # noqa: E731
    return ours, lambda: peer(x, m.clone(), v.clone(), w, b, True)


def inference(torch: Any, fn: Any, x: Any) -> Any:
    m, v = (f(x.shape[1], device=x.device) for f in (torch.zeros, torch.ones))
    peer = torch.nn.functional.batch_norm
    return lambda: fn.batch_norm(x, m, v), lambda: peer(x, m, v)


def instance(torch: Any, fn: Any, x: Any) -> Any:
    return lambda: fn.instance_norm(x), lambda: torch.nn.functional.instance_norm(x)


def layer_backward(torch: Any, fn: Any, x: Any) -> Any:
    size = x.shape[-1]
    w, dy = torch.ones(size, dtype=x.dtype, device=x.device), torch.randn_like(x)
    _, mean, rstd = fn.layer_norm(x, size, w, return_stats=True)
    _, m, r = torch.ops.aten.native_layer_norm(x, [size], w, w, 1e-5)
    peer = torch.ops.aten.native_layer_norm_backward
    ours = lambda: fn.layer_norm_backward(dy, x, mean, rstd, size, w)  # noqa: E731
    return ours, lambda: peer(dy, x, [size], m, r, w, w, [True, True, True])


IMAGES = (64, 64, 128, 128)
CASES = (
    Case("layer_norm", (65536, 1024), "float32", layer),
    Case("layer_norm", (32768, 4096), "bfloat16", layer),
    Case("layer_norm", (64, 1 << 20), "float32", layer),
    Case("rms_norm", (32768, 4096), "bfloat16", rms),
    Case("rms_norm", (32768, 4096), "float16", rms),
    Case("add_rms_norm", (32768, 4096), "bfloat16", add_rms, streams=4),
    Case("group_norm", IMAGES, "float32", group),
    Case("group_norm", IMAGES, "float32", group, channels_last=True),
    Case("group_norm + silu", IMAGES, "float32", group_silu),
    Case("batch_norm (training)", IMAGES, "float32", batch, streams=3),
    Case("batch_norm (training)", IMAGES, "float32", batch, streams=3, channels_last=True),
    Case("batch_norm (inference)", IMAGES, "float32", inference),
    Case("instance_norm", IMAGES, "float32", instance),
    Case("layer_norm_backward", (65536, 1024), "float32", layer_backward, streams=3),
    Case("layer_norm_backward", (32768, 4096), "bfloat16", layer_backward, streams=3),
)


def block(torch: Any, call: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of a call, over so many of them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats


def times(torch: Any, calls: list[Callable[[], Any]]) -> list[float]:
    """The median milliseconds of each call; they take turns."""
    repeats = []
    for call in calls:
        block(torch, call, 3)
        repeats.append(max(1, round(BLOCK_MS / max(block(torch, call, 3), 1e-3))))
    turns = [
        [block(torch, call, n) for call, n in zip(calls, repeats, strict=True)]
        for _ in range(TURNS)
    ]
    return [statistics.median(column) for column in zip(*turns, strict=True)]


def measure(torch: Any, fn: Any, case: Case) -> dict[str, Any]:
    """A row of the table."""
    dtype = getattr(torch, case.dtype)
    x = torch.randn(case.shape, device="cuda", dtype=torch.float32).to(dtype)
    if case.channels_last:
        x = x.to(memory_format=torch.channels_last)
    target = torch.empty_like(x)
    ours, peer = case.make(torch, fn, x)
    got, right = ours(), peer()
    first = [r[0] if isinstance(r, tuple) else r for r in (got, right)]
    torch.testing.assert_close(first[0].float(), first[1].float(), rtol=0.02, atol=0.02)
    del got, right, first
    ours_ms, peer_ms, copy_ms = times(torch, [ours, peer, lambda: target.copy_(x)])
    size = x.numel() * x.element_size()
    return {
        "case": case.label + (", channels last" if case.channels_last else ""),
        "shape": list(case.shape),
        "dtype": case.dtype,
        "MB": size / 2**20,
        "fastnorm ms": ours_ms,
        "pytorch ms": peer_ms,
        "copy ms": copy_ms,
        "fastnorm GB/s": case.streams * size / ours_ms / 1e6,
        "copy GB/s": 2 * size / copy_ms / 1e6,
        "of the copy": case.streams / 2 * copy_ms / ours_ms,
        "times PyTorch": peer_ms / ours_ms,
    }


def table(rows: list[dict[str, Any]], gpu_name: str, versions: str) -> str:
    """The rows as Markdown."""
    lines = [
        f"# {gpu_name}",
        "",
        f"Made by `python -m benchmarks.cuda`; {versions}.",
        "*of the copy*: bandwidth relative to a copy of x on the device.",
        "*times PyTorch*: its time by ours.",
        "",
        "| case | shape | dtype | MB | ms | GB/s | of the copy | PyTorch ms | times PyTorch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shape = "×".join(map(str, row["shape"]))
        lines.append(
            f"| {row['case']} | {shape} | {row['dtype']} | {row['MB']:.0f} | "
            f"{row['fastnorm ms']:.3f} | {row['fastnorm GB/s']:.0f} | {row['of the copy']:.2f} | "
            f"{row['pytorch ms']:.3f} | {row['times PyTorch']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure every case and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=RESULTS)
    folder = parser.parse_args().folder
    try:
        import torch
    except ImportError:
        print("this needs PyTorch with CUDA, and a GPU; nothing was measured", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("this PyTorch finds no GPU; nothing was measured", file=sys.stderr)
        return 2
    import numba

    import fastnorm as fn

    rows = []
    for case in CASES:
        rows.append(measure(torch, fn, case))
        print(json.dumps(rows[-1]), file=sys.stderr)
        torch.cuda.empty_cache()
    name = torch.cuda.get_device_name()
    versions = f"PyTorch {torch.__version__}, Numba {numba.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / (name.lower().replace(" ", "-") + "-cuda")
    text = table(rows, name, versions)
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    stem.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
