"""What came in as an array: masks, other libraries' arrays, subclasses, and what is no array."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastnorm as fn
from fastnorm.operations import OPERATIONS

from .helpers import BACKENDS, BF16, F32, assert_same_bits, data, layouts

SHAPE = (3, 4, 5)

# Functions that take statistics: of an x with a mask, and what says the same with `where`.
WITH_WHERE: dict[str, Callable[..., Any]] = {
    "batch_norm": lambda x, **o: fn.batch_norm(x, training=True, **o),
    "instance_norm": lambda x, **o: fn.instance_norm(x, **o),
    "group_norm": lambda x, **o: fn.group_norm(x, 2, **o),
    "layer_norm": lambda x, **o: fn.layer_norm(x, 5, **o),
    "rms_norm": lambda x, **o: fn.rms_norm(x, axis=1, **o),
}


def masked(rng: Any, shape: tuple[int, ...] = SHAPE, dtype: Any = F32) -> Any:
    """Numbers of which a third is hidden: under the mask lies what would be seen in any result."""
    hidden = rng.random(shape) < 0.3
    hidden[..., :2] = False  # every group keeps two
    return np.ma.array(np.where(hidden, 1e4, rng.standard_normal(shape)).astype(dtype), mask=hidden)


# --- Masks ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", WITH_WHERE)
def test_a_mask_is_a_where(name: str) -> None:
    rng = np.random.default_rng(0)
    for dtype in (F32, BF16):
        x = masked(rng, dtype=dtype)
        other = rng.random(SHAPE[1:]) < 0.8
        other[:, :2] = True
        for _ in range(3):  # the second of plain arrays is answered from the cache
            y = WITH_WHERE[name](x, return_stats=True)
            both = WITH_WHERE[name](x, where=other, return_stats=True)
            right = WITH_WHERE[name](x.data, where=~x.mask, return_stats=True)
            right_both = WITH_WHERE[name](x.data, where=~x.mask & other, return_stats=True)
            for a, b in (*zip(y, right), *zip(both, right_both)):
                assert type(a) is np.ndarray
                assert_same_bits(a, b)
        # and that is not what no mask gives
        assert not np.array_equal(y[0], WITH_WHERE[name](x.data))


def test_a_mask_that_hides_nothing_and_one_beside_a_where() -> None:
    x = data((4, 6), F32)
    for mask in (np.ma.nomask, np.zeros((4, 6), bool)):
        assert_same_bits(fn.layer_norm(np.ma.array(x, mask=mask), 6), fn.layer_norm(x, 6))
    chosen = np.ma.array(x > -9, mask=x < 0)  # of x > -9 it is not known where x is hidden
    assert_same_bits(fn.layer_norm(x, 6, where=chosen), fn.layer_norm(x, 6, where=x >= 0))


# Functions of statistics, and what comes back of each besides arrays: (of x and where, gradients).
PATHS: dict[str, Callable[..., Any]] = {
    **WITH_WHERE,
    "channels last": lambda x, **o: fn.group_norm(x, 1, channel_axis=-1, **o),
    "layer_norm of two axes": lambda x, **o: fn.layer_norm(x, axis=(2, 1), **o),
    "with what follows": lambda x, **o: fn.layer_norm(
        x, 5, np.arange(5.0), np.ones(5), residual=np.ones(SHAPE, F32), activation="relu", **o
    ),
    "moments": lambda x, **o: fn.moments(x, (0, 2), ddof=1, **o),
    "standardize": lambda x, **o: fn.standardize(x, 1, **o),
    "standardize with ddof": lambda x, **o: fn.standardize(x, ddof=1, **o),
    "Moments": lambda x, **o: fn.Moments((0, 2)).update(x, **o).var(),
    "Moments.from_array": lambda x, **o: fn.Moments.from_array(x, -1, **o).mean,
    "LayerNorm": lambda x, **o: fn.nn.LayerNorm(5)(x),
    "BatchNorm": lambda x, **o: fn.nn.BatchNorm(4)(x),
    "InstanceNorm1d": lambda x, **o: fn.nn.InstanceNorm1d(4)(x),
    "gradients": lambda x, **o: fn.layer_norm_backward(
        np.ones(SHAPE, F32), x, *fn.layer_norm(x, 5, return_stats=True, **o)[1:], 5, **o
    ),
}
OF_MODULES: dict[str, Callable[..., Any]] = {
    "LayerNorm": lambda x, **o: fn.layer_norm(x, 5, **o),
    "BatchNorm": WITH_WHERE["batch_norm"],
    "InstanceNorm1d": WITH_WHERE["instance_norm"],
}


def hide(x: Any, hidden: Any, how: str) -> tuple[Any, dict[str, Any]]:
    """An x of which this is hidden, by its own mask, by `where`, or a part by each."""
    own, other = {
        "mask": (hidden, None),
        "where": (None, hidden),
        "both": (hidden & (x > 0), hidden & (x <= 0)),
        "overlapping": (hidden, hidden & (x > 0)),
    }[how]
    where = {} if other is None else {"where": ~other}
    return (x if own is None else np.ma.array(x, mask=own)), where


# On Numba each path is compiled, for minutes; tests/fuzz draws masks there.
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "numba"])
@settings(max_examples=80)
@given(st.data())
def test_masks_on_any_path(backend: str, draw: st.DataObject) -> None:
    """Whatever hides elements, wherever they lie: statistics do not see what is under a mask."""
    name = draw.draw(st.sampled_from(list(PATHS)))
    ways = ["mask"] if name in OF_MODULES else ["mask", "where", "both", "overlapping"]
    how = draw.draw(st.sampled_from(ways))
    x = masked(np.random.default_rng(draw.draw(st.integers(0, 9))))
    hidden, plain = x.mask, x.data
    lie, lies = draw.draw(st.sampled_from(list(layouts(plain))))
    if lies.dtype.isnative is False and name == "with what follows":
        return  # a residual of another byte order than x
    given_x, where = hide(lies, hidden, how)
    function = OF_MODULES.get(name, PATHS[name])
    with fn.backend(backend):
        found, right = PATHS[name](given_x, **where), function(plain, where=~hidden)
    other = plain.copy()
    other[hidden] = 77  # statistics alone do not see it
    seen = name.lower() in ("moments", "moments.from_array")
    given_x, where = hide(other, hidden, how)
    again = PATHS[name](given_x, **where) if seen else right
    found, right, again = (v if isinstance(v, tuple) else (v,) for v in (found, right, again))
    for a, b, c in zip(found, right, again, strict=True):
        assert not np.ma.isMaskedArray(a)
        # a hundred roundings to float32, of the largest number: what was hidden is normalised too
        scale = 1.0 + abs(np.nan_to_num(np.asarray(b, np.float64))).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale, err_msg=f"{name} {lie} {how}")
        np.testing.assert_allclose(c, b, rtol=1e-13, atol=1e-13)


@settings(max_examples=40)
@given(st.data())
def test_masks_under_dask(draw: st.DataObject) -> None:
    da = pytest.importorskip("dask.array")
    name = draw.draw(st.sampled_from([n for n in PATHS if n not in (*OF_MODULES, "gradients")]))
    how = draw.draw(st.sampled_from(["mask", "where", "both", "overlapping"]))
    x = masked(np.random.default_rng(draw.draw(st.integers(0, 9))))
    given_x, where = hide(x.data, x.mask, how)
    chunks = tuple(draw.draw(st.integers(1, n)) for n in SHAPE)
    lazy = da.from_array(given_x, chunks=chunks)
    if where and draw.draw(st.booleans()):
        where = {"where": da.from_array(where["where"], chunks=2)}
    found, right = PATHS[name](lazy, **where), PATHS[name](x.data, where=~x.mask)
    found, right = (v if isinstance(v, tuple) else (v,) for v in (found, right))
    for a, b in zip(found, right, strict=True):
        computed = a.compute() if hasattr(a, "compute") else a
        assert not np.ma.isMaskedArray(computed)
        scale = 1.0 + abs(np.asarray(b, np.float64)).max()
        np.testing.assert_allclose(computed, b, rtol=0, atol=1e-5 * scale)


def test_masks_in_a_list() -> None:
    x = masked(np.random.default_rng(1), (3, 5))
    assert_same_bits(fn.layer_norm(list(x), 5), fn.layer_norm(x, 5))
    with pytest.raises(ValueError, match="weight is a masked array"):
        fn.layer_norm(x.data, 5, [np.ma.masked, 1.0, 1.0, 1.0, 1.0])


def test_masks_in_the_norms_beside_the_five() -> None:
    rng = np.random.default_rng(2)
    x = masked(rng, (3, 4, 6), np.float64)
    seen = x.filled(0.0)  # what is hidden counts as nothing in sums of squares
    length = np.sqrt((seen**2).sum(-1, keepdims=True))
    np.testing.assert_allclose(fn.l2_normalize(x), x.data / length, rtol=1e-14)
    length = np.sqrt((seen**2).sum((1, 2), keepdims=True))
    np.testing.assert_allclose(fn.weight_norm(x, np.full(3, 2.0)), 2 * x.data / length, rtol=1e-14)
    mean, std = x.mean((1, 2), keepdims=True).data, x.std((1, 2), keepdims=True).data
    exact = (x.data - mean) / std
    np.testing.assert_allclose(fn.weight_standardize(x, eps=0.0), exact, rtol=1e-10)
    squared = sum(np.pad(seen**2, ((0, 0), (1, 1), (0, 0)))[:, i : i + 4] for i in range(3))
    exact = x.data * (1 + 0.3 / 3 * squared) ** -0.5
    got = fn.local_response_norm(x, 3, alpha=0.3, beta=0.5)
    np.testing.assert_allclose(got, exact, rtol=1e-14)
    length = np.sqrt((seen**2).sum(-1, keepdims=True))
    exact = x.data * length / length.mean(1, keepdims=True) + x.data
    got = fn.global_response_norm(x, np.ones(4), np.zeros(4), eps=0.0)
    np.testing.assert_allclose(got, exact, rtol=1e-14)
    for op in OPERATIONS:
        if op.elementwise_backward:
            function = getattr(fn, op.name)
            assert_same_bits(function(x, 0.5), function(x.data, 0.5))
    for norm in (fn.add_layer_norm, fn.add_rms_norm):
        y, total = norm(x, np.ones(x.shape), 6)
        alone = fn.layer_norm if norm is fn.add_layer_norm else fn.rms_norm
        assert_same_bits(total, x.data + 1)
        np.testing.assert_allclose(y, alone(total, 6, where=~x.mask), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["weight", "bias", "residual", "running_mean"])
def test_a_mask_that_would_be_lost_is_refused(name: str) -> None:
    x = data(SHAPE, F32)
    value = np.ma.masked_less(x if name == "residual" else np.arange(4.0), 0.5)
    given = {"running_mean": np.zeros(4), "running_var": np.ones(4)} | {name: value}
    with pytest.raises(ValueError, match=rf"{name} is a masked array that hides \d+ of its"):
        fn.batch_norm(x, **given)
    with pytest.raises(TypeError, match=r"out is a MaskedArray.*out\.data"):
        fn.batch_norm(x, training=True, out=np.ma.array(x))


# --- Other libraries' -----------------------------------------------------------------------------


class Wraps:
    """An array of some library that NumPy can read, and nothing else is known of."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.array if dtype is None else self.array.astype(dtype)


