"""Transformer blocks and what they are made of: against PyTorch, forward and backward."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastnorm as fn
from fastnorm import runtime
from fastnorm.arguments import ACTIVATIONS
from fastnorm.nn import stream, weights

from .helpers import F32, F64, Array, assert_same_bits, named

D, HEADS, HIDDEN = 24, 3, 40
N, L = 3, 7

OTHERS = ("peri", "deepnorm")

# A result here is some hundred roundings of numbers of order 1 away from its
# input: 1e-14 in float64 and 1e-5 in float32, where errors of different signs leave about 1e-6.
CLOSE = {F64: 1e-10, F32: 1e-5}


def normal(*shape: int, dtype: Any = F64, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def shaken(m: Any) -> Any:
    """The module with all parameters moved: norms' weights and biases are not 1 and 0 then."""
    rng = np.random.default_rng(7)
    for p in m.parameters().values():
        p += (0.2 * rng.standard_normal(p.shape)).astype(p.dtype)
    return m


def assert_close(found: Any, right: Any, within: float, what: str = "") -> None:
    """Relative to the largest element."""
    right = right.detach().numpy() if hasattr(right, "detach") else np.asarray(right)
    assert found.shape == right.shape
    assert found.dtype == right.dtype
    assert abs(found - right).max() <= within * abs(right).max(), what


def assert_like_torch(
    ours: Any, theirs: Any, dtype: Any, ours_masks: dict[str, Any], theirs_masks: dict[str, Any]
) -> None:
    """The result and every gradient."""
    torch = pytest.importorskip("torch")
    x, dy = normal(N, L, D, dtype=dtype), normal(N, L, D, dtype=dtype, seed=1)
    tensor = torch.from_numpy(x.copy()).requires_grad_()
    right = theirs(tensor, **theirs_masks)
    right.backward(torch.from_numpy(dy))
    y = ours(x, **ours_masks)
    assert_close(y, right, CLOSE[dtype], "y")
    assert_close(ours.backward(dy), tensor.grad, CLOSE[dtype], "dx")
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert ours.grad.keys() == gradients.keys()
    # The bias of a key moves all scores of a query alike, so that its gradient is 0: what is left
    # is the rounding of the parts it shares an array with.
    for name, gradient in gradients.items():
        assert_close(ours.grad[name], gradient, CLOSE[dtype], name)


# --- Like torch.nn --------------------------------------------------------------------------------

PADDING = np.arange(L) >= np.array([[7], [3], [5]])  # True: nobody may see it
CAUSAL = np.triu(np.ones((L, L), bool), 1)
EACH = np.random.default_rng(4).random((N * HEADS, L, L)) < 0.3
EACH[:, np.arange(L), np.arange(L)] = False  # torch has NaN where nothing is seen

# For a block: options, and masks by name; True for a padding.
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "padding": {"src_key_padding_mask": PADDING},
    "causal": {"src_mask": CAUSAL},
    "causal and padding": {"src_mask": CAUSAL, "src_key_padding_mask": PADDING},
    "floats": {"src_mask": normal(L, L, seed=5)},
    "for each head": {"src_mask": EACH},
}

dtypes = pytest.mark.parametrize("dtype", [F64, F32], ids=named)
norm_first = pytest.mark.parametrize("norm_first", [True, False])


def layer_of(torch: Any, norm_first: bool, dtype: Any, **options: Any) -> Any:
    return torch.nn.TransformerEncoderLayer(
        D, HEADS, HIDDEN, dropout=0.0, batch_first=True, norm_first=norm_first,
        dtype=getattr(torch, dtype.name), **options,
    )  # fmt: skip


def masks_of(torch: Any, masks: dict[str, Any], dtype: Any) -> dict[str, Any]:
    def tensor(mask: Array) -> Any:
        return torch.from_numpy(mask if mask.dtype == bool else mask.astype(dtype))

    return {name: tensor(mask) for name, mask in masks.items()}


@dtypes
@norm_first
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_block_like_pytorch(
    activation: str, masks: str, norm_first: bool, dtype: Any, torch: Any
) -> None:
    placement: Any = "pre" if norm_first else "post"
    ours = shaken(
        fn.nn.TransformerBlock(
            D, HEADS, HIDDEN, placement=placement, activation=activation, dtype=dtype, rng=0
        )
    )
    theirs = layer_of(torch, norm_first, dtype, activation=activation)
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in ours.state_dict().items()})
    given = MASKS[masks]
    assert_like_torch(ours, theirs, dtype, given, masks_of(torch, given, dtype))


