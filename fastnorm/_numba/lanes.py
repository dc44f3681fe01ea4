"""Loops over many numbers side by side, written out: their order is fixed, their speed known.

LLVM vectorises a sum only where it may choose the order, and no loop that stores past the caches.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastnorm._numba.memory import (
    _ADDRESS,
    _WORD,
    AHEAD,
    _multiplied_and_added,
    _prefetch,
    _stored,
)

LANES, PAIRS = 32, 16  # sums of doubles side by side, forward and backward


def _in_lanes(builder: Any, n: int, places: Any, blocks: Any, terms: Any) -> None:
    """Add terms(block) to n doubles side by side at each place, in registers meanwhile."""
    lanes = ir.VectorType(ir.DoubleType(), n)
    places = [builder.inttoptr(place, lanes.as_pointer()) for place in places]
    sums = [cgutils.alloca_once(builder, lanes) for _ in places]
    for place, total in zip(places, sums, strict=True):
        builder.store(builder.load(place, align=8), total)
    with cgutils.for_range(builder, blocks) as loop:
        added = terms(loop.index, *(builder.load(total) for total in sums))
        for total, value in zip(sums, added, strict=True):
            builder.store(value, total)
    for place, total in zip(places, sums, strict=True):
        builder.store(builder.load(total), place, align=8)


def _lanes_at(builder: Any, n: int, address: Any, block: Any, ahead: Any = None) -> Any:
    """A block of n doubles; what lies `ahead` bytes further is asked for in time."""
    lanes = ir.VectorType(ir.DoubleType(), n)
    place = builder.gep(builder.inttoptr(address, lanes.as_pointer()), [block])
    if ahead is not None:
        after = builder.add(builder.ptrtoint(place, _ADDRESS), ahead)
        for line in range(0, 8 * n, 64):
            _prefetch(builder, builder.add(after, _ADDRESS(line)))
    return builder.load(place, align=8)


def _repeated(builder: Any, n: int, value: Any) -> Any:
    """A number side by side n times."""
    unknown = ir.Constant(ir.VectorType(value.type, n), ir.Undefined)
    one = builder.insert_element(unknown, value, _WORD(0))
    return builder.shuffle_vector(one, unknown, ir.Constant(ir.VectorType(_WORD, n), None))


def _folded(builder: Any, v: Any, add: Any) -> Any:
    """One number of many side by side: the upper half of each array of `v` goes to the lower."""
    n = v[0].type.count
    while n > 1:
        n //= 2
        halves = [[_WORD(i) for i in range(k, k + n)] for k in (0, n)]
        kind = ir.VectorType(_WORD, n)
        v = add(
            *([builder.shuffle_vector(a, a, ir.Constant(kind, half)) for a in v] for half in halves)
        )
    return [builder.extract_element(a, _WORD(0)) for a in v]


def _doubles_at(builder: Any, kind: Any, x: Any, block: Any) -> Any:
    """LANES numbers of float32, bfloat16 or float64 as doubles."""
    stored = {"float32": ir.FloatType(), "float64": ir.DoubleType()}.get(
        _stored(kind), ir.IntType(16)
    )
    place = builder.inttoptr(x, ir.VectorType(stored, LANES).as_pointer())
    align = 2 if isinstance(stored, ir.IntType) else kind.instance_type.bitwidth // 8
    v = builder.load(builder.gep(place, [block]), align=align)
    if isinstance(stored, ir.IntType):
        words = ir.VectorType(_WORD, LANES)
        v = builder.shl(builder.zext(v, words), ir.Constant(words, [16] * LANES))
        v = builder.bitcast(v, ir.VectorType(ir.FloatType(), LANES))
    doubles = ir.VectorType(ir.DoubleType(), LANES)
    return v if v.type == doubles else builder.fpext(v, doubles)


@intrinsic
def sums_in_lanes(typingctx: Any, x: Any, blocks: Any, pivot: Any, ahead: Any, kind: Any) -> Any:
    """The sums of x - pivot and of its square, of `blocks` times LANES numbers; not of float16.

    Without a pivot (None) of x itself. In the order of the Cython kernels.
    """
    pair = types.UniTuple(types.float64, 2)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, blocks, pivot, ahead = arguments[:4]
        lanes = ir.VectorType(ir.DoubleType(), LANES)
        size = LANES * kind.instance_type.bitwidth // 8
        sums = [cgutils.alloca_once(builder, lanes) for _ in range(2)]
        for total in sums:
            builder.store(ir.Constant(lanes, [0.0] * LANES), total)
        about = None if signature.args[2] == types.none else _repeated(builder, LANES, pivot)
        with cgutils.for_range(builder, blocks) as loop:
            at = builder.add(builder.add(x, ahead), builder.mul(loop.index, _ADDRESS(size)))
            for line in range(0, size, 64):
                _prefetch(builder, builder.add(at, _ADDRESS(line)))
            d = _doubles_at(builder, kind, x, loop.index)
            d = d if about is None else builder.fsub(d, about)
            builder.store(builder.fadd(builder.load(sums[0]), d), sums[0])
            builder.store(
                _multiplied_and_added(builder, d, d, builder.load(sums[1]), True), sums[1]
            )
        v = [builder.load(total) for total in sums]
        v = _folded(builder, v, lambda a, b: [builder.fadd(*pair) for pair in zip(a, b)])
        return context.make_tuple(builder, pair, v)

    return pair(types.intp, types.intp, pivot, types.intp, kind), codegen


@intrinsic
def exact_squares(typingctx: Any, x: Any, blocks: Any, chain: Any, mean: Any) -> Any:
    """Of doubles, the sum of x - mean, and of its square as two numbers.

    `blocks` times LANES of them: squares are added up in chains of `chain` blocks, and these
    exactly.
    """
    three = types.UniTuple(types.float64, 3)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, blocks, chain, mean = arguments
        lanes = ir.VectorType(ir.DoubleType(), LANES)
        zero = ir.Constant(lanes, [0.0] * LANES)
        mean = _repeated(builder, LANES, mean)
        first, total, rest, short = (cgutils.alloca_once(builder, lanes) for _ in range(4))
        for v in (first, total, rest):
            builder.store(zero, v)

        def two_sum(a: Any, b: Any) -> Any:
            total = builder.fadd(a, b)
            back = builder.fsub(total, a)
            lost = builder.fsub(a, builder.fsub(total, back))
            return total, builder.fadd(lost, builder.fsub(b, back))

        def halve(a: Any, b: Any) -> Any:
            high, lost = two_sum(a[0], b[0])
            low = builder.fadd(builder.fadd(a[1], lost), b[1])
            return [high, low, builder.fadd(a[2], b[2])]

        with cgutils.for_range_slice(builder, _ADDRESS(0), blocks, chain) as (begin, _):
            builder.store(zero, short)
            left = builder.sub(blocks, begin)
            n = builder.select(builder.icmp_signed("<", left, chain), left, chain)
            with cgutils.for_range(builder, n) as loop:
                block = builder.add(begin, loop.index)
                d = builder.fsub(_lanes_at(builder, LANES, x, block, _ADDRESS(AHEAD)), mean)
                builder.store(
                    _multiplied_and_added(builder, d, d, builder.load(short), True), short
                )
                builder.store(builder.fadd(builder.load(first), d), first)
            high, lost = two_sum(builder.load(total), builder.load(short))
            builder.store(high, total)
            builder.store(builder.fadd(builder.load(rest), lost), rest)
        m2, m2_rest, d = _folded(builder, [builder.load(v) for v in (total, rest, first)], halve)
        return context.make_tuple(builder, three, [d, m2, m2_rest])

    return three(types.intp, types.intp, types.intp, types.float64), codegen


@intrinsic
def add_to_lanes(
    typingctx: Any, x: Any, blocks: Any, pivot: Any, ahead: Any, first: Any, second: Any
) -> Any:
    """Add x - pivot, of `blocks` times LANES doubles, and its square to sums side by side.

    `first` and `second` are the addresses of LANES sums each; without the latter (None) only the
    former are taken. A loop over sums in memory would read and write them each time.
    """
    squared = second != types.none

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, blocks, pivot, ahead = arguments[:4]
        pivot = _repeated(builder, LANES, pivot)

        def terms(block: Any, *sums: Any) -> Any:
            d = builder.fsub(_lanes_at(builder, LANES, x, block, ahead), pivot)
            squares = [_multiplied_and_added(builder, d, d, total, True) for total in sums[1:]]
            return [builder.fadd(sums[0], d), *squares]

        _in_lanes(builder, LANES, arguments[4 : 5 + squared], blocks, terms)
        return context.get_dummy_value()

    word, last = types.intp, types.intp if squared else types.none
    return types.none(word, word, types.float64, word, word, last), codegen


@intrinsic
def add_pairs_to_lanes(
    typingctx: Any, x: Any, dy: Any, weight: Any, blocks: Any, mean: Any, rstd: Any, sums: Any
) -> Any:
    """Add g = dy weight and g (x - mean) rstd, of `blocks` times PAIRS doubles, likewise.

    `sums` is the address of PAIRS sums of the former and then of the latter. No weight (None) is 1.
    """
    weighted = weight != types.none

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, dy, weight, blocks = arguments[:4]
        mean, rstd = (_repeated(builder, PAIRS, value) for value in arguments[4:6])
        ahead = _ADDRESS(AHEAD)

        def terms(block: Any, first: Any, second: Any) -> Any:
            g = _lanes_at(builder, PAIRS, dy, block, ahead)
            if weighted:
                g = builder.fmul(g, _lanes_at(builder, PAIRS, weight, block))
            d = builder.fsub(_lanes_at(builder, PAIRS, x, block, ahead), mean)
            d = builder.fmul(d, rstd)
            return builder.fadd(first, g), _multiplied_and_added(builder, g, d, second, True)

        places = arguments[6], builder.add(arguments[6], _ADDRESS(8 * PAIRS))
        _in_lanes(builder, PAIRS, places, blocks, terms)
        return context.get_dummy_value()

    word, number = types.intp, types.float64
    third = word if weighted else types.none
    return types.none(word, word, third, word, number, number, word), codegen


@intrinsic
def step_lines(
    typingctx: Any, x: Any, y: Any, size: Any, hi: Any, r: Any, shift: Any,
    w: Any, b: Any, e: Any, relu: Any, ahead: Any, past: Any,
) -> Any:  # fmt: skip
    """`size` bytes of y = relu(((x - hi) r + shift) w + b + e), 64 at a time.

    A scale or weight is one number or the address of many; None leaves away what it stands for.
    x and e are asked for `ahead` bytes in advance. `past` the caches y is a multiple of 64: LLVM
    itself vectorises no loop that stores there, and asks of any other whether x and y overlap.
    """
    kind = next((v for v in (r, b) if isinstance(v, types.Float)), types.float32)
    n = 512 // kind.bitwidth

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = context.get_value_type(kind)
        lanes = ir.VectorType(number, n)
        there = [argument != types.none for argument in signature.args]

        with cgutils.for_range(builder, builder.udiv(arguments[2], _ADDRESS(64))) as loop:
            at = builder.mul(loop.index, _ADDRESS(64))

            def place(i: int) -> Any:
                return builder.add(arguments[i], at)

            def line(i: int) -> Any:
                if isinstance(signature.args[i], types.Float):
                    return _repeated(builder, n, arguments[i])
                pointer = builder.inttoptr(place(i), lanes.as_pointer())
                return builder.load(pointer, align=kind.bitwidth // 8)

            if there[10]:
                for i in (0, 8) if there[8] else (0,):
                    _prefetch(builder, builder.add(place(i), arguments[10]))
            t = _multiplied_and_added(builder, builder.fsub(line(0), line(3)), line(4), line(5))
            if there[6]:
                t = _multiplied_and_added(builder, t, line(6), line(7))
            if there[8]:
                t = builder.fadd(t, line(8))
            if there[9]:
                nothing = ir.Constant(lanes, [0.0] * n)
                t = builder.select(builder.fcmp_ordered("<", t, nothing), nothing, t)
            align = 64 if there[11] else kind.bitwidth // 8
            stored = builder.store(t, builder.inttoptr(place(1), lanes.as_pointer()), align=align)
            if there[11]:
                stored.set_metadata("nontemporal", builder.module.add_metadata([_WORD(1)]))
        return context.get_dummy_value()

    return types.none(x, y, size, hi, r, shift, w, b, e, relu, ahead, past), codegen
