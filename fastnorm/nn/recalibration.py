"""Exact statistics for batch norm's inference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastnorm.arguments import shown
from fastnorm.moments import Moments
from fastnorm.nn.norms import BatchNorm


def recalibrate(model: Callable[[Any], Any], batches: Iterable[ArrayLike]) -> int:
    r"""Replace running statistics by those of a population: "precise" batch norm.

    .. math:: \mathrm{running\_mean} = \frac{1}{n} \sum x, \quad
              \mathrm{running\_var} = \frac{1}{n - 1} \sum (x - \mathrm{mean})^2

    The sums run over all that a norm gets as its input. A moving average of variances of batches
    misses the spread between their means, and follows weights that have changed since.

    Parameters
    ----------
    model
        A :class:`BatchNorm`, or any callable object whose attributes, and theirs, lead to some.
        Every batch goes through it once. Meanwhile its batch norms normalise by the statistics of
        the batch, as in training; everything else computes in the mode that it is in.
    batches
        What `model` is called with, one after the other. A single norm's are only read, so they may
        be of any size and cut anywhere.

    Returns
    -------
    int
        How many norms have new statistics. ``num_batches_tracked`` stays what it was.

    Raises
    ------
    ValueError
        If there is no batch norm with running statistics, or no data. Nothing has changed then, nor
        after an error in `model`.
    TypeError
        If `batches` cannot be gone through.

    References
    ----------
    Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, arXiv:2105.07576, section 3.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> norm = fn.nn.BatchNorm(1)
    >>> fn.nn.recalibrate(norm, [np.array([[1.0], [3.0]]), np.array([[8.0]])])
    1
    >>> norm.running_mean, norm.running_var
    (array([4.], dtype=float32), array([13.], dtype=float32))
    """
    norms = [norm for norm in _batch_norms(model, set()) if norm.running_mean is not None]
    if not norms:
        raise ValueError(
            f"recalibrate found no BatchNorm with running statistics in {type(model).__name__}; "
            "give it a BatchNorm, or an object whose attributes lead to some"
        )
    try:
        batches = iter(batches)
    except TypeError:
        raise TypeError(
            f"batches is {shown(batches)}, expected arrays one after the other; write [x] for one"
        ) from None
    try:
        for norm in norms:
            norm._recorded = Moments(1)
        for batch in batches:
            if isinstance(model, BatchNorm):
                recorded: Any = model._recorded
                recorded.merge(model._moments(model._checked(batch), batch))
            else:
                model(batch)
        found = [norm._recorded or Moments(1) for norm in norms]
    finally:
        for norm in norms:
            norm._recorded = None
    found = [m if n.comm is None else m.allreduce(n.comm) for n, m in zip(norms, found)]
    for norm, moments in zip(norms, found):
        if not np.all(moments.count > 1):
            raise ValueError(
                f"recalibrate got {moments.count} values for {norm!r}, expected at least 2 for "
                "each channel"
            )
    for norm, moments in zip(norms, found):
        norm.running_mean = np.asarray(moments.mean)
        norm.running_var = np.asarray(moments.var(ddof=1))
    return len(norms)


def _batch_norms(value: Any, seen: set[int]) -> Iterator[BatchNorm]:
    """Every batch norm that attributes, lists and dictionaries lead to, once."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, BatchNorm):
        yield value
        return
    if isinstance(value, Mapping):
        inside: Iterable[Any] = value.values()
    elif isinstance(value, list | tuple | set):
        inside = value
    elif callable(value) and not isinstance(value, type):
        inside = getattr(value, "__dict__", {}).values()
    else:
        return
    for each in inside:
        yield from _batch_norms(each, seen)
