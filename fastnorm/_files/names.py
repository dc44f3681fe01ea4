"""Refusals, and names and reasons in a form that is safe to print."""

from __future__ import annotations

from typing import TextIO


class CannotUse(ValueError):
    """What was asked for cannot be done with these paths."""


class CannotRead(Exception):
    """A file that cannot be read, and why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"cannot read {path}: {reason}")


def escaped(text: str) -> str:
    """`text` with what a terminal would obey, or cannot show, written as escapes.

    Names of files and of arrays in them are other people's: a line break would forge a message, and
    an escape code is carried out by the terminal.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escape_of(c) for c in text)


def _escape_of(character: str) -> str:
    # a byte of a name that is not UTF-8 stands in the text as half of a surrogate pair
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def in_json(name: str) -> str:
    """`name` as JSON can keep it: what is not UTF-8 as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def say(text: str, stream: TextIO) -> None:
    """Print lines; characters that the stream's encoding lacks as escapes."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)


def reason_of(error: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if type(error).__name__ == "TokenError":  # of Python's own, which reads the header of an .npy
        return "its header is broken"
    return " ".join(str(error).split()) or type(error).__name__
