"""What every module has: parameters, their gradients, buffers, a mode, and a state to load."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from fastnorm.arguments import Array, is_float


class Module(ABC):
    """The base class of all modules: parameters, gradients, buffers and a mode.

    A subclass fills ``_parameters`` and ``_buffers`` (arrays that are changed in place), and
    defines ``_forward``, which returns the result and what ``_backward`` will want, and
    ``_backward``, which returns dx and the gradients of the parameters by name.

    Attributes
    ----------
    training : bool
        The mode, set by :meth:`train` and :meth:`eval`.
    grad : dict
        The gradient of each parameter, by its name: what :meth:`backward` has added up.
    """

    def __init__(self) -> None:
        self.training = True
        self.grad: dict[str, Array] = {}
        self._parameters: dict[str, Array] = {}
        self._buffers: dict[str, Array] = {}
        self._saved: Any = None

    def _add_parameter(self, name: str, value: Array) -> None:
        self._parameters[name] = value
        self.grad[name] = np.zeros(value.shape, value.dtype)  # no memory until it is written

    def __getattr__(self, name: str) -> Any:
        for arrays in ("_parameters", "_buffers"):
            found = self.__dict__.get(arrays, {})
            if name in found:
                return found[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        for arrays in ("_parameters", "_buffers"):
            array = self.__dict__.get(arrays, {}).get(name)
            if array is not None:
                array[...] = _fitting(value, array, name)
                return
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what the last call left for a backward pass."""
        return self.__dict__ | {"_saved": None}

    # --- Forward and backward ---------------------------------------------------------------------

    def __call__(self, x: ArrayLike) -> Array:
        """Return the result for `x`, and keep what :meth:`backward` needs: `x` itself included."""
        y, self._saved = self._forward(x)
        return y

    def backward(self, dy: ArrayLike) -> Array:
        """Return the gradient of the last call's `x`, and add those of the parameters to `grad`.

        Parameters
        ----------
        dy
            The gradient of what that call returned, of its shape. The `x` it got must not have
            been changed since.

        Returns
        -------
        dx
            The shape and dtype of that `x`.

        Raises
        ------
        RuntimeError
            If nothing has been called yet.
        ValueError
            If `dy` has another shape.
        """
        if self._saved is None:
            raise RuntimeError(
                f"{type(self).__name__}.backward has no call to go back through; call m(x) first"
            )
        dx, gradients = self._backward(dy, self._saved)
        for name, gradient in gradients.items():
            if name in self.grad:
                self.grad[name] += gradient
        return dx

    @abstractmethod
    def _forward(self, x: ArrayLike) -> tuple[Array, Any]:
        """Return the result, and what `_backward` will want."""

    @abstractmethod
    def _backward(self, dy: ArrayLike, saved: Any) -> tuple[Array, dict[str, Array]]:
        """Return dx, and the gradients of the parameters by name."""

    # --- Mode and parameters ----------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Set the mode to training, or with False to inference; return the module."""
        self.training = bool(mode)
        return self

    def eval(self) -> Self:
        """Set the mode to inference; return the module."""
        return self.train(False)

    def parameters(self) -> dict[str, Array]:
        """Return the parameters by name: the arrays themselves, to be changed in place."""
        return dict(self._parameters)

    def zero_grad(self) -> None:
        """Set the gradients in `grad` to zero."""
        for gradient in self.grad.values():
            gradient[...] = 0

    # --- State ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Array]:
        """Return copies of parameters and buffers, under the names that ``torch.nn`` gives them."""
        return {name: v.copy() for name, v in (self._parameters | self._buffers).items()}

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Take over parameters and buffers.

        Parameters
        ----------
        state
            By name, as :meth:`state_dict` or that of the ``torch.nn`` module returns it; the values
            may be arrays or CPU tensors, of any real dtype.

        Raises
        ------
        ValueError
            If a name is missing or unknown, or a shape does not fit. Nothing has changed then.
        TypeError
            If a value is not made of real numbers. Nothing has changed then.
        """
        own = self._parameters | self._buffers
        # PyTorch's own states have none from before version 0.4.1, and it loads them too
        missing = sorted(own.keys() - state.keys() - {"num_batches_tracked"})
        unknown = sorted(state.keys() - own.keys())
        if missing or unknown:
            raise ValueError(
                f"{type(self).__name__}.load_state_dict misses {missing} and does not know "
                f"{unknown}; expected {sorted(own)}"
            )
        fitting = {name: _fitting(value, own[name], name) for name, value in state.items()}
        for name, array in fitting.items():
            own[name][...] = array


def _fitting(value: ArrayLike, array: Array, name: str) -> Array:
    """`value` as something that can be written into `array`."""
    new = np.asarray(value)
    if new.shape != array.shape:
        raise ValueError(f"{name} has shape {new.shape}, expected {array.shape}")
    if not is_float(new.dtype) and new.dtype.kind not in "biu":
        raise TypeError(f"{name} has dtype {new.dtype}, expected real numbers")
    return new


def parameter_type(dtype: DTypeLike) -> np.dtype[Any]:
    """The dtype of parameters; refuse what is no float."""
    found = np.dtype(dtype)
    if not is_float(found):
        raise TypeError(
            f"dtype is {found}, expected float16, bfloat16, float32 or float64 for parameters"
        )
    return found
