"""
Larger than memory, with Dask
=============================

The functions take Dask arrays and return Dask arrays, and what is computed goes
through memory chunk by chunk. Here an array of 512 MiB is normalised by a
process that holds a few chunks of it.
"""

# %%
# Activations of shape (N, C, H, W), in 64 chunks of 8 MiB. In earnest they
# would be read from a file, as by ``dask.array.from_zarr``. Each reading notes
# the most memory that was in use since the one before.

import tracemalloc

import dask
import dask.array as da
import matplotlib.pyplot as plt
import numpy as np

import fastnorm as fn

peaks = []


def read(block_info):
    """Return 16 samples, of numbers from 0 to 1."""
    peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
    tracemalloc.reset_peak()
    number = block_info[None]["chunk-location"][0]
    return np.random.default_rng(number).random((16, 32, 64, 64), np.float32)


chunks = ((16,) * 64, (32,), (64,), (64,))
x = da.map_blocks(read, chunks=chunks, meta=np.empty((), np.float32))
print(f"{x.shape}: {x.nbytes / 2**20:.0f} MiB")

# %%
# Group norm needs one sample at a time and reads each chunk once. The
# statistics of batch norm are those of all chunks: it reads each once for them,
# and once more to normalise it. (The moments of the results are taken as the
# results come, and are here to show that they are right.)


def in_chunks(y):
    """Return mean and variance of y, and the peaks of memory."""
    peaks.clear()
    tracemalloc.start()
    with dask.config.set(scheduler="synchronous"):
        statistics = dask.compute(*fn.moments(y))
    peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
    tracemalloc.stop()
    return statistics, peaks[1:]


results = {
    "group norm": fn.group_norm(x, 8),
    "batch norm": fn.batch_norm(x, training=True),
}
assert not peaks  # nothing is read before it is asked for

in_chunks(fn.batch_norm(x[:32], training=True))  # imports what it needs
found = {}
for name, y in results.items():
    statistics, found[name] = in_chunks(y)
    assert np.allclose(statistics, (0, 1), atol=1e-3)
    most = max(found[name])
    print(f"{name}: {len(found[name])} readings, {most:.0f} MiB at most")
    assert most < 4 * 8  # chunks

assert len(found["group norm"]) == 64
assert len(found["batch norm"]) == 128

# %%

plt.style.use("tableau-colorblind10")
figure, ax = plt.subplots(figsize=(8, 4), layout="constrained")
for (name, values), style in zip(found.items(), ("s", "o")):
    ax.semilogy(np.arange(1, len(values) + 1), values, style, ms=4, label=name)
for size, text in ((512, "the array"), (8, "a chunk")):
    ax.axhline(size, color="black")
    ax.text(129, size * 1.05, text, ha="right")
ax.axvline(64.5, color="gray", ls=":")
ax.text(66, 100, "batch norm has its statistics\nand reads a second time")
ax.set(xlabel="chunks read", ylabel="most memory in use, MiB", ylim=(4, 1024))
sizes = 2 ** np.arange(3, 10)
ax.set_yticks(sizes, map(str, sizes))
ax.minorticks_off()
ax.legend(frameon=False, loc="center left")
plt.show()
