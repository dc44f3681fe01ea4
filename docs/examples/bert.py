"""BERT in NumPy: fn.nn.TransformerEncoder with the norms after the sums, as published.

Devlin and others, "BERT: Pre-training of Deep Bidirectional Transformers", 2018, arXiv:1810.04805.

    python docs/examples/bert.py FOLDER "The norm of a [MASK] is a number."
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from huggingface import ACTIVATIONS, Array, read

import fastnorm as fn

# Names in a block: fastnorm's (those of torch.nn), and BERT's.
NAMES = {
    "self_attn.out_proj": "attention.output.dense",
    "linear1": "intermediate.dense",
    "linear2": "output.dense",
    "norm1": "attention.output.LayerNorm",
    "norm2": "output.LayerNorm",
}


class BERT:
    """The model in a folder: model(tokens) are its hidden states, logits(those) the scores."""

    def __init__(self, folder: str | Path) -> None:
        self.config, weights = read(folder, "bert")
        # older files call a norm's weight gamma and its bias beta
        ends = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
        self.weights = {}
        for name, w in weights.items():
            for old, new in ends.items():
                name = name.replace(old, new)
            self.weights[name.removeprefix("bert.")] = w
        c = self.config
        self.encoder = fn.nn.TransformerEncoder(
            c["num_hidden_layers"],
            c["hidden_size"],
            c["num_attention_heads"],
            c["intermediate_size"],
            placement="post",
            activation=ACTIVATIONS[c["hidden_act"]],
            eps=c["layer_norm_eps"],
        ).eval()
        state = {}
        for i in range(c["num_hidden_layers"]):
            for kind in ("weight", "bias"):
                own, theirs = f"layers.{i}.", f"encoder.layer.{i}."
                parts = [
                    self.weights[f"{theirs}attention.self.{part}.{kind}"]
                    for part in ("query", "key", "value")
                ]
                state[f"{own}self_attn.in_proj_{kind}"] = np.concatenate(parts)
                for name, old in NAMES.items():
                    state[f"{own}{name}.{kind}"] = self.weights[f"{theirs}{old}.{kind}"]
        self.encoder.load_state_dict(state)

    def __call__(
        self, tokens: Array, mask: Array | None = None, types: Array | None = None
    ) -> Array:
        """Return the hidden states, (N, L, d), of tokens (N, L).

        `mask` is 0 at padding, `types` is 0 in the first and 1 in the second of two sentences.
        """
        w = self.weights
        x = w["embeddings.word_embeddings.weight"][tokens]
        x += w["embeddings.token_type_embeddings.weight"][0 if types is None else types]
        x += w["embeddings.position_embeddings.weight"][: tokens.shape[1]]
        x = self._norm("embeddings.LayerNorm", x)
        return self.encoder(x, src_key_padding_mask=None if mask is None else mask == 0)

    def logits(self, hidden: Array) -> Array:
        """Return a score for each token that may stand there."""
        name = "cls.predictions.transform"
        inner = fn.nn.linear(hidden, self.weights[f"{name}.dense.weight"])
        activation = ACTIVATIONS[self.config["hidden_act"]]
        inner = fn.nn.activate(inner, activation, self.weights[f"{name}.dense.bias"], out=inner)
        inner = self._norm(f"{name}.LayerNorm", inner)
        head, words = "cls.predictions.decoder.weight", "embeddings.word_embeddings.weight"
        bias = self.weights.get("cls.predictions.decoder.bias")
        if bias is None:
            bias = self.weights["cls.predictions.bias"]
        return fn.nn.linear(inner, self.weights.get(head, self.weights[words]), bias)

    def pooled(self, hidden: Array) -> Array:
        """Return the state of each sequence's first token for tasks about the whole, (N, d)."""
        name = "pooler.dense"
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return np.tanh(fn.nn.linear(hidden[:, 0], weight, bias))

    def _norm(self, name: str, x: Array) -> Array:
        weight, bias = (self.weights[f"{name}.{kind}"] for kind in ("weight", "bias"))
        return fn.layer_norm(x, x.shape[-1], weight, bias, self.config["layer_norm_eps"])


def main(argv: Sequence[str] | None = None) -> int:
    """Say what may stand where a text has [MASK]."""
    from tokenizers import Tokenizer

    parser = argparse.ArgumentParser(description="Fill in [MASK], in NumPy.")
    parser.add_argument("folder", type=Path, help="with config.json and model.safetensors")
    parser.add_argument("text", help="with [MASK] in it")
    given = parser.parse_args(argv)
    tokenizer = Tokenizer.from_file(str(given.folder / "tokenizer.json"))
    model = BERT(given.folder)
    tokens = np.array([tokenizer.encode(given.text).ids])
    shares = fn.nn.softmax(model.logits(model(tokens)))
    for place in np.argwhere(tokens[0] == tokenizer.token_to_id("[MASK]"))[:, 0]:
        best = np.argsort(-shares[0, place])[:5]
        print(", ".join(f"{tokenizer.decode([t])} {shares[0, place, t]:.3f}" for t in best))
    return 0


if __name__ == "__main__":
    sys.exit(main())
