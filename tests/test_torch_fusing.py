"""fastnorm.torch.replace(model, fuse=True): what is joined, what is not; and nothing changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
fnt: Any = pytest.importorskip("fastnorm.torch")
from fastnorm.torch.fusing import Joined  # noqa: E402

nn, F = torch.nn, torch.nn.functional


class Residual(nn.Module):
    """A block as those of a ResNet, with one ReLU for all."""

    def __init__(self, way: Any = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu, self.way = nn.ReLU(inplace=True), way

    def forward(self, x: Any) -> Any:
        """Straight, but for what depends on the module alone."""
        kept = x
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.conv2(y)
        y = self.bn2(y)
        if self.way is not None:
            kept = self.way(x)
        y += kept
        return self.relu(y)


class Written(nn.Module):
    """Its norm is followed by what a test says."""

    def __init__(self, shape: Any = (4, 5, 5)) -> None:
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(shape), nn.Conv2d(4, 4, 1)
        self.act, self.drop = nn.ReLU(), nn.Dropout(0.5)
        self.scale, self.alpha = nn.Parameter(torch.ones(1)), 2.0
        with torch.no_grad():
            self.norm.weight.copy_(torch.linspace(-1, 2, self.norm.weight.numel()).view(shape))


class Functions(Written):
    def forward(self, x: Any) -> Any:
        y = F.gelu(self.norm(x), approximate="tanh")
        return torch.add(y, self.norm(y)).relu()


class Silu(Written):
    def forward(self, x: Any) -> Any:
        return F.silu(self.conv(x) + self.norm(x), inplace=True)


class Broadcast(Written):
    def forward(self, x: Any) -> Any:
        return F.relu(self.norm(x) + self.scale)


class InPlace(Written):
    def forward(self, x: Any) -> Any:
        y = self.norm(x)
        y += self.scale.double()
        return F.relu(y)


class Wider(Written):
    def forward(self, x: Any) -> Any:
        return torch.relu(self.norm(x) + x.double())


class Twice(Written):
    def forward(self, x: Any) -> Any:
        y = self.norm(x)
        return self.act(y) * y


class Changed(Written):
    def forward(self, x: Any) -> Any:
        y = self.norm(x)
        x.mul_(2.0)
        return y + x


class Into(Written):
    def forward(self, x: Any) -> Any:
        kept = self.conv(x)
        kept += self.norm(x)
        return kept


class Given(Written):
    def forward(self, x: Any) -> Any:
        x += self.norm(x)
        return self.act(self.norm(x))


class OwnSum(Written):
    def forward(self, x: Any) -> Any:
        y = self.norm(x)
        return y + y


class Difference(Written):
    def forward(self, x: Any) -> Any:
        return self.norm(x) - self.conv(x)


class Product(Written):
    def forward(self, x: Any) -> Any:
        return self.norm(x) * self.conv(x)


class PartOfSum(Written):
    def forward(self, x: Any) -> Any:
        return torch.add(self.norm(x), self.conv(x), alpha=2)


class InTraining(Written):
    def forward(self, x: Any) -> Any:
        if self.training:
            return self.act(self.norm(x))
        return self.norm(x)


class Training(Written):
    def forward(self, x: Any) -> Any:
        return self.act(F.dropout(self.norm(x), 0.5, self.training))


class Branching(Written):
    def forward(self, x: Any) -> Any:
        if x.sum() > 0:
            x = -x
        return self.act(self.norm(x))


class Optional(Written):
    def forward(self, x: Any, mask: Any = None) -> Any:
        if mask is not None:
            x = x * mask
        return self.act(self.norm(x))


class Kinds(Written):
    def forward(self, x: Any) -> Any:
        x = torch.cat(x) if isinstance(x, list) else x
        return self.act(self.norm(x))


class Chance(Written):
    def forward(self, x: Any) -> Any:
        return self.act(self.norm(x)) + torch.rand(5)


class Number(Written):
    def forward(self, x: Any) -> Any:
        return self.act(self.norm(x)) * self.alpha


FACTOR = 2.0


class Global(Written):
    def forward(self, x: Any) -> Any:
        return self.act(self.norm(x)) * FACTOR


class DeepNumber(Written):
    def forward(self, x: Any) -> Any:
        return self.act(self.norm(x)) + self.drop.p


class Buffer(Written):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Any) -> Any:
        self.count.add_(1)
        return self.act(self.norm(x)) + self.count


def padded(x: Any, conv: Any) -> Any:
    """What is seen of a tensor's shape is of this call alone."""
    return F.pad(x, [conv.kernel_size[0] - 1, 0]) if x.shape[-1] % 2 else x * 2


def doubled(x: Any) -> Any:
    return x.mul_(2.0)


class Helped(Written):
    def forward(self, x: Any) -> Any:
        x = padded(x, self.conv)
        y = self.act(self.norm(x)) + self.norm(x)
        return doubled(y) - padded(y, conv=self.conv)


class HelpedByChange(Written):
    def forward(self, x: Any) -> Any:
        y = self.norm(x)
        doubled(x)
        return y + x


