"""Batch normalization over the batches of all processes of a group, on the CPU."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastnorm.backward import batch_norm_backward
from fastnorm.fields import fields_of, mean_of, merge, var_of
from fastnorm.functional import batch_norm
from fastnorm.torch.tensors import array_of, tensor_of


def _added(total: Any, group: Any) -> Any:
    """The sum over all processes."""
    tensor = tensor_of(total)
    torch.distributed.all_reduce(tensor, group=group)
    return array_of(tensor, "total")


class _Synchronised(torch.autograd.Function):
    """(x, weight, bias, module) -> y; the module's running statistics move."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, module: Any, momentum: float) -> Any:
        group = module.process_group or torch.distributed.group.WORLD
        array = array_of(x, "x")
        channels = array.shape[1]
        own = fields_of(array, tuple(axis for axis in range(array.ndim) if axis != 1))
        own = np.ascontiguousarray(own.reshape(len(own), channels))
        # all of them by each process, in one order: the same bits in each
        parts = [torch.empty(own.shape, dtype=torch.float64) for _ in range(group.size())]
        torch.distributed.all_gather(parts, tensor_of(own), group=group)
        fields = reduce(merge, [array_of(part, "fields") for part in parts])
        count = fields[0].max(initial=0.0)
        if count == 1:
            raise ValueError(
                "SyncBatchNorm got one value for each channel in all processes together, expected "
                "more in training; write model.eval(), or give larger batches"
            )
        mean, var = mean_of(fields), var_of(fields)
        if module.track_running_stats and count:
            for running, batch in (
                (module.running_mean, mean),
                (module.running_var, var * (count / (count - 1))),
            ):
                if running is not None:
                    running.copy_(running.double().lerp_(tensor_of(batch), momentum))
        ctx.save_for_backward(x, weight)
        ctx.statistics, ctx.count, ctx.eps, ctx.group = (mean, var), count, module.eps, group
        if not array.size:
            return torch.empty_like(x)
        weight, bias = (None if v is None else array_of(v, "weight") for v in (weight, bias))
        return tensor_of(batch_norm(array, mean, var, weight, bias, eps=module.eps))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        mean, var = ctx.statistics
        total = var + ctx.eps
        rstd = np.divide(1.0, np.sqrt(total), out=np.zeros_like(var), where=total != 0)
        # what is added up over processes is not rounded to half precision
        wide = torch.promote_types(x.dtype, torch.float32)
        array, gradient = array_of(x.to(wide), "x"), array_of(dy.to(wide), "dy")
        scale = np.ones_like(mean) if weight is None else array_of(weight.double(), "weight")
        dx, dweight, dbias = batch_norm_backward(gradient, array, mean, rstd, scale, training=False)
        if ctx.needs_input_grad[0]:
            # dx = weight * rstd * (dy - mean(dy) - xhat * mean(dy * xhat))
            means = _added(np.stack([dweight, dbias]), ctx.group) / max(ctx.count, 1.0)
            slope, shift = -scale * rstd * means
            dx = batch_norm(array, mean, var, slope, shift, eps=ctx.eps, residual=dx)
        found: list[Any] = [tensor_of(dx).to(x.dtype), None, None]
        if weight is not None:
            found[1:] = (tensor_of(g).to(weight.dtype) for g in (dweight, dbias))
        return *found, None, None


def synchronised(x: Tensor, module: nn.SyncBatchNorm, momentum: float) -> Tensor:
    """Batch norm in training by the statistics of all processes of a module's group."""
    y: Tensor = _Synchronised.apply(x, module.weight, module.bias, module, momentum)
    return y