@dtypes
@norm_first
@pytest.mark.parametrize("final", [True, False])
def test_encoder_like_pytorch(norm_first: bool, final: bool, dtype: Any, torch: Any) -> None:
    """Four layers, with PyTorch's own first weights loaded into ours."""
    torch.manual_seed(0)
    kind = getattr(torch, dtype.name)
    norm = torch.nn.LayerNorm(D, dtype=kind) if final else None
    theirs = torch.nn.TransformerEncoder(
        layer_of(torch, norm_first, dtype, activation="gelu"), 4, norm, enable_nested_tensor=False
    )
    ours = fn.nn.TransformerEncoder(
        4, D, HEADS, HIDDEN, placement="pre" if norm_first else "post", final_norm=final,
        causal=True, dtype=dtype,
    )  # fmt: skip
    ours.load_state_dict(theirs.state_dict())
    masks = masks_of(torch, {"mask": CAUSAL, "src_key_padding_mask": PADDING}, dtype)
    assert_like_torch(ours, theirs, dtype, {"mask": CAUSAL, "src_key_padding_mask": PADDING}, masks)


@norm_first
def test_block_without_biases_like_pytorch(norm_first: bool, torch: Any) -> None:
    theirs = layer_of(torch, norm_first, F64, bias=False)
    ours = fn.nn.TransformerBlock(
        D, HEADS, HIDDEN, placement="pre" if norm_first else "post", activation="relu",
        bias=False, dtype=F64,
    )  # fmt: skip
    ours.load_state_dict(theirs.state_dict())
    assert_like_torch(ours, theirs, F64, {}, {})


def test_state_has_the_names_of_pytorch(torch: Any) -> None:
    theirs = torch.nn.TransformerEncoder(
        layer_of(torch, True, F32), 2, torch.nn.LayerNorm(D), enable_nested_tensor=False
    )
    ours = fn.nn.TransformerEncoder(2, D, HEADS, HIDDEN)
    found = {name: (v.shape, v.dtype) for name, v in ours.state_dict().items()}
    right = {name: (tuple(v.shape), v.numpy().dtype) for name, v in theirs.state_dict().items()}
    assert list(found.items()) == list(right.items())


# --- What PyTorch has no layer for ----------------------------------------------------------------


def composed(torch: Any, m: Any, x: Any, weights: dict[str, Any]) -> Any:
    """A block of any placement, norm and activation, as torch's functions say it."""
    f = torch.nn.functional

    def normed(name: str, v: Any) -> Any:
        if m.norm == "rms":
            return f.rms_norm(v, (D,), weights[f"{name}.weight"], m.eps)
        return f.layer_norm(v, (D,), weights[f"{name}.weight"], weights[f"{name}.bias"], m.eps)

    def attend(h: Any) -> Any:
        packed = f.linear(h, weights["self_attn.in_proj_weight"], weights["self_attn.in_proj_bias"])
        heads = (v.unflatten(-1, (HEADS, -1)).transpose(1, 2) for v in packed.chunk(3, -1))
        y = f.scaled_dot_product_attention(*heads, is_causal=m.causal)
        joined = y.transpose(1, 2).flatten(-2)
        return f.linear(
            joined, weights["self_attn.out_proj.weight"], weights["self_attn.out_proj.bias"]
        )

    def feed(h: Any) -> Any:
        inner = f.linear(h, weights["linear1.weight"], weights["linear1.bias"])
        if m.activation == "gelu_tanh":
            active = f.gelu(inner, approximate="tanh")
        else:
            active = getattr(f, m.activation)(inner)
        return f.linear(active, weights["linear2.weight"], weights["linear2.bias"])

    alpha = (2 * m.num_layers) ** 0.25
    for number, part in (("1", attend), ("2", feed)):
        name = f"norm{number}"
        if m.placement == "pre":
            x = x + part(normed(name, x))
        elif m.placement == "post":
            x = normed(name, x + part(x))
        elif m.placement == "peri":
            x = x + normed(f"post_{name}", part(normed(name, x)))
        else:
            x = normed(name, alpha * x + part(x))
    return x


