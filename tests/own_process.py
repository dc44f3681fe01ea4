"""Tests that are a Python process each, begun before all others and run meanwhile.

Such a test is marked ``own_process(*arguments, **environment)`` and takes the fixture of that name:
the process when it has ended. They run one after the other, so that the others keep a processor.

python -m tests.own_process FOLDER    runs what FOLDER/processes.json lists; the tests start this
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from .helpers import PATIENCE, ROOT, run_python

# Of fewer tests nobody waits for long: each process is then started by its test.
MANY = 200


def key_of(mark: pytest.Mark) -> list[object]:
    return [list(mark.args), mark.kwargs]


class Begun:
    """The processes of some marks, in their order."""

    def __init__(self, marks: list[pytest.Mark]) -> None:
        self.keys = [key_of(mark) for mark in marks]
        self.folder = Path(tempfile.mkdtemp())
        (self.folder / "processes.json").write_text(json.dumps(self.keys), encoding="utf-8")
        self.driver = subprocess.Popen(
            [sys.executable, "-m", "tests.own_process", str(self.folder)],
            cwd=ROOT,
            start_new_session=True,
        )

    def result(self, mark: pytest.Mark) -> subprocess.CompletedProcess[str]:
        """One of them, when it has ended."""
        path = self.folder / f"{self.keys.index(key_of(mark))}.json"
        end = time.monotonic() + len(self.keys) * PATIENCE
        while not path.exists():
            assert self.driver.poll() is None or path.exists(), "the processes have ended early"
            assert time.monotonic() < end
            time.sleep(0.05)
        code, out, err = json.loads(path.read_text(encoding="utf-8"))
        return subprocess.CompletedProcess(mark.args, code, out, err)

    def end(self) -> None:
        """End what still runs: the tests have been stopped."""
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError):
                os.killpg(self.driver.pid, signal.SIGKILL)
        self.driver.kill()
        self.driver.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def begin(items: list[pytest.Item]) -> Begun | None:
    """Begin the processes of the chosen tests, if these are many and there is a processor left."""
    marks = [
        mark
        for item in items
        if (mark := item.get_closest_marker("own_process")) is not None
        and not any(skip.args[0] for skip in item.iter_markers("skipif"))
    ]
    if not marks or len(items) < MANY or (os.cpu_count() or 1) < 2:
        return None
    return Begun(marks)


def main(folder: Path) -> None:
    keys = json.loads((folder / "processes.json").read_text(encoding="utf-8"))
    for i, (arguments, environment) in enumerate(keys):
        run = run_python(*arguments, **environment)
        new = folder / f"{i}.new"
        new.write_text(json.dumps([run.returncode, run.stdout, run.stderr]), encoding="utf-8")
        new.rename(folder / f"{i}.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
