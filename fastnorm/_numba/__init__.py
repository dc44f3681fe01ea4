"""Kernels that Numba compiles on call: `scalar` is their arithmetic, `cpu` and `gpu` use it.

Nothing is imported here: Numba costs a third of a second. No module may have "numba.cuda" in its
dotted name, as `_numba.cuda` would: numba-cuda's import hook sends it round in circles.
"""
