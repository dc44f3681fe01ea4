"""Any argument of any function, module, method and command, given what it cannot be, as drawn.

`test_arguments.py` goes through a table of values; here they are drawn from all that is of the
wrong kind. Whatever is refused is refused by the argument's name, without a warning, and nothing
has changed then.
"""

from __future__ import annotations

import argparse
import inspect
import string
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastnorm as fn
from fastnorm import cli
from fastnorm.arguments import ACTIVATIONS

from .helpers import F32, assert_same_bits, data
from .test_arguments import NOT_ARRAYS, NOT_FINITE, NOT_INTEGERS, NOT_NUMBERS, RIGHT, X, signature

# --- What is wrong --------------------------------------------------------------------------------

words = st.text(string.ascii_letters + string.punctuation + " ", max_size=6)
objects = st.sampled_from([object(), {}, {"a": 1}, print, np, slice(2), np.ones((2, 2)), X, b"1"])
small = st.integers(-20, 20)
fractions = st.floats().filter(lambda v: not isinstance(v, int))

no_integer = st.one_of(
    st.sampled_from(NOT_INTEGERS), words, objects, fractions, st.booleans(), st.complex_numbers()
)
no_count = st.one_of(no_integer, st.none(), st.integers(max_value=0), st.tuples(small, small))
no_number = st.one_of(
    st.sampled_from([*NOT_NUMBERS, *NOT_FINITE]),
    words,
    objects,
    st.booleans(),
    st.complex_numbers(),
    st.binary(max_size=3),
    st.lists(st.floats(), max_size=2),
)
above = st.floats(1, exclude_min=True)
below = st.floats(max_value=0, exclude_max=True)
negative = st.one_of(no_number, st.none(), below)
no_share = st.one_of(no_number, above, below)
no_flag = st.one_of(
    st.none(), words, objects, fractions.filter(lambda v: v not in (0, 1)),
    st.integers().filter(lambda v: v not in (0, 1)), st.lists(st.booleans(), max_size=2),
)  # fmt: skip
no_axis = st.one_of(
    no_integer,
    st.integers(4),
    st.integers(max_value=-5),
    st.tuples(small, fractions),
    st.integers(-4, 3).map(lambda a: (a, a)),
    st.integers(0, 3).map(lambda a: (a, a - 4)),
    st.sets(small),
)
no_array = st.one_of(
    st.sampled_from(NOT_ARRAYS), words, st.complex_numbers(), st.dictionaries(words, small),
    st.binary(max_size=3), st.sampled_from([object(), print, np]),
)  # fmt: skip


def not_of(*choices: str) -> st.SearchStrategy[Any]:
    misspelt = st.sampled_from(choices).map(str.capitalize)
    return st.one_of(words, misspelt, st.none(), small, objects).filter(
        lambda v: not (isinstance(v, str) and v in choices)
    )


no_dtype = st.sampled_from(["flaot32", 5, "i4", "c8", object, 1.5, [], X, "float8_e5m2", "M8[s]"])

# By the argument's name; those of arrays are in test_arguments.py, with what fits them.
WRONG: dict[str, st.SearchStrategy[Any]] = {
    "eps": negative,
    "momentum": no_share,
    "weight_offset": st.one_of(no_number, st.none()),
    "beta": st.one_of(no_number, st.none()),
    "k": st.one_of(no_number, st.none()),
    "ddof": st.one_of(no_number, st.none()),
    "lr": negative,
    "scale": no_number,
    "betas": st.one_of(
        no_number.filter(lambda v: not isinstance(v, list)),
        st.tuples(st.floats(0, 0.9), above),
        st.tuples(below, below),
    ),
    "training": no_flag,
    "use_input_stats": no_flag,
    "return_stats": no_flag,
    "keepdims": no_flag,
    "affine": no_flag,
    "elementwise_affine": no_flag,
    "track_running_stats": no_flag,
    "causal": no_flag,
    "mode": no_flag,
    "strict": no_flag,
    "channel_axis": st.one_of(no_integer, st.none(), st.tuples(small)),
    "axis": no_axis,
    "num_groups": no_count,
    "size": no_count,
    "num_features": no_count,
    "num_channels": no_count,
    "num_layers": no_count,
    "d_model": no_count,
    "num_heads": no_count,
    "ignore_index": st.one_of(no_integer, st.none()),
    "normalized_shape": st.one_of(
        no_integer, st.none(), st.integers(max_value=0), st.just(()), st.tuples(small, fractions)
    ),
    "activation": not_of(*ACTIVATIONS).filter(lambda v: v is not None),
    "placement": not_of("pre", "post", "peri", "deepnorm"),
    "norm": not_of("layer", "rms"),
    "dtype": no_dtype,
    "rng": st.one_of(words, fractions, st.integers(max_value=-1), st.just(print)),
}


