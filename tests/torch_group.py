"""Processes of a gloo group, one batch in parts: what each of them gets, in a file of its own.

python -m tests.torch_group FOLDER WORLD
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastnorm.torch as fnt

# Of one process there are two samples, of the last one none.
PARTS = (5, 2, 0)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "far": {"mean": 1e4},
    "double": {"dtype": torch.float64},
    "half": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16, "mean": 30.0},
    "channels-last": {"memory": torch.channels_last},
    "without weights": {"affine": False},
    "average": {"momentum": None},
    "untracked": {"track_running_stats": False},
}
CHANNELS = 6


def data(case: dict[str, Any], seed: int = 0) -> Any:
    made = torch.Generator().manual_seed(seed)
    shape = (sum(PARTS), CHANNELS, 3, 4)
    x = torch.randn(shape, generator=made, dtype=torch.float64) + case.get("mean", 0.0)
    return x.to(case.get("dtype", torch.float32))


def norm(case: dict[str, Any]) -> Any:
    options = {k: v for k, v in case.items() if k not in ("mean", "dtype", "memory")}
    made = nn.BatchNorm2d(CHANNELS, **options)
    if made.affine:
        with torch.no_grad():
            made.weight.copy_(torch.linspace(-1, 2, CHANNELS))
            made.bias.copy_(torch.linspace(3, 1, CHANNELS))
    if case.get("dtype") is torch.float64:
        made.double()
    return made


def run(rank: int, folder: str, world: int) -> None:
    """One process: two batches through each case, forward and backward."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    found: dict[str, Any] = {}
    first = sum(PARTS[:rank])
    here = slice(first, first + PARTS[rank])
    for name, case in CASES.items():
        module = fnt.SyncBatchNorm.convert_sync_batchnorm(norm(case))
        if name == "double":  # PyTorch's class, replaced, is another way to the same
            module = fnt.replace(nn.SyncBatchNorm.convert_sync_batchnorm(norm(case)))
        results = []
        for seed in range(2):
            x = data(case, seed)[here].to(memory_format=case.get("memory", torch.preserve_format))
            x.requires_grad_()
            y = module(x)
            dy = data(case | {"mean": 0.0}, seed + 10)[here]
            module.zero_grad()
            y.backward(dy)
            weights = [p.grad for p in module.parameters()]
            results.append([y.detach(), x.grad, *weights])
        found[name] = results, module.state_dict()

    # one value for each channel in all processes together
    try:
        fnt.SyncBatchNorm(CHANNELS)(torch.ones(int(rank == 0), CHANNELS, 1, 1))
    except ValueError as error:
        found["one value"] = str(error)

    # in a model that is trained in parallel
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(CHANNELS, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    parallel = DistributedDataParallel(fnt.SyncBatchNorm.convert_sync_batchnorm(model))
    optimizer = torch.optim.SGD(parallel.parameters(), 0.1)
    for seed in range(3):
        optimizer.zero_grad()
        x = data({}, seed).chunk(7)[rank]  # one sample each
        parallel(x).square().mean().backward()
        optimizer.step()
    found["trained"] = model.state_dict()
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    folder, world = sys.argv[1:]
    Path(folder).mkdir(exist_ok=True)
    torch.multiprocessing.spawn(run, (folder, int(world)), nprocs=int(world))