class HelpedBetween(Written):
    def forward(self, x: Any) -> Any:
        return self.act(padded(self.norm(x), self.conv))


class OtherOrder(Written):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Any) -> Any:
        y = self.norm(x)
        return y + self.norm(self.conv(x) * 3)


class ChangeInto(Written):
    def forward(self, x: Any) -> Any:
        y = self.norm(x)
        torch.mul(x, 2.0, out=x)
        return y + x


class HookedChange(Written):
    def __init__(self) -> None:
        super().__init__()
        self.conv.register_forward_pre_hook(lambda _, given: (given[0].mul_(3.0),))

    def forward(self, x: Any) -> Any:
        y = self.norm(x)
        return y + self.conv(x)


class Drawn(Written):
    def forward(self, x: Any) -> Any:
        return self.act(self.norm(x)) * torch.rand(1).item()


class GradMode(Written):
    def forward(self, x: Any) -> Any:
        return self.act(self.norm(x)) * torch.is_grad_enabled()


class Computed(Written):
    @property
    def active(self) -> bool:
        return self.training

    def forward(self, x: Any) -> Any:
        if self.active:
            x = x * 2.0
        return self.act(self.norm(x))


class Wrapped(Written):
    @torch.no_grad()
    def forward(self, x: Any) -> Any:
        return self.act(self.norm(x))


class WrappedLater(Written):
    def forward(self, x: Any) -> Any:
        return self.act(self.norm(x))


WrappedLater.forward = torch.no_grad()(WrappedLater.forward)  # type: ignore[method-assign]


def enclosed() -> Any:
    journal: list[Any] = []

    class Enclosed(Written):
        def forward(self, x: Any) -> Any:
            journal.append(x)
            return self.act(self.norm(x))

    return Enclosed()


class OfClass(Written):
    def forward(self, x: Any) -> Any:
        return self.act(self.norm(x)) * Settings.scale


class Settings:
    scale = 2.0


LATER: Any = None


class SetLater(Written):
    def forward(self, x: Any) -> Any:
        return self.act(halves(self.norm(x), LATER))


def halves(x: Any, _: Any = None) -> Any:
    return map(torch.neg, (x, x))


class Iterated(Written):
    def forward(self, x: Any) -> Any:
        a, b = halves(self.conv(x))
        return self.act(self.norm(a)) + b


def number_of(x: Any) -> Any:
    return float(x.dim())


class AddsNumber(Written):
    def forward(self, x: Any) -> Any:
        return self.act(self.norm(x) + number_of(x)) * self.act(self.norm(x) + x.dim())


class Six(Written):
    def forward(self, x: Any) -> Any:
        return F.relu6(self.norm(x * 5) + self.conv(x)) + F.relu6(self.norm(x) * 5)


class Block(nn.Sequential):
    """As models have for a convolution, a norm and an activation."""


class OwnOrder(nn.Sequential):
    def __iter__(self) -> Any:
        return iter([self[2], self[1], self[0]])


class Other(Written):
    def forward(self, x: Any) -> Any:
        return self.helped(x)

    def helped(self, x: Any) -> Any:
        return self.act(self.norm(x))


def plain(*modules: Any) -> Callable[[], Any]:
    return lambda: nn.Sequential(*[m() for m in modules])


JOINED: dict[str, Callable[[], Any]] = {
    "sequence": plain(lambda: nn.Conv2d(4, 4, 1), lambda: nn.GroupNorm(2, 4), nn.SiLU),
    "tanh": plain(lambda: nn.GroupNorm(2, 4), lambda: nn.GELU("tanh")),
    "two": plain(lambda: nn.BatchNorm2d(4), nn.ReLU, lambda: nn.RMSNorm(5), nn.GELU, nn.Flatten),
    "residual": Residual,
    "residual, another way": lambda: Residual(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))),
    "functions": Functions,
    "second of a sum": Silu,
    "broadcast": Broadcast,
    "wider": Wider,
    "in place, broadcast": lambda: InPlace(),
    "deep": plain(lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), Residual),
    "six": Six,
    "six in a block": lambda: Block(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU6(True)),
    "helped": Helped,
    "sum with a number": AddsNumber,
    "other order": OtherOrder,  # the second of its calls, which stays behind the first
}
LEFT: dict[str, Callable[[], Any]] = {
    "twice": Twice, "changed": Changed, "into": Into, "with itself": OwnSum, "training": Training,
    "branching": Branching, "optional": Optional, "kinds": Kinds, "chance": Chance,
    "number": Number, "global": Global, "deep number": DeepNumber, "buffer": Buffer,
    "another method": Other, "difference": Difference, "product": Product,
    "part of a sum": PartOfSum, "in training": InTraining,
    "sequence": plain(lambda: nn.BatchNorm2d(4), nn.Dropout, nn.ReLU),
    "unknown": plain(lambda: nn.BatchNorm2d(4), nn.Hardswish),
    "own order": lambda: OwnOrder(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)),
    "helped by a change": HelpedByChange, "helped between": HelpedBetween,
    "change with out=": ChangeInto, "change by a hook": HookedChange,
    "drawn": Drawn, "grad mode": GradMode, "computed": Computed, "wrapped": Wrapped,
    "wrapped later": WrappedLater, "enclosed": enclosed, "of a class": OfClass,
    "iterated": Iterated,
}  # fmt: skip


