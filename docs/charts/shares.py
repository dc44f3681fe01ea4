"""Draws benchmarks/results/*-shares.json: the share of a copy, quiet and beside a busy program."""

import json
from pathlib import Path

import matplotlib.pyplot as plt

import benchmarks

found = sorted(Path(benchmarks.__path__[0], "results").glob("*-shares.json"))
kept = [json.loads(path.read_text(encoding="utf-8")) for path in found]

fig, axes = plt.subplots(max(len(kept), 1), squeeze=False, figsize=(8, 4 * max(len(kept), 1)))
for axis, results in zip(axes[:, 0], kept):
    rows, machine = results["rows"], results["machine"]
    for i, name in enumerate(dict.fromkeys(row["function"] for row in rows)):
        for load, line, beside in ((0, "-", "quiet"), (1, ":", "beside a busy program")):
            chosen = [row for row in rows if (row["function"], row["load"]) == (name, load)]
            shares = [row["times"]["copy"] / row["times"]["fastnorm"] for row in chosen]
            sizes = [row["bytes"] for row in chosen]
            axis.plot(sizes, shares, f".{line}", color=f"C{i}", label=f"{name}, {beside}")
    title = f"{machine['processor']}, {machine['threads']} threads, {machine['date']}"
    axis.set_title(title, fontsize=10)
    axis.axhline(1, color="grey", lw=0.8, ls="--")
    axis.set(xscale="log", xlabel="bytes of x", ylabel="time of a copy / time", ylim=(0, None))
    axis.legend(fontsize=8)
fig.tight_layout()