class Lends:
    """One that has no more than DLPack's methods."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def matrix(array: Any) -> Any:
    return array.view(np.matrix)


class Raises:
    """One whose attributes and conversions raise, as those of arrays elsewhere do."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise RuntimeError("somebody else's words")

    @property
    def __cuda_array_interface__(self) -> Any:
        raise RuntimeError("somebody else's words")


@pytest.mark.parametrize("kind", [Wraps, Lends, memoryview, matrix])
def test_array_likes(kind: Any) -> None:
    x, w = data((4, 6), F32), data((6,), F32, seed=2)
    right = fn.layer_norm(x, 6, w)
    weight = w if kind is matrix else kind(w)
    for _ in range(2):
        y = fn.layer_norm(kind(x), 6, weight, where=kind(np.ones((4, 6), bool)))
        assert type(y) is np.ndarray
        assert_same_bits(y, fn.layer_norm(x, 6, w, where=np.ones((4, 6), bool)))
        assert_same_bits(fn.layer_norm(kind(x), 6, weight), right)
    _, mean, rstd = fn.layer_norm(x, 6, return_stats=True)
    dx, *_ = fn.layer_norm_backward(kind(x), kind(x), mean, rstd, 6)
    assert type(dx) is np.ndarray


def test_no_copy_of_what_can_be_read_in_place() -> None:
    from fastnorm.arguments import as_array

    x = data((4, 6), F32)
    for kind in (Wraps, Lends, memoryview, matrix, np.ma.array):
        assert np.shares_memory(as_array(kind(x), "x"), x), kind


