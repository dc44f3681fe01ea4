"""Modules that keep their parameters and gradients, for training in NumPy: norms, transformers."""

from fastnorm.nn.functional import (
    activation_backward,
    attention,
    attention_backward,
    cross_entropy,
    linear,
    softmax,
    softmax_backward,
)
from fastnorm.nn.module import LoadedState, Module
from fastnorm.nn.norms import (
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    RMSNorm,
)
from fastnorm.nn.optimizer import Adam
from fastnorm.nn.recalibration import recalibrate
from fastnorm.nn.transformer import TransformerBlock, TransformerEncoder
from fastnorm.related import activate

__all__ = [
    "Adam",
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LoadedState",
    "Module",
    "RMSNorm",
    "TransformerBlock",
    "TransformerEncoder",
    "activate",
    "activation_backward",
    "attention",
    "attention_backward",
    "cross_entropy",
    "linear",
    "recalibrate",
    "softmax",
    "softmax_backward",
]
