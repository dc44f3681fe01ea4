"""Draws the share of a copy, by size, from benchmarks/results/*-threads.json."""

import json
from pathlib import Path

import matplotlib.pyplot as plt

import benchmarks

found = sorted(Path(benchmarks.__path__[0], "results").glob("*-threads.json"))
kept = [json.loads(path.read_text(encoding="utf-8")) for path in found]

fig, axes = plt.subplots(max(len(kept), 1), squeeze=False, figsize=(8, 4 * max(len(kept), 1)))
for axis, results in zip(axes[:, 0], kept):
    rows = [row for row in results["rows"] if row["kind"] == "cliff"]
    for name in dict.fromkeys(row["function"] for row in rows):
        chosen = [row for row in rows if row["function"] == name]
        # a row's bytes are those that are read and written: x is half of them
        sizes = [row["bytes"] / 2 for row in chosen]
        axis.plot(sizes, [row["share_of_copy"] for row in chosen], ".-", label=name)
    machine = results["machine"]
    title = f"{machine['processor']}, {machine['threads']} threads, {machine['date']}"
    axis.set_title(title, fontsize=10)
    axis.axhline(1, color="grey", lw=0.8, ls="--")
    axis.set(xscale="log", xlabel="bytes of x", ylabel="time of a copy / time", ylim=(0, None))
    axis.legend(fontsize=8)
fig.tight_layout()
