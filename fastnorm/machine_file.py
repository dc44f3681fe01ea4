"""The file in which `fastnorm tune` keeps what it measured, for every later process.

It lies in the user's configuration folder and has a ``name = value`` on each line. It is read when
fastnorm is imported, so nothing in it, and nothing in its place, may raise, wait or take long.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

MAX_BYTES = 1 << 14
FORMAT = "1"


class Unusable(Exception):
    """There is such a file, and why it cannot be used."""


def path() -> Path | None:
    """Where it is; None where the user has no folder for settings."""
    try:
        home = Path.home()
    except RuntimeError:
        home = Path()
    if sys.platform == "win32":
        folder = Path(os.environ.get("APPDATA", ""))
    elif sys.platform == "darwin":
        folder = home / "Library" / "Application Support"
    else:
        folder = Path(os.environ.get("XDG_CONFIG_HOME", ""))
        if not folder.is_absolute():  # as its specification says
            folder = home / ".config"
    return folder / "fastnorm" / "machine.txt" if folder.is_absolute() else None


def shown(file: Path) -> str:
    """Its name, in which nothing moves the cursor of a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(file))


def read(file: Path) -> dict[str, str] | None:
    """What the file says; None where there is none, an `Unusable` where it is no such file."""
    text = text_of(file)
    return None if text is None else _facts(text)


def text_of(file: Path) -> bytes | None:
    """What is in a small file; None where there is none, an `Unusable` where it is something else.

    That neither waits nor takes much memory, whatever lies there.
    """
    # a pipe without a writer would be waited for
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        opened = os.open(file, flags)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        if not _is_there(file):  # a folder above it is another user's
            return None
        raise Unusable("it may not be read") from None
    except OSError as error:
        raise Unusable(error.strerror or str(error)) from None
    try:
        found = os.fstat(opened)
        if not stat.S_ISREG(found.st_mode):
            raise Unusable("it is no file")
        if found.st_size > MAX_BYTES:
            raise Unusable(f"it has more than {MAX_BYTES} bytes")
        text = os.read(opened, MAX_BYTES)
    except OSError as error:
        raise Unusable(error.strerror or str(error)) from None
    finally:
        os.close(opened)
    return text


def _facts(text: bytes) -> dict[str, str]:
    facts: dict[str, str] = {}
    try:
        lines = text.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise Unusable("it is damaged: no text") from None
    for i, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, equals, value = (word.strip() for word in line.partition("="))
        if not equals or not name.isidentifier() or name in facts:
            raise Unusable(f"it is damaged: line {i} is no name = value")
        facts[name] = value
    if facts.pop("format", "") != FORMAT:
        raise Unusable("it is damaged, or of another version of fastnorm")
    return facts


def _is_there(file: Path) -> bool:
    try:
        file.lstat()
    except OSError:
        return False
    return True


def write(file: Path, facts: Mapping[str, object], comments: list[str]) -> None:
    """Put a file there, whole or not at all."""
    import tempfile  # takes as long as all that is imported for reading

    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lines = [f"# {line}".rstrip() for line in comments]
    lines += [f"{fact} = {value}" for fact, value in {"format": FORMAT, **facts}.items()]
    handle, name = tempfile.mkstemp(dir=file.parent, prefix="machine-", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as temporary:
            temporary.write("\n".join(lines) + "\n")
        Path(name).replace(file)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise


def remove(file: Path) -> bool:
    """Take it away; whether there was one."""
    try:
        file.unlink()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
