"""fastnorm: batch, layer, instance, group and RMS normalization for NumPy, fast and right."""

from fastnorm import nn
from fastnorm.backends import backend, get_backend, set_backend
from fastnorm.backward import (
    batch_norm_backward,
    group_norm_backward,
    instance_norm_backward,
    layer_norm_backward,
    rms_norm_backward,
)
from fastnorm.config import VERSION, explain, show_config
from fastnorm.functional import (
    add_layer_norm,
    add_rms_norm,
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
)
from fastnorm.moments import Moments, moments, standardize
from fastnorm.related import (
    dynamic_tanh,
    global_response_norm,
    l2_normalize,
    local_response_norm,
    weight_norm,
    weight_standardize,
)
from fastnorm.runtime import get_num_threads, set_num_threads, threads, trim_memory

__version__ = VERSION

__all__ = [
    "Moments",
    "add_layer_norm",
    "add_rms_norm",
    "backend",
    "batch_norm",
    "batch_norm_backward",
    "dynamic_tanh",
    "explain",
    "get_backend",
    "get_num_threads",
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
    "nn",
    "rms_norm",
    "rms_norm_backward",
    "set_backend",
    "set_num_threads",
    "show_config",
    "standardize",
    "threads",
    "trim_memory",
    "weight_norm",
    "weight_standardize",
]


def __dir__() -> list[str]:
    return ["__version__", *__all__]