def refused(call: Callable[[], Any], argument: str) -> None:
    """Assert that a call is refused, in words that name the argument and what was expected."""
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        with pytest.raises((ValueError, TypeError)) as caught:
            call()
    said = str(caught.value)
    assert argument in said
    assert any(word in said for word in ("expected", "use", "write", "divide")), said
    assert len(said) <= 600


# --- Functions ------------------------------------------------------------------------------------

OPTIONS = [(name, a) for name in RIGHT for a in signature(name) if a in WRONG]


@settings(max_examples=400)
@given(st.data())
def test_options_of_functions(draw: st.DataObject) -> None:
    name, argument = draw.draw(st.sampled_from(OPTIONS))
    kind = argument
    if argument == "alpha":
        kind = "beta"
    value = draw.draw(WRONG[kind])
    right = RIGHT[name]
    if value is None and argument == "eps" and "rms" in name:
        return  # what is usual there
    given_ = {k: v for k, v in right.items() if not (argument == "axis" and k[-6:] == "_shape")}
    refused(lambda: getattr(fn, name)(**given_ | {argument: value}), argument)


ROWS = data((2, 3))
LAYERS: dict[str, dict[str, Any]] = {
    "linear": {"x": ROWS, "weight": data((4, 3)), "bias": np.ones(4)},
    "softmax": {"x": ROWS},
    "softmax_backward": {"dy": ROWS, "y": ROWS},
    "attention": {"query": ROWS, "key": ROWS, "value": ROWS, "mask": np.zeros((2, 2))},
    "attention_backward": {
        "dy": ROWS, "query": ROWS, "key": ROWS, "value": ROWS, "weights": np.ones((2, 2))
    },
    "activate": {"x": ROWS, "activation": "relu", "bias": np.ones(3)},
    "activation_backward": {"dy": ROWS, "x": ROWS, "y": ROWS, "activation": "relu"},
    "cross_entropy": {"scores": ROWS, "target": np.array([0, 2])},
}  # fmt: skip
no_out = st.one_of(
    st.sampled_from([np.empty((9, 9)), np.empty((2, 3), int), [1.0], np.ma.array(ROWS)]),
    words,
    small,
)


def test_every_layer_is_here() -> None:
    functions = {n for n in fn.nn.__all__ if inspect.isfunction(getattr(fn.nn, n))}
    assert functions == {*LAYERS, "recalibrate"}
    classes = {n for n in fn.nn.__all__ if inspect.isclass(getattr(fn.nn, n))}
    assert classes - {"Module", "LoadedState"} == {name.partition(" ")[0] for name in MODULES}


@settings(max_examples=300)
@given(st.data())
def test_arguments_of_layers(draw: st.DataObject) -> None:
    name = draw.draw(st.sampled_from(list(LAYERS)))
    right = LAYERS[name]
    argument = draw.draw(st.sampled_from(list(inspect.signature(getattr(fn.nn, name)).parameters)))
    if argument == "out" or (argument, name) == ("weights", "attention"):
        wrong = no_out
    else:
        wrong = WRONG.get(argument, no_array)
    value = draw.draw(wrong)
    before = {k: part.copy() for k, part in right.items() if isinstance(part, np.ndarray)}
    refused(lambda: getattr(fn.nn, name)(**right | {argument: value}), argument)
    for key, part in before.items():
        assert_same_bits(right[key], part)


# --- Modules --------------------------------------------------------------------------------------

MODULES: dict[str, dict[str, Any]] = {
    **{f"BatchNorm{d}": {"num_features": 4} for d in ("", "1d", "2d", "3d")},
    **{f"InstanceNorm{d}": {"num_features": 4} for d in ("", "1d", "2d", "3d")},
    "GroupNorm": {"num_groups": 2, "num_channels": 4},
    "LayerNorm": {"normalized_shape": 3},
    "RMSNorm": {"normalized_shape": 3},
    "TransformerBlock": {"d_model": 8, "num_heads": 2},
    "TransformerEncoder": {"num_layers": 1, "d_model": 8, "num_heads": 2},
    "Adam": {"parameters": {"w": np.ones(3)}},
}
OF_MODULES: dict[str, st.SearchStrategy[Any]] = {
    **WRONG,
    "bias": no_flag,
    "dim_feedforward": no_count.filter(lambda v: v is not None),
    "final_norm": no_flag.filter(lambda v: v is not None),
    "num_heads": st.one_of(no_count, st.sampled_from([3, 16])),
    "parameters": st.sampled_from([None, 1, [ROWS], ROWS, {"w": [1.0]}, {"w": np.ones(3, int)}]),
}


