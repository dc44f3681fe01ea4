"""Draws benchmarks/results/*-accuracy.json: errors where the mean is large against the spread."""

import json
from pathlib import Path

import matplotlib.pyplot as plt

import benchmarks

found = sorted(Path(benchmarks.__path__[0], "results").glob("*-accuracy.json"))
kept = [json.loads(path.read_text(encoding="utf-8")) for path in found]

fig, axes = plt.subplots(max(len(kept), 1), squeeze=False, figsize=(8, 4.5 * max(len(kept), 1)))
for axis, results in zip(axes[:, 0], kept):
    rows, machine = results["rows"], results["machine"]
    means = [row["mean_over_std"] for row in rows]
    for name, mark in zip(rows[0]["errors"], "osd^v"):
        errors = [row["errors"][name] for row in rows]
        version = machine["versions"].get(name, "")
        axis.plot(means, errors, marker=mark, ms=5, label=f"{name} {version}")
    axis.set_title(f"layer_norm 256x1024, {machine['processor']}, {machine['date']}", fontsize=10)
    axis.set(xscale="log", yscale="log", xlabel="mean / standard deviation")
    axis.set_ylabel("largest error / standard deviation")
    axis.legend(fontsize=8)
fig.tight_layout()