@pytest.mark.parametrize("placement", ["pre", "post", *OTHERS])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@dtypes
def test_every_choice_like_its_formula(
    placement: Any, norm: Any, activation: str, dtype: Any, torch: Any
) -> None:
    ours = shaken(
        fn.nn.TransformerBlock(
            D, HEADS, HIDDEN, placement=placement, norm=norm, activation=activation, causal=True,
            num_layers=5, rng=0, dtype=dtype,
        )
    )  # fmt: skip
    weights = {k: torch.from_numpy(v).requires_grad_() for k, v in ours.state_dict().items()}
    x, dy = normal(N, L, D, dtype=dtype), normal(N, L, D, dtype=dtype, seed=1)
    tensor = torch.from_numpy(x).requires_grad_()
    right = composed(torch, ours, tensor, weights)
    right.backward(torch.from_numpy(dy))
    assert_close(ours(x), right, CLOSE[dtype], "y")
    assert_close(ours.backward(dy), tensor.grad, CLOSE[dtype], "dx")
    for name, weight in weights.items():
        assert_close(ours.grad[name], weight.grad, CLOSE[dtype], name)


@pytest.mark.parametrize("placement", ["pre", "post", *OTHERS])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_gradients_of_an_encoder(placement: Any, norm: Any) -> None:
    """Along a direction in which everything moves, PyTorch or not.

    Central differences in float64: off by step^2 = 1e-8 times the third derivative, here below 1e3.
    """
    m = shaken(
        fn.nn.TransformerEncoder(3, D, HEADS, placement=placement, norm=norm, rng=0, dtype=F64)
    )
    x, dy = normal(N, L, D), normal(N, L, D, seed=1)
    m(x, src_key_padding_mask=PADDING)
    dx = m.backward(dy)
    rng = np.random.default_rng(2)
    arrays = [(x, dx), *((p, m.grad[name]) for name, p in m.parameters().items())]
    moves = [rng.standard_normal(p.shape) / p.size**0.5 for p, _ in arrays]
    expected = sum(float((g * move).sum()) for (_, g), move in zip(arrays, moves))
    step, ends = 1e-4, []
    for sign in (1, -2):  # from the middle to one end, from there to the other
        for (p, _), move in zip(arrays, moves):
            p += sign * step * move
        ends.append(float((m(x, src_key_padding_mask=PADDING) * dy).sum()))
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(expected, rel=1e-5)


def test_deepnorm_begins_as_published() -> None:
    """Wang et al., figure 2, encoder only: alpha = (2N)^(1/4), gain (8N)^(-1/4) but for q and k."""
    layers, d = 6, 128
    m = fn.nn.TransformerEncoder(layers, d, 4, placement="deepnorm", rng=0)
    plain = fn.nn.TransformerEncoder(layers, d, 4, placement="post", rng=0)
    assert not m.final_norm
    beta, begun = (8 * layers) ** -0.25, m.state_dict()
    for name, array in plain.state_dict().items():
        if array.ndim == 2 and "in_proj" not in name:
            # Xavier: 2 / (inputs + outputs); the spread of n normal numbers is off by (2n)^(-1/2)
            xavier = (2 / sum(array.shape)) ** 0.5
            assert array.std() == pytest.approx(xavier, rel=5 * (2 * array.size) ** -0.5)
            np.testing.assert_allclose(begun[name], beta * array, rtol=1e-6)
    q, k, v = np.split(begun["layers.0.self_attn.in_proj_weight"], 3)
    for part, gain in ((q, 1), (k, 1), (v, beta)):
        assert part.std() == pytest.approx(gain * d**-0.5, rel=5 * (2 * d * d) ** -0.5)
    # f is small against alpha x: norm(alpha x + f) is then near norm(x)
    x = normal(1, 4, d, dtype=F32)
    block = m.layers[0]
    for name, array in block.parameters().items():
        if name.startswith("linear"):
            array[...] = 0
        if "out_proj" in name:
            array[...] = 1 if name.endswith("bias") else 0
    alpha = (2 * layers) ** 0.25
    right = fn.layer_norm(fn.layer_norm(alpha * x + 1, d) * alpha, d)
    np.testing.assert_allclose(block(x), right, rtol=0, atol=1e-5)


# --- Module ---------------------------------------------------------------------------------------


def models(**options: Any) -> list[Any]:
    return [
        fn.nn.TransformerBlock(D, HEADS, HIDDEN, rng=0, **options),
        fn.nn.TransformerEncoder(2, D, HEADS, HIDDEN, rng=0, **options),
    ]


