"""
Pre-LN and Post-LN
==================

Where a transformer has its norms decides how it may be trained. With a norm
after each sum, as in the first transformers, the last layers begin with large
gradients, and a high learning rate needs a warm-up; with a norm before each
part it does not.
"""

# %%
# Handwritten digits of scikit-learn, read as eight rows of eight pixels. A
# fixed random matrix makes vectors of the rows, and another one tells them
# apart.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import fastnorm as fn

data = load_digits()
images = (data.images - data.images.mean()) / data.images.std()
rng = np.random.default_rng(0)
x = images @ rng.normal(0, 8**-0.5, (8, 32)) + rng.normal(0, 1, (8, 32))
x = x.astype(np.float32)  # (images, rows, 32)


def new(depth, placement):
    """Return an encoder, and weights that make ten scores of its result."""
    encoder = fn.nn.TransformerEncoder(depth, 32, 2, placement=placement, rng=0)
    head = np.random.default_rng(0).normal(0, 32**-0.5, (10, 32))
    return encoder, head.astype(np.float32)


def step(encoder, head, chosen):
    """Return the loss for some images, and the gradient of every parameter."""
    mean = encoder(x[chosen]).mean(1)
    loss, dscores = fn.nn.cross_entropy(mean @ head.T, data.target[chosen])
    encoder.zero_grad()
    dmean = dscores @ head / 8  # the same for each of eight rows
    encoder.backward(np.stack([dmean] * 8, axis=1))
    return loss, encoder.grad | {"head": dscores.T @ mean}


# %%
# Before any training, in 24 layers: the norm of the gradient of each layer's
# second feed-forward matrix, the mean for twenty images.

gradients = {}
for placement in ("pre", "post"):
    encoder, head = new(24, placement)
    found = []
    for i in range(20):
        step(encoder, head, [i])
        matrices = [m.grad["linear2.weight"] for m in encoder.layers]
        found.append(np.linalg.norm(matrices, axis=(1, 2)))
    gradients[placement] = np.mean(found, axis=0)

assert gradients["post"][-1] > 4 * gradients["pre"][-1]

# %%
# Training of 6 layers by Adam, with the same first weights and the same
# batches. The learning rate falls along a line; with warm-up it rises along one
# before.


def train(placement, warm_up, steps=100, rate=0.015):
    """Return the loss of each step."""
    encoder, head = new(6, placement)
    adam = fn.nn.Adam(encoder.parameters() | {"head": head}, betas=(0.9, 0.98))
    rng, losses = np.random.default_rng(0), []
    for i in range(steps):
        loss, gradient = step(encoder, head, rng.integers(len(x), size=32))
        adam.lr = rate * min(1, (i + 1) / max(warm_up, 1)) * (1 - i / steps)
        adam.step(gradient)
        losses.append(loss)
    return losses


losses = {
    (placement, warm_up): train(placement, warm_up)
    for placement in ("pre", "post")
    for warm_up in (0, 40)
}
final = {kind: np.mean(values[-20:]) for kind, values in losses.items()}
assert final["post", 0] > 2.2  # guessing takes log(10) = 2.3
assert max(final["post", 40], final["pre", 0], final["pre", 40]) < 1

# %%
# Post-LN learns nothing without warm-up, and with it learns. Pre-LN learns
# either way; in 100 steps at so high a rate warm-up helps it, too.
# :doc:`/placement` has deeper networks, longer runs, lower rates, several
# seeds, and two placements more.

plt.style.use("tableau-colorblind10")
figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 3.8), layout="constrained"
)
names = {"pre": "Pre-LN", "post": "Post-LN"}
colours = {"pre": "C0", "post": "C1"}
for placement, marker in (("pre", "o-"), ("post", "s-")):
    norms = gradients[placement]
    left.plot(range(1, 25), norms, colours[placement] + marker, ms=4)
left.text(20, 6.1, "Post-LN", color="C5", ha="center")
left.text(20, 1.2, "Pre-LN", color="C0", ha="center")
left.set(xlabel="layer of 24", ylabel="gradient before training")
left.set(xlim=(0, 25), ylim=(0, 8))
for (placement, warm_up), values in losses.items():
    mean = np.convolve(values, np.full(10, 0.1), "valid")  # of ten steps
    label = f"{names[placement]}, {'with' if warm_up else 'without'} warm-up"
    style = colours[placement] + ("-" if warm_up else "--")
    right.plot(np.arange(10, 101), mean, style, label=label)
right.axhline(np.log(10), color="gray", ls=":")
right.text(100, np.log(10) + 0.06, "guessing", ha="right")
right.set(xlabel="step", ylabel="loss", ylim=(0, 4.6))
right.legend(frameon=False, loc="upper right")
plt.show()
