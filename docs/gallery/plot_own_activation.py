"""
An activation of your own
=========================

``activation=`` takes a function of one number that Numba has compiled, and
makes it part of the norm. Memory is walked once, and nothing is kept but the
result.
"""

# %%
# Soft thresholding: what is less than half a standard deviation from the mean
# becomes 0, the rest comes nearer by as much. No norm has this one built in.

import math
import tracemalloc

import matplotlib.pyplot as plt
import numba
import numpy as np

import fastnorm as fn


@numba.njit
def shrink(v):
    return math.copysign(max(abs(v) - 0.5, 0), v)


x = np.random.default_rng(0).normal(5, 2, (64, 256, 128)).astype(np.float32)
y = fn.layer_norm(x, 128, activation=shrink)

# %%
# The same in steps of NumPy has the same results, and arrays in between.


def in_steps():
    z = fn.layer_norm(x, 128)
    return np.sign(z) * np.maximum(abs(z) - 0.5, 0)


def peak(function):
    """Return the most memory that a call takes, as a multiple of that of x."""
    tracemalloc.start()
    function()
    size = tracemalloc.get_traced_memory()[1] / x.nbytes
    tracemalloc.stop()
    return size


assert np.allclose(y, in_steps(), atol=1e-6)
memory = {
    "in one pass": peak(lambda: fn.layer_norm(x, 128, activation=shrink)),
    "in steps": peak(in_steps),
}
print({name: round(size, 2) for name, size in memory.items()})
assert memory["in one pass"] < 1.1
assert memory["in steps"] > 3.9

# %%
# :doc:`/numba` has the command that measures what is saved in time.

zeros = np.mean(y == 0)
expected = math.erf(0.5 / math.sqrt(2))  # of normal numbers
assert np.isclose(zeros, expected, atol=0.01)

plt.style.use("tableau-colorblind10")
figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 3.4), layout="constrained", width_ratios=[2, 1]
)
z = np.linspace(-3, 3, 601)
left.plot(z, z, color="C2", ls="--", label="norm alone")
left.plot(z, [shrink(v) for v in z], color="C0", lw=2, label="with shrink")
counts, edges = np.histogram(fn.layer_norm(x, 128), 60, (-3, 3), density=True)
left.stairs(counts, edges, fill=True, color="C4", alpha=0.5)
left.text(0, -0.1, f"{zeros:.0%} become 0", ha="left", va="top")
left.set_xlabel("normalised value (shaded: how frequent)")
left.set(ylabel="result", ylim=(-2, 2))
left.legend(frameon=False, loc="upper left")
bars = right.bar(*zip(*memory.items()), color=["C0", "C1"], width=0.6)
right.bar_label(bars, fmt="%.1f", padding=2)
right.set(ylabel="peak of memory, in arrays like x", ylim=(0, 4.6))
plt.show()