@pytest.mark.parametrize("placement", ["pre", "post", *OTHERS])
def test_inference_has_the_same_bits_and_a_way_back(placement: Any) -> None:
    for m in models(placement=placement):
        x, dy = normal(40, L, D, dtype=F32), normal(40, L, D, dtype=F32, seed=1)
        padding = np.zeros((40, L), bool)
        padding[::3, 4:] = True
        y = m(x, src_key_padding_mask=padding)
        dx, gradients = m.backward(dy), copy.deepcopy(m.grad)
        m.zero_grad()
        assert not any(g.any() for g in m.grad.values())
        m.eval()
        assert_same_bits(m(x, src_key_padding_mask=padding), y)
        assert_same_bits(m.backward(dy), dx)
        for name, gradient in gradients.items():
            assert_same_bits(m.grad[name], gradient)


@pytest.mark.parametrize("placement", ["pre", "post", *OTHERS])
@pytest.mark.parametrize("final", [True, False])
def test_a_result_holds_no_other_memory(placement: Any, final: bool) -> None:
    # all that is computed on the way lies in one piece, which ends with the call
    x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    for training in (True, False):
        m = fn.nn.TransformerEncoder(2, 8, 2, placement=placement, final_norm=final, rng=0)
        for module in (m.train(training), m.layers[0]):
            y = module(x)
            assert y.base is None or y.base.nbytes == y.nbytes
            assert not np.shares_memory(x, y)


def test_gradients_add_up() -> None:
    for m in models():
        x = normal(N, L, D, dtype=F32)
        m.backward(m(x))
        once = copy.deepcopy(m.grad)
        m.backward(m(x))
        for name, gradient in once.items():
            np.testing.assert_allclose(m.grad[name], 2 * gradient, rtol=1e-6)


def test_threads_and_what_others_do_change_no_bits() -> None:
    """64 positions of 1024 numbers: enough for the kernels to use threads, if they were let."""
    m = fn.nn.TransformerEncoder(2, 256, 4, rng=0).eval()
    x = normal(8, 64, 256, dtype=F32)
    with fn.threads(1):
        alone = m(x)
    with fn.threads(4):
        assert_same_bits(m(x), alone)
        assert fn.get_num_threads() == 4


def test_kernels_have_their_threads_again_after_a_call() -> None:
    """Of several threads at once, and after an error in the middle."""
    modules = [fn.nn.TransformerBlock(64, 4, rng=seed).eval() for seed in range(4)]
    x = normal(4, 40, 64, dtype=F32)
    alone = [m(x) for m in modules]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for found, right in zip(pool.map(lambda m: m(x), modules), alone):
                assert_same_bits(found, right)
    modules[0].activation = "dance"
    with pytest.raises(ValueError, match="'dance'"):
        modules[0](x)
    with fn.threads(3):
        assert runtime.kernel_threads() == 3
        with runtime.serial():
            assert runtime.kernel_threads() == 1
            assert fn.get_num_threads() == 3


def test_a_sample_does_not_see_the_others() -> None:
    """But for rounding: BLAS may cut matrices of other sizes in other ways."""
    m = fn.nn.TransformerEncoder(2, D, HEADS, rng=0, dtype=F64).eval()
    x = normal(50, L, D)
    mask = np.random.default_rng(0).random((50 * HEADS, L, L)) < 0.3
    y = m(x, mask)
    for i in (0, 49):
        one = m(x[i : i + 1], mask[i * HEADS : (i + 1) * HEADS])
        np.testing.assert_allclose(y[i : i + 1], one, rtol=0, atol=1e-13)


