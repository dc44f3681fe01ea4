"""fastnorm: batch, layer, instance, group and RMS normalization for NumPy, fast and right."""

from fastnorm.backends import (
    backend,
    get_backend,
    get_num_threads,
    set_backend,
    set_num_threads,
    show_config,
    threads,
)
from fastnorm.functional import (
    add_layer_norm,
    add_rms_norm,
    batch_norm,
    dynamic_tanh,
    global_response_norm,
    group_norm,
    instance_norm,
    l2_normalize,
    layer_norm,
    local_response_norm,
    rms_norm,
    weight_norm,
    weight_standardize,
)

__version__ = "0.1.0"

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "backend",
    "batch_norm",
    "dynamic_tanh",
    "get_backend",
    "get_num_threads",
    "global_response_norm",
    "group_norm",
    "instance_norm",
    "l2_normalize",
    "layer_norm",
    "local_response_norm",
    "rms_norm",
    "set_backend",
    "set_num_threads",
    "show_config",
    "threads",
    "weight_norm",
    "weight_standardize",
]
