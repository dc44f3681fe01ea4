"""What gpt2.py, bert.py and llama.py share: reading a folder, a cache, generation, a command.

A folder is what `save_pretrained` of the transformers package writes, and what is downloaded from
the Hugging Face Hub: config.json and model.safetensors. safetensors reads the latter into NumPy,
ml_dtypes gives NumPy bfloat16, and tokenizers is needed for text.

    pip install 'fastnorm-kernels[models]'
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

import fastnorm as fn

Array: TypeAlias = NDArray[Any]

# Names of activations in a config.json, and fastnorm's.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def read(folder: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return config.json, and all weights by name, in float32.

    `kind` is the model_type that is expected.
    """
    from safetensors.numpy import load_file

    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if config["model_type"] != kind:
        raise ValueError(f"{folder} holds a model of type {config['model_type']!r}, not {kind!r}")
    if config.get("dtype", config.get("torch_dtype")) == "bfloat16":
        import ml_dtypes  # noqa: F401 - importing it makes the type known to NumPy
    index = folder / "model.safetensors.index.json"  # of large models, in several files
    files = {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    weights = {}
    for file in files:
        weights |= {name: w.astype(np.float32) for name, w in load_file(folder / file).items()}
    return config, weights


class Cache:
    """Keys and values of all positions so far, (..., length, size), for each layer."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._kept: dict[int, list[Array]] = {}

    def extend(self, layer: int, key: Array, value: Array) -> list[Array]:
        """Take up those of new positions; return those of all."""
        if layer not in self._kept:
            self._kept[layer] = [
                np.empty((*a.shape[:-2], self.capacity, a.shape[-1]), a.dtype) for a in (key, value)
            ]
        end = self.length + key.shape[-2]
        for kept, new in zip(self._kept[layer], (key, value)):
            kept[..., self.length : end, :] = new
        return [kept[..., :end, :] for kept in self._kept[layer]]


def generate(model: Any, tokens: Array, count: int) -> Iterator[Array]:
    """Yield the most likely next token of each row of `tokens`, (N, L), `count` times."""
    cache = Cache(tokens.shape[1] + count)
    for _ in range(count):
        # the first time all of the prompt, then only what is new
        tokens = model.logits(model(tokens, cache)[:, -1:]).argmax(-1)
        yield tokens[:, 0]


def main(model_of: Callable[[Path], Any], argv: Sequence[str] | None = None) -> int:
    """Complete a text, or a sequence of token numbers, word by word."""
    parser = argparse.ArgumentParser(description="Complete a text, in NumPy.")
    parser.add_argument("folder", type=Path, help="with config.json and model.safetensors")
    parser.add_argument("prompt", help="a text (needs tokenizer.json), or with --tokens numbers")
    parser.add_argument("--tokens", action="store_true", help="take and print token numbers")
    parser.add_argument("--count", type=int, default=50, metavar="N", help="default: 50")
    given = parser.parse_args(argv)
    model = model_of(given.folder)
    if given.tokens:
        tokens, decode = [int(word) for word in given.prompt.split()], str
    else:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(given.folder / "tokenizer.json"))
        tokens = tokenizer.encode(given.prompt).ids
        print(given.prompt, end="", flush=True)
    ends = model.config.get("eos_token_id")
    found: list[int] = []
    shown = ""
    # kernels on one thread: between products they would wait for BLAS's threads, and these for them
    with fn.threads(1):
        for token in generate(model, np.array([tokens]), given.count):
            if token[0] in np.atleast_1d(-1 if ends is None else ends):
                break
            found.append(int(token[0]))
            # a token may be a part of a letter, so all of the text is decoded each time
            text = " ".join(map(decode, found)) if given.tokens else tokenizer.decode(found)
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    return 0


if __name__ == "__main__":
    sys.exit("This is what gpt2.py, bert.py and llama.py share; run one of them.")