def test_samples_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many scores at once as a cache holds: two samples each here, and one in the last piece."""
    x = normal(5, L, D)
    masks = (normal(5 * HEADS, L, L, seed=1), normal(5, L, seed=2) > 1)
    m = fn.nn.TransformerEncoder(2, D, HEADS, rng=0, dtype=F64)
    y = m(x, *masks)
    dx = m.backward(y)
    monkeypatch.setattr(stream, "_SCORES", 2 * HEADS * L * L)
    assert_same_bits(m.backward(m(x, *masks)), dx)
    assert_same_bits(m.eval()(x, *masks), y)


def test_final_norm() -> None:
    x = normal(N, L, D)
    for placement in ("pre", "peri", "post", "deepnorm"):
        plain, normed, chosen = (
            fn.nn.TransformerEncoder(2, D, HEADS, placement=placement, final_norm=f, rng=0)  # type: ignore[arg-type]
            for f in (False, True, None)
        )
        right = fn.layer_norm(plain(x), D)
        np.testing.assert_allclose(normed(x), right, rtol=0, atol=1e-12)
        assert chosen.final_norm == (placement in ("pre", "peri"))
        assert "norm.weight" in normed.state_dict()
        assert "norm.weight" not in plain.state_dict()


def test_encoder_and_layers_are_one() -> None:
    m = fn.nn.TransformerEncoder(2, D, HEADS, rng=0)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        inner = other.layers[1].parameters()["linear1.weight"]
        assert other.parameters()["layers.1.linear1.weight"] is inner
        assert other.grad["layers.1.linear1.weight"] is other.layers[1].grad["linear1.weight"]
        assert not np.shares_memory(inner, m.layers[1].parameters()["linear1.weight"])
    assert not m.eval().layers[1].training
    assert m.train().layers[1].training
    first = m.state_dict()
    shaken(m).reset_parameters(0)
    for name, array in m.state_dict().items():
        np.testing.assert_array_equal(array, first[name])
    weights = [layer.parameters()["linear1.weight"] for layer in m.layers]
    assert abs(weights[0] - weights[1]).max() > 0.1


def test_seeds() -> None:
    a, b, c = (fn.nn.TransformerBlock(D, HEADS, rng=seed).state_dict() for seed in (1, 1, 2))
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert not np.array_equal(a["linear1.weight"], c["linear1.weight"])
    given = fn.nn.TransformerBlock(D, HEADS, rng=np.random.default_rng(1)).state_dict()
    assert np.array_equal(a["linear1.weight"], given["linear1.weight"])


GENERATORS = [
    np.random.PCG64,  # that of a seed; this and the next are drawn from on several threads
    np.random.PCG64DXSM,
    np.random.SFC64,
    np.random.MT19937,
]


@pytest.mark.parametrize("before", [0, 1], ids=["", "half a step drawn"])
@pytest.mark.parametrize("kind", GENERATORS, ids=lambda kind: kind.__name__)
def test_first_weights_are_the_generators_own_numbers(
    kind: Any, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, whoever draws them, and it goes on after them; matrices of an odd size too."""
    layers, d, hidden, count = 2, 257, 1030, []

    class Counted(threading.Thread):
        def start(self) -> None:
            count.append(1)
            super().start()

    monkeypatch.setattr(weights, "Thread", Counted)
    rng = np.random.Generator(kind(3))
    rng.random(before, F32)
    expected = []
    for _ in range(layers):
        for shape in [(d, d)] * 4 + [(hidden, d), (d, hidden)]:
            bound = (6 / sum(shape)) ** 0.5
            drawn = rng.random(shape, F32)
            expected.append((drawn - np.float32(0.5)) * np.float32(2 * bound))
            # Xavier: within the bound and near it, mean 0 and variance bound^2 / 3; these are off
            # by (variance / n)^(1/2) and (4 / 5n)^(1/2) of themselves
            n, variance = drawn.size, bound**2 / 3
            assert 0.999 * bound < abs(expected[-1]).max() <= bound
            assert abs(expected[-1].mean(dtype=F64)) < 5 * (variance / n) ** 0.5
            assert expected[-1].var(dtype=F64) == pytest.approx(variance, rel=5 * (0.8 / n) ** 0.5)
    after = rng.random(3, F32)
    numbers = np.concatenate([e.ravel() for e in expected])
    # no part of it twice: of n numbers of 24 bits, n^2 / 2^25 pairs are alike, here 6 %
    assert len(np.unique(numbers)) > 0.9 * len(numbers)
    for threads in (1, 2, 3):
        rng = np.random.Generator(kind(3))
        rng.random(before, F32)
        count.clear()
        with fn.threads(threads):
            m = fn.nn.TransformerEncoder(layers, d, 1, hidden, rng=rng)
        found = [p.ravel() for p in m.parameters().values() if p.ndim == 2]
        assert_same_bits(np.concatenate(found), numbers)
        assert_same_bits(rng.random(3, F32), after)
        assert len(count) == (threads - 1 if kind in GENERATORS[:2] else 0)


def test_small_modules_and_other_dtypes_start_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    large = {"d_model": 256, "num_heads": 4, "rng": 0}
    with fn.threads(1):
        right = fn.nn.TransformerBlock(**large, dtype=F64).state_dict()
    monkeypatch.delattr(weights, "Thread")
    with fn.threads(4):
        fn.nn.TransformerEncoder(4, 64, 4, rng=0)
        for name, array in fn.nn.TransformerBlock(**large, dtype=F64).state_dict().items():
            assert_same_bits(array, right[name])
        m = fn.nn.TransformerBlock(**large, dtype=np.float16)
        assert m.parameters()["linear1.weight"].std() == pytest.approx((2 / 1280) ** 0.5, rel=0.01)


