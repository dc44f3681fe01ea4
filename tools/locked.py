"""Run a command while no other one runs under the same lock: locked.py FILE COMMAND..."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

FAR = 1 << 30  # Windows locks bytes, and others may not read them: one beyond the end of the file


def take(file: BinaryIO) -> bool:
    """Whether the lock is ours now; the system gives it back when this process ends."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(FAR)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def main(path: str, *command: str) -> int:
    """Wait for the lock, run the command, return its exit status."""
    with Path(path).open("rb") as file:
        if not take(file):
            print("another make is at work here: waiting for it", file=sys.stderr)
            while not take(file):
                time.sleep(0.2)
        # open files are passed on: make -j speaks with its children through them
        return subprocess.call(command, close_fds=False)


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
