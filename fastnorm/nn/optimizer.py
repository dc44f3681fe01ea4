"""What changes parameters by their gradients."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fastnorm.arguments import (
    Array,
    as_array,
    check_eps,
    is_float,
    number,
    plain,
    read,
    shown,
)


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
        If a beta is not in [0, 1), or `lr` or `eps` is no finite number of at least 0, or a mask of
        ``np.ma`` hides a part of a parameter.
    TypeError
        If a parameter is not a NumPy array of floats that can be written.

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
        try:
            first, second = (number(beta, "betas") for beta in betas)
        except (TypeError, ValueError):
            first = second = np.nan
        if not (0 <= first < 1 and 0 <= second < 1):
            raise ValueError(f"betas is {shown(betas)}, expected two numbers from 0 to below 1")
        if not isinstance(parameters, Mapping):
            raise TypeError(
                f"parameters is a {type(parameters).__name__}, expected arrays by name; write "
                "m.parameters()"
            )
        for name, p in parameters.items():
            own = plain(p)
            if own is None or not (is_float(own.dtype) and own.flags.writeable):
                kind = type(p).__name__ if own is None else f"array of {own.dtype}"
                raise TypeError(
                    f"{name!r} of parameters is a {kind}, expected a NumPy array of floats that is "
                    "changed in place"
                )
            read(p, f"parameter {name!r}")  # which must hide nothing
        self.parameters = dict(parameters)
        self.lr, self.betas, self.eps = check_eps(lr, "lr"), (first, second), check_eps(eps)
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
        ValueError
            If one has another shape than its parameter. Nothing has changed then.
        TypeError
            If one is not made of real numbers. Nothing has changed then.
        """
        found = {name: as_array(gradients[name], f"{name}'s gradient") for name in self.parameters}
        for name, g in found.items():
            if g.shape != self.parameters[name].shape:
                raise ValueError(
                    f"the gradient of {name!r} has shape {g.shape}, expected "
                    f"{self.parameters[name].shape}"
                )
        self._steps += 1
        first, second = self.betas
        rate = self.lr / (1 - first**self._steps)
        correction = (1 - second**self._steps) ** -0.5
        for name, g in found.items():
            m, v = self._averages[name]
            m += (1 - first) * (g - m)
            v += (1 - second) * (g * g - v)
            self.parameters[name] -= rate * m / (np.sqrt(v) * correction + self.eps)