def test_weights_that_cannot_be_written_are_an_error() -> None:
    m = fn.nn.TransformerBlock(256, 4, rng=0)
    m.parameters()["linear2.weight"].flags.writeable = False
    with fn.threads(2), pytest.raises(ValueError, match=r"writable|read-only"):
        m.reset_parameters(0)


def test_large_arrays_lie_together() -> None:
    """From a huge page on, and nowhere twice."""
    shapes = [(3, 500, 100), (1000, 400), (0, 7), (5,)]
    for dtype in (np.dtype(F32), np.dtype(ml_dtypes.bfloat16), np.dtype(F64)):
        arrays = weights.together(shapes, dtype)
        assert [a.shape for a in arrays] == shapes
        assert all(a.dtype == dtype and a.flags.c_contiguous and a.flags.aligned for a in arrays)
        assert (arrays[0].ctypes.data % 2**21 == 0) == (arrays[0].base is not None)
        for i, array in enumerate(arrays):
            array[...] = i
        assert all((array == i).all() for i, array in enumerate(arrays))
    assert arrays[0].ctypes.data % 2**21 == 0  # 4 MB
    (small,) = weights.together([(3, 4)], dtype)
    assert small.base is None


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.int64], ids=str)
def test_other_dtypes(dtype: Any) -> None:
    """Computed in float32, or float64 for integers; rounded once at the end."""
    x = (3 * normal(N, L, D)).astype(dtype)
    for m in models():
        y = m(x)
        dx = m.backward(y)
        wide = np.float64 if dtype is np.int64 else np.float32
        kind = np.dtype(np.float64 if dtype is np.int64 else dtype)
        assert y.dtype == dx.dtype == kind
        assert_same_bits(y, m(x.astype(wide)).astype(kind))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64], ids=str)
def test_parameters_of_other_dtypes(dtype: Any) -> None:
    """They are rounded, or not, and the arithmetic is that of x: float32."""
    x = normal(N, L, D, dtype=F32)
    for m, plain in zip(models(dtype=dtype), models()):
        plain.load_state_dict(m.state_dict())
        y = m(x)
        assert_same_bits(y, plain(x))
        assert_same_bits(m.backward(y), plain.backward(y))
        for name, gradient in plain.grad.items():
            assert_same_bits(m.grad[name], gradient.astype(dtype))


def test_shapes_and_memory() -> None:
    """Any leading axes, any strides; x and masks are left as they are; empty gives empty."""
    x = normal(2, 3, L, D, dtype=F32)
    padding = np.zeros((2, 3, L), bool)
    padding[1, 2, 4:] = True
    mask = normal(L, L, dtype=F32)
    kept = [array.copy() for array in (x, padding, mask)]
    for m in models(placement="post"):
        y = m(x, mask, padding)
        dx = m.backward(y)
        assert y.shape == dx.shape == x.shape
        flat = m(x.reshape(6, L, D), mask, padding.reshape(6, L))
        assert_same_bits(flat.reshape(y.shape), y)
        swapped = np.asfortranarray(x)
        assert_same_bits(m(swapped, mask, padding), y)
        np.testing.assert_allclose(m(x[1, 2], mask, padding[1, 2]), y[1, 2], rtol=0, atol=1e-5)
        for shape in ((0, L, D), (2, 0, D)):
            m.zero_grad()
            none = m(np.zeros(shape, F32))
            assert none.shape == m.backward(none).shape == shape
            assert not any(g.any() for g in m.grad.values())
    for array, before in zip((x, padding, mask), kept):
        assert_same_bits(array, before)


def test_where_nothing_is_seen_attention_adds_nothing() -> None:
    m = fn.nn.TransformerBlock(D, HEADS, rng=0)
    x = normal(2, L, D, dtype=F32)
    padding = np.zeros((2, L), bool)
    padding[1] = True
    y = m(x, src_key_padding_mask=padding)
    assert np.isfinite(y).all()
    assert np.isfinite(m.backward(y)).all()
    m.parameters()["self_attn.out_proj.weight"][...] = 0  # what is left is x
    assert_same_bits(y[1], m(x)[1])


