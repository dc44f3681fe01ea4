"""How many times as fast whole models are with their norms replaced, trained and in inference.

    python -m benchmarks.torch_models           # 10 minutes; keeps a table in results/
    python -m benchmarks.torch_models --short   # a look that keeps nothing
    python -m benchmarks.torch_models --load 1  # beside one busy program

Random weights, two threads. The original model and the replaced one, alone and with fuse=True, take
turns. Asked of a training step: 1.15 of MobileNet (1.2 beside a busy program), 1.08 of the 3-D
U-Net, 1.15 of the diffusion model's blocks, and 0.98 of each.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fastnorm as fn
import fastnorm.torch as fnt
from fastnorm._bench import text
from fastnorm._bench.timing import Contender, compete
from fastnorm.workers import busy_processes

from . import kept

ROUNDS = 7
ASKED = {"mobilenet": 1.15, "unet 3d": 1.08, "diffusion": 1.15}


class Stage(nn.Module):
    """Two convolutions of a 3-D U-Net, each with instance norm."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(inside, outside, 3, padding=1)
        self.norm1 = nn.InstanceNorm3d(outside, affine=True)
        self.conv2 = nn.Conv3d(outside, outside, 3, padding=1)
        self.norm2 = nn.InstanceNorm3d(outside, affine=True)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Any) -> Any:
        x = self.act(self.norm1(self.conv1(x)))
        return self.act(self.norm2(self.conv2(x)))


class UNet3d(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1, self.down2 = Stage(1, width), Stage(width, 2 * width)
        self.middle = Stage(2 * width, 4 * width)
        self.up2, self.up1 = Stage(6 * width, 2 * width), Stage(3 * width, width)
        self.pool, self.wider = nn.MaxPool3d(2), nn.Upsample(scale_factor=2)
        self.head = nn.Conv3d(width, 2, 1)

    def forward(self, x: Any) -> Any:
        first = self.down1(x)
        second = self.down2(self.pool(first))
        x = self.middle(self.pool(second))
        x = self.up2(torch.cat([self.wider(x), second], 1))
        return self.head(self.up1(torch.cat([self.wider(x), first], 1)))


class DiffusionBlock(nn.Module):
    """A residual block of a diffusion model's U-Net: group norm, SiLU, convolution, twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(32, width), nn.Conv2d(width, width, 3, padding=1)
        self.act = nn.SiLU()

    def forward(self, x: Any) -> Any:
        y = self.conv1(self.act(self.norm1(x)))
        return x + self.conv2(self.act(self.norm2(y)))


def transformers_model(kind: str, **options: Any) -> Any:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**options)
    return getattr(transformers, f"{kind}Model")(config)


def tokens(words: int) -> Any:
    return torch.randint(0, 1000, (2, words), generator=torch.Generator().manual_seed(0))


def images(*shape: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


SMALL_GPT = {"vocab_size": 1000, "n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 256}
SMALL_LLAMA = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
    "num_attention_heads": 4,
}  # fmt: skip
MODELS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "resnet": (
        lambda: transformers_model(
            "ResNet", layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512]
        ),
        lambda: images(8, 3, 128, 128),
    ),
    "mobilenet": (lambda: transformers_model("MobileNetV2"), lambda: images(8, 3, 128, 128)),
    "unet 3d": (UNet3d, lambda: images(1, 1, 48, 48, 48)),
    "diffusion": (
        lambda: nn.Sequential(*[DiffusionBlock(128) for _ in range(3)]),
        lambda: images(4, 128, 32, 32),
    ),
    "convnext": (
        lambda: transformers_model(
            "ConvNext", depths=[2, 2, 4, 2], hidden_sizes=[48, 96, 192, 384], drop_path_rate=0.0
        ),
        lambda: images(4, 3, 128, 128),
    ),
    "gpt2": (
        lambda: transformers_model("GPT2", **SMALL_GPT, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
        lambda: tokens(256),
    ),
    "llama": (lambda: transformers_model("Llama", **SMALL_LLAMA), lambda: tokens(256)),
}


def first_of(output: Any) -> Any:
    return output if isinstance(output, torch.Tensor) else output[0]


def training(model: Any, x: Any) -> Callable[[], None]:
    """A step without the optimizer, whose time is the same for all."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        first_of(model(x)).square().mean().backward()

    return step


def measured(name: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Seconds of each of the three models, for each of two things."""
    torch.manual_seed(0)
    make, given = MODELS[name]
    model, x = make(), given()
    models = {
        "torch": model,
        "replaced": fnt.replace(copy.deepcopy(model)),
        "fused": fnt.replace(copy.deepcopy(model), fuse=True),
    }
    found: dict[str, Any] = {"case": name}
    for what in ("training", "inference"):
        for each in models.values():
            each.train(what == "training")
        if what == "training":
            contenders = {key: Contender(training(each, x)) for key, each in models.items()}
        else:
            contenders = {
                key: Contender(lambda each=each: each(x), torch.inference_mode)
                for key, each in models.items()
            }
        compete(contenders, rounds, seconds)
        found[what] = {key: each.seconds for key, each in contenders.items()}
    return found


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """A page: PyTorch's time, and how many times as fast the others are."""
    page = [
        "How many times as fast whole models are with fastnorm's norms, two threads.",
        "",
        "| model | training step | replaced | fused | inference | replaced | fused |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = []
        for what in ("training", "inference"):
            times = row[what]
            ratios = [times["torch"] / times[key] for key in ("replaced", "fused")]
            cells += [text.seconds(times["torch"]), *(f"{ratio:.2f}" for ratio in ratios)]
        page.append(f"| {row['case']} | {' | '.join(cells)} |")
    return page


def main() -> int:
    parser = kept.parser("torch_models", __doc__)
    parser.add_argument("--load", type=int, default=0, metavar="N", help="busy programs beside (0)")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}")
    given = parser.parse_args()
    fn.set_num_threads(2)
    torch.set_num_threads(2)
    facts, rows = kept.about(), []
    with busy_processes(given.load):
        for name in given.models or MODELS:
            kept.say(name)
            rows.append(measured(name, 3 if given.short else ROUNDS, 0.1 if given.short else 0.5))
    name = "torch_models" + (f"-load-{given.load}" if given.load else "")
    kept.keep(name, facts, rows, lines(rows), given)
    least = {
        row["case"]: max(
            row["training"]["torch"] / row["training"][k] for k in ("replaced", "fused")
        )
        for row in rows
    }
    return int(any(ratio < ASKED.get(case, 0.98) for case, ratio in least.items()))


if __name__ == "__main__":
    sys.exit(main())
