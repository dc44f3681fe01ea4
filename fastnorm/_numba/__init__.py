"""Kernels that Numba compiles on call: `scalar` is their arithmetic, `cpu` and `cuda` use it.

Nothing is imported here: Numba costs a third of a second.
"""