def test_conversions_that_raise_are_told_in_our_words() -> None:
    with pytest.raises(TypeError, match=r"x is a Raises .*RuntimeError: somebody else's words"):
        fn.layer_norm(Raises(), 3)
    with pytest.raises(TypeError, match="weight is a Raises"):
        fn.layer_norm(np.ones((2, 3)), 3, Raises())


def test_jax() -> None:
    jax = pytest.importorskip("jax")
    x, w = data((4, 6), F32), data((6,), F32, seed=2)
    for _ in range(2):
        y = fn.layer_norm(jax.numpy.asarray(x), 6, jax.numpy.asarray(w))
        assert type(y) is np.ndarray
        assert_same_bits(y, fn.layer_norm(x, 6, w))
    half = fn.rms_norm(jax.numpy.asarray(x, jax.numpy.bfloat16), 6)
    assert_same_bits(half, fn.rms_norm(x.astype(ml_dtypes.bfloat16), 6))
    assert fn.moments(jax.numpy.asarray(x)) == fn.moments(x)

    @jax.jit
    def traced(x: Any) -> Any:
        return fn.layer_norm(x, 6)

    with pytest.raises(TypeError, match=r"x is a .*Tracer.*cannot be read"):
        traced(x)


def test_tensors(torch: Any) -> None:
    x, w = data((4, 6), F32), data((6,), F32, seed=2)
    for of in (lambda t: t, lambda t: t.T.contiguous().T, lambda t: t.flip(0).flip(0)):
        y = fn.layer_norm(of(torch.from_numpy(x)), 6, torch.from_numpy(w))
        assert type(y) is torch.Tensor
        assert_same_bits(y.contiguous().numpy(), fn.layer_norm(x, 6, w))
        # an array makes arrays, whatever else is a tensor
        assert type(fn.layer_norm(x, 6, torch.from_numpy(w))) is np.ndarray
    half = torch.from_numpy(x).bfloat16()
    right = fn.layer_norm(x.astype(BF16), 6)
    for y in (fn.layer_norm(half, 6), fn.layer_norm(half.T, axis=0).T.contiguous()):
        assert_same_bits(y.view(torch.int16).numpy().view(BF16), right)
    # modules and accumulators are of arrays
    for norm in (fn.nn.LayerNorm(6), fn.nn.BatchNorm(6)):
        y = norm(torch.from_numpy(x))
        assert type(y) is np.ndarray
        assert_same_bits(y, norm(x))
        assert type(norm.backward(torch.from_numpy(x))) is np.ndarray
    seen = fn.Moments(0).update(torch.from_numpy(x), where=torch.ones(4, 1, dtype=torch.bool))
    assert seen == fn.Moments(0).update(x)
    needs = torch.ones(6, requires_grad=True)
    assert fn.layer_norm(needs.reshape(2, 3), 3).requires_grad
    with pytest.raises(TypeError, match=r"x is a tensor that requires a gradient.*x\.detach\(\)"):
        fn.moments(needs)
    with pytest.raises(TypeError, match=r"weight is a tensor.*weight\.detach\(\)"):
        fn.layer_norm(x, 6, needs)
    with torch.no_grad():
        assert_same_bits(fn.layer_norm(x, 6, needs), fn.layer_norm(x, 6, np.ones(6, F32)))
    with pytest.raises(TypeError, match=r"x is a tensor of layout .*x\.to_dense\(\)"):
        fn.layer_norm(torch.eye(3).to_sparse(), 3)
    with pytest.raises(TypeError, match=r"x is a tensor on the device meta.*x\.cpu\(\)"):
        fn.layer_norm(torch.ones(2, 3, device="meta"), 3)
    with pytest.raises(TypeError, match=r"x has dtype complex64"):
        fn.layer_norm(torch.ones(2, 3, dtype=torch.complex64), 3)
    with pytest.raises(TypeError, match="x is a Tensor that cannot be read"):
        fn.layer_norm(torch.ones(2, 3).to(torch.float8_e5m2), 3)


