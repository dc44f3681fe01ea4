"""
Batch norm in small batches
===========================

Batch norm of an image depends on which other images are in its batch, the more
so the fewer there are. Group norm looks at one image alone, and learns from
batches of two as well as from large ones.
"""

# %%
# Networks and data are those of :doc:`/digits`: three convolutions, each with a
# norm, learn to read the handwritten digits of scikit-learn. In the network
# that is called narrow, the last norm sees one pixel of each image.

import sys

import matplotlib.pyplot as plt
import numpy as np

import fastnorm as fn

sys.path.append("../examples")
import digits  # docs/examples/digits.py

training, test = digits.load()

# %%
# One image in 300 batches of others, drawn at random. The last norm of a new
# network gets the same numbers for this image in all of them, and makes other
# numbers of them in each. In batches of two they are nearly -1 or 1 whatever
# they were: two numbers have no other z-scores, but for eps.

new = digits.Network(digits.STRIDES["narrow"], "none", np.random.default_rng(0))
x = training.images
for layer in new.layers[:-3]:  # up to where the last norm would be
    x = layer(x)
x = x[:, 0, 0]  # (N, C): of one pixel each

rng = np.random.default_rng(0)
results = {}
for size in (32, 16, 8, 4, 2):
    others = rng.integers(1, len(x), size=(300, size - 1))
    batches = np.insert(others, 0, 0, axis=1)  # image 0 and others
    results[size] = np.array(
        [fn.batch_norm(x[batch], training=True)[0, 5] for batch in batches]
    )
alone = fn.group_norm(x[:1, :, np.newaxis], digits.GROUPS)[0, 5, 0]

spreads = [y.std() for y in results.values()]
assert spreads == sorted(spreads)
assert np.mean(abs(results[2]) > 0.9) > 0.9

# %%
# What that does to learning: four epochs, from the same first weights.

losses, accuracies = {}, {}
for norm, size in (("batch", 32), ("batch", 2), ("group", 2)):
    rng = np.random.default_rng(0)
    network = digits.Network(digits.STRIDES["narrow"], norm, rng)
    losses[norm, size] = digits.train(network, training, size, 4, rng)
    accuracies[norm, size] = digits.accuracy(network, test)

assert accuracies["batch", 32] > 0.85
assert accuracies["batch", 2] < 0.6
assert accuracies["group", 2] > 0.85

# %%

plt.style.use("tableau-colorblind10")
figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 3.8), layout="constrained"
)
for place, y in enumerate(results.values()):
    aside = rng.uniform(-0.3, 0.3, len(y))
    left.plot(place + aside, y, ".", ms=3, color="C0", alpha=0.5)
left.axhline(alone, color="C1", ls="--")
left.text(-0.35, alone - 0.07, "group norm, in any batch", color="C5", va="top")
left.set_xlabel("images in the batch")
left.set_ylabel("result for one image, batch norm")
left.set_ylim(-2.2, 2)
left.set_xticks(range(5), map(str, results))

styles = ("C0o--", "C0o-", "C1s-")
for (kind, curve), style in zip(losses.items(), styles):
    norm, size = kind
    label = f"{norm} norm, batches of {size}: reads {accuracies[kind]:.0%}"
    right.semilogy(range(1, 5), curve, style, label=label)
right.set(xlabel="epoch", ylabel="training loss", ylim=(0.01, 30))
right.set_xticks(range(1, 5))
right.legend(frameon=False, loc="upper right")
plt.show()
