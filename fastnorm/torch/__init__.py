"""The functions of fastnorm for tensors, differentiable; and the norms of a model replaced by them.

``import fastnorm.torch as fnt`` asks for PyTorch 2.10 or later. CPU tensors are computed by
fastnorm's kernels, in place of the memory they are in; what these cannot see (a compiler, a
transform of torch.func, a subclass, another device) by PyTorch's own operators.
"""

from fastnorm.torch.classes import SyncBatchNorm
from fastnorm.torch.functions import (
    add_layer_norm,
    add_rms_norm,
    batch_norm,
    batch_norm_backward,
    derf,
    derf_backward,
    dynamic_tanh,
    dynamic_tanh_backward,
    global_response_norm,
    group_norm,
    group_norm_backward,
    instance_norm,
    instance_norm_backward,
    l2_normalize,
    layer_norm,
    layer_norm_backward,
    local_response_norm,
    moments,
    rms_norm,
    rms_norm_backward,
    standardize,
    weight_norm,
    weight_standardize,
)
from fastnorm.torch.functions import (
    fields_of as fields_of,
)
from fastnorm.torch.modules import Entry, Report, replace, report, restore
from fastnorm.torch.threads import borrow as _borrow

# Functions and models; `fields_of` is for `Moments.update` alone.
__all__ = [
    "Entry",
    "Report",
    "SyncBatchNorm",
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm",
    "batch_norm_backward",
    "derf",
    "derf_backward",
    "dynamic_tanh",
    "dynamic_tanh_backward",
    "global_response_norm",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
    "l2_normalize",
    "layer_norm",
    "layer_norm_backward",
    "local_response_norm",
    "moments",
    "replace",
    "report",
    "restore",
    "rms_norm",
    "rms_norm_backward",
    "standardize",
    "weight_norm",
    "weight_standardize",
]

_borrow()
