"""The study of ``fastnorm placement``: what it changes where a transformer has its norms.

Three parts, each with the norm before attention and network ("pre"), after the sums ("post"), on
both sides ("peri"), and after sums with a scaled residual ("deepnorm"):

- gradient: how large the gradients are at initialisation, by depth;
- residual: how large the residual stream is at initialisation, by layer;
- training: what becomes of a small model that learns to continue a text, at several learning rates,
  with and without warm-up.

The first two are in the setting of Xiong and others, "On Layer Normalization in the Transformer
Architecture", 2020, arXiv:2002.04745: one head, W_Q = W_K = 0, ReLU, square matrices, Xavier.
(Of which the proofs there use the variance; ours are uniform, theirs normal numbers.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

import fastnorm as fn
from fastnorm._bench.machine import environment
from fastnorm._bench.text import aligned
from fastnorm.arguments import Array
from fastnorm.nn.stream import PLACEMENTS, Placement
from fastnorm.workers import interrupts_held, processes

Report: TypeAlias = Callable[[str], None]

PARTS = ("gradient", "residual", "training")
DEPTHS = (2, 4, 6, 8, 12, 16, 24, 32, 48)
SEEDS = 3


def steps(parts: Sequence[str], depths: Sequence[int], seeds: int) -> int:
    """Return how often :func:`run` will report."""
    each = {"gradient": len(PLACEMENTS) * len(depths), "residual": len(PLACEMENTS)}
    each["training"] = len(_jobs(seeds, STEPS))
    return sum(each[part] for part in parts)


def run(
    parts: Sequence[str] = PARTS,
    depths: Sequence[int] = DEPTHS,
    seeds: int = SEEDS,
    report: Report = lambda step: None,
    *,
    training_steps: int | None = None,
) -> dict[str, Any]:
    """Do the study, or some of its parts: the result of each by its name, ready for JSON.

    There are as many networks of each kind as `seeds`; the residual part is of the largest of the
    `depths`. `report` is called `steps` times, with what is begun or, in training, done. What is
    not a number is None.
    """
    do: dict[str, Callable[[], dict[str, Any]]] = {
        "gradient": lambda: gradient(depths, seeds, report),
        "residual": lambda: residual(max(depths), seeds, report),
        "training": lambda: training(seeds, training_steps or STEPS, report),
    }
    return {part: do[part]() for part in PARTS if part in parts}


@contextmanager
def _each(
    function: Callable[..., Array], jobs: Sequence[tuple[Any, ...]]
) -> Iterator[Iterator[Array]]:
    """The result of each job in turn, on as many processors as fastnorm may use."""
    workers = min(fn.get_num_threads(), len(jobs))
    if workers < 2:
        yield (function(*job) for job in jobs)
        return
    # Each with one thread: the matrices are small.
    single = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "FASTNORM_NUM_THREADS"), "1")
    with environment(**single), processes(workers) as pool:
        with interrupts_held():
            results = pool.map(function, *zip(*jobs))
        yield results


# --- At initialisation ----------------------------------------------------------------------------

WIDTH, LENGTH = 128, 16
SAMPLES = 2  # sequences for each network


def _network(
    placement: Placement, depth: int, rng: np.random.Generator
) -> fn.nn.TransformerEncoder:
    m = fn.nn.TransformerEncoder(
        depth, WIDTH, 1, WIDTH, placement=placement, activation="relu", rng=rng
    )
    for layer in m.layers:
        layer.parameters()["self_attn.in_proj_weight"][: 2 * WIDTH] = 0  # W_Q and W_K
    return m


def _gradients(placement: Placement, depth: int, seed: int) -> Array:
    """The norm of the gradient of each layer's second feed-forward matrix.

    It is that of the loss at one position, as in the paper's theorem 1: cross entropy of a linear
    classifier with as many classes as the network is wide.
    """
    rng = np.random.default_rng(seed)
    m = _network(placement, depth, rng)
    head = (rng.standard_normal((WIDTH, WIDTH)) * WIDTH**-0.5).astype(np.float32)
    found = []
    for _ in range(SAMPLES):
        y = m(rng.standard_normal((LENGTH, WIDTH)).astype(np.float32))
        _, dscores = fn.nn.cross_entropy(y[:1] @ head.T, rng.integers(WIDTH, size=1))
        dy = np.zeros_like(y)
        dy[:1] = dscores @ head
        m.zero_grad()
        m.backward(dy)
        found.append([np.linalg.norm(layer.grad["linear2.weight"]) for layer in m.layers])
    return np.mean(found, 0)


def _slope(depths: Sequence[int], norms: Sequence[float]) -> float | None:
    if len(set(depths)) < 2:
        return None
    return float(np.polyfit(np.log(depths), np.log(norms), 1)[0])


def gradient(depths: Sequence[int], seeds: int, report: Report) -> dict[str, Any]:
    """Measure gradients by depth.

    Of each placement ``norms``, of the last layer for each depth, the mean over seeds; ``spread``,
    its standard deviation over them; ``layers``, of every layer for each depth; and ``slope``, that
    of log norm on log depth, with ``slopes`` for each seed.
    """
    results: dict[str, Any] = {}
    jobs = list(product(PLACEMENTS, depths, range(seeds)))
    norms = {}
    with _each(_gradients, jobs) as each:
        for placement, depth, seed in jobs:
            if seed == 0:
                report(f"gradient: {placement}, {depth} layers")
            norms[placement, depth, seed] = next(each)
    for placement in PLACEMENTS:
        found = [np.array([norms[placement, d, s] for s in range(seeds)]) for d in depths]
        last = np.array([layers[:, -1] for layers in found])
        results[placement] = {
            "depths": list(depths),
            "norms": last.mean(1).tolist(),
            "spread": (last.std(1, ddof=1) if seeds > 1 else np.zeros(len(depths))).tolist(),
            "layers": [layers.mean(0).tolist() for layers in found],
            "slope": _slope(depths, last.mean(1)),
            "slopes": [_slope(depths, column) for column in last.T],
        }
    return results


def _sizes(placement: Placement, depth: int, seed: int) -> Array:
    """The mean of ||x||^2 / d after each layer, before a norm takes the size away."""
    rng = np.random.default_rng(seed)
    m = _network(placement, depth, rng)
    x = rng.standard_normal((4 * SAMPLES, LENGTH, WIDTH)).astype(np.float32)
    found = [] if placement in ("post", "deepnorm") else [x]
    for layer in m.layers:
        x = layer(x)
        if placement in ("post", "deepnorm"):
            *_, (_, ffn) = layer._saved  # the sum that the second norm saw: x_{l,5} in the paper
            found.append(ffn[1])
        else:
            found.append(x)
    return np.array([np.square(stream, dtype=float).sum(-1).mean() / WIDTH for stream in found])


def residual(depth: int, seeds: int, report: Report) -> dict[str, Any]:
    """Measure the residual stream by layer, in units of d, to compare with lemma 2 of the paper.

    Of each placement ``layers`` and ``sizes``, the means over seeds. For "pre" and "peri", which
    begin at layer 0, the stream itself, and for "pre" the bounds ``lower``, 1 + l/2, and ``upper``,
    1 + 3l/2. For "post" and "deepnorm" the last sum of each layer, ``mean`` over the layers, and
    for "post" the ``expected`` 3/2.
    """
    results: dict[str, Any] = {}
    measured = {}
    with _each(_sizes, list(product(PLACEMENTS, [depth], range(seeds)))) as each:
        for placement in PLACEMENTS:
            report(f"residual: {placement}")
            measured[placement] = np.mean([next(each) for _ in range(seeds)], 0)
    for placement, sizes in measured.items():
        first = depth + 1 - len(sizes)
        layers = np.arange(first, depth + 1)
        results[placement] = {"layers": layers.tolist(), "sizes": sizes.tolist()}
        if first:
            results[placement]["mean"] = float(sizes.mean())
        if placement == "pre":
            results[placement] |= {
                "lower": (1 + layers / 2).tolist(),
                "upper": (1 + 3 * layers / 2).tolist(),
            }
        if placement == "post":
            results[placement]["expected"] = 1.5
    return results


# --- Training -------------------------------------------------------------------------------------

LAYERS, SIZE, HEADS = 6, 32, 2
BATCH, CONTEXT = 16, 32  # sequences, and characters of each
STEPS = 300
WARM_UP = 0.5  # of the steps
RATES = (1e-3, 3e-3, 8e-3)
BETAS = (0.9, 0.98)  # of Adam, as in the papers
POINTS = 30  # of a loss curve
MARGIN = 0.1  # nats


def text() -> str:
    """Return what pydoc's ``help`` tells of the language: chapters of Python's documentation."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


