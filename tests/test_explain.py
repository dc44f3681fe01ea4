"""What is said of how a call would be carried out."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import cli, machine, runtime
from fastnorm.operations import OPERATIONS

from .helpers import BF16, F16, F32, F64, named

WITHOUT_KERNELS = ("local_response_norm",)


def found(call: Any, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
    passes = fn.explain(call, *args, mode="dicts", **kwargs)
    assert passes is not None
    return passes


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=named)
@pytest.mark.parametrize("op", OPERATIONS, ids=named)
def test_every_operation_can_be_explained(op: Any, dtype: Any) -> None:
    own = {"batch_norm (training)": "(training)", "layer_norm (axis)": "(axis)"}
    shape = "4x8x5x6" if op.min_ndim > 1 else "6x8"
    call = f"{op.name} {shape} {dtype.name} {own.get(op.label, '')}"
    passes = found(call)
    assert bool(passes) is (op.name not in WITHOUT_KERNELS)
    if op.backward:
        passes = found(call + " backward")
        assert passes
        assert all(each["backward"] for each in passes)
    json.dumps(passes)


def test_nothing_is_computed_and_no_array_is_changed() -> None:
    x = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
    mean, var, out = np.zeros(3), np.ones(3), np.zeros_like(x)
    before = x.copy()
    found(fn.batch_norm, x, mean, var, training=True, out=out)
    assert np.array_equal(x, before)
    assert not mean.any()
    assert not out.any()
    assert np.array_equal(var, np.ones(3))
    assert fn.get_backend() != "recorder"
    assert np.array_equal(fn.batch_norm(x, mean, var), x / np.sqrt(np.float32(1 + 1e-5)))


def test_arrays_are_explained_as_they_lie() -> None:
    whole = np.zeros((64, 40, 96), np.float32)
    assert found(fn.layer_norm, whole, 96) == found("layer_norm 64x40x96")
    turned = whole[::-1, :, ::-1]
    assert turned.strides[0] < 0
    assert [each["path"] for each in found(fn.layer_norm, turned, 96)]
    last = np.moveaxis(np.zeros((8, 32, 32, 256), BF16), -1, 1)
    assert found(fn.group_norm, last, 32) == found("group_norm 8x256x32x32 channels-last bfloat16")


def test_another_machine() -> None:
    call = "layer_norm 4096x768"
    assert found(call, machine="laptop")[0]["stores"] == "non-temporal"
    assert found(call, machine="zen5")[0]["stores"] == "usual"
    assert found(call, machine="sapphire-rapids,l3=8M")[0]["stores"] == "non-temporal"
    here = machine.here
    with runtime.on_machine(machine.MODELS["zen5"]):
        assert found(call) == found(call, machine="zen5")
    assert machine.here == here


def test_bits_do_not_depend_on_it() -> None:
    x = np.random.default_rng(0).normal(size=(300, 768)).astype(np.float32)
    right = fn.layer_norm(x, 768)
    for other in machine.MODELS.values():
        with runtime.on_machine(other):
            assert np.array_equal(fn.layer_norm(x, 768), right)


def test_threads() -> None:
    call = "layer_norm 4096x768"
    assert [found(call, threads=n)[0]["threads"] for n in (1, 2, 8)] == [1, 2, 8]
    assert found("layer_norm 8x768", threads=8)[0]["sharing"] == "alone"
    with pytest.raises(ValueError, match="num_threads is 0"):
        fn.explain(call, threads=0)


def test_groups_that_do_not_stay_in_cache_are_read_twice() -> None:
    call = "group_norm 2x128x192x192 channels-last"
    (large,) = found(call, machine="zen5", threads=2)
    (small,) = found("group_norm 8x128x64x64 channels-last", machine="laptop", threads=2)
    assert large["share of a copy"] == 0.67
    assert large["bytes"] == 3 * 4 * 2 * 128 * 192 * 192
    assert small["share of a copy"] == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("layer_norm", "no shape"),
        ("layer_nrom 4x8", "did you mean 'layer_norm'"),
        ("layer_norm 4x8 --dtype", "needs a value"),
        ("layer_norm 4x8 --dtype float31", "did you mean 'float32'"),
        ("group_norm 4x8x4 --num-groups many", "whole number"),
        ("group_norm 4x8x4 --num-groups=3", "expected a divisor"),
        ("layer_norm '4x8", "cannot be read"),
        ("", "a function and a shape"),
    ],
)
def test_what_cannot_be_explained(call: str, words: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match=words):
        fn.explain(call)
    assert cli.main(["info", "--explain", call]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err


def test_wrong_modes_and_machines() -> None:
    with pytest.raises(ValueError, match="'dicts'"):
        fn.explain("layer_norm 4x8", mode="dict")
    with pytest.raises(ValueError, match="is no model"):
        fn.explain("layer_norm 4x8", machine="zen")


def test_the_command_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    call = "group_norm 8x256x32x32 channels-last bfloat16"
    fn.explain(call, machine="zen5")
    expected = capsys.readouterr()
    assert expected.out.startswith(
        "machine   L1 48 kB, L2 1 MB, L3 32 MB for 8 cores\nwalk      strid"
    )
    assert cli.main(["info", "--explain", call, "--machine", "zen5"]) == 0
    assert capsys.readouterr() == expected
    assert cli.main(["info", "--explain", call, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found(call)
    assert cli.main(["info", "--machine", "zen5"]) == 2
    assert "--explain" in capsys.readouterr().err


def test_several_passes_and_none(capsys: pytest.CaptureFixture[str]) -> None:
    fn.explain("global_response_norm 8x64x32x32", machine="aarch64-cloud")
    out = capsys.readouterr().out
    assert "pass      1 of 2\n" in out
    assert "32 MB, as is assumed" in out
    fn.explain("local_response_norm 8x64x32x32")
    assert "no kernel is asked" in capsys.readouterr().out
