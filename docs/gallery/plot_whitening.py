"""
Whitening, which no norm does
=============================

A norm gives every channel variance 1 and leaves what the channels have in
common. Whitening takes that away, too: it multiplies by the inverse root of the
channels' correlations.
"""

# %%
# The pixels of a photograph that comes with scikit-learn: three numbers each,
# red, green and blue.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_image

import fastnorm as fn

photograph = load_sample_image("china.jpg")
pixels = photograph.reshape(-1, 3)  # uint8

# %%
# Z-scores first. Their covariance is the correlation of the channels: ones on
# the diagonal, which is all that normalization sees to, and nearly as much
# beside it.

z = fn.standardize(pixels, axis=0)
correlation = z.T @ z / len(z)
print(correlation.round(3))
assert np.allclose(np.diag(correlation), 1)
assert correlation.min() > 0.9

# %%
# The inverse root of that matrix makes it the identity. Of all matrices that do
# so this one, called ZCA, changes the z-scores least [#]_.

variances, directions = np.linalg.eigh(correlation)
zca = directions / np.sqrt(variances) @ directions.T
white = z @ zca

assert np.allclose(white.T @ white / len(white), np.eye(3))
print(f"the variance along the three directions: {variances.round(3)}")

# %%
# Pixels as dots of their own colour, and a dashed circle: one standard
# deviation in every direction. Standardized, the pixels still lie along a line,
# because what is bright is bright in every channel. Whitened, they lie around
# the circle, and colours differ as much as brightness does.

shown = {"as it is": pixels, "standardized": z, "whitened": white}
some = np.random.default_rng(0).choice(len(pixels), 4000, replace=False)

figure, axes = plt.subplots(
    2, 3, figsize=(9, 5.6), layout="constrained", height_ratios=[2, 3]
)
for column, (title, values) in zip(axes.T, shown.items()):
    picture = pixels / 255 if values is pixels else 0.5 + values / 5
    column[0].imshow(picture.clip(0, 1).reshape(photograph.shape))
    column[0].set_title(title)
    column[0].set_axis_off()
    column[1].scatter(*values[some, :2].T, s=3, c=pixels[some] / 255)
    column[1].set(xlabel="red", aspect="equal")
axes[1, 0].set(xlim=(-10, 265), ylim=(-10, 265))
axes[1, 0].set(xticks=[0, 255], yticks=[0, 255], ylabel="green")
for ax in axes[1, 1:]:
    ax.set(xlim=(-4, 4), ylim=(-4, 4), xticks=[-4, 0, 4], yticks=[-4, 0, 4])
    ax.add_patch(plt.Circle((0, 0), 1, fill=False, color="black", ls="--"))
plt.show()

# %%
# .. [#] A. Kessy, A. Lewin, K. Strimmer, *Optimal Whitening and
#    Decorrelation*, The American Statistician, 2018, arXiv:1512.00809.
