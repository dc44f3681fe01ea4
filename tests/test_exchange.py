"""The way of tensors to the kernels and back (fastnorm/_core/_exchange.pyx)."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import _core

from .helpers import operators_seen

torch = pytest.importorskip("torch")
pytest.importorskip("ml_dtypes")

import fastnorm.torch as fnt  # noqa: E402
from fastnorm.torch import tensors  # noqa: E402

pytestmark = pytest.mark.skipif(_core.exchange() is None, reason="it was not built")

X = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)

READ = {
    "as it is": X,
    "another order": X.permute(2, 0, 1),
    "a part": X[:, 1:, ::2],
    "channels-last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "repeated": X[:1].expand(5, 3, 4),
    "one number": torch.tensor(3.0),
    "long axes of one": X[:, None, :, None],
    "none": X[:0],
    "double": X.double(),
    "half": X.half(),
    "bfloat16": X.bfloat16(),
    "a parameter": torch.nn.Parameter(X, requires_grad=False),
    "of inference": torch.inference_mode()(lambda: X + 1)(),
}


@pytest.mark.parametrize("name", READ)
def test_an_array_is_the_tensors_memory_and_a_tensor_the_arrays(name: str) -> None:
    tensor = READ[name]
    tensors.array_of(X.bfloat16(), "x")  # bfloat16 is known from the first on
    array = tensors._exchange.array(tensor)
    assert array.shape == tuple(tensor.shape)
    # NumPy has strides of its own where nothing is there
    assert not array.size or array.strides == tuple(n * array.itemsize for n in tensor.stride())
    assert array.flags.aligned
    assert not array.size or array.ctypes.data == tensor.data_ptr()
    assert (array.astype(np.float64) == tensor.double().numpy()).all()
    if name != "repeated" and array.size:
        assert array.flags.c_contiguous == tensor.is_contiguous()
        back = tensors._exchange.tensor(array)
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        assert (back.stride(), back.data_ptr()) == (tensor.stride(), tensor.data_ptr())


REFUSED = {
    "sparse": lambda: X.to_sparse(),
    "of another layout": lambda: X.to_mkldnn(),
    "on no device": lambda: X.to("meta"),
    "whole numbers": lambda: X.int(),
    "complex": lambda: torch.complex(X, X),
    "a lazy negative": lambda: torch.complex(X, X).conj().imag,
    "zeros that are nowhere": lambda: torch._efficientzerotensor((3,)),
    "nine axes": lambda: X[None, None, None, None, None, None],
    "of a subclass": lambda: X.as_subclass(type("Own", (torch.Tensor,), {})),
    "an array": lambda: X.numpy(),
    "a number": lambda: 3.0,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_more_than_its_memory_is_left_to_python(name: str) -> None:
    assert tensors._exchange.array(REFUSED[name]()) is None
    assert sys.exc_info() == (None, None, None)


@pytest.mark.parametrize("array", [3.0, np.float32(3), np.arange(3), np.ones(2, "c8"), [1.0]])
def test_only_arrays_of_floats_become_tensors_here(array: Any) -> None:
    assert tensors._exchange.tensor(array) is None


def test_memory_lives_as_long_as_the_last_that_has_it() -> None:
    array = np.arange(5.0)
    seen = weakref.ref(array)
    tensor = tensors._exchange.tensor(array)
    del array
    gc.collect()
    assert seen() is not None
    assert tensor.tolist() == [0, 1, 2, 3, 4]
    holder = [tensor]
    del tensor
    other = threading.Thread(target=holder.clear)  # the last of it goes in another thread
    other.start()
    other.join()
    assert seen() is None

    tensor = torch.ones(5)
    before = sys.getrefcount(tensor)
    array = tensors._exchange.array(tensor)
    assert sys.getrefcount(tensor) == before + 1
    del tensor
    assert array.tolist() == [1] * 5


def python_of(function: Any, *args: Any, **kwargs: Any) -> list[str]:
    """The Python functions that a call runs."""
    seen: list[str] = []

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            seen.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        function(*args, **kwargs)
    finally:
        sys.setprofile(None)
    return seen


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("module", [fn, fnt], ids=["fastnorm", "fastnorm.torch"])
def test_a_known_call_runs_no_more_python_than_its_signature(module: Any, dtype: str) -> None:
    x = torch.randn(2, 6, 5, dtype=getattr(torch, dtype))
    kind = torch.float64 if dtype == "float64" else torch.float32  # of what is computed in
    p, w, running = (torch.rand(n, dtype=kind) for n in (6, 5, 6))
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("layer_norm", (x, 5, w, w), {}),
        ("layer_norm", (x, w.shape, w), {"residual": x}),
        ("rms_norm", (x, 5, w), {"return_stats": True}),
        ("group_norm", (x, 2, p, p), {"activation": "silu"}),
        ("instance_norm", (x,), {}),
        ("batch_norm", (x, running, running), {}),
        ("add_rms_norm", (x, x, 5), {}),
        ("dynamic_tanh", (x, 0.5), {}),
    ]
    allowed = {name for name, *_ in calls} | {"is_dynamo_compiling", "describe"}
    with torch.no_grad():
        for name, args, kwargs in calls:
            function = getattr(module, name)
            function(*args, **kwargs)
            seen = python_of(function, *args, **kwargs)
            assert set(seen) <= allowed, (name, seen)


def test_what_a_known_call_writes_to_is_told_to_autograd() -> None:
    x, out = torch.randn(3, 6, 5), torch.empty(3, 6, 5)
    mean, var = torch.zeros(6), torch.ones(6)
    kept = out.clone().requires_grad_()
    for _ in range(3):
        versions = [t._version for t in (out, mean, var)]
        y = fnt.layer_norm(x, 5, out=out)
        assert y is out
        fnt.batch_norm(x, mean, var, training=True)
        assert [t._version for t in (out, mean, var)] == [n + 1 for n in versions]
        versions = [t._version for t in (mean, var)]
        fnt.batch_norm(x, mean, var)
        assert [t._version for t in (mean, var)] == versions
    square = (kept * out).sum()  # keeps `out` for its gradient
    fnt.layer_norm(x, 5, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_a_call_changes_nothing_of_a_tensor() -> None:
    """`Tensor.numpy` forbids to make a tensor larger ever after."""
    x, w = torch.randn(3, 5), torch.randn(5)
    for _ in range(3):
        fnt.layer_norm(x, 5, w)
        fn.layer_norm(x, 5, w)
    assert x.untyped_storage().resizable()
    x.resize_(30, 5)
    assert fnt.layer_norm(x.fill_(1.0), 5, w).shape == (30, 5)


def test_no_reference_is_kept() -> None:
    x, w, size = torch.randn(3, 5), torch.randn(5), torch.Size([5])
    held = (x, w, size, torch.Tensor.is_neg)
    counts: list[list[int]] = []
    for times in (3, 1000):
        for _ in range(times):
            fnt.layer_norm(x, size, w, return_stats=True)
            fnt.layer_norm(x, 5, w, out=x)
        counts.append([sys.getrefcount(one) for one in held])
    assert counts[0] == counts[1]


def shapes_and_orders() -> list[Any]:
    """Tensors that the array of the call before is not like, and some that it is."""
    whole = torch.randn(9, 7, 6, 5)
    floats = [
        whole, whole[1:], whole[:, 1:6:2], whole.transpose(0, 2), whole[0], whole[0, 0],
        whole[..., ::2], whole[:0], whole[:1].expand(9, 7, 6, 5), whole[:, None],
        whole.to(memory_format=torch.channels_last), whole.flatten()[1:-4].view(5, 377)[:, :375],
    ]  # fmt: skip
    return [x.to(kind) for x in floats for kind in (torch.float32, torch.float64, torch.float16)]


def test_the_arrays_of_the_call_before_are_right_for_the_next() -> None:
    """They are filled in anew, whatever lay where before, and hold nothing."""
    found = shapes_and_orders()
    expected = [fn.layer_norm(x.numpy(), x.shape[-1], residual=x.numpy()) for x in found]
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for _ in range(4):
            for i in rng.permutation(len(found)):
                x, out = found[i], torch.empty_like(found[i])
                y = fnt.layer_norm(x, x.shape[-1], residual=x)
                assert np.array_equal(y.numpy(), expected[i])
                if not any(n > 1 and step == 0 for n, step in zip(out.shape, out.stride())):
                    assert fnt.layer_norm(x, x.shape[-1], residual=x, out=out) is out
                    assert np.array_equal(out.numpy(), expected[i])


def test_the_arrays_of_a_call_are_out_of_reach() -> None:
    """They have no owner, so nobody may hold one when the tensor goes."""
    x, w = torch.randn(3, 5), torch.randn(5)
    for _ in range(3):
        fnt.layer_norm(x, 5, w)
        fnt.layer_norm(x, 5, w, out=x)
    seen, reached = set(), [fnt.layer_norm]
    while reached:
        one = reached.pop()
        if id(one) not in seen and not isinstance(one, (dict, type, type(gc))):
            seen.add(id(one))
            assert not isinstance(one, np.ndarray)
            reached += gc.get_referents(one)
    assert any("PlainCalls" in repr(one) for one in gc.get_referents(closure_of(fnt.layer_norm)))


def closure_of(function: Any) -> Any:
    return next(c for c in function.__closure__ if "PlainCalls" in repr(c.cell_contents))


def test_threads_have_arrays_of_their_own() -> None:
    x = [torch.randn(64, 1000 + i) for i in range(4)]
    expected = [fn.layer_norm(a.numpy(), a.shape[-1]) for a in x]
    wrong = []

    def call(i: int) -> None:
        for _ in range(200):
            y = fnt.layer_norm(x[i], x[i].shape[-1])
            if not np.array_equal(y.numpy(), expected[i]):
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_everything_works_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(3, 5), torch.rand(5)
    expected = fnt.layer_norm(x, 5, w), fnt.layer_norm(x.bfloat16(), 5)
    monkeypatch.setattr(tensors, "_exchange", None)
    assert tensors.finder(fn.layer_norm, ())((x, 5)) is None
    found = [
        tensors.tensor_of(fn.layer_norm(tensors.array_of(a, "x"), 5, b))
        for a, b in ((x, tensors.array_of(w, "weight")), (x.bfloat16(), None))
    ]
    assert all(map(torch.equal, expected, found))


def test_another_table_is_left_alone() -> None:
    module = _core.exchange()
    assert module is not None

    class Without:
        pass

    with pytest.raises(AttributeError):
        module.Exchange(Without, Without, lambda x: False)
    assert tensors._table(None) is None


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("module", [fn, fnt], ids=["fastnorm", "fastnorm.torch"])
def test_who_has_to_see_the_operators_sees_those_of_a_known_call(module: Any) -> None:
    x, w = torch.randn(3, 5), torch.rand(5)
    for _ in range(3):
        expected = module.layer_norm(x, 5, w)
    with operators_seen() as seen:
        found = module.layer_norm(x, 5, w)
    torch.testing.assert_close(found, expected)
    assert any("layer_norm" in str(function) for function in seen)
    traced = torch.jit.trace(lambda x: module.layer_norm(x, 5, w), (x,))
    torch.testing.assert_close(traced(x + 1), module.layer_norm(x + 1, 5, w))
    torch.testing.assert_close(traced(2 * x + x**2), module.layer_norm(2 * x + x**2, 5, w))
