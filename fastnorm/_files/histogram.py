"""Histograms that merge exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from fastnorm._files.parts import Array


@dataclass
class Histogram:
    """How many numbers of each channel lie in each bin; bins are `width` wide, a power of two.

    Bin i holds the numbers from i * width on, so that histograms of parts merge exactly: the finer
    one's bins are added up in pairs.
    """

    MOST = 512  # bins
    CHANNELS = 1 << 14

    exponent: int = 0
    start: int = 0
    counts: Array = field(default_factory=lambda: np.zeros((0, 0), np.int64))

    @property
    def edges(self) -> Array:
        """The edges of the bins, in the units of the numbers."""
        bins = self.start + np.arange(self.counts.shape[1] + 1, dtype=np.float64)
        return np.ldexp(bins, self.exponent)

    @classmethod
    def of(cls, x: Array, axes: tuple[int, ...], where: Array | None = None) -> Histogram:
        """Return that of an array, over these axes; what is not finite is left out."""

        def in_rows(x: Array) -> Array:
            rows = np.moveaxis(x, axes, range(-len(axes), 0) if axes else ())
            return rows.reshape(math.prod(rows.shape[: x.ndim - len(axes)]), -1)

        rows = in_rows(x)
        if len(rows) > cls.CHANNELS:
            raise ValueError(f"it has {len(rows):,} channels, too many for histograms")
        integers = rows.dtype.kind in "biu"
        wide = rows if integers else rows.astype(np.float64)
        finite = np.ones(rows.shape, bool) if integers else np.isfinite(wide)
        if where is not None:
            finite = finite & in_rows(where)
        if not finite.any():
            return cls(counts=np.zeros((len(rows), 0), np.int64))
        low, high = float(wide[finite].min()), float(wide[finite].max())
        step = high / cls.MOST - low / cls.MOST or max(abs(low), 1e-300) / cls.MOST**2
        exponent = max(math.frexp(step)[1], 0 if integers else -1000)
        bins = np.floor(
            np.ldexp(wide.astype(np.float64), -exponent), where=finite, out=np.zeros(wide.shape)
        )
        start = int(bins[finite].min())
        width = int(bins[finite].max()) - start + 1
        index = (bins - start).astype(np.int64) + width * np.arange(len(rows))[:, np.newaxis]
        counts = np.bincount(index[finite], minlength=width * len(rows))
        return cls(exponent, start, counts.reshape(len(rows), width))

    def merge(self, other: Histogram) -> Histogram:
        """Return the histogram of both."""
        if not self.counts.size or not other.counts.size:
            return other if not self.counts.size else self
        exponent = max(self.exponent, other.exponent)
        while True:
            a, b = self._coarser(exponent), other._coarser(exponent)
            start = min(a.start, b.start)
            end = max(h.start + h.counts.shape[1] for h in (a, b))
            if end - start <= 2 * self.MOST:
                break
            exponent += 1
        counts = np.zeros((len(a.counts), end - start), np.int64)
        for h in (a, b):
            counts[:, h.start - start : h.start - start + h.counts.shape[1]] += h.counts
        return Histogram(exponent, start, counts)

    def _coarser(self, exponent: int) -> Histogram:
        shift = exponent - self.exponent
        bins = (self.start + np.arange(self.counts.shape[1])) >> shift
        counts = np.zeros((len(self.counts), int(bins[-1] - bins[0]) + 1), np.int64)
        np.add.at(counts.T, bins - bins[0], self.counts.T)
        return Histogram(exponent, int(bins[0]), counts)