def test_sparse_arrays() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    for x in (sparse.eye(3), sparse.eye_array(3).tocsr()):
        for call in (fn.moments, lambda x: fn.layer_norm(x, 3), lambda x: fn.group_norm(x, 1)):
            with pytest.raises(TypeError, match=r"x is a .*write x\.toarray\(\)"):
                call(x)


class Foreign:
    """An array of a library that is not installed here, as far as a message asks."""

    def __init__(self, *attributes: str, **others: Any) -> None:
        self.__dict__.update(dict.fromkeys(attributes), **others)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        if "isna" in self.__dict__:  # a table in which a value is missing
            return np.array([[1.0, None], [2.0, 3.0]], object)
        raise RuntimeError("somebody else's words")


@pytest.mark.parametrize(
    ("value", "write"),
    [
        (Foreign("isna", "to_numpy"), r"to_numpy\(np\.float64, na_value=np\.nan\)"),
        (Foreign("toarray", "todense"), r"toarray\(\)"),
        (Foreign("todense"), r"todense\(\)"),
        (Foreign("to_dataarray", "to_array"), r"to_dataarray\(\)"),
        (Foreign("to_numpy", data=Foreign("todense")), r"data\.todense\(\)"),
        (Foreign("collect"), r"collect\(\)"),
    ],
)
def test_what_to_write_for_what_cannot_be_read(value: Any, write: str) -> None:
    for name, call in (
        ("x", lambda: fn.layer_norm(value, 2)),
        ("weight", lambda: fn.layer_norm(np.ones((2, 2)), 2, value)),
        ("batch", lambda: fn.Moments().update(value)),
    ):
        with pytest.raises(TypeError, match=rf"^{name} is .*; write {name}\.{write}"):
            call()