@lru_cache
def _codes() -> tuple[Array, int]:
    """Each character of the text as the number of its kind, and how many kinds there are."""
    kinds, codes = np.unique(np.array(list(text())), return_inverse=True)
    return codes, len(kinds)


def entropy(codes: Array) -> float:
    """Return what a character takes, in nats, if nothing is known but how frequent each kind is."""
    shares = np.bincount(codes) / len(codes)
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


class Model:
    """A causal encoder between characters and scores of the next one."""

    def __init__(self, placement: Placement, kinds: int, rng: np.random.Generator) -> None:
        self.encoder = fn.nn.TransformerEncoder(
            LAYERS, SIZE, HEADS, placement=placement, causal=True, rng=rng
        )
        # characters and places together have variance 1
        own = {
            "characters": rng.standard_normal((kinds, SIZE)) * 0.5**0.5,
            "places": rng.standard_normal((CONTEXT, SIZE)) * 0.5**0.5,
            "head": rng.standard_normal((kinds, SIZE)) * (2 / (kinds + SIZE)) ** 0.5,
        }
        self.own = {name: p.astype(np.float32) for name, p in own.items()}

    def parameters(self) -> dict[str, Array]:
        """Return all parameters by name."""
        return self.own | self.encoder.parameters()

    def loss(self, windows: Array) -> tuple[float, dict[str, Array]]:
        """Return the loss of (N, CONTEXT + 1) characters, and the gradient of each parameter."""
        before, after = windows[:, :-1], windows[:, 1:]
        own = self.own
        hidden = self.encoder(own["characters"][before] + own["places"])
        loss, dscores = fn.nn.cross_entropy(fn.nn.linear(hidden, own["head"]), after)
        self.encoder.zero_grad()
        dx = self.encoder.backward(dscores @ own["head"])
        characters = np.zeros_like(own["characters"])
        np.add.at(characters, before, dx)
        head = dscores.reshape(-1, len(own["head"])).T @ hidden.reshape(-1, SIZE)
        gradients = {"characters": characters, "places": dx.sum(0), "head": head}
        return loss, gradients | self.encoder.grad


