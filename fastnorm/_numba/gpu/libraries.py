"""Arrays on a GPU, whoever made them: what they are, and more of the same kind.

Recognised by their attributes, and their libraries through `sys.modules`: nothing is imported here
but NumPy. `Library` is one for each kind; results are allocated by the library of x.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np

Shape = tuple[int, ...]


def handles(x: Any) -> bool:
    """Whether x is an array on a GPU (or in the memory of Numba's simulator of one)."""
    for name in ("is_cuda", "__cuda_array_interface__", "__cuda_ndarray__"):
        try:
            found = getattr(x, name, None)
        except Exception:  # JAX's arrays have an interface that raises where they are not on a GPU
            continue
        if name == "is_cuda" and isinstance(found, bool):
            return found  # PyTorch's: its interface raises for many tensors that are
        if name != "is_cuda" and found is not None:
            return True
    return False


def dtype_named(name: str) -> np.dtype[Any]:
    """The dtype of this name; bfloat16 is that of ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    try:
        return np.dtype(name)
    except TypeError:
        raise TypeError(
            f"an array has dtype {name}, expected float16, bfloat16, float32 or float64; write "
            "x.float() first"
        ) from None


def dense_strides(shape: Shape, like: Shape, itemsize: int) -> Shape:
    """Strides in bytes without gaps, the axes in the order in which those of `like` lie."""
    strides, step = [0] * len(shape), itemsize
    for axis in sorted(range(len(shape)), key=lambda a: (abs(like[a]), -a)):
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)


class Memory(NamedTuple):
    """Where an array lies."""

    address: int
    shape: Shape
    strides: Shape  # in bytes
    dtype: np.dtype[Any]
    readonly: bool = False


def _memory_of(interface: dict[str, Any], named: Any = None) -> Memory:
    """What a `__cuda_array_interface__` says, if it can be so; `named`: a dtype it cannot name."""

    def refused(what: str) -> ValueError:
        return ValueError(
            f"an array on the GPU has {what} in its __cuda_array_interface__, expected that of an "
            "array as CuPy, PyTorch and Numba make it; write x.copy() in its library first"
        )

    try:
        shape, strides = tuple(interface["shape"]), interface.get("strides")
        strides = None if strides is None else tuple(strides)
        typestr, (address, readonly) = interface["typestr"], interface["data"]
        mask = interface.get("mask")
    except (AttributeError, KeyError, TypeError, ValueError):
        raise refused("something else") from None
    if mask is not None:
        raise refused("a mask")
    if not all(_is_whole(n) and n >= 0 for n in shape):
        raise refused(f"shape {shape!r}")
    # the simulator's arrays have a dtype whose letters say nothing of it
    try:
        letters = np.dtype(typestr)
        dtype = letters if named is None else np.dtype(named)
    except (TypeError, ValueError):
        raise TypeError(
            f"an array on the GPU has dtype {typestr!r}, expected float16, bfloat16, "
            "float32 or float64; write x.astype('float32') in its library first"
        ) from None
    if letters.itemsize != dtype.itemsize or letters.isnative != dtype.isnative:
        raise refused(f"typestr {typestr!r} for dtype {dtype}")
    if strides is None:
        strides = dense_strides(shape, (0,) * len(shape), dtype.itemsize)
    if len(strides) != len(shape) or not all(_is_whole(step) for step in strides):
        raise refused(f"strides {strides!r} for shape {shape}")
    if address is not None and not _is_whole(address):
        raise refused(f"address {address!r}")
    address = int(address or 0)
    if 0 not in shape:
        ends = [step * (n - 1) for n, step in zip(shape, strides)]
        low = address + sum(min(end, 0) for end in ends)
        high = address + sum(max(end, 0) for end in ends) + dtype.itemsize
        if address == 0 or low <= 0 or high >= 1 << 63:
            raise refused(f"address {address:#x}, shape {shape} and strides {tuple(strides)}")
    return Memory(address, shape, tuple(strides), dtype, bool(readonly))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


class Library:
    """Numba's own arrays, and those of a library that is not known but has the interface."""

    name = "Numba"

    def memory(self, x: Any) -> Memory:
        """Where x lies."""
        interface = getattr(x, "__cuda_array_interface__", None)
        if interface is None:  # the simulator's
            interface = x.__array_interface__
        return _memory_of(interface, getattr(x, "dtype", None))

    def device(self, x: Any) -> int | None:
        """The number of the GPU that x lies on; None for the one in use."""
        return None

    def stream(self, x: Any) -> int:
        """The stream of the caller, as a pointer; 0 is the default one."""
        interface = getattr(x, "__cuda_array_interface__", None) or {}
        stream = interface.get("stream")
        if stream is not None and not (_is_whole(stream) and stream > 0):
            raise ValueError(
                f"an array on the GPU has stream {stream!r} in its __cuda_array_interface__, "
                "expected None, 1 (the default one), 2, or a stream's address"
            )
        return 0 if stream in (None, 1) else int(stream)

    def empty(self, x: Any, shape: Shape, dtype: np.dtype[Any], strides: Shape) -> Any:
        """New memory on the GPU of x, of this library's kind."""
        from fastnorm._numba.gpu.package import cuda

        return cuda.device_array(shape, dtype, strides=strides)

    def from_host(self, x: Any, array: np.ndarray[Any, Any]) -> Any:
        """A copy on the GPU of x of an array in the host's memory."""
        from fastnorm._numba.gpu.package import cuda

        made = cuda.to_device(np.ascontiguousarray(array))
        cuda.synchronize()  # the copy is on the default stream
        return made

    def to_host(self, x: Any) -> np.ndarray[Any, Any]:
        """A copy of x in the host's memory."""
        from fastnorm._numba.gpu.package import cuda

        cuda.synchronize()  # as it is in `from_host`
        return x.copy_to_host()


class _Cupy(Library):
    name = "CuPy"

    def device(self, x: Any) -> int | None:
        return int(x.device.id)

    def stream(self, x: Any) -> int:
        return int(sys.modules["cupy"].cuda.get_current_stream().ptr)

    def empty(self, x: Any, shape: Shape, dtype: np.dtype[Any], strides: Shape) -> Any:
        order = sorted(range(len(shape)), key=lambda axis: -strides[axis])
        with x.device:
            flat = sys.modules["cupy"].empty([shape[axis] for axis in order], dtype)
        return flat.transpose([order.index(axis) for axis in range(len(shape))])

    def from_host(self, x: Any, array: np.ndarray[Any, Any]) -> Any:
        with x.device:
            return sys.modules["cupy"].asarray(array)

    def to_host(self, x: Any) -> np.ndarray[Any, Any]:
        return x.get()


class _Torch(Library):
    name = "PyTorch"

    def memory(self, x: Any) -> Memory:
        torch = sys.modules["torch"]
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "a tensor on the GPU requires a gradient, which these functions do not record; "
                "write x.detach(), and use the *_backward functions for gradients"
            )
        dtype = dtype_named(str(x.dtype).removeprefix("torch."))
        strides = tuple(step * dtype.itemsize for step in x.stride())
        return Memory(x.data_ptr(), tuple(x.shape), strides, dtype)

    def device(self, x: Any) -> int | None:
        return int(x.device.index) if x.is_cuda else None

    def stream(self, x: Any) -> int:
        if not x.is_cuda:  # under the simulator
            return 0
        return int(sys.modules["torch"].cuda.current_stream(x.device).cuda_stream)

    def empty(self, x: Any, shape: Shape, dtype: np.dtype[Any], strides: Shape) -> Any:
        torch = sys.modules["torch"]
        steps = [step // dtype.itemsize for step in strides]
        kind = getattr(torch, dtype.name)
        return torch.empty_strided(shape, steps, dtype=kind, device=x.device)

    def from_host(self, x: Any, array: np.ndarray[Any, Any]) -> Any:
        torch = sys.modules["torch"]
        array = np.ascontiguousarray(array)
        if array.dtype.name == "bfloat16":
            bits = torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
            return bits.to(x.device, copy=True)
        return torch.from_numpy(array.copy()).to(x.device)

    def to_host(self, x: Any) -> np.ndarray[Any, Any]:
        x = x.detach().cpu()
        if str(x.dtype) == "torch.bfloat16":
            torch = sys.modules["torch"]
            return x.contiguous().view(torch.int16).numpy().view(dtype_named("bfloat16"))
        return x.numpy()


_LIBRARIES = {"torch": _Torch(), "cupy": _Cupy()}
_NUMBA = Library()


def library_of(x: Any) -> Library:
    """The library that made x; Numba's where it is none that is known."""
    for kind in type(x).__mro__:  # a user's subclass has a base there
        found = _LIBRARIES.get(kind.__module__.partition(".")[0])
        if found is not None:
            return found
    return _NUMBA
