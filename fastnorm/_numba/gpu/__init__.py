"""Arrays on a GPU: kernels that Numba compiles for CUDA, what launches them, and the libraries.

The folder is not called `cuda`: numba-cuda takes every module with "numba.cuda" in its name for
one of Numba's. Nothing is imported here: `libraries` recognises arrays without Numba.
"""
