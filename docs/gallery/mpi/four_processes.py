"""Each of four MPI processes sees one file of images, and all of them know the whole.

In a folder with 0.npy to 3.npy, with mpi4py's own option, so that an error in one process ends all:

    mpiexec -n 4 python -m mpi4py four_processes.py
"""

import numpy as np
from mpi4py import MPI

import fastnorm as fn

comm = MPI.COMM_WORLD
mine = np.load(f"{comm.rank}.npy")  # (images, 8, 8), in each process another number of images

own = fn.Moments.from_array(mine, axis=0)
whole = own.allreduce(comm)  # of all images, in each process

norm = fn.nn.BatchNorm(64, comm=comm)
y = norm(mine.reshape(-1, 64))  # by the statistics of all images

np.savez(f"{comm.rank}.npz", own=(own.mean, own.std()), whole=(whole.mean, whole.std()), y=y)
