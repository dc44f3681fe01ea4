"""Statistics at full size: right to 1e-12, fast, beyond memory, and over two thousand files.

    python -m benchmarks.statistics                # everything, a few minutes; nothing else may run
    python -m benchmarks.statistics accuracy speed # some of it: accuracy, speed, dask, images

Results are kept in benchmarks/results/statistics.json and shown in statistics.md next to it. Dask,
Pillow, SciPy and scikit-learn are those of the extra "test", psutil is of "bench".
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import fastnorm as fn
from fastnorm._bench import machine
from fastnorm._bench.timing import Contender, compete, turns

Row = tuple[str, str, str]  # what, what was measured, what is asked for

RESULTS = Path(__file__).parent / "results" / "statistics.json"
TABLE = ("| what | measured | asked for |", "| --- | --- | --- |")

# --- Accuracy -------------------------------------------------------------------------------------

ELEMENTS = 100_000_000


def exact(x: np.ndarray[Any, Any]) -> tuple[Any, Any]:
    """Mean and variance in long double, block by block: wrong by 1e-17 or so."""
    pivot = x[:1000].astype(np.longdouble).mean()
    first = second = np.longdouble(0)
    for block in np.array_split(x, max(1, x.size // 1_000_000)):
        d = block.astype(np.longdouble) - pivot
        first += d.sum()
        second += (d * d).sum()
    return pivot + first / x.size, (second - first * first / x.size) / x.size


def accuracy() -> list[Row]:
    """A hundred million different numbers."""
    rng = np.random.default_rng(0)
    rows = []
    for name, make, allowed in (
        ("uint8", lambda n: rng.integers(0, 256, n, np.uint8), 1e-12),
        ("float32", lambda n: 3 + rng.standard_normal(n, np.float32), 1e-12),
        (
            "float32, mean/std 1e6",
            lambda n: np.float32(1e6) + rng.standard_normal(n, np.float32),
            1e-6,
        ),
    ):
        x = np.concatenate([make(ELEMENTS // 10) for _ in range(10)])
        right = exact(x)
        found = fn.moments(x)
        errors = [float(abs(f / r - 1)) for f, r in zip(found, right)]
        measured = f"mean {errors[0]:.1e}, variance {errors[1]:.1e}"
        rows.append((f"1e8 {name}: relative errors", measured, f"{allowed:.0e}"))
        del x
    return rows


# --- Speed ----------------------------------------------------------------------------------------


def ratio(ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[float, Contender]:
    """How many times as long as ours theirs takes."""
    own, other = Contender(ours), Contender(theirs)
    compete({"ours": own, "theirs": other})
    return other.seconds / own.seconds, own


def speed() -> list[Row]:
    """Compared with NumPy, SciPy and scikit-learn."""
    from scipy.stats import zscore
    from sklearn.preprocessing import scale

    warnings.simplefilter("ignore")  # scikit-learn's, about float32
    rng = np.random.default_rng(0)
    rows = []

    def row(what: str, ours: Any, theirs: Any, asked: str) -> None:
        times, own = ratio(ours, theirs)
        rows.append((what, f"{times:.1f} times ({own.seconds * 1e3:.2f} ms)", asked))

    for shape, axis in (((100_000, 64), (0,)), ((32, 64, 56, 56), (0, 2, 3))):
        for dtype, asked in (("float32", "4"), ("uint8", "")):
            x = (128 + 20 * rng.standard_normal(shape, np.float32)).astype(dtype)

            def numpys(x: Any = x, axis: Any = axis) -> Any:
                return np.mean(x, axis), np.var(x, axis)

            what = f"moments, {dtype} {shape} over {axis}, beside np.mean and np.var"
            row(what, lambda x=x, axis=axis: fn.moments(x, axis), numpys, asked)
    x = rng.standard_normal((100_000, 64), np.float32)
    for name, other, asked in (
        ("scipy.stats.zscore", zscore, "8"),
        ("sklearn's scale", scale, "10"),
    ):
        what = f"standardize, float32 (100000, 64) over 0, beside {name}"
        row(what, lambda: fn.standardize(x, 0), lambda other=other: other(x), asked)
    return rows


# --- Dask -----------------------------------------------------------------------------------------

CHUNKS, ROWS = 96, 16_384  # of 1024 float32: 64 MiB each, 6 GiB in all


PERIOD = 512  # rows after which those of a chunk are repeated: what they must give is soon known


def rows_of(i: int) -> Any:
    """The rows that chunk i repeats."""
    x = np.random.default_rng(i).standard_normal((PERIOD, 1024), np.float32)
    return 10 + (1 + i % 3) * x


def chunk(block_info: Any = None) -> Any:
    """Made when it is read, and again when it is read again."""
    return np.tile(rows_of(block_info[None]["chunk-location"][0]), (ROWS // PERIOD, 1))


def dask() -> list[Row]:
    """6 GiB on two workers of 1 GiB, of which one is killed half-way."""
    import dask.array as da
    from distributed import Client, LocalCluster

    x = da.map_blocks(
        chunk, chunks=((ROWS,) * CHUNKS, (1024,)), dtype=np.float32, meta=np.empty((0, 0), "f4")
    )
    # what it must be, in long double
    wide = np.concatenate([rows_of(i) for i in range(CHUNKS)]).astype(np.longdouble)
    mean, var = wide.mean(0), wide.var(0)
    del wide
    rows, taken = [], 0.0
    options: dict[str, Any] = {"n_workers": 2, "threads_per_worker": 1, "memory_limit": "1GiB"}
    with (
        LocalCluster(dashboard_address=None, silence_logs=50, **options) as cluster,
        Client(cluster) as client,
    ):
        for name, kill in (("6 GiB", False), ("6 GiB, a worker killed", True)):
            y = fn.batch_norm(x, training=True, eps=0.0).astype(np.float64)
            lazy = [*fn.moments(x, 0), y.mean(0), (y * y).mean(0)]
            begin, after = time.perf_counter(), ""
            futures = client.compute(lazy)
            if kill:
                victim = next(iter(client.run(os.getpid).values()))
                # half-way of what the first time took
                threading.Timer(taken / 2, os.kill, (victim, signal.SIGKILL)).start()
                after = f", killed after {taken / 2:.0f} s"
            found = client.gather(futures)
            if kill:
                assert victim not in client.run(os.getpid).values(), "it was to be killed"
            taken = time.perf_counter() - begin
            errors = [float(abs(f / r - 1).max()) for f, r in zip(found[:2], (mean, var))]
            off = max(float(abs(found[2]).max()), float(abs(found[3] - 1).max()))
            measured = (
                f"relative errors: mean {errors[0]:.1e}, variance {errors[1]:.1e}; mean and mean "
                f"square of the result are off by {off:.1e}; {taken:.0f} s{after}"
            )
            rows.append((f"Dask, {name}: moments and batch_norm (training)", measured, "right"))
    return rows


# --- Images ---------------------------------------------------------------------------------------

LOOP = """
import json, sys
from pathlib import Path
import numpy as np
from PIL import Image
n = s = q = 0
for path in sorted(Path(sys.argv[1]).rglob("*.jpg")):
    x = np.asarray(Image.open(path), np.float64)
    n += x.shape[0] * x.shape[1]
    s = s + x.sum((0, 1))
    q = q + (x * x).sum((0, 1))