@settings(max_examples=500)
@given(st.data())
def test_arguments_of_modules(draw: st.DataObject) -> None:
    name = draw.draw(st.sampled_from(list(MODULES)))
    known = [a for a in inspect.signature(getattr(fn.nn, name)).parameters if a != "comm"]
    argument = draw.draw(st.sampled_from(known))
    value = draw.draw(OF_MODULES[argument])
    if value is None and (argument == "momentum" or (argument, name) == ("eps", "RMSNorm")):
        return  # what has a meaning there
    refused(lambda: getattr(fn.nn, name)(**MODULES[name] | {argument: value}), argument)


@settings(max_examples=150)
@given(st.data())
def test_calls_of_modules(draw: st.DataObject) -> None:
    """Neither parameters nor running statistics have changed, and the last call is still there."""
    m, x = draw.draw(
        st.sampled_from(
            [
                (fn.nn.BatchNorm(3), data((4, 3), F32)),
                (fn.nn.InstanceNorm(3, track_running_stats=True), data((2, 3, 4), F32)),
                (fn.nn.GroupNorm(3, 6), data((2, 6, 2), F32)),
                (fn.nn.LayerNorm((3, 4)), data((2, 3, 4), F32)),
                (fn.nn.RMSNorm(4), data((2, 4), F32)),
                (fn.nn.TransformerBlock(4, 2, rng=0), data((2, 3, 4), F32)),
            ]
        )
    )
    y = m(x)
    before = m.state_dict()
    value = draw.draw(no_array)
    what, call = draw.draw(
        st.sampled_from(
            [
                ("x", m),
                ("dy", m.backward),
                ("weight", lambda v: setattr(m, next(n for n in m.parameters()), v)),
                ("weight", lambda v: m.load_state_dict(before | dict.fromkeys(m.parameters(), v))),
                ("mode", m.train),
                ("strict", lambda v: m.load_state_dict({}, strict=v)),
            ]
        )
    )
    if not m.parameters() and what == "weight":
        return
    if what in ("mode", "strict"):
        value = draw.draw(no_flag)
    refused(lambda: call(value), what)
    assert m.training
    for key, array in m.state_dict().items():
        assert_same_bits(array, before[key])
    assert_same_bits(m.backward(y), m.backward(y))


# --- Moments --------------------------------------------------------------------------------------

no_where = st.sampled_from(["ab", X, np.ones(6), [1, 0, 1, 0, 1, 1], 1, X[:3] > 0, object()])
no_communicator = st.one_of(st.none(), small, words, st.sampled_from([X, object()]))
FIELDS = ("count", "mean", "mean_rest", "m2", "m2_rest", "exponent")
no_field = st.one_of(
    st.none(), words, small, st.floats(), st.just([[1.0], [1.0, 2.0]]),
    st.lists(st.floats()).filter(lambda numbers: len(numbers) != X.shape[1]),
    st.just({}), st.just([["a", "b", "c"]]),
)  # fmt: skip

METHODS: dict[str, tuple[Callable[[fn.Moments, Any], Any], str, st.SearchStrategy[Any]]] = {
    "Moments": (lambda m, v: fn.Moments(v), "axis", no_axis.filter(lambda v: _is_no_axis(v))),
    "from_array of": (lambda m, v: fn.Moments.from_array(v), "", no_array),
    "from_array over": (lambda m, v: fn.Moments.from_array(X, v), "axis", no_axis),
    "from_array where": (lambda m, v: fn.Moments.from_array(X, where=v), "where", no_where),
    "update": (lambda m, v: m.update(v), "batch", no_array),
    "update where": (lambda m, v: m.update(X, v), "where", no_where),
    "merge": (lambda m, v: m.merge(v), "Moments.merge", st.one_of(no_array, small)),
    "var": (lambda m, v: m.var(v), "ddof", WRONG["ddof"]),
    "std": (lambda m, v: m.std(v), "ddof", WRONG["ddof"]),
    "allreduce": (lambda m, v: m.allreduce(v), "comm", no_communicator),
    "from_dict": (lambda m, v: fn.Moments.from_dict(v), "from_dict", st.one_of(no_array, small)),
    **{
        f"from_dict {name}": (
            lambda m, v, name=name: fn.Moments.from_dict(m.to_dict() | {name: v}),
            "",
            no_field,
        )
        for name in FIELDS
    },
}


