"""
Masks for padded sequences
==========================

Sequences of different lengths become one array by padding, and batch norm takes
the padding for data. ``where=`` says which elements count, so that the
statistics are those of the sequences alone.
"""

# %%
# Sixteen sequences of up to 60 steps with 8 features each, padded with zeros to
# (N, C, L). What is real has mean 3 and standard deviation 1.

import matplotlib.pyplot as plt
import numpy as np

import fastnorm as fn

rng = np.random.default_rng(0)
lengths = np.sort(rng.integers(10, 61, size=16))
real = np.arange(60) < lengths[:, None, None]  # (N, 1, L)
x = np.where(real, rng.normal(3, 1, (16, 8, 60)), 0)

# %%
# Without a mask the zeros pull the mean down and blow the variance up: with a
# share f of real steps they are 3 f and f + 9 f (1 - f). With the mask, what is
# real comes out with mean 0 and deviation 1.

blind = fn.batch_norm(x, training=True)
masked = fn.batch_norm(x, training=True, where=real)

share = real.mean()
deviation = np.sqrt(share + 9 * share * (1 - share))
expected = 3 * (1 - share) / deviation, 1 / deviation**2
for y, right in ((blind, expected), (masked, (0, 1))):
    mean, var = fn.moments(y, where=real)
    print(f"mean {mean:.2f}, standard deviation {np.sqrt(var):.2f}")
    assert np.allclose((mean, var), right, atol=0.03)  # of numbers at random

# %%
# The mask decides what enters the statistics, and nothing else: the padding is
# normalised, too, and what follows must go on ignoring it. The result for the
# sequences is that of packing all real steps into one array without padding.

packed = np.moveaxis(x, 1, -1)[real[:, 0]]  # (real steps, C)
there = np.moveaxis(masked, 1, -1)[real[:, 0]]
assert np.allclose(there, fn.batch_norm(packed, training=True), rtol=1e-12)

# %%
# One long sequence in the batch widens the array of all, and without a mask it
# changes the results of all. Layer norm of each step over its features needs no
# mask: no step sees another.

widths = np.arange(60, 241, 10)
means = []
for width in widths:
    more = [(0, 0), (0, 0), (0, width - 60)]
    wider, mask = np.pad(x, more), np.pad(real, more)
    results = (
        fn.batch_norm(wider, training=True),
        fn.batch_norm(wider, training=True, where=mask),
        fn.layer_norm(wider, axis=1),
    )
    means.append([fn.moments(y, where=mask)[0] for y in results])
    assert np.allclose(results[1][..., :60], masked, rtol=1e-12)
means = np.array(means)
assert (np.diff(means[:, 0]) > 0).all()
assert np.allclose(means[:, 1:], 0, atol=1e-12)

plt.style.use("tableau-colorblind10")
figure, axes = plt.subplots(1, 3, figsize=(9, 3.4), layout="constrained")
shown = {"batch norm": blind, "batch norm, where=real": masked}
colours = {"cmap": "PuOr", "vmin": -3, "vmax": 3, "interpolation": "none"}
for ax, (title, y) in zip(axes, shown.items()):
    one = np.where(real, y, np.nan)[:, 0]  # feature
    image = ax.imshow(one, aspect="auto", **colours)
    ax.set(title=title, xlabel="step (white: padding)", yticks=[0, 5, 10, 15])
axes[0].set_ylabel("sequence")
figure.colorbar(image, ax=axes[1], label="result")
padding = 100 * (1 - lengths.sum() / (16 * widths))
labels = ("batch norm", "batch norm, where=", "layer norm of a step")
for values, style, label in zip(means.T, ("o-", "s-", "^--"), labels):
    axes[2].plot(padding, values, style, ms=4, label=label)
axes[2].set(xlabel="padding, %", ylim=(-0.2, 3.4))
axes[2].set_title("mean of the sequences")
axes[2].legend(frameon=False, loc="upper left")
plt.show()
