"""`fastnorm bench`: what it times, refuses and prints, and that nothing is left when it ends.

Turns are as short as can be: no time here means anything.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastnorm as fn
from benchmarks import cases as table
from fastnorm import bench, cli, processor, runtime, workers
from fastnorm import calls as written
from fastnorm._bench import machine, models, peers
from fastnorm._bench.cases import Case
from fastnorm.operations import OPERATIONS

from .helpers import ROOT, run_python

SHORT = ("--seconds", "1e-4", "--rounds", "1")
AT_HAND = [name for name in bench.USUAL if bench.missing(name) is None]
QUICK = [name for name in AT_HAND if name != "jax"]  # which compiles each case

needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="draws")
posix = pytest.mark.skipif(os.name != "posix", reason="signals and pipes as POSIX has them")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that nobody else uses."""
    monkeypatch.setattr(machine, "busy", lambda seconds=1.0: 0.0)


def refuse(text: str) -> NoReturn:
    raise AssertionError(f"{text} is no JSON")


def told(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> dict[str, Any]:
    """The JSON of a short run; nothing else was said."""
    assert cli.main(["bench", *arguments, *SHORT, "--json"]) == status
    out, err = capsys.readouterr()
    assert err == "" or status
    found: dict[str, Any] = json.loads(out, parse_constant=refuse)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said about arguments that cannot be used."""
    try:
        status: Any = cli.main(["bench", *arguments])
    except SystemExit as stopped:  # argparse's
        status = stopped.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    return err


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is timed fails."""

    def run(*arguments: Any, **options: Any) -> NoReturn:
        raise AssertionError("work was begun")

    monkeypatch.setattr(bench, "run", run)


# --- What is timed --------------------------------------------------------------------------------


def calls() -> Iterator[str]:
    """Every function, with each option that it takes."""
    for op in OPERATIONS:
        name = op.label.partition(" (")[0]
        own = {"batch_norm (training)": " --training", "layer_norm (axis)": " --axis 1"}
        call = f"{name} {'4x8x5x6' if op.min_ndim > 1 else '6x8'}{own.get(op.label, '')}"
        yield call
        yield f"{call} --dtype float64"
        if "channel_axis" in op.features or "axis" in op.label:
            yield f"{call} --layout channels-last"
        if op.backward:
            yield f"{call} --backward"
            yield f"{call} --dtype bfloat16 --backward"
        if "activation" in op.features:
            yield f"{call} --activation silu"
            yield f"{call} --activation silu --residual"
            yield f"{call} --activation gelu --residual"
            yield f"{call} --activation gelu_tanh --dtype float16"
            yield f"{call} --activation relu --residual"
            yield f"{call} --residual"
        if "out" in op.features:
            yield f"{call} --out"


@pytest.mark.parametrize("call", list(calls()))
def test_every_function_with_every_option(call: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, call, "--threads", "1", "--peers", ",".join(QUICK))
    (row,) = found["rows"]
    assert row["different"] == []
    assert row["seconds"].keys() | row["absent"].keys() == {"fastnorm", "copy", *QUICK}
    assert min(row["seconds"].values()) > 0
    assert (
        row["ratios"].keys()
        == row["difference"].keys()
        == row["seconds"].keys()
        - {
            "fastnorm",
            "copy",
        }
    )
    for reason in row["absent"].values():
        known = ("no backward", "no channels-last", "no operator", "bfloat16", "over the last axes")
        known += (
            "no error function",
            "not implemented for",
            "NOT_IMPLEMENTED",
            "new array in each call",
        )
        assert any(words in reason for words in known), reason


@pytest.mark.skipif("jax" not in AT_HAND, reason="needs JAX")
@pytest.mark.parametrize(
    "call",
    [
        "group_norm 4x8x5x6 channels-last + silu",
        "batch_norm (training) 4x8x5x6 channels-last backward",
        "local_response_norm 4x8x5x6 channels-last",
        "layer_norm (axis) 4x8x5x6 channels-last + gelu",
        "global_response_norm 4x8x5x6 channels-last float64",
        "dynamic_tanh 6x8 float16",
    ],
)
def test_jax_lays_channels_last(call: str, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = told(capsys, call, "--peers", "jax")["rows"]
    assert row["different"] == []
    assert "jax" in row["seconds"]


@pytest.mark.parametrize(
    "case",
    [*table.CASES, *table.OUT, *table.GATE, Case("group_norm", (2, 8, 4, 4), num_groups=2)],
    ids=str,
)
def test_the_name_of_a_case_is_a_call(case: Case) -> None:
    parser = cli._parser()
    assert cli._cases(parser.parse_args(["bench", str(case)])) == [case]


def test_options_stand_in_a_call_or_after_it() -> None:
    def cases(*arguments: str) -> list[Case]:
        return cli._cases(cli._parser().parse_args(["bench", *arguments]))

    inside = cases("group_norm 2x8x4x4 --num-groups 2 --layout channels-last --dtype float64")
    assert inside == [Case("group_norm", (2, 8, 4, 4), 2, True, "float64")]
    shared = ("--num-groups", "2", "--layout", "channels-last", "--dtype", "float64")
    assert cases("group_norm 2x8x4x4", *shared) == inside
    assert cases("group_norm", "2,8,4,4", *shared) == inside  # without quotes
    both = cases("group_norm 2x8x4x4 --dtype float16", "layer_norm 3x4", *shared[:2], *shared[4:])
    assert both == [
        Case("group_norm", (2, 8, 4, 4), 2, False, "float16"),
        Case("layer_norm (normalized_shape)", (3, 4), dtype="float64"),
    ]
    assert cases("group_norm 2x48x4")[0].num_groups == 16  # of 32 and 48


def test_rows_are_of_each_number_of_threads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fn.get_num_threads()
    seen = []

    def watch(case: Any, data: Any, make: Any = peers.PEERS["numpy"]) -> Any:
        library = sys.modules.get("torch")
        threads = None if library is None else library.get_num_threads()
        seen.append((fn.get_num_threads(), threads or fn.get_num_threads()))
        return make(case, data)

    monkeypatch.setitem(peers.PEERS, "numpy", watch)
    names = [name for name in ("torch", "numpy") if name in AT_HAND]
    found = told(capsys, "layer_norm 64x64", "--threads", "1,2", "--peers", ",".join(names))
    assert [row["threads"] for row in found["rows"]] == [1, 2]
    assert seen == [(1, 1), (2, 2)]
    assert fn.get_num_threads() == before
    assert "numpy uses one thread" in found["rows"][1]["notes"][-1]
    assert "cores" in found["machine"]
    assert found["method"]["rounds"] == 1


def test_settings_of_peers_are_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    jax = pytest.importorskip("jax")
    before = torch.get_num_threads(), jax.config.jax_enable_x64
    told(capsys, "rms_norm 4x8 float64", "--threads", "1", "--peers", "torch,jax")
    assert (torch.get_num_threads(), jax.config.jax_enable_x64) == before


# --- What cannot be used --------------------------------------------------------------------------

WORDS = st.text("abcxyz019-_.éß", min_size=1, max_size=8)
WRONG: dict[str, st.SearchStrategy[str]] = {
    "--num-groups": st.sampled_from(["0", "-1", "2.5", "many", "nan", "1e3"]) | WORDS,
    "--layout": st.sampled_from(["channels_last", "NHWC", "last"]) | WORDS,
    "--dtype": st.sampled_from(["float23", "bfloat61", "int8", "FLOAT32", "complex64"]) | WORDS,
    "--activation": st.sampled_from(["gleu", "SiLU", "tanh", "None"]) | WORDS,
    "--axis": st.sampled_from(["2", "0", "-2", "last"]),
    "--threads": st.sampled_from(["0", "1,", ",", "two", "1;2", "-1", "1025", "9" * 20]) | WORDS,
    "--peers": st.sampled_from(["torhc", "tensorflow", "numpy,", "jax;numpy", "NumPy"]) | WORDS,
    "--load": st.sampled_from(["0", "-1", "1.5", "1025"]),
    "--seconds": st.sampled_from(["0", "-1", "nan", "inf", "61", "soon"]),
    "--rounds": st.sampled_from(["0", "-3", "2.5", "many"]),
    "--plot": st.sampled_from(["x.txt", "x", "nowhere/x.png", "."]),
}


@settings(max_examples=120)
@given(drawn=st.data())
def test_a_wrong_value_is_named(drawn: st.DataObject) -> None:
    option = drawn.draw(st.sampled_from(sorted(WRONG)))
    value = drawn.draw(WRONG[option])
    usable = {"--num-groups": value.isdecimal() and int(value) > 0 and 32 % int(value) == 0}
    usable["--threads"] = value.isdecimal() and 0 < int(value) <= runtime.MOST_THREADS
    if usable.get(option):
        return
    inside = option in written.OPTIONS and drawn.draw(st.booleans())
    call = "layer_norm 8x32" if option == "--axis" else "group_norm 8x32x4"
    arguments = [f"{call} {option}={value}"] if inside else [call, f"{option}={value}"]
    stderr = sys.stderr
    sys.stderr = err = io.StringIO()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bench, "run", lambda *a, **k: pytest.fail("work was begun"))
            status: Any = cli.main(["bench", *arguments])
    except SystemExit as stopped:
        status = stopped.code
    finally:
        sys.stderr = stderr
    assert status == 2
    message = err.getvalue().splitlines()[-1]
    assert option in message
    # a list is named by the part that is wrong, a file whose folder is missing by its own name
    parts = value.split(",") if option in ("--threads", "--peers") else [value.split("/")[-1]]
    assert any(repr(part) in message or f" {part}" in message for part in parts)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "bench needs a CALL"),
        ([""], "CALL is ''"),
        (["lyer_norm 4x8"], "'lyer_norm', expected one of .*; did you mean 'layer_norm'"),
        (["moments 4x8"], "'moments', expected one of batch_norm"),
        (["layer_norm"], "has no shape"),
        (["layer_norm 4y8"], "'4y8' for a shape, expected one like"),
        (["layer_norm 0x8"], "an axis of 0 elements"),
        (["layer_norm 4x" + "9" * 30], "expected 1 or more|would take"),
        (["layer_norm 99999999x99999"], "would take .* expected at most"),
        (["group_norm 1x999999999999 --num-groups 7"], "would take|expected a divisor"),
        (["layer_norm 4x8 bfloa16"], "'bfloa16', expected an option; did you mean 'bfloat16'"),
        (["layer_norm 4x8 --dtpye float16"], "--dtpye, expected .*; did you mean '--dtype'"),
        (["layer_norm 4x8 --dtype"], "--dtype: expected one argument"),
        (["layer_norm 4x8 'x"], "cannot be read"),
        (["layer_norm 4x8", "--training"], "--training is of batch_norm"),
        (["layer_norm 4x8 --num-groups 2"], "--num-groups: it is of group_norm"),
        (["rms_norm 4x8 --axis 1"], "--axis: it is of layer_norm"),
        (["layer_norm 4x8", "--layout", "channels-last"], "--layout: it has no channel axis"),
        (["group_norm 4x8", "--layout", "channels-last"], "2 axes, expected 3 or more"),
        (["instance_norm 4x8"], "2 axes, expected 3 or more"),
        (["group_norm 4x30x2 --num-groups 7"], "30 channels, expected .*: 1, 2, 3, 5, 6"),
        (["batch_norm 1x8 --training"], "one value for each statistic"),
        (["add_layer_norm 4x8", "--backward"], "--backward: there is no such function"),
        (["dynamic_tanh 4x8", "--backward"], "--backward: its gradients are not timed"),
        (["layer_norm 4x8", "--backward", "--activation", "silu"], "with --backward"),
        (["l2_normalize 4x8", "--activation", "silu"], "does not take --activation"),
    ],
)
def test_unusable_calls(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    err = refused(capsys, *arguments)
    assert err.count("\n") == 1
    assert re.search(complaint, err), err


# --- Peers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch", "onnxruntime", "jax"])
def test_a_missing_peer(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("torch", "onnxruntime", "jax"):
        monkeypatch.setitem(sys.modules, other, None)
    (row,) = told(capsys, "layer_norm 4x8")["rows"]
    assert row["absent"][name] == f"{name} is not installed"
    assert "numpy" in row["seconds"]
    with monkeypatch.context() as patch:
        patch.setattr(bench, "run", lambda *a, **k: pytest.fail("work was begun"))
        err = refused(capsys, "layer_norm 4x8", "--peers", f"numpy,{name}")
    assert err == f"fastnorm: --peers {name} is not installed: {bench.NEEDED[name][1]}\n"


def test_a_peer_that_fails_is_absent_with_its_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(case: Any, data: Any) -> NoReturn:
        raise OSError("libfoo.so is missing\nand more")

    monkeypatch.setitem(peers.PEERS, "numpy", broken)
    (row,) = told(capsys, "layer_norm 4x8", "--peers", "numpy")["rows"]
    assert row["absent"] == {"numpy": "OSError: libfoo.so is missing"}
    assert cli.main(["bench", "layer_norm 4x8", "--peers", "numpy", *SHORT]) == 0
    assert "  numpy: OSError: libfoo.so is missing\n" in capsys.readouterr().out


@pytest.mark.parametrize("error", [1e-3, np.nan, np.inf])
def test_another_result_is_said_loudly(
    error: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(case: Any, data: Any, make: Any = peers.PEERS["numpy"]) -> peers.Peer:
        right = make(case, data)
        return peers.Peer(lambda: right.call() * (1 + error), right.answer)

    monkeypatch.setitem(peers.PEERS, "numpy", wrong)
    (row,) = told(capsys, "layer_norm 4x8", "--peers", "numpy", status=1)["rows"]
    assert row["different"] == ["numpy"]
    assert "numpy" not in row["seconds"]
    assert cli.main(["bench", "layer_norm 4x8", "--peers", "numpy", *SHORT]) == 1
    out, err = capsys.readouterr()
    assert "numpy: DIFFERENT, numpy is off by" in out
    assert err.startswith("fastnorm: DIFFERENT RESULT, not timed: layer_norm 4x8: numpy is off by")


# --- Models ---------------------------------------------------------------------------------------


@pytest.fixture
def torchvision(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has a single model."""
    nn = torch.nn

    class FrozenNorm(nn.Module):
        def forward(self, x: Any) -> Any:
            return x

    def get_model(name: str, weights: Any) -> Any:
        assert (name, weights) == ("tiny", None)
        layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        more = (nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), FrozenNorm())
        return nn.Sequential(*layers, *more, nn.Flatten(2), nn.LayerNorm([8, 36]))

    models = ModuleType("torchvision.models")
    models.list_models = lambda module: ["tiny"]  # type: ignore[attr-defined]
    models.get_model = get_model  # type: ignore[attr-defined]
    package = ModuleType("torchvision")
    package.models = models  # type: ignore[attr-defined]
    package.__spec__ = ModuleSpec("torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.setitem(sys.modules, "transformers", None)


@pytest.mark.usefixtures("torchvision")
def test_the_norms_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--torch-model", "tiny", "--input", "2x3x8x8", "--peers", "numpy")
    found = told(capsys, *model, "--threads", "1,2", "--layout", "channels-last")
    counts = {
        "batch_norm (inference) 2x8x6x6 channels-last": 2,
        "group_norm 2x8x6x6 num_groups=2 channels-last": 1,
        "instance_norm 2x8x6x6 channels-last": 1,
        "layer_norm 2x288": 1,
    }
    assert [(row["case"], row["threads"], row["count"]) for row in found["rows"]] == [
        (case, n, count) for case, count in counts.items() for n in (1, 2)
    ]
    assert found["model"]["norms"] == 5
    assert found["model"]["input"] == [2, 3, 8, 8]
    assert found["model"]["left out"] == {"FrozenNorm": 1}
    for total in found["model"]["totals"]:
        rows = [row for row in found["rows"] if row["threads"] == total["threads"]]
        for name in ("fastnorm", "numpy", "copy"):
            expected = sum(row["count"] * row["seconds"][name] for row in rows)
            assert total["seconds"][name] == pytest.approx(expected)
    assert cli.main(["bench", *model, "--training", *SHORT]) == 0
    out, _ = capsys.readouterr()
    assert "batch_norm (training) 2x8x6x6, " in out
    assert "all 5 norms of torchvision's tiny, input 2x3x8x8\n" in out
    assert "left out, as fastnorm has no such function: 1 FrozenNorm" in out


@pytest.mark.slow
def test_a_model_of_transformers(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded, and nothing is said."""
    pytest.importorskip("transformers")

    def connect(*arguments: Any) -> NoReturn:
        raise AssertionError("a network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    cases, about = bench.of_model("convnext", (2, 3, 64, 64))
    assert Case("layer_norm (axis)", (2, 96, 16, 16)) in cases
    assert Case("layer_norm (normalized_shape)", (2, 16, 16, 96)) in cases
    assert about["norms"] == sum(about["counts"]) == 23
    assert "HF_HUB_OFFLINE" not in os.environ
    with pytest.raises(bench.CannotUse, match=r"no such model in .*; did you mean 'convnext'"):
        bench.of_model("convnxt")


def test_norms_by_other_names(torch: Any) -> None:
    class T5LayerNorm(torch.nn.Module):
        weight = torch.ones(8)

    class LlamaRMSNorm(T5LayerNorm):
        pass

    class SomeNorm(torch.nn.Module):
        pass

    for module in (T5LayerNorm(), LlamaRMSNorm(), torch.nn.RMSNorm(8)):
        assert models.call_of(module, (2, 5, 8)) == ("rms_norm", (2, 5, 8), ())
    assert models.call_of(SomeNorm(), (2, 8)) is None
    assert models.call_of(torch.nn.LayerNorm(8), (2, 8, 4, 4))[2] == (("axis", 1),)
    assert models.call_of(torch.nn.LayerNorm(8), (2, 7)) is None
    assert models.call_of(torch.nn.BatchNorm1d(8).eval(), (2, 8))[2] == (("training", False),)
    own = torch.nn.BatchNorm1d(8, track_running_stats=False).eval()
    assert models.call_of(own, (2, 8))[2] == (("training", True),)


@pytest.mark.usefixtures("no_work", "torchvision")
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["tinny"], "no such model in torchvision; did you mean 'tiny'"),
        (
            ["tiny", "layer_norm 4x8"],
            "--torch-model is in place of CALL, which is 'layer_norm 4x8'",
        ),
        (["tiny", "--activation", "silu"], "--torch-model does not take --activation"),
        (["tiny", "--num-groups", "2"], "--torch-model does not take --num-groups"),
        (["tiny", "--input", "2x3"], "torchvision's tiny cannot be run: "),
        (["tiny", "--input", "2x0x3"], "--input has an axis of 0 elements"),
        (["tiny", "--input", "many"], "--input has 'many' for a shape"),
    ],
)
def test_unusable_models(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    err = refused(capsys, "--torch-model", *arguments)
    assert err.count("\n") == 1
    assert complaint in err


@pytest.mark.usefixtures("no_work")
def test_models_that_are_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--input is of --torch-model" in refused(capsys, "layer_norm 4x8", "--input", "4x8")
    for name in ("torchvision", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert bench.NEEDED["torch"][1] in refused(capsys, "--torch-model", "resnet50")
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__spec__=ModuleSpec("torch", None)))
    assert "neither torchvision nor" in refused(capsys, "--torch-model", "resnet50")

    def broken() -> NoReturn:
        raise RuntimeError("built for another PyTorch")

    package = SimpleNamespace(__spec__=ModuleSpec("torchvision", None))
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(models._SOURCES, "torchvision", broken)
    err = refused(capsys, "--torch-model", "resnet50")
    assert "torchvision cannot be imported: built for another PyTorch" in err


# --- What is printed and drawn --------------------------------------------------------------------


def test_the_table_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["group_norm 2x8x4x4 --num-groups 2", "--peers", "numpy", "--threads", "1"]
    assert cli.main(["bench", *arguments, *SHORT]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "group_norm 2x8x4x4 num_groups=2, 1 thread\n" in out
    for name in ("fastnorm", "numpy", "copy"):
        assert f"\n  {name} " in out
    assert machine.processor() in out
    assert f"numpy {np.__version__}" in out
    assert "fresh array" in out
    assert "np.copyto" in out
    assert max(map(len, out.splitlines())) <= 120


def test_who_else_uses_the_machine_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "busy", lambda seconds: 87.0)
    assert cli.main(["bench", "layer_norm 4x8", "--peers", "none", *SHORT]) == 0
    out, err = capsys.readouterr()
    assert "others used 87 % of the processors" in out
    assert err.startswith("fastnorm: others used 87 % of the processors")


def test_progress_on_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    arguments = ["layer_norm 4x8", "rms_norm 4x8", "--threads", "1,2", "--peers", "none"]
    assert cli.main(["bench", *arguments, *SHORT]) == 0
    shown = terminal.getvalue().split("\r\x1b[K")
    assert len([step for step in shown if step.startswith("[")]) == bench.steps("ab", [1, 2], 1)
    assert shown[-1] == ""
    assert "\r" not in capsys.readouterr().out


@needs_matplotlib
@pytest.mark.parametrize(("suffix", "begin"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_plot(
    suffix: str, begin: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"times{suffix}"
    told(capsys, "layer_norm 4x8", "rms_norm 4x8", "--peers", "numpy", "--plot", str(path))
    assert path.read_bytes().startswith(begin)


@pytest.mark.usefixtures("no_work")
def test_plot_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    err = refused(capsys, "layer_norm 4x8", "--plot", str(tmp_path / "x.png"))
    assert "pip install 'fastnorm-kernels[demo]'" in err


def documented() -> list[str]:
    """The commands that README and the documentation show."""
    pages = (ROOT / name for name in ("README.md", "docs/bench.rst"))
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    return re.findall(r"^ *\$ fastnorm (bench .*)$", text, re.MULTILINE)


@pytest.mark.parametrize("command", documented())
def test_documented_commands_can_be_used(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their models are not looked for."""
    monkeypatch.setattr(bench, "of_model", lambda name, shape, **options: ([name, shape], {}))
    arguments = cli._parser().parse_args(shlex.split(command, comments=True))
    if arguments.torch_model is None:
        assert cli._cases(arguments)
    else:
        assert cli._model(arguments)


def test_the_first_documented_command(capsys: pytest.CaptureFixture[str]) -> None:
    command = shlex.split(documented()[0], comments=True)
    assert cli.main([*command, *SHORT, "--peers", "numpy"]) == 0
    assert "group_norm 8x256x32x32, 1 thread\n" in capsys.readouterr().out


# --- The machine ----------------------------------------------------------------------------------


def test_a_processor_has_a_name_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert machine.processor() == processor.name()
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "none")
    for system in ("Windows", "Darwin"):
        monkeypatch.setattr(processor.platform, "system", lambda system=system: system)
        assert processor.name()
    monkeypatch.setattr(processor, "_brand", lambda: "Imaginary M9")
    assert processor.name() == "Imaginary M9"
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    processor.CPUINFO.write_text("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n")
    assert processor.name().endswith(" (implementer 0x41, part 0xd40)")


def test_import_fastnorm_leaves_this_alone() -> None:
    code = "import sys, fastnorm; print([m for m in sys.modules if 'bench' in m])"
    assert run_python("-c", code).stdout == "[]\n"


# --- Load, and how it ends ------------------------------------------------------------------------


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that are started."""
    found: list[subprocess.Popen[bytes]] = []

    def popen(*arguments: Any, start: Callable[..., Any] = subprocess.Popen, **more: Any) -> Any:
        found.append(start(*arguments, **more))
        return found[-1]

    monkeypatch.setattr(workers.subprocess, "Popen", popen)
    return found


def test_load_ends_with_the_run(
    started: list[subprocess.Popen[bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    found = told(capsys, "layer_norm 4x8", "--peers", "none", "--load", "2")
    assert found["method"]["load"] == 2
    assert len(started) == 2
    assert all(process.returncode is not None for process in started)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_load_ends_with_an_error(
    error: type[BaseException], started: list[subprocess.Popen[bytes]]
) -> None:
    def fail() -> NoReturn:
        with workers.busy_processes(2):
            assert all(process.poll() is None for process in started)
            raise error

    with pytest.raises(error):
        fail()
    assert len(started) == 2
    assert all(process.returncode is not None for process in started)


@pytest.mark.parametrize("error", [OSError(11, "Too many processes"), MemoryError()])
def test_what_cannot_be_timed(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def popen(*arguments: Any, **options: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(workers.subprocess, "Popen", popen)
    assert cli.main(["bench", "layer_norm 4x8", "--load", "1", *SHORT]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastnorm: this cannot be timed: ")


LEFT = """
import os
from fastnorm import workers

class Told(workers.subprocess.Popen):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        print(self.pid, flush=True)

workers.subprocess.Popen = Told
with workers.busy_processes(1):
    os._exit(7)
"""


@posix
def test_load_ends_with_a_process_that_dies() -> None:
    """Its pipe is closed then, which is what the busy ones wait for."""
    done = run_python("-c", LEFT)
    assert done.returncode == 7, done.stderr
    pid, deadline = int(done.stdout), time.monotonic() + 60
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not running(pid)


INTERRUPTED = """
import os, signal, sys
from fastnorm import bench, cli
from fastnorm._bench import timing

def stop(*arguments, **options):
    os.killpg(0, signal.SIGINT)  # as a terminal does: to all

os.setpgrp()
signal.signal(signal.SIGINT, signal.default_int_handler)
bench.compete = stop
sys.exit(cli.main(["bench", "layer_norm 4x8", "--peers", "none", "--load", "1"]))
"""


@posix
def test_ctrl_c_is_quiet() -> None:
    done = run_python("-c", INTERRUPTED)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@posix
def test_nobody_reads_or_nothing_can_be_written() -> None:
    command = [sys.executable, "-m", "fastnorm", "bench", "layer_norm 4x8", "--peers", "none"]
    run = partial(
        subprocess.run, [*command, *SHORT, "--json"], stderr=subprocess.PIPE, text=True, check=False
    )
    with Path("/dev/full").open("w") as full:
        done = run(stdout=full)
    assert done.returncode == 1
    assert "fastnorm: cannot write the results: " in done.stderr
    reading, writing = os.pipe()
    os.close(reading)
    done = run(stdout=writing)
    os.close(writing)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
