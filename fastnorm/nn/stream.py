"""What a transformer block and a stack of blocks have in common: masks, rows, norms, memory."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from fastnorm import backward, functional
from fastnorm.arguments import Array, as_array, computing_type, is_float, read
from fastnorm.nn.module import Module
from fastnorm.nn.weights import Random, draw, generator, together
from fastnorm.runtime import serial

Placement: TypeAlias = Literal["pre", "post", "peri", "deepnorm"]
Norm: TypeAlias = Literal["layer", "rms"]
Gradients: TypeAlias = dict[str, Array]

PLACEMENTS: tuple[Placement, ...] = ("pre", "post", "peri", "deepnorm")
NORMS: dict[Norm, tuple[Any, Any]] = {
    "layer": (functional.layer_norm, backward.layer_norm_backward),
    "rms": (functional.rms_norm, backward.rms_norm_backward),
}

# So many scores at once: those of a few samples, which stay in a core's cache.
_SCORES = 1 << 18


class Scratch:
    """Memory for what a block computes on the way: each call new, or by its name used again.

    What is used again is cut from one piece of memory, whose size must be enough for all of it.
    """

    def __init__(self, keep: bool, dtype: np.dtype[Any], size: int = 0) -> None:
        self.keep = keep
        self._dtype = dtype
        self._arrays: dict[str, Array] = {}
        self._left = None if keep else together([(size,)], dtype)[0]

    def __call__(self, name: str, *shape: int) -> Array:
        """Return an array; one and the same for each name, unless all is to be kept."""
        if self._left is None:
            return np.empty(shape, self._dtype)
        if name not in self._arrays:
            size = math.prod(shape)
            self._arrays[name] = self._left[:size].reshape(shape)
            self._left = self._left[size:]
        return self._arrays[name]


class Transformer(Module):
    """What a block and a stack of blocks have in common: masks, rows, and when to keep what."""

    d_model: int
    num_heads: int
    dim_feedforward: int
    num_layers: int
    placement: Placement
    norm: Norm
    eps: float
    _mask_name: str  # as the caller knows it

    def _forward(
        self,
        x: ArrayLike,
        mask: ArrayLike | None = None,
        src_key_padding_mask: ArrayLike | None = None,
    ) -> tuple[Array, Any]:
        array = as_array(x, "x")
        if array.ndim < 2 or array.shape[-1] != self.d_model:
            raise ValueError(
                f"{type(self).__name__} got x of shape {array.shape}, expected (..., L, "
                f"{self.d_model}): samples, positions, d_model; write x.swapaxes(0, 1) where "
                "positions come first"
            )
        samples = math.prod(array.shape[:-2])
        dtype = np.dtype(computing_type(array.dtype))
        with serial(), np.errstate(all="ignore"):
            added = self._added(mask, src_key_padding_mask, samples, array.shape[:-1], dtype)
            rows = self._rows(array)
            size = len(rows) * (7 * self.d_model + self.dim_feedforward)
            size += self._at_once(samples, array.shape[-2]) * self.num_heads * array.shape[-2] ** 2
            y, saved = self._run(rows, samples, added, Scratch(self.training, dtype, size))
            y = y.reshape(array.shape).astype(array.dtype, copy=False)
        # in inference x alone is kept: a backward pass computes the rest again
        return y, (array, samples, added, saved if self.training else None)

    def _backward(self, dy: ArrayLike, saved: Any) -> tuple[Array, Gradients]:
        array, samples, mask, inside = saved
        gradient = as_array(dy, "dy")
        if gradient.shape != array.shape:
            raise ValueError(f"dy has shape {gradient.shape}, expected {array.shape} as x had")
        dtype = np.dtype(computing_type(array.dtype))
        with serial(), np.errstate(all="ignore"):
            rows = self._rows(gradient.astype(dtype, copy=False))
            if inside is None:
                _, inside = self._run(self._rows(array), samples, mask, Scratch(True, dtype))
            dx, gradients = self._run_backward(rows, samples, inside)
            dx = dx.reshape(array.shape).astype(array.dtype, copy=False)
        return dx, gradients

    def reset_parameters(self, rng: Random = None) -> None:
        """Set the weights to what they begin as, those of norms to 1, and the biases to 0.

        Parameters
        ----------
        rng
            As for the class.
        """
        beta = (8 * self.num_layers) ** -0.25 if self.placement == "deepnorm" else 1.0
        weights = []
        for name, array in self._parameters.items():
            if array.ndim == 1:
                array[...] = name.endswith("weight")
                continue
            # query, key and value: three matrices in one
            parts = np.split(array, 3) if "in_proj" in name else [array]
            for i, part in enumerate(parts):
                scaled = len(parts) == 1 or i == 2
                weights.append((part, (6 / sum(part.shape)) ** 0.5 * (beta if scaled else 1.0)))
        draw(weights, generator(rng))

    @abstractmethod
    def _run(
        self, x: Array, samples: int, mask: Array | None, scratch: Scratch
    ) -> tuple[Array, Any]:
        """Return the rows for rows x, and what `_run_backward` wants."""

    @abstractmethod
    def _run_backward(self, dy: Array, samples: int, saved: Any) -> tuple[Array, Gradients]:
        """Return dx and the gradients of the parameters by name."""

    def _at_once(self, samples: int, length: int) -> int:
        """How many samples attention takes at once, where their scores are not kept."""
        return max(1, min(samples, _SCORES // max(1, self.num_heads * length * length)))

    def _rows(self, array: Array) -> Array:
        rows = array.astype(computing_type(array.dtype), copy=False)
        return np.ascontiguousarray(rows).reshape(math.prod(array.shape[:-1]), self.d_model)

    def _added(
        self,
        mask: ArrayLike | None,
        padding: ArrayLike | None,
        samples: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
    ) -> Array | None:
        """Both masks as one that is added to scores (samples, heads, L, L), or None."""
        length, total = shape[-1], None
        if mask is not None:
            name = self._mask_name
            added = _added(mask, name, dtype)
            each = (samples * self.num_heads, length, length)
            if added.shape not in (each, each[1:]):
                raise ValueError(
                    f"{name} has shape {added.shape}, expected {each[1:]}, or {each} for one "
                    "mask for each head of each sample"
                )
            heads = (samples, self.num_heads) if added.ndim == 3 else (1, 1)
            total = added.reshape(*heads, length, length)
        if padding is not None:
            added = _added(padding, "src_key_padding_mask", dtype)
            if added.shape != shape:
                raise ValueError(
                    f"src_key_padding_mask has shape {added.shape}, expected {shape} as x has "
                    "without its last axis"
                )
            added = added.reshape(samples, 1, 1, length)
            total = added if total is None else total + added
        return total

    def _of(self, name: str, x: Array) -> Any:
        """A parameter in the type that is computed in, or None where there is none."""
        found = self._parameters.get(name)
        return None if found is None else found.astype(x.dtype, copy=False)

    def _normed(
        self,
        name: str,
        x: Array,
        branch: Array | None = None,
        out: Array | None = None,
        total: Array | None = None,
    ) -> tuple[Array, Array]:
        """The norm of x + branch, and that sum itself, which is x where there is no branch."""
        weight, bias = self._of(f"{name}.weight", x), self._of(f"{name}.bias", x)
        d, eps = self.d_model, self.eps
        if branch is not None:
            norm = f"add_{self.norm}_norm"
            return functional.add_norm(norm, x, branch, d, weight, bias, eps, out=out, total=total)
        if self.norm == "rms":
            return functional.rms_norm(x, d, weight, eps, out=out), x
        return functional.layer_norm(x, d, weight, bias, eps, out=out), x

    def _normed_backward(self, name: str, dy: Array, total: Array, gradients: Gradients) -> Array:
        """The gradient of what was normed; the statistics are computed again."""
        forward, back = NORMS[self.norm]
        _, *statistics = forward(total, self.d_model, eps=self.eps, return_stats=True)
        weight = self._of(f"{name}.weight", dy)
        dx, *found = back(dy, total, *statistics, self.d_model, weight)
        gradients.update(zip((f"{name}.weight", f"{name}.bias"), found))
        return dx


def total_of(x: Array, branch: Array | None) -> Array:
    """The last of a stream, in memory of its own."""
    return x.copy() if branch is None else x + branch


def _added(mask: ArrayLike, name: str, dtype: np.dtype[Any]) -> Array:
    array = read(mask, name)
    if array.dtype == bool:
        return np.where(array, dtype.type(-np.inf), dtype.type(0))
    if not is_float(array.dtype):
        raise TypeError(
            f"{name} has dtype {array.dtype}, expected booleans (True: not to be seen) or floats "
            f"that are added to the scores; write {name}.astype(bool)"
        )
    return array.astype(dtype, copy=False)
