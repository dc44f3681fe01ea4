"""
In a PyTorch model
==================

:func:`fastnorm.torch.replace` has fastnorm compute the norms of a model, each
where it stands. The model trains as before, and keeps its digits where
activations are far from zero.
"""

# %%
# A small convolutional network for the handwritten digits of scikit-learn.

import copy

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import fastnorm.torch as fnt

data = load_digits()
images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
digits = torch.tensor(data.target)

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
    nn.Flatten(), nn.Linear(144, 64), nn.LayerNorm(64), nn.GELU(),
    nn.Linear(64, 10),
)  # fmt: skip

# %%
# The norms are replaced in place: the modules and their parameters are the
# objects that they were, and optimizers, hooks and state dictionaries know
# nothing of it.

replaced = copy.deepcopy(model)
weight = replaced[1].weight
replaced = fnt.replace(replaced)
print(fnt.report(replaced))
assert replaced[1].weight is weight
assert replaced.state_dict().keys() == model.state_dict().keys()

# %%
# Both train alike.


def train(model):
    """Return the loss of each of 60 steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        batch = torch.randint(len(images), (32,), generator=order)
        loss = nn.functional.cross_entropy(model(images[batch]), digits[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


losses = {"PyTorch": train(model), "replaced": train(replaced)}
difference = abs(losses["PyTorch"] - losses["replaced"]).max()
print(f"largest difference of the losses: {difference:.0e}")
assert difference < 1e-2

# %%
# A layer norm of float32 numbers around a mean, with standard deviation 1,
# against the same in float64: PyTorch's statistics lose a digit where the mean
# has one more. :doc:`/accuracy` tells why.

torchs = nn.LayerNorm(1024)
norms = {"PyTorch": torchs, "replaced": fnt.replace(copy.deepcopy(torchs))}
means = 10.0 ** np.arange(6)
errors = {name: [] for name in norms}
with torch.no_grad():
    for mean in means:
        x = mean + torch.randn(256, 1024)
        exact = nn.functional.layer_norm(x.double(), (1024,))
        for name, norm in norms.items():
            errors[name].append((norm(x) - exact).abs().max().item())
assert max(errors["replaced"]) < 1e-6
assert errors["PyTorch"][-1] > 1e-3

# %%

plt.style.use("tableau-colorblind10")
figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 3.6), layout="constrained"
)
left.plot(losses["PyTorch"], color="C1", lw=5, alpha=0.5, label="PyTorch")
left.plot(losses["replaced"], color="C0", lw=1.5, label="replaced")
left.set(xlabel="step", ylabel="training loss", ylim=(0, None))
for (name, values), style in zip(errors.items(), ("C1s-", "C0o-")):
    right.loglog(means, values, style, label=name)
right.set_xlabel("mean / standard deviation")
right.set_ylabel("largest error of layer norm")
for ax in (left, right):
    ax.legend(frameon=False)
plt.show()
