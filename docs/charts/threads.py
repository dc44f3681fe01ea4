"""Draws benchmarks/results/*-thread-curve.json: times of two threads over those of one."""

import json
from pathlib import Path

import matplotlib.pyplot as plt

import benchmarks

found = sorted(Path(benchmarks.__path__[0], "results").glob("*-thread-curve.json"))
kept = [json.loads(path.read_text(encoding="utf-8")) for path in found]

fig, axes = plt.subplots(max(len(kept), 1), squeeze=False, figsize=(8, 4 * max(len(kept), 1)))
for axis, results in zip(axes[:, 0], kept):
    for name in dict.fromkeys(row["function"] for row in results["rows"]):
        chosen = [row for row in results["rows"] if row["function"] == name]
        axis.plot([r["bytes"] for r in chosen], [r["ratio"] for r in chosen], ".-", label=name)
    machine = results["machine"]
    axis.set_title(f"{machine['processor']}, {machine['date']}", fontsize=10)
    axis.axhline(1.05, color="grey", lw=0.8, ls="--")
    axis.set(xscale="log", xlabel="bytes of x", ylabel="two threads / one", ylim=(0, None))
    axis.legend(fontsize=8)
if not kept:
    axes[0, 0].text(0.5, 0.5, "no machine was measured yet", ha="center")
    axes[0, 0].set_axis_off()
fig.tight_layout()
