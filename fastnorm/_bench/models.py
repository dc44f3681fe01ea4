"""The norms of a PyTorch model: which functions, on what shapes, how often.

The model is made and run on PyTorch's "meta" device, where tensors have shapes and nothing else: it
has no weights, computes nothing, and nothing is downloaded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from math import prod
from typing import Any

from fastnorm._bench.machine import environment
from fastnorm.arguments import did_you_mean

Shape = tuple[int, ...]
Call = tuple[str, Shape, tuple[tuple[str, Any], ...]]
"""A function's name, the shape of x, and options as in a call of `fastnorm bench`."""

SOURCES = ("torchvision", "transformers")
PIXELS, TOKENS = (1, 3, 224, 224), (1, 128)
# Root mean squares, whatever they are called; a T5LayerNorm does not centre.
RMS = re.compile(r"RMSNorm$|T5LayerNorm$")


@dataclass
class Found:
    """The norms of a model."""

    source: str
    """The library that has the model."""
    given: Shape
    """The shape of its input."""
    calls: Counter[Call] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    """Classes of norms that fastnorm has no function for."""


def norms_of(name: str, given: Shape | None = None, *, training: bool = False) -> Found:
    """Run a model, and keep what its norms are called with.

    It is a classifier of torchvision ("resnet50"), or a kind of model of transformers ("bert") with
    its default configuration. The input is images, or numbers of sequences and tokens; where
    nothing is `given` one image of 224 x 224 pixels, or of what the model is made for, or one
    sequence of 128 tokens. In training batch norms take the statistics of the batch. A ValueError
    says that there is no such model, or that it cannot be run in this way.
    """
    if find_spec("torch") is None:
        raise ValueError("PyTorch is not installed: pip install torch")
    sources = [source for source in SOURCES if find_spec(source) is not None]
    if not sources:
        raise ValueError("there is neither torchvision nor transformers, which have the models")
    known: list[str] = []
    broken = ""
    with environment(HF_HUB_OFFLINE="1"):  # what a library would like to download, it does not
        for source in sources:
            try:
                names, make = _SOURCES[source]()
            except Exception as error:  # built for another PyTorch, for example
                broken += f"; {source} cannot be imported: {_first_line(error)}"
                continue
            if name in names:
                return _run(source, name, make, given, training)
            known += names
    absent = [source for source in SOURCES if source not in sources]
    if absent:
        broken += f"; {absent[0]}, which is not installed, may have it"
    meant = did_you_mean(name, known)
    raise ValueError(f"there is no such model in {' or '.join(sources)}{meant}{broken}")


# --- Where models are -----------------------------------------------------------------------------

Made = tuple[Any, Shape, Callable[[], Any]]
"""A model, the shape of its input, and a call of it."""
Make = Callable[[str, "Shape | None"], Made]


def _torchvision() -> tuple[list[str], Make]:
    import torch
    from torchvision import models

    def make(name: str, given: Shape | None) -> Made:
        model, given = models.get_model(name, weights=None), given or PIXELS
        return model, given, partial(model, torch.empty(given))

    # its classifiers: other models would fetch the weights of a part of them
    return models.list_models(module=models), make


def _transformers() -> tuple[list[str], Make]:
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    transformers.logging.set_verbosity_error()

    def make(name: str, given: Shape | None) -> Made:
        config = transformers.AutoConfig.for_model(name)
        model = transformers.AutoModel.from_config(config, attn_implementation="eager")
        kind = model.main_input_name
        if kind == "input_ids":
            given = given or TOKENS
            tokens = torch.zeros(given, dtype=torch.long)
            more = {"decoder_input_ids": tokens} if config.is_encoder_decoder else {}
            return model, given, partial(model, tokens, **more)
        if kind == "pixel_values":
            side = getattr(config, "image_size", None) or PIXELS[-1]
            sides = tuple(side) if isinstance(side, list | tuple) else (side, side)
            given = given or (1, getattr(config, "num_channels", 3), *sides)
            return model, given, partial(model, torch.empty(given))
        raise ValueError(f"it takes {kind}, expected a model of tokens or images")

    return list(MODEL_MAPPING_NAMES), make


_SOURCES: dict[str, Callable[[], tuple[list[str], Make]]] = {
    "torchvision": _torchvision,
    "transformers": _transformers,
}


# --- What its norms are called with ---------------------------------------------------------------


def _run(source: str, name: str, make: Make, given: Shape | None, training: bool) -> Found:
    import torch

    try:
        with torch.device("meta"), torch.no_grad():
            model, given, call = make(name, given)
            found = Found(source, given)
            model.train(training)
            for module in model.modules():
                if "Norm" in type(module).__name__:
                    module.register_forward_pre_hook(_keeper(found), with_kwargs=True)
            call()
    except Exception as error:  # anything may happen in other people's models
        raise ValueError(f"{source}'s {name} cannot be run: {_first_line(error)}") from error
    if not found.calls:
        raise ValueError(f"{source}'s {name} has no norm that fastnorm has a function for")
    return found


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def _keeper(found: Found) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        call = call_of(module, tuple(x.shape))
        if call is not None:
            found.calls[call] += 1
        elif not any("Norm" in type(part).__name__ for part in module.children()):
            found.left_out[type(module).__name__] += 1

    return keep


def call_of(module: Any, shape: Shape) -> Call | None:
    """What a module computes of an x of this shape; None where fastnorm has no such function."""
    from torch import nn

    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        own = module.training or module.running_mean is None
        return "batch_norm", shape, (("training", own),)
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return "instance_norm", shape, ()
    if isinstance(module, nn.GroupNorm):
        return "group_norm", shape, (("num_groups", module.num_groups),)
    name = "rms_norm" if RMS.search(type(module).__name__) else "layer_norm"
    sizes = getattr(module, "normalized_shape", None)
    if sizes is None and name == "rms_norm":
        sizes = getattr(getattr(module, "weight", None), "shape", None)
    if sizes is None:
        return None
    sizes = tuple(sizes)
    if sizes and shape[-len(sizes) :] == sizes:
        return name, (*shape[: -len(sizes)], prod(sizes)), ()
    if len(sizes) == 1 and name == "layer_norm" and len(shape) > 2 and shape[1] == sizes[0]:
        return name, shape, (("axis", 1),)
    return None