def _is_no_axis(value: Any) -> bool:
    """Whether it is wrong before there is any data: how many axes there are is not known then."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return not whole and not (isinstance(value, tuple) and len(set(value)) == len(value) == 2)


@settings(max_examples=400)
@given(st.data())
def test_methods_of_moments(draw: st.DataObject) -> None:
    name = draw.draw(st.sampled_from(list(METHODS)))
    call, argument, wrong = METHODS[name]
    m = fn.Moments((0, 2, 3)).update(X)
    before = m.copy()
    value = draw.draw(wrong)
    if name == "Moments" and isinstance(value, tuple) and not _is_no_axis(value):
        return
    refused(lambda: call(m, value), argument)
    assert m == before


# --- The command line -----------------------------------------------------------------------------

letters = st.text(string.ascii_letters, max_size=5).filter(
    lambda text: text.lower() not in ("nan", "inf", "infinity")
)
no_whole = st.one_of(
    st.sampled_from(["0", "-1", "1.5", "two", "", " ", "1e3", "²", "1_0", "+1", "9" * 20, "0x1"]),
    letters,
    st.integers(max_value=0).map(str),
    st.floats().map(str),
)
no_real = st.one_of(st.sampled_from(["1,5", "", "1 2", "0x10", "1e", "--"]), letters)
no_file = st.sampled_from(["p.txt", "p", "nowhere/p.png", ".", "", "p.png.gz", "/proc/x/y.png"])


def none_of(*choices: str) -> st.SearchStrategy[str]:
    misspelt = st.sampled_from(choices).map(str.swapcase)
    return st.one_of(letters, misspelt, st.just("")).filter(lambda text: text not in choices)


# Of each option: what it does not take. The rest are switches, or names of what is asked of a file.
OF_OPTIONS: dict[tuple[str, str], st.SearchStrategy[str]] = {
    ("demo", "--output"): st.sampled_from([".", "nowhere/p.png", ""]),
    ("demo", "--threads"): no_whole,
    ("placement", "--part"): none_of("gradient", "residual", "training"),
    ("placement", "--depths"): st.one_of(no_whole, no_whole.map(lambda text: f"2,{text}")),
    ("placement", "--seeds"): no_whole,
    ("placement", "--plot"): no_file,
    ("stats", "--axis"): st.sampled_from(["", "x", "0,0", "1.5", "0,,1", "0;1", "0,"]),
    ("stats", "--mode"): none_of("L", "RGB", "RGBA", "CMYK", "LA", "I", "F", "P", "1", "HSV"),
    ("stats", "--scale"): st.one_of(no_real, st.sampled_from(["0", "-1", "nan", "inf", "-0.0"])),
    ("stats", "--nodata"): no_real,
    ("stats", "--max-pixels"): no_whole,
    ("stats", "--by"): none_of("folder"),
    ("stats", "--workers"): st.one_of(no_whole, st.just("100000")),
    ("stats", "--plot"): no_file,
    ("bench", "--threads"): st.one_of(no_whole, no_whole.map(lambda text: f"2,{text}")),
    ("bench", "--peers"): none_of("torch", "jax", "onnxruntime", "numpy", "none", "compile"),
    ("bench", "--load"): no_whole,
    ("bench", "--seconds"): st.one_of(no_real, st.sampled_from(["0", "-1", "61", "nan", "inf"])),
    ("bench", "--rounds"): no_whole,
    ("bench", "--num-groups"): no_whole,
    ("bench", "--layout"): none_of("channels-first", "channels-last"),
    ("bench", "--dtype"): none_of("float16", "bfloat16", "float32", "float64"),
    ("bench", "--activation"): none_of(*ACTIVATIONS),
    ("bench", "--axis"): st.one_of(letters, st.sampled_from(["", "1.5", "0,1"])),
    ("bench", "--plot"): no_file,
}


def options() -> dict[tuple[str, str], argparse.Action]:
    """Every option with a value of every command, as the parser has them; hidden ones too."""
    (commands,) = (
        action
        for action in cli._parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return {
        (command, action.option_strings[-1]): action
        for command, parser in commands.choices.items()
        for action in parser._actions
        if action.option_strings and action.nargs != 0
    }


def test_every_option_is_here() -> None:
    """But those that take any text: names, which are looked for in files or elsewhere."""
    checked = {
        key
        for key, action in options().items()
        if action.help != argparse.SUPPRESS and (action.type or action.choices)
    }
    assert checked <= OF_OPTIONS.keys()
    assert OF_OPTIONS.keys() <= options().keys()


@settings(max_examples=300)
@given(st.data())
def test_options_of_commands(draw: st.DataObject) -> None:
    """Exit code 2 before any work, nothing on stdout, and the option's name on stderr."""
    command, option = draw.draw(st.sampled_from(list(OF_OPTIONS)))
    value = draw.draw(OF_OPTIONS[command, option])
    rest = {"stats": ["no such folder"], "bench": ["layer_norm 8x768"]}.get(command, [])
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr(
            argparse.ArgumentParser, "_print_message", lambda _, m, f=None: said.append(m)
        )
        patch.setattr("builtins.print", lambda *parts, **_: pytest.fail(f"printed {parts}"))
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, f"{option}={value}", *rest])
    assert stopped.value.code == 2
    text = "".join(map(str, said))
    assert f"argument {option}" in text.replace("argument -h", ""), text
    assert len(text.splitlines()[-1]) <= 400
