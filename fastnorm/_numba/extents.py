"""What memory a kernel may touch: known, and checked, with FASTNORM_CHECK=1 in the environment.

Every load and store of a kernel then looks its address up in a table of extents: those of the
arrays it was given and of each part of its scratch memory. One that lies in none goes to a place
of its own, and the call ends with an AssertionError. That takes a hundred times as long.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numpy.typing import NDArray

Array = NDArray[Any]

CHECKED = os.environ.get("FASTNORM_CHECK", "") not in ("", "0")
GAP = 64 if CHECKED else 0  # bytes behind each part of scratch memory that belong to none

_MOST = 1000  # extents at once
_REST = 512  # bytes for what has no place: more than is loaded at once
# How many extents there are and the first address that lay in none; then their ends.
_table = np.zeros(2 + 2 * _MOST + _REST // 8, np.int64)
_NAME = "fastnorm_extents"
if CHECKED:
    binding.add_symbol(_NAME, _table.ctypes.data)
_one_at_a_time = threading.RLock()


# --- Scratch memory -------------------------------------------------------------------------------


def size_of_part(numbers: Any) -> Any:
    """Bytes that so many numbers of 8 bytes take: whole lines, and the gap behind them."""
    return (8 * numbers + 63) // 64 * 64 + GAP


def size_of_room(parts: tuple[int, ...]) -> int:
    """Bytes of a thread's scratch memory, whose parts are so many numbers each."""
    return sum(size_of_part(numbers) for numbers in parts)


def part_at(memory: Any, parts: Any, i: Any) -> Any:
    """Where part i of a thread's scratch memory begins."""
    for j in range(i):
        memory += size_of_part(parts[j])
    return memory


def spans_of(start: int, parts: tuple[int, ...], threads: int) -> list[tuple[int, int]]:
    """[low, high) of the addresses of each part of each thread's memory, where it is checked."""
    if not CHECKED:
        return []
    rooms = (start + size_of_room(parts) * thread for thread in range(threads))
    return [
        (low := part_at(room, parts, i), low + 8 * parts[i])
        for room in rooms
        for i in range(len(parts))
    ]


# --- The table ------------------------------------------------------------------------------------


@contextmanager
def _watched(*arrays: Array | None, spans: Any = ()) -> Iterator[None]:
    """Let kernels touch these arrays, and [low, high) of addresses, and nothing else."""
    with _one_at_a_time:
        before = int(_table[0])
        known = [np.lib.array_utils.byte_bounds(a) for a in arrays if a is not None and a.size]
        known += list(spans)
        last = before + len(known)
        _table[2 + 2 * before : 2 + 2 * last] = np.array(known, np.int64).ravel()
        _table[:2] = last, 0
        try:
            yield
        finally:
            wrong = int(_table[1])
            _table[:2] = before, 0
        if wrong:
            apart, i = min(
                (max(low - wrong, wrong - high + 1), i) for i, (low, high) in enumerate(known)
            )
            low, high = known[i]
            raise AssertionError(
                f"a kernel of Numba's touched address {wrong:#x}, {max(apart, 0)} bytes outside "
                f"memory {i} of {len(known)}, which is [{low:#x}, {high:#x}): bytes next to it, or "
                "part of a number that begins in it"
            )


def _unwatched(*arrays: Array | None, spans: Any = ()) -> nullcontext[None]:
    return _NOTHING


_NOTHING = nullcontext()
watched = _watched if CHECKED else _unwatched


def checked(builder: Any, address: Any, size: int) -> Any:
    """An address, of which so many bytes are loaded or stored; or of what has no place."""
    if not CHECKED:
        return address
    module, word = builder.module, ir.IntType(64)
    function = module.globals.get("fastnorm_checked")
    if function is None:
        function = ir.Function(module, ir.FunctionType(word, [word, word]), "fastnorm_checked")
        function.linkage = "linkonce_odr"
        function.attributes.add("noinline")
        _build_look_up(module, function, word)
    return builder.call(function, [address, word(size)])


def _build_look_up(module: Any, function: Any, word: Any) -> None:
    table = ir.GlobalVariable(module, ir.ArrayType(word, len(_table)), _NAME)
    entry, head, body, found, following, missing = (
        function.append_basic_block(name)
        for name in ("entry", "head", "body", "found", "following", "missing")
    )
    address, size = function.args
    builder = ir.IRBuilder(entry)

    def place(index: Any) -> Any:
        return builder.gep(table, [word(0), index])

    n = builder.load(place(word(0)))
    builder.cbranch(builder.icmp_signed("==", n, word(0)), found, head)
    builder.position_at_end(head)
    i = builder.phi(word)
    i.add_incoming(word(0), entry)
    builder.cbranch(builder.icmp_signed("<", i, n), body, missing)
    builder.position_at_end(body)
    first = builder.add(builder.mul(i, word(2)), word(2))
    low, high = builder.load(place(first)), builder.load(place(builder.add(first, word(1))))
    after = builder.icmp_signed("<=", low, address)
    before = builder.icmp_signed("<=", builder.add(address, size), high)
    builder.cbranch(builder.and_(after, before), found, following)
    builder.position_at_end(following)
    i.add_incoming(builder.add(i, word(1)), following)
    builder.branch(head)
    builder.position_at_end(found)
    builder.ret(address)
    builder.position_at_end(missing)
    builder.store(address, place(word(1)))
    rest = builder.ptrtoint(place(word(2 + 2 * _MOST)), word)
    # what is stored without the caches must begin at a line
    builder.ret(builder.and_(builder.add(rest, word(63)), word(-64)))