def test_a_mask_of_missing_values() -> None:
    with pytest.raises(TypeError, match=r"write where\.to_numpy\(bool, na_value=False\)"):
        fn.layer_norm(np.ones((2, 2)), 2, where=Foreign("isna"))  # type: ignore[arg-type]


# What gives 15 numbers in the rows of two dimensions, and that of one.
TABLES: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "pandas": (
        "pandas",
        lambda pandas, a: pandas.Series(a) if a.ndim == 1 else pandas.DataFrame(a),
    ),
    "xarray": ("xarray", lambda xarray, a: xarray.DataArray(a)),
    "polars": (
        "polars",
        lambda polars, a: polars.Series(a) if a.ndim == 1 else polars.DataFrame(a),
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name: str) -> None:
    module, of = TABLES[name]
    library = pytest.importorskip(module)
    x, w = data((5, 3), F32), data((3,), F32, seed=1)
    rows, row = of(library, x), of(library, w)
    for _ in range(2):
        y = fn.layer_norm(rows, 3, row, row, where=of(library, x > -9), residual=rows)
        assert type(y) is np.ndarray
        right = fn.layer_norm(x, 3, w, w, where=x > -9, residual=x)
        # the sums' order is that of memory, in which a table's columns lie together
        np.testing.assert_allclose(y, right, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(fn.moments(rows, 0), fn.moments(x, 0), rtol=1e-13)
        m = fn.nn.BatchNorm(3)
        m.load_state_dict({"running_mean": row, "running_var": row, "weight": row, "bias": row})
        np.testing.assert_allclose(m(rows), fn.nn.BatchNorm(3)(x) * w + w, rtol=1e-5, atol=1e-5)
        _, mean, rstd = fn.layer_norm(x, 3, return_stats=True)
        dx, *_ = fn.layer_norm_backward(rows, rows, of(library, mean), of(library, rstd), 3)
        assert type(dx) is np.ndarray
    with pytest.raises(TypeError, match=r"out is a .*expected a NumPy array"):
        fn.layer_norm(x, 3, out=rows)
    assert fn.moments(row) == fn.moments(w)


def test_tables_are_read_in_place() -> None:
    from fastnorm.arguments import as_array

    pandas = pytest.importorskip("pandas")
    x = data((5, 3), F32)
    frame = pandas.DataFrame(x)
    for table in (frame, frame.T, frame[[0, 1]], frame[0]):
        assert np.shares_memory(as_array(table, "x"), table.to_numpy())
    xarray = pytest.importorskip("xarray")
    for array in (xarray.DataArray(x), xarray.Variable(("a", "b"), x), xarray.DataArray(x).T):
        assert np.shares_memory(as_array(array, "x"), x)


def test_tables_that_are_no_arrays() -> None:
    pandas = pytest.importorskip("pandas")
    # NumPy's meaning, not that of pandas, which leaves it out
    assert np.isnan(fn.moments(pandas.Series([1.5, np.nan]))[0])
    missing = pandas.DataFrame({"a": pandas.array([1, None], dtype="Int64"), "b": [1.5, 2.5]})
    with pytest.raises(TypeError, match=r"write x\.to_numpy\(np\.float64, na_value=np\.nan\)"):
        fn.moments(missing)
    mean, _ = fn.moments(missing.to_numpy(np.float64, na_value=np.nan), 0, where=missing.notna())
    np.testing.assert_array_equal(mean, [1.0, 2.0])
    for words in (["a", "b"], [1.5, "a"]):
        with pytest.raises(TypeError, match=r"^x "):
            fn.moments(pandas.Series(words))
    with pytest.raises(TypeError, match=r"x has dtype datetime64"):
        fn.moments(pandas.Series(pandas.date_range("2020-01-01", periods=3)))
    xarray = pytest.importorskip("xarray")
    with pytest.raises(TypeError, match=r"write x\.to_dataarray\(\)"):
        fn.moments(xarray.Dataset({"a": ("x", np.ones(3))}))


def test_sparse_arrays_of_pydata() -> None:
    sparse = pytest.importorskip("sparse")
    x = sparse.COO.from_numpy(np.eye(3))
    with pytest.raises(TypeError, match=r"write x\.todense\(\)"):
        fn.layer_norm(x, 3)
    assert fn.moments(x.todense()) == fn.moments(np.eye(3))
    xarray = pytest.importorskip("xarray")
    with pytest.raises(TypeError, match=r"write x\.data\.todense\(\)"):
        fn.layer_norm(xarray.DataArray(x), 3)


def test_nothing_is_imported_to_look_at_an_array() -> None:
    from .helpers import run_python

    code = (
        "import sys, numpy as np, fastnorm as fn; before = set(sys.modules)\n"
        "fn.layer_norm([[1.0, 2.0]], 2); fn.layer_norm(np.ma.masked_equal([1., 2., 3.], 3), 3)\n"
        "late = {n.partition('.')[0] for n in set(sys.modules) - before}\n"
        "assert not late & {'torch', 'jax', 'ml_dtypes', 'pandas', 'scipy', 'numba', 'dask'}, late"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


# --- What is no array of numbers ------------------------------------------------------------------

NARROW = [
    name
    for name in ("float8_e5m2", "float8_e4m3fn", "float8_e3m4", "float4_e2m1fn", "int4", "uint2")
    if hasattr(ml_dtypes, name)
]


@pytest.mark.parametrize("name", NARROW)
def test_the_narrow_types_of_ml_dtypes(name: str) -> None:
    """They are as foreign as an object is; float8_e5m2 has kind "f" as floats of NumPy's have."""
    x, plain = np.ones((2, 8), getattr(ml_dtypes, name)), np.ones((2, 8), F32)
    same = np.ones((2, 8), np.float16)
    for call in (
        lambda v: fn.layer_norm(v, 8),
        lambda v: fn.layer_norm(plain, 8, v[0]),
        lambda v: fn.layer_norm(plain, 8, residual=v),
        lambda v: fn.group_norm(v, 2),
        lambda v: fn.l2_normalize(v),
        lambda v: fn.moments(v),
        lambda v: fn.layer_norm_backward(v, plain, np.ones((2, 1)), np.ones((2, 1)), 8),
    ):
        call(same)
        for _ in range(3):
            with pytest.raises(TypeError, match=f"has dtype {name}"):
                call(x)


ODD: list[tuple[str, Any]] = [
    ("ragged", [[1.0, 2.0], [3.0]]),
    ("generator", (i for i in range(3))),
    ("none", None),
    ("string", "abc"),
    ("strings", ["a", "b"]),
    ("dictionary", {"a": 1.0}),
    ("dates", np.ones(3, "M8[s]")),
    ("spans", np.ones(3, "m8[s]")),
    ("records", np.zeros(3, [("a", "f4")])),
    ("objects", np.array([1.0, None], object)),
    ("complex", np.ones(3, "c8")),
    ("long double", np.ones(3, np.longdouble)),
    ("void", np.zeros(3, "V4")),
]


@pytest.mark.parametrize("value", [v for _, v in ODD], ids=[n for n, _ in ODD])
def test_what_is_no_array_of_numbers(value: Any) -> None:
    x = np.ones((2, 3))
    for name, call in (
        ("x", lambda: fn.layer_norm(value, 3)),
        ("x", lambda: fn.moments(value)),
        ("weight", lambda: fn.layer_norm(x, 3, value)),
        ("residual", lambda: fn.layer_norm(x, 3, residual=value)),
    ):
        if value is None and name != "x":
            continue
        for _ in range(2):
            with pytest.raises(TypeError, match=f"^{name} .*expected .*; ") as caught:
                call()
            assert len(str(caught.value)) < 400


def test_sixty_four_dimensions() -> None:
    for call in (
        lambda x: fn.layer_norm(x, 1),
        lambda x: fn.group_norm(x, 1),
        lambda x: fn.moments(x),
        lambda x: fn.batch_norm(x, training=True),
        lambda x: fn.l2_normalize(x),
    ):
        with pytest.raises(ValueError, match=r"x has 6\d dimensions, expected at most 62"):
            call(np.ones((1,) * 64))
        if call is not None:
            call(np.ones((2,) + (1,) * 61))


class Quantity(np.ndarray[Any, Any]):
    """A subclass with a mind of its own."""

    def __array_ufunc__(self, *call: Any, **options: Any) -> Any:
        raise AssertionError("its arithmetic was asked")

    def reshape(self, *shape: Any, **options: Any) -> Any:
        raise AssertionError("its shape was changed")


@settings(max_examples=30)
@given(st.sampled_from([Quantity, np.matrix, np.recarray, np.memmap]), st.booleans())
def test_subclasses(kind: Any, lazily: bool) -> None:
    x = data((4, 6), F32)

    def view(a: Any) -> Any:
        return a.copy().view(kind) if kind is not np.memmap else a.copy()

    out = view(np.empty_like(x))
    given = fn.layer_norm(view(x), 6, residual=view(x), out=out if lazily else None)
    assert_same_bits(np.asarray(given), fn.layer_norm(x, 6, residual=x))
    assert given is out if lazily else type(given) is np.ndarray
    mean, var = np.zeros(6), np.ones(6)
    if kind is not np.matrix:
        mean, var = mean.view(kind), var.view(kind)
    fn.batch_norm(view(x), mean, var, training=True)
    assert np.asarray(mean).any()
