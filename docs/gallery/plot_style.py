"""
The statistics of style
=======================

The means of a photograph's channels are its colour cast, their standard
deviations its contrast: instance norm takes both away. With the mean and the
standard deviation of another photograph as bias and weight it is AdaIN, and
gives the one photograph the palette of the other.
"""

# %%
# Two photographs that come with scikit-learn, china.jpg and flower.jpg, as one
# batch of shape (N, C, H, W).

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_images

import fastnorm as fn

photographs = np.stack(load_sample_images().images)  # (2, H, W, 3), uint8
x = np.moveaxis(photographs, -1, 1).astype(np.float32) / 255

# %%
# Instance norm: every channel of every photograph gets mean 0 and standard
# deviation 1, by itself.

plain = fn.instance_norm(x)
assert np.allclose(plain.mean((2, 3)), 0, atol=1e-4)
assert np.allclose(plain.std((2, 3)), 1, atol=1e-3)

# %%
# AdaIN: one weight and one bias for each channel of each photograph, of shape
# (N, C), are those of the other photograph. Colours change hands, and what is
# where does not.

mean, var = fn.moments(x, axis=(2, 3))
swapped = fn.instance_norm(x, weight=np.sqrt(var[::-1]), bias=mean[::-1])

new_mean, new_var = fn.moments(swapped, axis=(2, 3))
assert np.allclose(new_mean, mean[::-1], atol=1e-5)
# eps, 1e-5, takes its share of each variance
assert np.allclose(new_var, var[::-1], rtol=1.1e-5 / var.min())

# %%
# Above, the photographs: in the middle with the statistics of neither, on the
# right with those of the other. Below, how often each brightness occurs in the
# red, green and blue channel of the first photograph. A dashed line is the
# mean.

pictures = {
    "as it is": x,
    "instance norm": 0.5 + plain / 5,
    "AdaIN: the other's palette": swapped,
}
inks = {"red": "#D55E00", "green": "#009E73", "blue": "#0072B2"}

figure, axes = plt.subplots(
    3, 3, figsize=(9, 6), layout="constrained", height_ratios=[4, 4, 3]
)
for column, (title, batch) in zip(axes.T, pictures.items()):
    column[0].set_title(title)
    for ax, picture in zip(column, batch):
        ax.imshow(np.moveaxis(picture, 0, -1).clip(0, 1))
        ax.set_axis_off()
    for ink, channel in zip(inks.values(), batch[0]):
        counts, edges = np.histogram(channel, bins=60, range=(0, 1))
        column[2].stairs(counts / 1000, edges, color=ink, lw=1.5)
        column[2].axvline(channel.mean(), color=ink, ls="--", lw=1)
    column[2].set(xlabel="brightness", xlim=(0, 1), ylim=(0, 25))
axes[2, 0].set_ylabel("1000 pixels")
for y, (name, ink) in zip((0.85, 0.7, 0.55), inks.items()):
    axes[2, 0].text(0.03, y, name, color=ink, transform=axes[2, 0].transAxes)
plt.show()
