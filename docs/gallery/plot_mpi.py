"""
On four MPI processes
=====================

Where a data set is spread over processes, each has moments of its own, and
``allreduce`` gives all of them those of the whole. Batch norm with ``comm=``
normalises by them.
"""

# %%
# The program that runs in each process:
#
# .. literalinclude:: /gallery/mpi/four_processes.py
#    :start-at: import numpy
#
# The handwritten digits of scikit-learn, in four files: the first process sees
# zeros alone, the others ones, fours and sevens.

import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import fastnorm as fn

data = load_digits()
files = [data.images[data.target == digit] for digit in (0, 1, 4, 7)]

# MPICH from PyPI has its launcher next to Python.
beside = str(Path(sys.executable).parent)
launcher = shutil.which("mpiexec", path=beside) or "mpiexec"
program = str(Path("mpi/four_processes.py").resolve())
command = [launcher, "-n", "4", sys.executable, "-m", "mpi4py", program]
with TemporaryDirectory() as folder:
    for i, images in enumerate(files):
        np.save(Path(folder, f"{i}.npy"), images)
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=folder, env=one_thread, check=True)
    found = [dict(np.load(Path(folder, f"{i}.npz"))) for i in range(4)]

# %%
# Each of them has found what one process finds in all of the images, and so are
# the results of batch norm those of one process.

images = np.concatenate(files)
mean, var = fn.moments(images, axis=0)
for one in found:
    assert np.allclose(one["whole"], (mean, np.sqrt(var)), rtol=1e-14)
    assert (one["whole"] == found[0]["whole"]).all()
right = fn.batch_norm(images.reshape(-1, 64), training=True)
together = np.concatenate([one["y"] for one in found])
assert np.allclose(together, right, atol=1e-12)

# %%
# No process could have guessed the whole: above, the mean of each pixel; below,
# its standard deviation.

maps = [one["own"] for one in found] + [found[0]["whole"]]
titles = [*(f"process {i}" for i in range(4)), "all, by allreduce"]
figure, axes = plt.subplots(2, 5, figsize=(9, 3.9), layout="constrained")
kinds = {"mean": 16, "standard deviation": 8}  # and the end of its colours
for row, (name, most), statistic in zip(axes, kinds.items(), zip(*maps)):
    for ax, values in zip(row, statistic):
        image = ax.imshow(values, cmap="cividis", vmin=0, vmax=most)
        ax.set(xticks=[], yticks=[])
    figure.colorbar(image, ax=row, label=name)
for ax, title in zip(axes[0], titles):
    ax.set_title(title, fontsize=11)
plt.show()