def joined(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, Joined)]


@pytest.mark.parametrize("name", [*JOINED, *LEFT])
def test_nothing_changes(name: str) -> None:
    torch.manual_seed(0)
    made = {**LEFT, **JOINED}[name]
    model = made().double()
    ours = fnt.replace(copy.deepcopy(model), fuse=True)
    assert bool(joined(ours)) == (name in JOINED)
    assert list(ours.state_dict()) == list(model.state_dict())
    for training in (True, False):
        model.train(training)
        ours.train(training)
        for needs in (True, False) if "change" not in name else (False,):  # or its gradient is lost
            with torch.set_grad_enabled(needs):
                x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
                a, b = (x.clone().requires_grad_(needs) for _ in range(2))
                torch.manual_seed(1)
                found = ours(a)
                torch.manual_seed(1)
                expected = model(b)
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
                if not found.requires_grad:
                    assert not expected.requires_grad
                    continue
                dy = torch.randn_like(found)
                for y, module in ((found, ours), (expected, model)):
                    module.zero_grad()
                    y.backward(dy)
                grads = [[p.grad for p in m.parameters()] for m in (ours, model)]
                torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-10)
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.state_dict(), model.state_dict(), rtol=1e-12, atol=1e-12)
    assert fnt.restore(ours) is ours
    assert [type(m) for m in ours.modules()] == [type(m) for m in model.modules()]


def test_what_is_written_to_is_written_to() -> None:
    """``x += ...`` of what a caller gave, also where something else is joined."""
    model = Given()
    ours = fnt.replace(copy.deepcopy(model), fuse=True)
    a, b = (torch.ones(2, 4, 5, 5) * torch.arange(5) for _ in range(2))
    with torch.no_grad():
        torch.testing.assert_close(ours(a), model(b))
    torch.testing.assert_close(a, b)
    assert a.max() > 5
    # the sum keeps the dtype of what it is added to
    model = fnt.replace(InPlace(), fuse=True)
    assert model(a).dtype is torch.float32
    with torch.no_grad():
        assert fnt.replace(Wider(), fuse=True)(a).dtype is torch.float64


def test_a_sum_with_nothing_fails_as_it_did() -> None:
    class Sum(Written):
        def forward(self, x: Any, other: Any) -> Any:
            return self.act(self.norm(x) + other)

    model, x = fnt.replace(Sum(), fuse=True), torch.randn(2, 4, 5, 5)
    assert joined(model)
    torch.testing.assert_close(model(x, 0.5), Sum.forward(model, x, 0.5))
    with pytest.raises(TypeError, match="NoneType"):
        model(x, None)


def test_what_a_global_may_become_is_not_taken() -> None:
    assert not joined(fnt.replace(SetLater(), fuse=True))


def test_what_is_joined_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastnorm.torch import functions

    seen: list[tuple[bool, Any]] = []
    own = functions.batch_norm

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append((kwargs.get("residual") is not None, kwargs.get("activation")))
        return own(*args, **kwargs)

    monkeypatch.setattr(functions, "batch_norm", noted)
    way = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model = fnt.replace(Residual(way), fuse=True)
    calls: list[Any] = []
    model.relu.register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(2, 4, 5, 5))
    assert seen == [(False, "relu"), (False, None), (True, "relu")]  # of bn1, the way, bn2
    assert not calls  # hooks of a later day are not called: docs/torch.rst


@pytest.mark.parametrize("part", ["relu", "bn1", "bn2", ""])
def test_who_watches_is_left_alone(part: str) -> None:
    """And sees the same as before."""
    model, x = Residual(), torch.randn(2, 4, 5, 5)
    calls: list[Any] = []
    model.get_submodule(part).register_forward_hook(lambda *of: calls.append(of[-1].clone()))
    copy.deepcopy(model)(x)
    expected = calls.copy()
    calls.clear()
    fnt.replace(model, fuse=True)(x)
    assert len(calls) == (2 if part == "relu" else 1)
    torch.testing.assert_close(calls, expected)


def test_copies_and_pickles_have_their_own_forward() -> None:
    model = fnt.replace(Residual(), fuse=True).eval()
    x = torch.randn(2, 4, 5, 5)
    expected = model(x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again) is Residual
        torch.testing.assert_close(again(x), expected)
        assert fnt.report(again).replaced == fnt.report(model).replaced
        assert isinstance(fnt.replace(again, fuse=True), Joined)
    assert type(fnt.replace(model, fuse=True)).__mro__[2] is Residual  # not joined twice


def test_it_is_compiled_and_exported() -> None:
    model = fnt.replace(Residual(), fuse=True).eval()
    x = torch.randn(2, 4, 5, 5)
    expected = model(x)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