@dataclass(frozen=True)
class Job:
    """One training."""

    placement: Placement
    warmup: bool
    lr: float
    seed: int
    steps: int

    def rate(self, step: int) -> float:
        """Return the learning rate: it falls to 0 on a line, and with warm-up rises on one first.

        Without, it begins at its largest.
        """
        rise = (step + 1) / (WARM_UP * self.steps) if self.warmup else 1.0
        return self.lr * min(1.0, rise) * (1 - step / self.steps)


def _jobs(seeds: int, number: int) -> list[Job]:
    chosen = product(PLACEMENTS, (False, True), RATES, range(seeds))
    return [Job(*values, number) for values in chosen]


@np.errstate(all="ignore")  # a training that fails does so at its loss
def train(job: Job) -> Array:
    """Train one model; return the loss of each step, NaN after one that is not finite.

    The seed sets the first weights and the order of the batches, the same for all placements.
    """
    codes, kinds = _codes()
    rng = np.random.default_rng(job.seed)
    model = Model(job.placement, kinds, rng)
    adam = fn.nn.Adam(model.parameters(), betas=BETAS, eps=1e-9)
    batches = np.random.default_rng(job.seed)
    losses = np.full(job.steps, np.nan)
    for step in range(job.steps):
        places = batches.integers(len(codes) - CONTEXT, size=BATCH)
        loss, gradients = model.loss(codes[places[:, None] + np.arange(CONTEXT + 1)])
        if not np.isfinite(loss):
            break
        losses[step] = loss
        adam.lr = job.rate(step)
        adam.step(gradients)
    return losses


