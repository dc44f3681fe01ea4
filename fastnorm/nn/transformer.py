"""Transformer blocks: attention, a feed-forward network, and the norm where it is wanted.

Inside, an array is rows of d_model numbers, one row for each position of each sample. A residual
stream is handed on as two arrays, x and what is still to be added to it, so that the addition
happens in the norm that reads the sum: in the next block, if there is one.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from fastnorm.arguments import ACTIVATIONS, Array, Named, check_eps, check_flag, shown
from fastnorm.nn.bases import count_of
from fastnorm.nn.functional import (
    activation_backward,
    attention,
    attention_backward,
    choice,
    linear,
)
from fastnorm.nn.module import check_room, parameter_type
from fastnorm.nn.stream import (
    NORMS,
    PLACEMENTS,
    Gradients,
    Norm,
    Placement,
    Scratch,
    Transformer,
    total_of,
)
from fastnorm.nn.weights import Random, together
from fastnorm.related import activate

_LATER: Any = object()  # instead of a block's rng: whoever makes it draws its weights


class TransformerBlock(Transformer):
    r"""Multi-head self-attention and a feed-forward network, with residuals and norms.

    With f the attention and then the network :math:`W_2 \, g(W_1 x + b_1) + b_2`, by `placement`:

    .. math::

        \mathrm{pre:}  \quad & x \leftarrow x + f(\mathrm{norm}(x)) \\
        \mathrm{post:} \quad & x \leftarrow \mathrm{norm}(x + f(x)) \\
        \mathrm{peri:} \quad & x \leftarrow x + \mathrm{norm}'(f(\mathrm{norm}(x))) \\
        \mathrm{deepnorm:} \quad & x \leftarrow \mathrm{norm}(\alpha x + f(x)),
            \quad \alpha = (2 N)^{1/4}

    Parameters are named as in ``torch.nn.TransformerEncoderLayer``, with "pre" that of
    ``norm_first=True`` and with "post" of ``norm_first=False``, and load from it; the norms of
    "peri" that it has not are ``post_norm1`` and ``post_norm2``. There is no dropout. In inference
    (:meth:`eval`) intermediate results are not kept, which is faster; :meth:`backward` then
    computes them again.

    Weights begin uniform, of variance 2 / (inputs + outputs) (Xavier), those of query, key and
    value each by itself, and biases as 0. With "deepnorm", the weights of the value, of the
    attention's output and of the network are multiplied by :math:`(8 N)^{-1/4}`.

    Parameters
    ----------
    d_model
        The size of a position's vector.
    num_heads
        How many attentions there are side by side; a divisor of `d_model`.
    dim_feedforward
        The hidden size of the network; None is ``4 * d_model``.
    placement
        Where the norms are: ``"pre"``, ``"post"``, ``"peri"`` or ``"deepnorm"``.
    norm
        ``"layer"`` or ``"rms"``.
    activation
        g: ``"relu"``, ``"relu6"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
    causal
        Whether a position sees only itself and those before it.
    eps
        Of the norms.
    rng
        A generator, or the seed of one, for the first weights. Large ones are drawn on several
        threads; they are those that the generator gives in order all the same, and one that is
        given goes on after them.
    num_layers
        N, how many blocks the model has: "deepnorm" needs to know.
    bias
        Whether matrices and layer norms have biases.
    dtype
        Of the parameters, whatever that of `x`.

    Raises
    ------
    ValueError
        For sizes and options that cannot be; on a call, for an `x` or masks that do not fit.

    References
    ----------
    Vaswani and others, "Attention Is All You Need", 2017, arXiv:1706.03762 ("post"). Xiong and
    others, "On Layer Normalization in the Transformer Architecture", 2020, arXiv:2002.04745
    ("pre"). Kim and others, "Peri-LN", 2025, arXiv:2502.02732. Wang and others, "DeepNet: Scaling
    Transformers to 1,000 Layers", 2022, arXiv:2203.00555 ("deepnorm").

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> m = fn.nn.TransformerBlock(16, 4, causal=True, rng=0)
    >>> x = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)
    >>> y = m(x)
    >>> dx = m.backward(y)
    >>> y.shape, m.grad["linear1.weight"].shape
    ((2, 5, 16), (64, 16))
    """

    _mask_name = "src_mask"
    _shown = (
        "d_model", "num_heads", "dim_feedforward", "placement", "norm", "activation", "causal",
        "eps", "bias",
    )  # fmt: skip

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        dim_feedforward: int | None = None,
        *,
        placement: Placement = "pre",
        norm: Norm = "layer",
        activation: Named = "gelu",
        causal: bool = False,
        eps: float = 1e-5,
        rng: Random = None,
        num_layers: int = 1,
        bias: bool = True,
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__()
        self.d_model = d = count_of(d_model, "d_model")
        self.num_heads = count_of(num_heads, "num_heads")
        if d % self.num_heads:
            raise ValueError(
                f"num_heads is {shown(num_heads)}, expected a divisor of d_model, which is "
                f"{shown(d_model)}"
            )
        hidden = 4 * d if dim_feedforward is None else dim_feedforward
        self.dim_feedforward = count_of(hidden, "dim_feedforward")
        self.placement = choice(placement, "placement", PLACEMENTS)
        self.norm = choice(norm, "norm", tuple(NORMS))
        self.activation: Named = choice(activation, "activation", ACTIVATIONS)
        self.causal = check_flag(causal, "causal")
        self.eps = check_eps(eps)
        self.num_layers = count_of(num_layers, "num_layers")
        self.bias = check_flag(bias, "bias")
        self._alpha = (2 * self.num_layers) ** 0.25 if placement == "deepnorm" else 1.0
        self._first = placement in ("pre", "peri")  # norms before attention and network
        kind = parameter_type(dtype)

        sizes = {
            "self_attn.in_proj": (3 * d, d),
            "self_attn.out_proj": (d, d),
            "linear1": (self.dim_feedforward, d),
            "linear2": (d, self.dim_feedforward),
        }
        check_room(type(self).__name__, sizes.values(), kind)
        for name, matrix in zip(sizes, together(sizes.values(), kind)):
            joint = "_" if name == "self_attn.in_proj" else "."
            self._add_parameter(f"{name}{joint}weight", matrix)
            if self.bias:
                self._add_parameter(f"{name}{joint}bias", np.zeros(len(matrix), kind))
        norms = ("norm1", "norm2", "post_norm1", "post_norm2")
        for name in norms if placement == "peri" else norms[:2]:
            self._add_parameter(f"{name}.weight", np.ones(d, kind))
            if self.bias and norm == "layer":
                self._add_parameter(f"{name}.bias", np.zeros(d, kind))
        if rng is not _LATER:
            self.reset_parameters(rng)

    def __call__(
        self,
        x: ArrayLike,
        src_mask: ArrayLike | None = None,
        src_key_padding_mask: ArrayLike | None = None,
    ) -> Array:
        """Return the result for `x`, and keep what :meth:`backward` needs: `x` itself included.

        Parameters
        ----------
        x
            (..., L, d_model).
        src_mask
            (L, L) or (samples * num_heads, L, L): True, or minus infinity, where the position of
            the row may not see that of the column. Floats are added to the scores.
        src_key_padding_mask
            (..., L): True, or minus infinity, at positions that nobody may see.

        Returns
        -------
        y
            The shape and dtype of `x`.

        Raises
        ------
        ValueError
            For shapes that do not fit.
        TypeError
            For dtypes other than real numbers, and for masks of integers.
        """
        y, self._saved = self._forward(x, src_mask, src_key_padding_mask)
        return y

    # --- Forward ----------------------------------------------------------------------------------

    def _run(
        self, x: Array, samples: int, mask: Array | None, scratch: Scratch
    ) -> tuple[Array, Any]:
        x, branch, saved = self._through(x, None, samples, mask, scratch)
        return total_of(x, branch), saved

    def _through(
        self, x: Array, branch: Array | None, samples: int, mask: Array | None, scratch: Scratch
    ) -> tuple[Array, Array | None, list[Any]]:
        """Take a stream x + branch through the block: return it, and what is kept of each part."""
        saved = []
        for number in "12":
            h, total = x, None
            if self._first:
                into = scratch("normed", *x.shape), scratch("stream", *x.shape)
                h, x = self._normed(f"norm{number}", x, branch, *into)
                total = x
            if number == "1":
                branch, inside = self._attend(h, samples, mask, scratch)
            else:
                branch, inside = self._feed(h, scratch)
            after = branch
            if self.placement == "peri":
                branch = scratch("branch", *x.shape)
                branch, _ = self._normed(f"post_norm{number}", after, out=branch)
            if not self._first:
                into = scratch("normed", *x.shape), scratch("stream", *x.shape)
                start = x if self._alpha == 1 else np.multiply(x, self._alpha, out=into[1])
                x, total = self._normed(f"norm{number}", start, branch, *into)
                branch = None
            if scratch.keep:
                saved.append((h, total, after, inside))
        return x, branch, saved

    def _linear(self, name: str, x: Array, out: Array) -> Array:
        return linear(x, self._of(f"{name}weight", x), self._of(f"{name}bias", x), out=out)

    def _heads(self, packed: Array, samples: int) -> Array:
        """Rows of one or more vectors for each head as (vectors, samples, heads, L, size)."""
        size = self.d_model // self.num_heads
        vectors = packed.shape[1] // self.d_model
        length = len(packed) // max(samples, 1)
        split = packed.reshape(samples, length, vectors, self.num_heads, size)
        return split.transpose(2, 0, 3, 1, 4)

    def _attend(
        self, h: Array, samples: int, mask: Array | None, scratch: Scratch
    ) -> tuple[Array, Any]:
        packed = self._linear("self_attn.in_proj_", h, scratch("packed", len(h), 3 * self.d_model))
        q, k, v = self._heads(packed, samples)
        length = q.shape[-2]
        heads = self.num_heads
        joined = scratch("joined", *h.shape)
        (y,) = self._heads(joined, samples)
        some = self._at_once(samples, length)
        weights = scratch("weights", samples if scratch.keep else some, heads, length, length)
        for i in range(0, samples, some):
            part = slice(i, min(i + some, samples))
            attention(
                q[part],
                k[part],
                v[part],
                mask if mask is None or len(mask) == 1 else mask[part],
                causal=self.causal,
                out=y[part],
                weights=weights[part if scratch.keep else slice(part.stop - i)],
            )
        branch = self._linear("self_attn.out_proj.", joined, scratch("branch", *h.shape))
        return branch, (packed, weights, joined)

    def _feed(self, h: Array, scratch: Scratch) -> tuple[Array, Any]:
        hidden = scratch("hidden", len(h), self.dim_feedforward)
        linear(h, self._of("linear1.weight", h), out=hidden)
        # kept for the way back, the result goes into another array
        out = scratch("active", *hidden.shape) if scratch.keep else hidden
        bias = self._of("linear1.bias", h)
        active = activate(hidden, self.activation, bias, out=out)
        branch = self._linear("linear2.", active, scratch("branch", *h.shape))
        return branch, (hidden, active)

    # --- Backward ---------------------------------------------------------------------------------

    def _run_backward(self, dy: Array, samples: int, saved: Any) -> tuple[Array, Gradients]:
        gradients: Gradients = {}
        for number, (h, total, after, inside) in zip("21", reversed(saved)):
            dsum = dy  # of x + branch
            if not self._first:
                dsum = self._normed_backward(f"norm{number}", dy, total, gradients)
            dbranch = dsum
            if self.placement == "peri":
                dbranch = self._normed_backward(f"post_norm{number}", dsum, after, gradients)
            if number == "1":
                dh = self._attend_backward(dbranch, samples, h, inside, gradients)
            else:
                dh = self._feed_backward(dbranch, h, inside, gradients)
            if self._first:
                dh = self._normed_backward(f"norm{number}", dh, total, gradients)
            dh += dsum if self._alpha == 1 else dsum * dsum.dtype.type(self._alpha)
            dy = dh
        return dy, gradients

    def _linear_backward(self, name: str, dy: Array, x: Array, gradients: Gradients) -> Array:
        gradients[f"{name}weight"] = dy.T @ x
        gradients[f"{name}bias"] = dy.sum(0)
        return dy @ self._of(f"{name}weight", x)

    def _attend_backward(
        self, dy: Array, samples: int, h: Array, inside: Any, gradients: Gradients
    ) -> Array:
        packed, weights, joined = inside
        djoined = self._linear_backward("self_attn.out_proj.", dy, joined, gradients)
        dpacked = np.empty_like(packed)
        dq, dk, dv = self._heads(dpacked, samples)
        q, k, v = self._heads(packed, samples)
        attention_backward(self._heads(djoined, samples)[0], q, k, v, weights, out=(dq, dk, dv))
        return self._linear_backward("self_attn.in_proj_", dpacked, h, gradients)

    def _feed_backward(self, dy: Array, h: Array, inside: Any, gradients: Gradients) -> Array:
        hidden, active = inside
        dactive = self._linear_backward("linear2.", dy, active, gradients)
        bias = self._of("linear1.bias", h)
        x = hidden if bias is None else hidden + bias
        dhidden = activation_backward(dactive, x, active, self.activation)
        return self._linear_backward("linear1.", dhidden, h, gradients)


class TransformerEncoder(Transformer):
    r"""A stack of transformer blocks, and with "pre" and "peri" a norm of the last sum.

    .. math:: y = \mathrm{norm}(\mathrm{block}_N(\ldots \mathrm{block}_1(x)))

    The sum that ends a block is taken in the norm that begins the next, in one pass. Parameters are
    named as in ``torch.nn.TransformerEncoder`` and load from it. `layers` holds the blocks; their
    parameters and gradients are those of the encoder, not copies.

    Parameters
    ----------
    num_layers
        How many blocks.
    d_model, num_heads, dim_feedforward, placement, norm, activation, causal, eps, rng, bias, dtype
        As for :class:`TransformerBlock`.
    final_norm
        Whether a norm ends the stack; None is yes for "pre" and "peri", whose stream is not normed
        otherwise. ``torch.nn.TransformerEncoder`` has one if it is given one.

    Raises
    ------
    ValueError
        For sizes and options that cannot be; on a call, for an `x` or masks that do not fit.

    References
    ----------
    Those of :class:`TransformerBlock`.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> m = fn.nn.TransformerEncoder(2, 16, 4, placement="post", activation="relu", rng=0)
    >>> x = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)
    >>> padding = np.arange(5) >= np.array([[5], [3]])  # the second sample is of 3 positions
    >>> m(x, src_key_padding_mask=padding).shape
    (2, 5, 16)
    >>> sorted(m.grad)[:2]
    ['layers.0.linear1.bias', 'layers.0.linear1.weight']
    """

    _mask_name = "mask"

    def __init__(
        self,
        num_layers: int,
        d_model: int,
        num_heads: int,
        dim_feedforward: int | None = None,
        *,
        placement: Placement = "pre",
        norm: Norm = "layer",
        activation: Named = "gelu",
        causal: bool = False,
        eps: float = 1e-5,
        rng: Random = None,
        final_norm: bool | None = None,
        bias: bool = True,
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__()
        self.num_layers = count_of(num_layers, "num_layers")
        self.layers = [
            TransformerBlock(
                d_model,
                num_heads,
                dim_feedforward,
                placement=placement,
                norm=norm,
                activation=activation,
                causal=causal,
                eps=eps,
                rng=_LATER,
                num_layers=num_layers,
                bias=bias,
                dtype=dtype,
            )
            for _ in range(self.num_layers)
        ]
        for i, layer in enumerate(self.layers):
            for name, array in layer.parameters().items():
                self._parameters[f"layers.{i}.{name}"] = array
                self.grad[f"layers.{i}.{name}"] = layer.grad[name]
        block = self.layers[0]
        for name in ("d_model", "num_heads", "dim_feedforward", "placement", "norm", "eps"):
            setattr(self, name, getattr(block, name))
        self.final_norm = (
            placement in ("pre", "peri")
            if final_norm is None
            else check_flag(final_norm, "final_norm")
        )
        for name, array in block.parameters().items():
            if self.final_norm and name.startswith("norm1."):  # alike: of ones, and zeros
                self._add_parameter(name.replace("norm1", "norm"), array.copy())
        self.reset_parameters(rng)

    def __call__(
        self,
        x: ArrayLike,
        mask: ArrayLike | None = None,
        src_key_padding_mask: ArrayLike | None = None,
    ) -> Array:
        """Return the result for `x`, as a :class:`TransformerBlock` does: `mask` is its `src_mask`.

        Parameters, result, errors, and what is kept for :meth:`backward` are those of a block.
        """
        y, self._saved = self._forward(x, mask, src_key_padding_mask)
        return y

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all blocks to training, or with False to inference; return the module."""
        for layer in self.layers:
            layer.train(mode)
        return super().train(mode)

    def _run(
        self, x: Array, samples: int, mask: Array | None, scratch: Scratch
    ) -> tuple[Array, Any]:
        branch, kept = None, []
        for layer in self.layers:
            x, branch, saved = layer._through(x, branch, samples, mask, scratch)
            kept.append(saved)
        if self.final_norm:
            y, total = self._normed("norm", x, branch, total=scratch("stream", *x.shape))
            return y, (kept, total)
        return total_of(x, branch), (kept, None)

    def _run_backward(self, dy: Array, samples: int, saved: Any) -> tuple[Array, Gradients]:
        kept, total = saved
        gradients: Gradients = {}
        if self.final_norm:
            dy = self._normed_backward("norm", dy, total, gradients)
        for i, layer in reversed(list(enumerate(self.layers))):
            dy, found = layer._run_backward(dy, samples, kept[i])
            gradients |= {f"layers.{i}.{name}": array for name, array in found.items()}
        return dy, gradients

    def _options(self) -> dict[str, Any]:
        shown = {"num_layers": self.num_layers} | self.layers[0]._options()
        return shown | {"final_norm": self.final_norm}
