"""What changes parameters by their gradients."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fastnorm.arguments import Array


class Adam:
    r"""Gradient descent with a step size of its own for each parameter.

    With g the gradient, after t steps:

    .. math::

        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2

        p \leftarrow p - \mathrm{lr} \,
            \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    Parameters
    ----------
    parameters
        Arrays by name, which are changed in place: ``m.parameters()``.
    lr
        The learning rate; may be set between steps.
    betas
        The shares that the averages of g and of its square keep at each step.
    eps
        In the units of the gradient.

    Raises
    ------
    ValueError
        If a beta is not in [0, 1).

    References
    ----------
    Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2014, arXiv:1412.6980.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> p = {"x": np.array([3.0])}
    >>> adam = fn.nn.Adam(p, lr=0.1)
    >>> for _ in range(100):
    ...     adam.step({"x": 2 * p["x"]})  # downhill on x ** 2
    >>> bool(abs(p["x"]) < 0.2)
    True
    """

    def __init__(
        self,
        parameters: Mapping[str, Array],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}, expected two numbers from 0 to below 1")
        self.parameters = dict(parameters)
        self.lr, self.betas, self.eps = lr, betas, eps
        self._averages = {n: (np.zeros_like(p), np.zeros_like(p)) for n, p in parameters.items()}
        self._steps = 0

    @np.errstate(all="ignore")
    def step(self, gradients: Mapping[str, Array]) -> None:
        """Change every parameter once.

        Parameters
        ----------
        gradients
            An array for each parameter, by its name: ``m.grad``.

        Raises
        ------
        KeyError
            If one is missing. Nothing has changed then.
        """
        found = {name: gradients[name] for name in self.parameters}
        self._steps += 1
        first, second = self.betas
        rate = self.lr / (1 - first**self._steps)
        correction = (1 - second**self._steps) ** -0.5
        for name, g in found.items():
            m, v = self._averages[name]
            m += (1 - first) * (g - m)
            v += (1 - second) * (g * g - v)
            self.parameters[name] -= rate * m / (np.sqrt(v) * correction + self.eps)
