"""Draws benchmarks/results/*-cores.json: how many times as fast n threads would be."""

import json
from pathlib import Path

import matplotlib.pyplot as plt

import benchmarks

found = sorted(Path(benchmarks.__path__[0], "results").glob("*-cores.json"))
kept = [json.loads(path.read_text(encoding="utf-8")) for path in found]

fig, axes = plt.subplots(max(len(kept), 1), squeeze=False, figsize=(8, 4.5 * max(len(kept), 1)))
for axis, results in zip(axes[:, 0], kept):
    ahead = [row for row in results["rows"] if "faster" in row]
    colours = {row["example"]: f"C{i // 2}" for i, row in enumerate(ahead)}
    for row in ahead:
        one = row["pages"] == "touched by one"
        threads = [int(n) for n in row["faster"]]
        style = {"ls": ":" if one else "-", "color": colours[row["example"]]}
        label = None if one else row["example"]
        axis.plot(threads, list(row["faster"].values()), marker=".", label=label, **style)
    machine = results["machine"]
    axis.set_title(
        f"computed from one core of {machine['processor']}, {machine['date']}", fontsize=10
    )
    axis.set(xscale="log", yscale="log", xlabel="threads", ylabel="times as fast as one")
    axis.set_xticks(threads, [str(n) for n in threads])
    axis.minorticks_off()
    axis.legend(fontsize=8)
if not kept:
    axes[0, 0].text(0.5, 0.5, "no machine was measured yet", ha="center")
    axes[0, 0].set_axis_off()
fig.tight_layout()
