"""Fetches what other documentations name, and keeps what pages here may link to.

``python docs/inventories/refresh.py [NAME=FILE ...]`` writes NAME.inv; FILE instead of the address.
"""

from __future__ import annotations

import sys
import urllib.request
import zlib
from pathlib import Path

ADDRESSES = {
    "python": "https://docs.python.org/3/objects.inv",
    "numpy": "https://numpy.org/doc/stable/objects.inv",
}
KINDS = ("py:class", "py:data", "py:exception", "py:function", "py:module", "py:type")
# Whole modules of these; the rest of Python's library is not spoken of.
MODULES = {
    "python": ("asyncio", "bool", "contextvars", "dict", "float", "int", "list", "object", "str",
               "tuple", "typing", "collections.abc", "contextlib"),
    "numpy": ("numpy",),
}  # fmt: skip


def kept(name: str, line: str) -> bool:
    """Whether an entry may be linked to."""
    entry, kind, *_ = line.split(" ")
    if kind not in KINDS:
        return False
    error = kind == "py:exception"
    return error or any(entry == m or entry.startswith(f"{m}.") for m in MODULES[name])


def main(*given: str) -> None:
    """Write each inventory with the entries that are kept."""
    files = dict(word.split("=", 1) for word in given)
    for name in files or ADDRESSES:
        address = Path(files[name]).resolve().as_uri() if files else ADDRESSES[name]
        with urllib.request.urlopen(address) as response:
            content = response.read()
        *head, body = content.split(b"\n", 4)
        lines = zlib.decompress(body).decode("utf-8").splitlines()
        lines = [line for line in lines if kept(name, line)]
        packed = zlib.compress("\n".join([*lines, ""]).encode("utf-8"), 9)
        Path(__file__).with_name(f"{name}.inv").write_bytes(b"\n".join([*head, packed]))


if __name__ == "__main__":
    main(*sys.argv[1:])
