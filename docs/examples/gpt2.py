"""GPT-2 in NumPy and fastnorm: Pre-LN blocks and a final norm, as published.

Radford and others, "Language Models are Unsupervised Multitask Learners", 2019.

    python docs/examples/gpt2.py FOLDER "The norm of a vector is"
"""

from __future__ import annotations

import sys
from pathlib import Path

from huggingface import ACTIVATIONS, Array, Cache, main, read

import fastnorm as fn


class GPT2:
    """The model in a folder: model(tokens) are its last hidden states, logits(those) the scores."""

    def __init__(self, folder: str | Path) -> None:
        self.config, weights = read(folder, "gpt2")
        self.weights = {name.removeprefix("transformer."): w for name, w in weights.items()}

    def __call__(self, tokens: Array, cache: Cache | None = None) -> Array:
        """Return the last hidden states, (N, L, n_embd), of tokens (N, L) that follow the cache."""
        start, length = cache.length if cache else 0, tokens.shape[1]
        if start + length > self.config["n_positions"]:
            raise ValueError(f"the model has no more than {self.config['n_positions']} positions")
        w, layers = self.weights, self.config["n_layer"]
        x = w["wte.weight"][tokens] + w["wpe.weight"][start : start + length]
        h = fn.layer_norm(x, x.shape[-1], *self._norm("h.0.ln_1"))
        # each sum is taken in the norm that reads it
        for i in range(layers):
            h, x = fn.add_layer_norm(
                x, self._attend(i, h, cache), x.shape[-1], *self._norm(f"h.{i}.ln_2")
            )
            after = f"h.{i + 1}.ln_1" if i + 1 < layers else "ln_f"
            h, x = fn.add_layer_norm(x, self._feed(i, h), x.shape[-1], *self._norm(after))
        if cache:
            cache.length += length
        return h

    def logits(self, hidden: Array) -> Array:
        """Return a score for each token that may come next."""
        head = self.weights.get("lm_head.weight", self.weights["wte.weight"])  # untied or tied
        return fn.nn.linear(hidden, head)

    def _norm(self, name: str) -> tuple[Array, Array, float]:
        weight, bias = (self.weights[f"{name}.{kind}"] for kind in ("weight", "bias"))
        return weight, bias, self.config["layer_norm_epsilon"]

    def _linear(self, name: str, x: Array) -> Array:
        # GPT-2's matrices lie the other way round
        return fn.nn.linear(x, self.weights[f"{name}.weight"].T, self.weights[f"{name}.bias"])

    def _attend(self, i: int, h: Array, cache: Cache | None) -> Array:
        n, length, d = h.shape
        packed = self._linear(f"h.{i}.attn.c_attn", h)
        heads = packed.reshape(n, length, 3, self.config["n_head"], -1)
        q, k, v = heads.transpose(2, 0, 3, 1, 4)  # each (N, heads, L, size)
        scale = q.shape[-1] ** -0.5 if self.config.get("scale_attn_weights", True) else 1.0
        if self.config.get("scale_attn_by_inverse_layer_idx"):
            scale /= i + 1
        if cache:
            k, v = cache.extend(i, k, v)
        y, _ = fn.nn.attention(q, k, v, causal=True, scale=scale)
        return self._linear(f"h.{i}.attn.c_proj", y.swapaxes(1, 2).reshape(n, length, d))

    def _feed(self, i: int, h: Array) -> Array:
        inner = fn.nn.linear(h, self.weights[f"h.{i}.mlp.c_fc.weight"].T)
        activation = ACTIVATIONS[self.config["activation_function"]]
        bias = self.weights[f"h.{i}.mlp.c_fc.bias"]
        return self._linear(f"h.{i}.mlp.c_proj", fn.nn.activate(inner, activation, bias, out=inner))


if __name__ == "__main__":
    sys.exit(main(GPT2))
