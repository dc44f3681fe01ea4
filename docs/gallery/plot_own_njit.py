"""
Inside your own compiled functions
==================================

In a function that Numba compiles, ``fn.moments`` and the norms are compiled
with it. Here each pixel of a photograph is standardized by its own
surroundings, which no ``axis`` can say.
"""

# %%
# A loop over pixels with a call for each: 273 thousand calls, without Python
# between them. The window is cut off at the edges. With ``parallel=True``,
# ``prange`` shares the rows among threads.

import matplotlib.pyplot as plt
import numba
import numpy as np
from sklearn.datasets import load_sample_image

import fastnorm as fn


@numba.njit(parallel=True)
def local_contrast(image, radius):
    """Return the z-score of each pixel among those around it."""
    height, width = image.shape
    out = np.empty_like(image)
    for i in numba.prange(height):
        for j in range(width):
            window = image[
                max(i - radius, 0) : i + radius + 1,
                max(j - radius, 0) : j + radius + 1,
            ]
            mean, var = fn.moments(window)
            out[i, j] = (image[i, j] - mean) / np.sqrt(var + 1e-4)
    return out


photograph = load_sample_image("china.jpg").astype(np.float32) / 255
brightness = photograph.mean(-1)
result = local_contrast(brightness, radius=20)

# %%
# The same number by the same function, without Numba:

i, j = 200, 400
mean, var = fn.moments(brightness[i - 20 : i + 21, j - 20 : j + 21])
right = (brightness[i, j] - mean) / np.sqrt(var + 1e-4)
assert np.isclose(result[i, j], right, rtol=1e-6)

# %%
# Small differences show next to large ones: clouds in the sky, boats on the
# lake, leaves in the shade.

figure, axes = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained")
axes[0].imshow(brightness, cmap="gray")
axes[0].set_title("brightness")
axes[1].imshow(result, cmap="gray", vmin=-3, vmax=3)
axes[1].set_title("z-score in 41 × 41 pixels")
for ax in axes:
    ax.set_axis_off()
plt.show()
