"""fastnorm.torch.SyncBatchNorm: a batch in parts, in processes of a gloo group."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

import fastnorm.torch as fnt  # noqa: E402

from .torch_group import CASES, CHANNELS, PARTS, data, norm  # noqa: E402

nn = torch.nn
ROOT = Path(__file__).parent.parent
# Of the dtype's epsilon, for results of about 1: y is rounded once, dx is a sum of two that are.
EPSILONS = 8


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("group")
    command = [sys.executable, "-m", "tests.torch_group", str(folder), str(len(PARTS))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(PARTS))]


def near(a: Any, b: Any, epsilon: float) -> None:
    error = (a.double() - b.double()).abs()
    assert (error <= EPSILONS * epsilon * b.double().abs().clamp(min=1.0)).all(), error.max()


@pytest.mark.parametrize("name", CASES)
def test_processes_together_are_one_with_the_whole_batch(found: list[Any], name: str) -> None:
    case = CASES[name]
    alone = norm(case).double()
    for seed in range(2):
        x = data(case, seed).double().requires_grad_()
        y = alone(x)
        alone.zero_grad()
        dy = data(case | {"mean": 0.0}, seed + 10)
        y.backward(dy.double())
        parts = [rank[name][0][seed] for rank in found]
        epsilon = torch.finfo(dy.dtype).eps
        near(torch.cat([part[0] for part in parts]), y.detach(), epsilon)
        near(torch.cat([part[1] for part in parts]), x.grad, epsilon)
        for at, p in enumerate(alone.parameters()):
            # each has the part of its own batch
            near(sum(part[2 + at] for part in parts), p.grad, torch.finfo(torch.float32).eps * 8)
    states = [rank[name][1] for rank in found]
    for key, value in alone.state_dict().items():
        assert all(torch.equal(state[key], states[0][key]) for state in states)
        if "running" in key:
            near(states[0][key], value, torch.finfo(torch.float32).eps)
        else:
            assert torch.equal(states[0][key].double(), value.double())


def test_one_value_of_all_is_refused_by_each(found: list[Any]) -> None:
    assert all("one value for each channel" in rank["one value"] for rank in found)


def test_it_trains_as_one_process_does(found: list[Any]) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(CHANNELS, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    model = model.double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for seed in range(3):
        optimizer.zero_grad()
        model(data({}, seed)[: len(PARTS)].double()).square().mean().backward()
        optimizer.step()
    for rank in found:
        for key, value in model.state_dict().items():
            near(rank["trained"][key], value, 1e-6)


def test_converted_modules_keep_what_they_have() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-3), nn.LayerNorm(5)).eval()
    parameters = list(model.parameters())
    converted = fnt.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted[1]) is fnt.SyncBatchNorm
    assert not isinstance(converted[1], nn.SyncBatchNorm)  # or it could not be trained in parallel
    assert type(converted[2]) is nn.LayerNorm
    assert all(a is b for a, b in zip(parameters, converted.parameters(), strict=True))
    assert (converted[1].eps, converted[1].training) == (1e-3, False)
    x = torch.randn(2, 3, 5, 5)
    expected = copy.deepcopy(converted)(x)
    again = pickle.loads(pickle.dumps(converted))
    assert type(again[1]) is fnt.SyncBatchNorm
    assert torch.equal(again(x), expected)
    # of one process it is batch norm
    made = fnt.SyncBatchNorm(4)
    plain = fnt.replace(nn.BatchNorm2d(4))
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(made(x), plain(x))
    assert torch.equal(made.running_var, plain.running_var)
    # PyTorch's own class replaced computes the same, and stays that class
    own = fnt.replace(nn.SyncBatchNorm(4))
    assert isinstance(own, nn.SyncBatchNorm)
    assert torch.equal(own(x), plain(x))