print(json.dumps({"mean": (s / n).tolist(), "std": np.sqrt(q / n - (s / n) ** 2).tolist()}))
"""
FILES, SIDE = 2000, 224


def cut(folder: Path, files: int = FILES, side: int = SIDE) -> None:
    """Cut JPEG files from the photographs that come with scikit-learn."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    photographs = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    rng = np.random.default_rng(0)
    for i in range(files):
        photograph = photographs[i % 2]
        top, left = (int(rng.integers(0, n - side)) for n in photograph.shape[:2])
        path = folder / f"class{i % 7}" / f"{i:05}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(photograph[top : top + side, left : left + side]).save(path)


def timed(command: list[str]) -> tuple[float, float, Any]:
    """Seconds, megabytes of the process and its children at the most, and the JSON it prints."""
    import psutil

    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            size = 0
            try:
                parent = psutil.Process(process.pid)
                for each in (parent, *parent.children(recursive=True)):
                    size += each.memory_info().rss
            except psutil.Error:
                continue
            peak = max(peak, size)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, _ = process.communicate()
    taken = time.perf_counter() - begin
    done.set()
    watcher.join()
    return taken, peak / 1e6, json.loads(out)


def images() -> list[Row]:
    """2,000 photographs: the command and a loop over Pillow and NumPy."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cut(folder)
        ours = [sys.executable, "-m", "fastnorm", "stats", name, "--json"]
        commands = {
            "loop": [sys.executable, "-c", LOOP, name],
            "1 worker": ours,
            "2 workers": [*ours, "--workers", "2"],
        }
        runs: dict[str, list[Any]] = {key: [] for key in commands}
        for order in turns(list(commands), 5):
            for key in order:
                runs[key].append(timed(commands[key]))
        seconds = {key: float(np.median([r[0] for r in each])) for key, each in runs.items()}
        from PIL import Image

        x = np.concatenate(
            [np.asarray(Image.open(p)).reshape(-1, 3) for p in sorted(folder.rglob("*.jpg"))]
        )
        # in float64, from sums of integers, which are exact
        sums = [np.array([(x[:, c].astype(np.int64) ** k).sum() for c in range(3)]) for k in (1, 2)]
        mean = sums[0] / len(x)
        right = {"mean": mean, "std": np.sqrt(sums[1] / len(x) - mean**2)}
    for key in ("1 worker", "2 workers"):
        found, memory = runs[key][-1][2], max(r[1] for r in runs[key])
        error = max(float(abs(found[k] / right[k] - 1).max()) for k in right)
        asked = ("1e-9", "2", "300 MB") if key == "2 workers" else ("1e-9", "", "300 MB")
        what = f"fastnorm stats, {FILES} JPEG files of {SIDE}x{SIDE}, {key}"
        rows += [
            (f"{what}: relative error", f"{error:.1e}", asked[0]),
            (
                f"{what}: beside a loop over Pillow and NumPy",
                f"{seconds['loop'] / seconds[key]:.2f} times ({seconds[key]:.2f} s)",
                asked[1],
            ),
            (f"{what}: memory of all processes", f"{memory:.0f} MB", asked[2]),
        ]
    return rows


# --- The table ------------------------------------------------------------------------------------

PARTS = {"accuracy": accuracy, "speed": speed, "dask": dask, "images": images}


def main(names: list[str]) -> None:
    """Measure some parts, or all; keep the rows, and write the table of all that are kept."""
    if unknown := set(names) - PARTS.keys():
        raise SystemExit(f"unknown: {sorted(unknown)}; there are {', '.join(PARTS)}")
    facts = machine.facts()
    about = f"{facts['processor']}, {facts['cores']} cores"
    kept: dict[str, Any] = {}
    if RESULTS.exists():
        kept = json.loads(RESULTS.read_text(encoding="utf-8"))
    if kept.get("machine") != about:
        kept = {"machine": about, "parts": {}}
    for name in names or PARTS:
        rows = PARTS[name]()
        print("\n".join("  ".join(row) for row in rows), flush=True)
        kept["parts"][name] = {"date": facts["date"], "rows": rows}
    lines = [f"# Statistics at full size\n\n`python -m benchmarks.statistics` on {about}."]
    for name, part in kept["parts"].items():
        lines += [f"\n## {name.capitalize()}, {part['date']}\n", *TABLE]
        lines += [f"| {' | '.join(row)} |" for row in part["rows"]]
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
