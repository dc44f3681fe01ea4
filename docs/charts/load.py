"""Draws benchmarks/results/*-load.json: times next to busy programs."""

import json
from pathlib import Path
from statistics import geometric_mean

import matplotlib.pyplot as plt

import benchmarks

found = sorted(Path(benchmarks.__path__[0], "results").glob("*-load.json"))
kept = [json.loads(path.read_text(encoding="utf-8")) for path in found]

fig, axes = plt.subplots(max(len(kept), 1), squeeze=False, figsize=(8, 4 * max(len(kept), 1)))
for axis, results in zip(axes[:, 0], kept):
    rows, machine = results["rows"], results["machine"]
    quiet = {row["case"]: row["times"]["one thread"] for row in rows if row["load"] == 0}
    loads = sorted({row["load"] for row in rows})
    names = [name for name in rows[0]["times"] if all(name in row["times"] for row in rows)]
    for i, name in enumerate(names):
        heights = [
            geometric_mean(
                row["times"][name] / quiet[row["case"]] for row in rows if row["load"] == load
            )
            for load in loads
        ]
        places = [place + 0.8 * (i - (len(names) - 1) / 2) / len(names) for place in loads]
        label = f"fastnorm, {name}" if "thread" in name else name
        axis.bar(places, heights, 0.8 / len(names), label=label)
    axis.set_xticks(loads)
    axis.axhline(1, color="grey", lw=0.8, ls="--")
    axis.set_title(f"{machine['processor']}, {machine['date']}", fontsize=10)
    axis.set(xlabel="busy programs beside it", ylabel="time / one quiet thread of fastnorm")
    axis.legend(fontsize=8)
fig.tight_layout()
