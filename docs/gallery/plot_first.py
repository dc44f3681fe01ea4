"""
What group norm does to a batch
===============================

Channels of different height and spread, before and after.
"""

import matplotlib.pyplot as plt
import numpy as np

import fastnorm as fn

rng = np.random.default_rng(0)
x = rng.normal([0, 4, 8, 12], [1, 2, 1, 2], (256, 4)).T[None].astype(np.float32)
y = fn.group_norm(x, 4)

fig, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for axis, values, title in zip(axes, (x, y), ("before", "after")):
    axis.hist(list(values[0]), 30, histtype="step")
    axis.set(title=title, xlabel="value", ylabel="how often")
