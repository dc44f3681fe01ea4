"""Llama in NumPy and fastnorm: RMSNorm, rotary positions, gated feed-forward networks.

Touvron and others, "LLaMA: Open and Efficient Foundation Language Models", 2023, arXiv:2302.13971.

    python docs/examples/llama.py FOLDER "The norm of a vector is"
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from huggingface import ACTIVATIONS, Array, Cache, main, read

import fastnorm as fn


class Llama:
    """The model in a folder: model(tokens) are its last hidden states, logits(those) the scores."""

    def __init__(self, folder: str | Path) -> None:
        self.config, weights = read(folder, "llama")
        self.weights = {name.removeprefix("model."): w for name, w in weights.items()}
        heads = self.config["num_attention_heads"]
        self.size = self.config.get("head_dim") or self.config["hidden_size"] // heads
        self.frequencies = frequencies(self.config, self.size)

    def __call__(self, tokens: Array, cache: Cache | None = None) -> Array:
        """Return the last hidden states, (N, L, d), of tokens (N, L) that follow the cache."""
        start, length = cache.length if cache else 0, tokens.shape[1]
        angles = np.arange(start, start + length)[:, None] * self.frequencies
        turn = np.exp(1j * angles).astype(np.complex64)  # (L, size / 2)
        x, layers = self.weights["embed_tokens.weight"][tokens], self.config["num_hidden_layers"]
        h = fn.rms_norm(x, x.shape[-1], *self._norm("layers.0.input_layernorm"))
        # each sum is taken in the norm that reads it
        for i in range(layers):
            branch = self._attend(i, h, turn, cache)
            norm = self._norm(f"layers.{i}.post_attention_layernorm")
            h, x = fn.add_rms_norm(x, branch, x.shape[-1], *norm)
            after = f"layers.{i + 1}.input_layernorm" if i + 1 < layers else "norm"
            h, x = fn.add_rms_norm(x, self._feed(i, h), x.shape[-1], *self._norm(after))
        if cache:
            cache.length += length
        return h

    def logits(self, hidden: Array) -> Array:
        """Return a score for each token that may come next."""
        head = self.weights.get("lm_head.weight", self.weights["embed_tokens.weight"])
        return fn.nn.linear(hidden, head)  # untied or tied

    def _norm(self, name: str) -> tuple[Array, float]:
        return self.weights[f"{name}.weight"], self.config["rms_norm_eps"]

    def _linear(self, name: str, x: Array) -> Array:
        bias = self.weights.get(f"layers.{name}.bias")  # most Llamas have none
        return fn.nn.linear(x, self.weights[f"layers.{name}.weight"], bias)

    def _attend(self, i: int, h: Array, turn: Array, cache: Cache | None) -> Array:
        n, length, _ = h.shape
        keys = self.config.get("num_key_value_heads") or self.config["num_attention_heads"]
        # (N, heads of keys, queries for each, L, size): several queries share one key
        q, k, v = (
            self._linear(f"{i}.self_attn.{name}_proj", h)
            .reshape(n, length, keys, -1, self.size)
            .transpose(0, 2, 3, 1, 4)
            for name in "qkv"
        )
        q, k = rotate(q, turn), rotate(k, turn)
        if cache:
            k, v = cache.extend(i, k, v)
        y, _ = fn.nn.attention(q, k, v, causal=True)
        joined = y.transpose(0, 3, 1, 2, 4).reshape(n, length, -1)
        return self._linear(f"{i}.self_attn.o_proj", joined)

    def _feed(self, i: int, h: Array) -> Array:
        gate = self._linear(f"{i}.mlp.gate_proj", h)
        gate = fn.nn.activate(gate, ACTIVATIONS[self.config["hidden_act"]], out=gate)
        gate *= self._linear(f"{i}.mlp.up_proj", h)
        return self._linear(f"{i}.mlp.down_proj", gate)


def frequencies(config: dict[str, Any], size: int) -> Array:
    """Return the angle that each pair of numbers is turned by from one position to the next."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    turned = theta ** -(np.arange(0, size, 2) / size)
    if kind == "llama3":
        # waves longer than the length of early training are stretched, the longest by the factor
        waves = rope["original_max_position_embeddings"] * turned / (2 * np.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = np.clip((waves - low) / (high - low), 0, 1)
        turned = turned * (kept + (1 - kept) / rope["factor"])
    elif kind != "default":
        raise ValueError(f"rotary positions of type {kind!r} are not known here")
    return turned


def rotate(x: Array, turn: Array) -> Array:
    """Turn pairs of numbers, one from each half of a vector, as complex numbers (RoPE).

    Su and others, "RoFormer", 2021, arXiv:2104.09864.
    """
    real, imaginary = np.split(x, 2, -1)
    return np.concatenate(
        [real * turn.real - imaginary * turn.imag, imaginary * turn.real + real * turn.imag], -1
    )


if __name__ == "__main__":
    sys.exit(main(Llama))
