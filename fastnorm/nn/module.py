"""What every module has: parameters, their gradients, buffers, a mode, and a state to load."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from fastnorm.arguments import Array, check_flag, is_float, read, shown


class LoadedState(NamedTuple):
    """What :meth:`Module.load_state_dict` found, as ``torch.nn`` returns it.

    ``missing_keys`` are names of the module that the state does not have, ``unexpected_keys`` names
    of the state that the module does not have.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


class Module(ABC):
    """The base class of all modules: parameters, gradients, buffers and a mode.

    A subclass fills ``_parameters`` and ``_buffers`` (arrays that are changed in place), names in
    ``_absent`` those that others of its kind have and that are None here, and defines ``_forward``,
    which returns the result and what ``_backward`` will want, and ``_backward``, which returns dx
    and the gradients of the parameters by name.

    Attributes
    ----------
    training : bool
        The mode, set by :meth:`train` and :meth:`eval`.
    grad : dict
        The gradient of each parameter, by its name: what :meth:`backward` has added up.
    """

    _shown: tuple[str, ...] = ()  # the attributes that `repr` shows: what makes another

    def __init__(self) -> None:
        self.training = True
        self.grad: dict[str, Array] = {}
        self._parameters: dict[str, Array] = {}
        self._buffers: dict[str, Array] = {}
        self._absent: set[str] = set()
        self._saved: Any = None

    def _add_parameter(self, name: str, value: Array) -> None:
        self._parameters[name] = value
        self.grad[name] = np.zeros(value.shape, value.dtype)  # no memory until it is written

    if not TYPE_CHECKING:  # which would take any name for one of these

        def __getattr__(self, name: str) -> Any:
            for arrays in ("_parameters", "_buffers"):
                found = self.__dict__.get(arrays, {})
                if name in found:
                    return found[name]
            if name in self.__dict__.get("_absent", ()):
                return None
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        for arrays in ("_parameters", "_buffers"):
            held = self.__dict__.get(arrays, {})
            if name in held and value is None:
                del held[name]
                self.grad.pop(name, None)
                self._absent.add(name)
                return
            if name in held:
                held[name][...] = _fitting(value, held[name], name)
                return
        if name in self.__dict__.get("_absent", ()):
            if value is not None:
                raise ValueError(
                    f"{type(self).__name__} has no {name}, expected None; make a module that has "
                    "one instead"
                )
            return
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what the last call left for a backward pass."""
        return self.__dict__ | {"_saved": None}

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._shown}

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self._options().items())
        return f"{type(self).__name__}({options})" if options else super().__repr__()

    # --- Forward and backward ---------------------------------------------------------------------

    def __call__(self, x: ArrayLike) -> Array:
        """Return the result for `x`, and keep what :meth:`backward` needs: `x` itself included."""
        y, self._saved = self._forward(_of_tensor(x))
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
        with np.errstate(all="ignore"):
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
        self.training = check_flag(mode, "mode")
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

    def load_state_dict(self, state: Mapping[str, ArrayLike], strict: bool = True) -> LoadedState:
        """Take over parameters and buffers.

        Parameters
        ----------
        state
            By name, as :meth:`state_dict` or that of the ``torch.nn`` module returns it; the values
            may be arrays or CPU tensors, of any real dtype. They are rounded to what the module
            has, beyond its range to infinity, as PyTorch does.
        strict
            Whether names that are missing or unknown are an error; otherwise they are passed over.

        Returns
        -------
        LoadedState
            The lists ``missing_keys`` and ``unexpected_keys``. A missing ``num_batches_tracked`` is
            not counted: PyTorch's states have none from before version 0.4.1.

        Raises
        ------
        ValueError
            If a name is missing or unknown and `strict`, or a shape does not fit, or a count of
            batches is no whole number of at least 0. Nothing has changed then.
        TypeError
            If a value is not made of real numbers. Nothing has changed then.
        """
        of = f"{type(self).__name__}.load_state_dict"
        if not isinstance(state, Mapping):
            raise TypeError(
                f"{of} got a {type(state).__name__}, expected arrays by name, as state_dict() "
                "returns them"
            )
        strict = check_flag(strict, "strict")
        given, own = dict(state), self._parameters | self._buffers
        missing = [name for name in own if name not in given and name != "num_batches_tracked"]
        unknown = [name for name in given if name not in own]
        if strict and (missing or unknown):
            raise ValueError(
                f"{of} misses {missing} and does not know {unknown}; expected {list(own)}, or "
                "write strict=False to load what there is"
            )
        found = [(own[k], _fitting(value, own[k], k)) for k, value in given.items() if k in own]
        for array, new in found:
            array[...] = new
        return LoadedState(missing, unknown)


def _fitting(value: Any, array: Array, name: str) -> Array:
    """`value` as an array that can be copied into `array`, and will not fail there."""
    new = _numbers(value, name)
    if array.ndim == 0 and new.shape == (1,):
        new = new[0:1].reshape(())  # a count as PyTorch had it before version 0.4
    if new.shape != array.shape:
        raise ValueError(f"{name} has shape {new.shape}, expected {array.shape}")
    if not is_float(new.dtype) and new.dtype.kind not in "biuf":
        raise TypeError(f"{name} has dtype {new.dtype}, expected real numbers")
    if not array.flags.writeable:
        raise ValueError(f"{name} of this module is read-only, expected an array to write into")
    if array.dtype.kind == "i":
        count = new.item()
        if not 0 <= count < 2**63 or count != int(count):
            raise ValueError(f"{name} is {count}, expected a whole number, 0 or more")
    with np.errstate(all="ignore"):
        return new.astype(array.dtype)


def _numbers(value: Any, name: str) -> Array:
    """`value` as an array of NumPy's; tensors that need a gradient, and those of bfloat16, too."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.detach()
        if value.dtype == torch.bfloat16:
            value = value.float()
    return read(value, name)


def _of_tensor(x: Any) -> Any:
    """A CPU tensor as an array: modules are of arrays, whatever the functions make of tensors."""
    torch = None if isinstance(x, np.ndarray) else sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor) and x.is_cpu:
        return read(x, "x")
    return x


def check_room(of: str, shapes: Iterable[tuple[int, ...]], dtype: np.dtype[Any]) -> None:
    """Refuse parameters of more bytes than an address can tell apart."""
    shapes = list(shapes)
    if sum(map(math.prod, shapes)) * dtype.itemsize >= 1 << 63:
        raise ValueError(
            f"{of} got sizes that make parameters of shape {', '.join(map(shown, shapes))}, "
            "expected some that memory can have; use smaller ones"
        )


def parameter_type(dtype: DTypeLike) -> np.dtype[Any]:
    """The dtype of parameters, None for float32; refuse what is no float."""
    try:
        found = np.dtype(np.float32 if dtype is None else dtype)
    except (TypeError, ValueError, SyntaxError):
        found = None
    if found is None or not is_float(found):
        raise TypeError(
            f"dtype is {shown(dtype) if found is None else found}, expected float16, bfloat16, "
            "float32 or float64 for parameters"
        )
    return found