def test_nan_stays_in_its_sample() -> None:
    m = fn.nn.TransformerBlock(D, HEADS, rng=0)
    x = normal(3, L, D, dtype=F32)
    x[1, 2, 3] = np.nan
    y = m(x)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: fn.nn.TransformerBlock(10, 3), "num_heads is 3, expected a divisor of d_model"),
        (lambda: fn.nn.TransformerBlock(0, 1), "d_model is 0"),
        (lambda: fn.nn.TransformerBlock(8, 2, placement="mid"), "placement is 'mid', expected"),  # type: ignore[arg-type]
        (lambda: fn.nn.TransformerBlock(8, 2, norm="batch"), "norm is 'batch', expected"),  # type: ignore[arg-type]
        (lambda: fn.nn.TransformerBlock(8, 2, activation="tanh"), "activation is 'tanh', expected"),
        (lambda: fn.nn.TransformerBlock(8, 2, eps=-1.0), "eps is -1.0"),
        (lambda: fn.nn.TransformerEncoder(0, 8, 2), "num_layers is 0"),
        (lambda: fn.nn.Adam({}, betas=(0.9, 1.0)), "betas is"),
        (lambda: fn.nn.linear(np.zeros(3), np.zeros((3, 2))), "write weight.T"),
        (lambda: fn.nn.attention(*map(np.zeros, [(2, 3), (2, 4), (2, 4)])), "attention got"),
        (lambda: fn.nn.cross_entropy(np.zeros((2, 3)), np.zeros(2)), "integers of shape"),
        (lambda: fn.nn.activation_backward(np.ones(1), np.ones(1), np.ones(1), "tanh"), "'tanh'"),
        (lambda: fn.nn.activate(np.ones(1), "tanh"), "'tanh'"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_what_cannot_be(make: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()


def test_calls_that_do_not_fit() -> None:
    for m in models():
        x = normal(N, L, D, dtype=F32)
        with pytest.raises(RuntimeError, match="no call to go back through"):
            m.backward(x)
        with pytest.raises(ValueError, match=r"expected \(\.\.\., L, 24\)"):
            m(x[..., :8])
        with pytest.raises(ValueError, match=r"mask has shape \(3, 3\), expected \(7, 7\)"):
            m(x, np.zeros((3, 3)))
        with pytest.raises(ValueError, match=r"src_key_padding_mask has shape \(7, 3\)"):
            m(x, src_key_padding_mask=PADDING.T)
        with pytest.raises(TypeError, match="mask has dtype int64, expected booleans"):
            m(x, np.zeros((L, L), int))
        m(x)
        with pytest.raises(ValueError, match="dy has shape"):
            m.backward(x[:1])
        with pytest.raises(ValueError, match="misses"):
            m.load_state_dict({})
    with pytest.raises(TypeError, match="mask has dtype bool"):
        fn.nn.attention(x, x, x, np.zeros((L, L), bool))


# --- The parts ------------------------------------------------------------------------------------


def test_softmax() -> None:
    x = 50 * normal(4, 6, 33)
    x[0, 0] = -np.inf
    x[1, 1, 3:] = -np.inf
    x[2, 2] += 1e4  # would overflow
    before = x.copy()
    y = fn.nn.softmax(x)
    assert_same_bits(x, before)
    wide = x.astype(np.longdouble)
    wide[0, 0] = 0
    right = np.exp(wide - wide.max(-1, keepdims=True))
    right /= right.sum(-1, keepdims=True)
    right[0, 0] = 0
    # the rounding of x - max, up to 200, is 1e-14 of the exponential
    np.testing.assert_allclose(y, right.astype(float), rtol=1e-13, atol=1e-300)
    assert fn.nn.softmax(x, out=x) is x
    assert_same_bits(x, y)


def test_attention_with_fewer_keys_than_queries(torch: Any) -> None:
    """Grouped heads by broadcasting, and a causal mask whose last query is at the last key."""
    q, k, v = normal(2, 3, 4, 5, 8), normal(2, 3, 1, 9, 8, seed=1), normal(2, 3, 1, 9, 6, seed=2)
    y, weights = fn.nn.attention(q, k, v, causal=True, scale=0.5)
    assert weights.shape == (2, 3, 4, 5, 9)
    allowed = np.tril(np.ones((5, 9), bool), 4)
    assert (weights[..., ~allowed] == 0).all()
    right = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(np.broadcast_to(a, (2, 3, 4, *a.shape[-2:])).copy()) for a in (q, k, v)),
        attn_mask=torch.from_numpy(allowed), scale=0.5,
    )  # fmt: skip
    np.testing.assert_allclose(y, right.numpy(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@dtypes
def test_activations_like_pytorch(activation: Any, dtype: Any, torch: Any) -> None:
    """With a bias, in place, and far out where the formulas meet 0, 1 and infinity."""
    rows = np.concatenate([np.linspace(-12, 12, 400), [0.0, 1e-30, -1e-30, 60, -60, 1e20, -1e20]])
    x, bias = np.tile(rows, (3, 1)).astype(dtype), np.zeros(len(rows), dtype)
    bias[:400] = np.random.default_rng(0).standard_normal(400)
    moved = x + bias
    tensor = torch.from_numpy(moved).requires_grad_()
    f, options = torch.nn.functional, {}
    if activation == "gelu_tanh":
        options = {"approximate": "tanh"}
    theirs = getattr(f, activation.removesuffix("_tanh"))(tensor, **options)
    theirs.sum().backward()
    y = fn.nn.activate(x, activation, bias)
    assert fn.nn.activate(x, activation, bias, out=x) is x
    assert_same_bits(x, y)
    dx = fn.nn.activation_backward(np.ones_like(y), moved, y, activation)
    # some roundings of numbers of order x, and of 1
    unit = 8 * np.finfo(dtype).eps
    np.testing.assert_allclose(y, theirs.detach().numpy(), rtol=unit, atol=unit)
    right = tensor.grad.numpy()
    fine = abs(moved) < 1e19  # PyTorch's gelu_tanh has NaN beyond
    np.testing.assert_allclose(dx[fine], right[fine], rtol=4 * unit, atol=4 * unit)
    passed = (moved > 0) & (activation != "relu6")
    np.testing.assert_array_equal(dx[~fine], passed[~fine])


def test_cross_entropy_like_pytorch(torch: Any) -> None:
    scores, right = 30 * normal(5, 4, 11), np.random.default_rng(0).integers(11, size=(5, 4))
    scores[0, 0, right[0, 0]] = -2000  # p is 0, its logarithm is not
    tensor = torch.from_numpy(scores).requires_grad_()
    theirs = torch.nn.functional.cross_entropy(
        tensor.reshape(-1, 11), torch.from_numpy(right).reshape(-1)
    )
    theirs.backward()
    loss, gradient = fn.nn.cross_entropy(scores, right)
    assert loss == pytest.approx(theirs.item(), rel=1e-13)
    np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=0, atol=1e-15)


def test_adam_like_pytorch(torch: Any) -> None:
    ours = {"a": normal(3, 4), "b": normal(5, seed=1)}
    theirs = [torch.from_numpy(p.copy()).requires_grad_() for p in ours.values()]
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6}
    adam, other = fn.nn.Adam(ours, **options), torch.optim.Adam(theirs, **options)
    for step in range(5):
        gradients = {name: normal(*p.shape, seed=10 + step) for name, p in ours.items()}
        adam.lr = other.param_groups[0]["lr"] = 0.01 * (step + 1)
        for tensor, gradient in zip(theirs, gradients.values()):
            tensor.grad = torch.from_numpy(gradient)
        adam.step(gradients)
        other.step()
    for p, tensor in zip(ours.values(), theirs):
        np.testing.assert_allclose(p, tensor.detach().numpy(), rtol=0, atol=1e-14)
    with pytest.raises(KeyError, match="b"):
        adam.step({"a": ours["a"]})


def test_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], torch: Any
) -> None:
    """In small: it compares the answers, and prints a ratio for each row."""
    from benchmarks import transformer as benchmark

    small = {"LAYERS": 2, "WIDTH": 16, "HEADS": 2, "SHAPE": (2, 3, 16), "TURN": 0.01}
    for name, value in small.items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(benchmark, "FIRST", dict.fromkeys(("fastnorm", "torch"), "pass"))
    monkeypatch.setattr(sys, "argv", ["transformer", "--short"])  # which keeps nothing
    before = torch.get_num_threads()
    benchmark.main()
    torch.set_num_threads(before)
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if " ms " in line]
    assert len(rows) == 3
    assert all(float(ratio) > 0 for *_, ratio, _ in rows)


def test_nothing_warns() -> None:
    """Overflow on the way forth and back, in the steps of Adam too."""
    for m in models():
        x = normal(N, L, D, dtype=F32)
        for name, p in m.parameters().items():
            if "linear" in name:
                p *= F32.type(1e30)
        y = m(x)
        assert not np.isfinite(y).all()
        m.backward(y)
        fn.nn.Adam(m.parameters()).step(m.grad)