def training(seeds: int, number: int, report: Report) -> dict[str, Any]:
    """Train every placement with and without warm-up, at every learning rate, from every seed.

    What is found is the ``entropy`` of a single character, in nats; and ``runs``, each with its
    options, its ``curve`` (mean losses of equal shares of the steps), its final ``loss`` (the mean
    over the last tenth of the steps) and whether it ``diverged``: ended at what is not a number, or
    less than `MARGIN` below that entropy, which is to have learned next to nothing of sequences.
    """
    codes, kinds = _codes()
    alone = entropy(codes)
    runs = []
    jobs = _jobs(seeds, number)
    with _each(train, [(job,) for job in jobs]) as each:
        for job, losses in zip(jobs, each):
            with_or_not = "with" if job.warmup else "without"
            report(f"training: {job.placement} at {job.lr:g} {with_or_not} warm-up")
            loss = float(losses[-max(1, number // 10) :].mean())
            parts = np.array_split(losses, min(POINTS, number))
            found = {
                "loss": _number(loss),
                "diverged": not loss < alone - MARGIN,
                "curve": [_number(float(part.mean())) for part in parts],
            }
            runs.append(asdict(job) | found)
    setting = {"characters": len(codes), "kinds": kinds, "entropy": alone, "rates": list(RATES)}
    return setting | {"runs": runs}


def _number(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None


def _chosen(result: dict[str, Any], placement: str, warmup: bool, lr: float) -> list[Any]:
    kind = (placement, warmup, lr)
    return [r for r in result["runs"] if (r["placement"], r["warmup"], r["lr"]) == kind]


def _spread(runs: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Mean and standard deviation of the final losses."""
    losses = [np.nan if r["loss"] is None else r["loss"] for r in runs]
    return float(np.mean(losses)), float(np.std(losses, ddof=1)) if len(losses) > 1 else np.nan


# --- Text -----------------------------------------------------------------------------------------


def to_text(results: dict[str, Any]) -> str:
    """Return tables of what was found."""
    tables: dict[str, list[list[str]]] = {}
    if "gradient" in results:
        depths = results["gradient"]["pre"]["depths"]
        rows = [["", *(f"{d} layers" for d in depths), "slope"]]
        for placement, found in results["gradient"].items():
            pairs = zip(found["norms"], found["spread"])
            slope = "-" if found["slope"] is None else f"{found['slope']:.3f}"
            rows.append([placement, *(f"{n:.2f} +- {s:.2f}" for n, s in pairs), slope])
        matrix = "the last layer's second feed-forward matrix"
        tables[f"gradient of {matrix} at initialisation, by depth"] = rows
    if "residual" in results:
        shown = _some(results["residual"]["post"]["layers"])
        rows = [["", *(f"layer {i}" for i in shown), "lemma 2"]]
        for placement, found in results["residual"].items():
            sizes = dict(zip(found["layers"], found["sizes"]))
            lemma = {"pre": "1 + l/2 to 1 + 3l/2", "post": "1.5"}.get(placement, "")
            rows.append([placement, *(f"{sizes[i]:.2f}" for i in shown), lemma])
        tables["residual stream at initialisation, |x|^2 / d"] = rows
    if "training" in results:
        found = results["training"]
        rows = [["", "warm-up", *(f"rate {lr:g}" for lr in found["rates"])]]
        for placement, warmup in product(PLACEMENTS, (False, True)):
            cells = []
            for lr in found["rates"]:
                runs = _chosen(found, placement, warmup, lr)
                mean, deviation = _spread(runs)
                diverged = sum(r["diverged"] for r in runs)
                cell = f"{mean:.2f} +- {deviation:.2f}".removesuffix(" +- nan")
                cells.append(f"{cell} ({diverged} of {len(runs)} diverged)" if diverged else cell)
            rows.append([placement, "yes" if warmup else "no", *cells])
        alone = f"{found['entropy']:.2f} is that of characters alone"
        tables[f"final training loss in nats a character; {alone}"] = rows
    return "\n\n".join(
        "\n".join([title, *(line.rstrip() for line in aligned(rows, "<"))])
        for title, rows in tables.items()
    )


def _some(layers: Sequence[int]) -> list[int]:
    """At most six of them, evenly spaced, the first and the last among them."""
    return sorted({layers[round(i)] for i in np.linspace(0, len(layers) - 1, 6)})


# --- The picture ----------------------------------------------------------------------------------

STYLES = {
    "pre": ("#2563eb", "o"),
    "post": ("#dc2626", "s"),
    "peri": ("#0f766e", "^"),
    "deepnorm": ("#b45309", "D"),
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw what was found into a file, a row for initialisation and one for training."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    start = [part for part in ("gradient", "residual") if part in results]
    height = bool(start) + ("training" in results)
    with rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(10.5, 3.6 * height), layout="constrained")
        grid = figure.subplots(height, 3, squeeze=False)
        row = list(grid[0]) if start else []
        if "gradient" in results:
            _draw_gradient(results["gradient"], row.pop(0), row.pop(0))
        if "residual" in results:
            _draw_residual(results["residual"], row.pop(0))
        if "training" in results:
            _draw_training(results["training"], grid[-1])
        for ax in row:
            ax.set_visible(False)
        for ax in grid.flat:
            ax.grid(color="#e5e7eb")
            ax.spines[["top", "right"]].set_visible(False)
        grid[0, 0].legend(frameon=False)
        figure.savefig(path, dpi=110)


def _marks(placement: str) -> dict[str, Any]:
    """How means and their deviations are drawn."""
    colour, marker = STYLES[placement]
    style = {"ms": 4, "lw": 1.3, "elinewidth": 1, "capsize": 2}
    return {"color": colour, "marker": marker, **style}


def _draw_gradient(found: dict[str, Any], by_depth: Any, by_layer: Any) -> None:
    for placement, (colour, _) in STYLES.items():
        values = found[placement]
        slope = values["slope"]
        label = placement if slope is None else f"{placement}, slope {slope:.2f}"
        means, deviations = values["norms"], values["spread"]
        by_depth.errorbar(values["depths"], means, deviations, label=label, **_marks(placement))
        norms = values["layers"][-1]
        by_layer.plot(range(1, len(norms) + 1), norms, color=colour, lw=1.3)
    depths = found["pre"]["depths"]
    by_depth.set(xscale="log", yscale="log", xlabel="layers", title="gradient of the last layer")
    by_depth.set_xticks(depths, map(str, depths))
    by_depth.minorticks_off()
    by_layer.set(
        yscale="log", xlabel="layer", title=f"gradient of every layer, {depths[-1]} layers"
    )


def _draw_residual(found: dict[str, Any], ax: Any) -> None:
    for placement, (colour, _) in STYLES.items():
        ax.plot(
            found[placement]["layers"], found[placement]["sizes"], color=colour, lw=1.3,
            label=placement,
        )  # fmt: skip
    pre, post = found["pre"], found["post"]
    ax.fill_between(
        pre["layers"], pre["lower"], pre["upper"], color=STYLES["pre"][0], alpha=0.12, lw=0
    )
    ax.axhline(post["expected"], color=STYLES["post"][0], lw=0.8, ls=":")
    ax.set(yscale="log", xlabel="layer", title="residual stream, |x|² / d, and lemma 2")


def _draw_training(found: dict[str, Any], axes: Sequence[Any]) -> None:
    rate = found["rates"][-1]
    without, with_, final = axes
    for placement, (colour, _) in STYLES.items():
        for ax, warmup in ((without, False), (with_, True)):
            for i, r in enumerate(_chosen(found, placement, warmup, rate)):
                curve = [np.nan if point is None else point for point in r["curve"]]
                at = (np.arange(len(curve)) + 0.5) * r["steps"] / len(curve)
                ax.plot(at, curve, color=colour, lw=0.9, label=placement if i == 0 else None)
            pairs = [_spread(_chosen(found, placement, warmup, lr)) for lr in found["rates"]]
            means, deviations = zip(*pairs)
            style = {} if warmup else {"ls": ":", "mfc": "white"}
            deviations = np.nan_to_num(deviations)
            final.errorbar(found["rates"], means, deviations, **_marks(placement), **style)
    for ax, title in ((without, "without warm-up"), (with_, "with warm-up")):
        ax.set(xlabel="step", title=f"{title}, rate {rate:g}, each seed", ylabel="nats a character")
    without.legend(frameon=False)
    final.set(xscale="log", xlabel="learning rate", title="final loss (dotted: without warm-up)")
    final.set_xticks(found["rates"], [f"{lr:g}" for lr in found["rates"]])
    final.minorticks_off()
    for ax in axes:
        ax.axhline(found["entropy"], color="#6b7280", lw=0.8, ls="--")
