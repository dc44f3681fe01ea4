"""Timing norms and their peers: what ``fastnorm bench`` and ``benchmarks/`` share."""
