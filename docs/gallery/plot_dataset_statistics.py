"""
Statistics of a data set
========================

Every image has a mean and a standard deviation, and those of the data set are
not the averages of them. :class:`fastnorm.Moments` merges them rightly, image
by image or file by file.
"""

# %%
# The data set: two photographs that come with scikit-learn, cut into 48 images.

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

import fastnorm as fn

images = [
    photograph[top : top + 104, left : left + 104]
    for photograph in load_sample_images().images  # (427, 640, 3), uint8
    for top in range(0, 416, 104)
    for left in range(0, 624, 104)
]

# %%
# The moments of the parts add up. :meth:`~fastnorm.Moments.update` does the
# same one image at a time.

parts = [fn.Moments.from_array(image) for image in images]
total = sum(parts, fn.Moments())

right = fn.moments(np.stack(images))
assert np.allclose((total.mean, total.var()), right, rtol=1e-14)

# %%
# The average of the variances leaves out how far the means lie apart: here that
# is most of the whole.

within = np.mean([part.var() for part in parts])
between = np.var([part.mean for part in parts])
assert np.isclose(within + between, total.var())
print(f"variance: {within:.0f} within images, {between:.0f} between them")
assert between > within

# %%
# Each image at its mean and standard deviation. The average of the standard
# deviations is too small, and every image would be divided by it.

average = np.mean([part.std() for part in parts])
assert average < 0.6 * total.std()

plt.style.use("tableau-colorblind10")
figure, ax = plt.subplots(figsize=(8, 5.2), layout="constrained")
for image, part in zip(images, parts):
    x, y = part.mean, part.std()
    place = (x - 5, x + 5, y - 3, y + 3)
    ax.imshow(image, extent=place, aspect="auto", zorder=2)
lines = {"of the data set": total.std(), "average of the images": average}
for (text, y), style in zip(lines.items(), ("-", "--")):
    ax.axhline(y, color="black", ls=style, zorder=1)
    ax.text(145, y + 1, f"{text}: {y:.1f}", ha="center")
ax.plot(total.mean, total.std(), "*", ms=22, mfc="C8", mec="black", zorder=3)
ax.set(xlabel="mean", ylabel="standard deviation", xlim=(0, 265), ylim=(0, 105))
plt.show()

# %%
# From files, ``fastnorm stats`` does it, for each channel. Its last line is for
# torchvision.

with TemporaryDirectory() as folder:
    for i, image in enumerate(images):
        Image.fromarray(image).save(Path(folder, f"{i:02}.png"))
    command = ["-m", "fastnorm", "stats", folder, "--scale", "255"]
    table = subprocess.check_output([sys.executable, *command], text=True)
print(table)

mean, var = fn.moments(np.stack(images), axis=(0, 1, 2))
found = np.loadtxt(table.splitlines()[1:4], usecols=(2, 3)) * 255
assert np.allclose(found, np.transpose([mean, np.sqrt(var)]), rtol=1e-7)
