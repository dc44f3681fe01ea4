"""Timing norms beside their peers: what ``fastnorm bench`` and ``benchmarks/`` share."""
