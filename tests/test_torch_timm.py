"""The norms of timm, replaced by fastnorm.torch.

timm asks for torchvision, whose builds fit one build of PyTorch each: what its norms need of it is
nothing, so they are imported without.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
fnt: Any = pytest.importorskip("fastnorm.torch")
nn = torch.nn

if importlib.util.find_spec("timm") is None:
    pytest.importorskip("timm")


@pytest.fixture(scope="module")
def layers() -> Iterator[dict[str, Any]]:
    """The classes of timm.layers.norm and norm_act, by name."""
    before = dict(sys.modules)
    spec = importlib.util.find_spec("timm")
    assert spec is not None
    names: dict[str, dict[str, Any]] = {
        "torchvision": {},
        "torchvision.models": {},
        "torchvision.models.feature_extraction": {
            "create_feature_extractor": None,
            "get_graph_node_names": None,
        },
        "torchvision.ops": {},
        "torchvision.ops.misc": {"FrozenBatchNorm2d": type("FrozenBatchNorm2d", (), {})},
        "timm": {"__path__": list(spec.submodule_search_locations or ())},
    }
    for name, values in names.items():
        sys.modules[name] = module = ModuleType(name)
        vars(module).update({"__path__": []} | values)
    try:
        modules = [importlib.import_module(f"timm.layers.{name}") for name in ("norm", "norm_act")]
        yield {k: v for m in modules for k, v in vars(m).items() if isinstance(v, type)}
    finally:
        for name in set(sys.modules) - set(before):
            if name.partition(".")[0] in ("timm", "torchvision"):
                del sys.modules[name]


WITHOUT = ("LayerNorm", "LayerNorm2d", "GroupNorm", "GroupNorm1", "RmsNorm", "RmsNorm2d")
WITH = (
    "BatchNormAct2d", "GroupNormAct", "GroupNorm1Act", "LayerNormAct", "LayerNormAct2d",
    "RmsNormAct", "RmsNormAct2d",
)  # fmt: skip
ACTIVATIONS = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "unknown": nn.Hardswish,
    "none": None,
}
CASES = [(name, None) for name in WITHOUT] + list(itertools.product(WITH, ACTIVATIONS))


def made(layers: dict[str, Any], name: str, activation: str | None) -> Any:
    options: dict[str, Any] = {}
    if activation == "none":
        options["apply_act"] = False
    elif activation:
        options["act_layer"] = ACTIVATIONS[activation]
    if name in ("GroupNorm", "GroupNormAct"):
        options["num_groups"] = 4
    norm = layers[name](8, **options)
    with torch.no_grad():
        for at, p in enumerate(norm.parameters()):
            p.copy_(torch.linspace(-1, 2, 8) + at)
    return norm


@pytest.mark.parametrize(("name", "activation"), CASES)
def test_it_computes_the_same_forward_and_backward(
    layers: dict[str, Any], name: str, activation: str | None
) -> None:
    norm = made(layers, name, activation).double()
    ours = made(layers, name, activation).double()
    before = dict(ours.named_parameters())
    assert fnt.replace(ours) is ours
    assert fnt.report(ours)[0].replaced
    assert type(ours).__name__ == name
    assert dict(ours.named_parameters()) == before
    shape = (3, 8, 5, 4) if "2d" in name or "Group" in name else (3, 5, 8)
    for mode in (True, False):
        norm.train(mode)
        ours.train(mode)
        for needs in (True, False):
            x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            a, b = x.clone().requires_grad_(needs), x.clone().requires_grad_(needs)
            y, expected = ours(a), norm(b)
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
            if needs:
                dy = torch.randn_like(y)
                found = torch.autograd.grad(y, [a, *ours.parameters()], dy)
                right = torch.autograd.grad(expected, [b, *norm.parameters()], dy)
                torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)
    for key, value in norm.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-12, atol=1e-12)
    assert type(fnt.restore(ours)) is layers[name]


def test_what_watches_an_activation_still_sees_it(layers: dict[str, Any]) -> None:
    norm = fnt.replace(made(layers, "BatchNormAct2d", "relu"))
    seen: list[Any] = []
    norm.act.register_forward_hook(lambda *_: seen.append(1))
    y = norm(torch.randn(2, 8, 3, 3))
    assert seen == [1]
    assert (y >= 0).all()
    norm.drop = nn.Dropout(1.0)
    assert not norm(torch.randn(2, 8, 3, 3)).any()


def test_lower_precision_is_timms_own(layers: dict[str, Any]) -> None:
    norm = fnt.replace(made(layers, "LayerNorm2d", None))
    x = torch.randn(2, 8, 3, 3)
    expected = norm._replaces.forward(norm, x.half())
    found = norm(x.half())
    assert found.dtype is expected.dtype
    assert torch.equal(found, expected)  # its weights are of float32
    norm._fast_norm = True
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype is torch.bfloat16


def test_what_is_unknown_is_left_with_the_reason(layers: dict[str, Any]) -> None:
    for name in ("LayerNormFp32", "LayerNormExp2d", "SimpleNorm"):
        (entry,) = fnt.report(fnt.replace(layers[name](8)))
        assert not entry.replaced
        assert "forward" in entry.reason
