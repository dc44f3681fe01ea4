"""Loops over many numbers side by side, written out: their order is fixed, their speed known.

LLVM vectorises a sum only where it may choose the order, and no loop of non-temporal stores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastnorm._numba.extents import checked
from fastnorm._numba.memory import (
    ADDRESS,
    MULTIPLY_ADD,
    WORD,
    build_multiply_add,
    build_prefetch,
    stored_name,
)
from fastnorm.schedule import LANES, PAIR_LANES, PREFETCH_BYTES


def _in_lanes(builder: Any, n: int, places: Any, blocks: Any, terms: Any) -> None:
    """Add terms(block) to n doubles side by side at each place, in registers meanwhile."""
    lanes = ir.VectorType(ir.DoubleType(), n)
    places = [
        builder.inttoptr(checked(builder, place, 8 * n), lanes.as_pointer()) for place in places
    ]
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
    place = builder.add(address, builder.mul(block, ADDRESS(8 * n)))
    if ahead is not None:
        after = builder.add(place, ahead)
        for line in range(0, 8 * n, 64):
            build_prefetch(builder, builder.add(after, ADDRESS(line)))
    place = builder.inttoptr(checked(builder, place, 8 * n), lanes.as_pointer())
    return builder.load(place, align=8)


def _repeated(builder: Any, n: int, value: Any) -> Any:
    """A number side by side n times."""
    unknown = ir.Constant(ir.VectorType(value.type, n), ir.Undefined)
    one = builder.insert_element(unknown, value, WORD(0))
    return builder.shuffle_vector(one, unknown, ir.Constant(ir.VectorType(WORD, n), None))


def _folded(builder: Any, v: Any, add: Any) -> Any:
    """One number of many side by side: the upper half of each array of `v` goes to the lower."""
    n = v[0].type.count
    while n > 1:
        n //= 2
        halves = [[WORD(i) for i in range(k, k + n)] for k in (0, n)]
        kind = ir.VectorType(WORD, n)
        v = add(
            *([builder.shuffle_vector(a, a, ir.Constant(kind, half)) for a in v] for half in halves)
        )
    return [builder.extract_element(a, WORD(0)) for a in v]


def _words(n: int, value: int) -> Any:
    """A number of 32 bits side by side n times."""
    return ir.Constant(ir.VectorType(WORD, n), [value] * n)


# `scalar` has these for one number. Loops over them LLVM would vectorise; here there is no loop.


def _from_bf16(builder: Any, h: Any) -> Any:
    """`scalar.from_bf16` of numbers side by side."""
    n = h.type.count
    u = builder.shl(builder.zext(h, ir.VectorType(WORD, n)), _words(n, 16))
    return builder.bitcast(u, ir.VectorType(ir.FloatType(), n))


def _to_bf16(builder: Any, v: Any) -> Any:
    """`scalar.to_bf16` of what arithmetic has made, whose not-a-numbers are quiet (made_bf16)."""
    n = v.type.count
    u = builder.bitcast(v, ir.VectorType(WORD, n))
    odd = builder.and_(builder.lshr(u, _words(n, 16)), _words(n, 1))
    up = builder.select(
        builder.fcmp_ordered("ord", v, v), builder.add(odd, _words(n, 0x7FFF)), _words(n, 0)
    )
    cut = builder.lshr(builder.add(u, up), _words(n, 16))
    return builder.trunc(cut, ir.VectorType(ir.IntType(16), n))


def _from_f16(builder: Any, h: Any) -> Any:
    """`scalar.from_f16` of numbers side by side."""
    n = h.type.count
    words, floats = ir.VectorType(WORD, n), ir.VectorType(ir.FloatType(), n)
    u = builder.zext(h, words)
    magnitude = builder.shl(builder.and_(u, _words(n, 0x7FFF)), _words(n, 13))
    exponent = builder.and_(magnitude, _words(n, 0x0F800000))
    normal = builder.add(magnitude, _words(n, 112 << 23))
    shifted = builder.bitcast(builder.add(magnitude, _words(n, 113 << 23)), floats)
    least = builder.bitcast(_words(n, 113 << 23), floats)
    subnormal = builder.bitcast(builder.fsub(shifted, least), words)
    small = builder.icmp_unsigned("==", exponent, _words(n, 0))
    special = builder.icmp_unsigned("==", exponent, _words(n, 0x0F800000))
    v = builder.select(small, subnormal, normal)
    v = builder.select(special, builder.add(normal, _words(n, 112 << 23)), v)
    sign = builder.shl(builder.and_(u, _words(n, 0x8000)), _words(n, 16))
    return builder.bitcast(builder.or_(v, sign), floats)


def _to_f16(builder: Any, v: Any) -> Any:
    """`scalar.to_f16` of numbers side by side."""
    n = v.type.count
    words, floats = ir.VectorType(WORD, n), ir.VectorType(ir.FloatType(), n)
    u = builder.bitcast(v, words)
    magnitude = builder.and_(u, _words(n, 0x7FFFFFFF))
    half = builder.fadd(
        builder.bitcast(magnitude, floats), builder.bitcast(_words(n, 0x3F000000), floats)
    )
    subnormal = builder.sub(builder.bitcast(half, words), _words(n, 0x3F000000))
    odd = builder.and_(builder.lshr(magnitude, _words(n, 13)), _words(n, 1))
    rounded = builder.add(builder.add(magnitude, odd), _words(n, 0xFFF - (112 << 23)))
    nan = builder.icmp_unsigned(">", magnitude, _words(n, 0x7F800000))
    special = builder.select(nan, _words(n, 0x7E00), _words(n, 0x7C00))
    large = builder.icmp_unsigned(">=", magnitude, _words(n, 0x47800000))
    small = builder.icmp_unsigned("<", magnitude, _words(n, 0x38800000))
    h = builder.select(small, subnormal, builder.lshr(rounded, _words(n, 13)))
    h = builder.select(large, special, h)
    sign = builder.and_(builder.lshr(u, _words(n, 16)), _words(n, 0x8000))
    return builder.trunc(builder.or_(h, sign), ir.VectorType(ir.IntType(16), n))


_TYPES = {"float32": ir.FloatType(), "float64": ir.DoubleType()}  # others by their 16 bits
_FROM = {"uint16": _from_bf16, "int16": _from_f16}
_TO = {"uint16": _to_bf16, "int16": _to_f16}
_DOUBLE = types.NumberClass(types.float64)


def _size(kind: Any) -> int:
    """Bytes of a stored number."""
    return int(kind.instance_type.bitwidth // 8)


def _numbers_at(builder: Any, kind: Any, n: int, array: Any, i: Any) -> Any:
    """Elements i, i + 1 ... of an array that begins at an address, as they are computed with."""
    stored = _TYPES.get(stored_name(kind), ir.IntType(16))
    place = builder.add(array, builder.mul(i, ADDRESS(_size(kind))))
    place = checked(builder, place, n * _size(kind))
    place = builder.inttoptr(place, ir.VectorType(stored, n).as_pointer())
    v = builder.load(place, align=_size(kind))
    return _FROM[stored_name(kind)](builder, v) if stored_name(kind) in _FROM else v


def _put_numbers(builder: Any, kind: Any, array: Any, i: Any, v: Any) -> None:
    """Write them, rounded to their kind."""
    v = _TO[stored_name(kind)](builder, v) if stored_name(kind) in _TO else v
    place = builder.add(array, builder.mul(i, ADDRESS(_size(kind))))
    n = v.type.count if isinstance(v.type, ir.VectorType) else 1
    place = checked(builder, place, n * _size(kind))
    builder.store(v, builder.inttoptr(place, v.type.as_pointer()), align=_size(kind))


def _as_doubles(builder: Any, v: Any) -> Any:
    doubles = ir.VectorType(ir.DoubleType(), v.type.count)
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
            at = builder.add(builder.add(x, ahead), builder.mul(loop.index, ADDRESS(size)))
            for line in range(0, size, 64):
                build_prefetch(builder, builder.add(at, ADDRESS(line)))
            first = builder.mul(loop.index, ADDRESS(LANES))
            d = _as_doubles(builder, _numbers_at(builder, kind, LANES, x, first))
            d = d if about is None else builder.fsub(d, about)
            builder.store(builder.fadd(builder.load(sums[0]), d), sums[0])
            builder.store(build_multiply_add(builder, d, d, builder.load(sums[1]), True), sums[1])
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

        with cgutils.for_range_slice(builder, ADDRESS(0), blocks, chain) as (begin, _):
            builder.store(zero, short)
            left = builder.sub(blocks, begin)
            n = builder.select(builder.icmp_signed("<", left, chain), left, chain)
            with cgutils.for_range(builder, n) as loop:
                block = builder.add(begin, loop.index)
                d = builder.fsub(_lanes_at(builder, LANES, x, block, ADDRESS(PREFETCH_BYTES)), mean)
                builder.store(build_multiply_add(builder, d, d, builder.load(short), True), short)
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
            squares = [build_multiply_add(builder, d, d, total, True) for total in sums[1:]]
            return [builder.fadd(sums[0], d), *squares]

        _in_lanes(builder, LANES, arguments[4 : 5 + squared], blocks, terms)
        return context.get_dummy_value()

    word, last = types.intp, types.intp if squared else types.none
    return types.none(word, word, types.float64, word, word, last), codegen


@intrinsic
def add_pairs_to_lanes(
    typingctx: Any, x: Any, dy: Any, weight: Any, n: Any, scale: Any, sums: Any, kinds: Any
) -> Any:
    """Add g = dy weight and g xhat, xhat = (x - hi) r + shift, of n numbers, likewise.

    `scale` is hi, r and shift, `kinds` those of x and dy; `sums` is the address of PAIR_LANES sums
    of the former and then of the latter. No weight (None) is 1. In the order of the Cython kernels
    (fn_pair_planes, fn_sum_planes): of floats four terms are added up before they go into a double;
    of doubles, which have no bits to spare, none.
    """
    number = scale.dtype
    double = number == types.float64
    kind, stored = kinds

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        n, first, own = arguments[3], arguments[5], types.NumberClass(number)
        scales = cgutils.unpack_tuple(builder, arguments[4], 3)
        second = builder.add(first, ADDRESS(8 * PAIR_LANES))

        def terms(i: Any, k: int) -> Any:
            hi, r, shift = (_repeated(builder, k, v) for v in scales)
            g = _numbers_at(builder, stored, k, arguments[1], i)
            if signature.args[2] != types.none:
                g = builder.fmul(g, _numbers_at(builder, own, k, arguments[2], i))
            d = builder.fsub(_numbers_at(builder, kind, k, arguments[0], i), hi)
            return g, builder.fmul(d, r) if double else build_multiply_add(builder, d, r, shift)

        def add(g: Any, h: Any, a: Any, b: Any) -> Any:
            if double:
                return builder.fadd(a, g), build_multiply_add(builder, g, h, b, True)
            return add_floats(g, builder.fmul(g, h), a, b)

        def add_floats(one: Any, two: Any, a: Any, b: Any) -> Any:
            one, two = _as_doubles(builder, one), _as_doubles(builder, two)
            return builder.fadd(a, one), builder.fadd(b, two)

        def fetch(i: Any, k: int) -> None:
            _fetch_numbers(builder, kind, arguments[0], i, k)
            _fetch_numbers(builder, stored, arguments[1], i, k)

        def four_blocks(block: Any, a: Any, b: Any) -> Any:
            i = builder.mul(block, ADDRESS(4 * PAIR_LANES))
            fetch(i, 4 * PAIR_LANES)
            parts = [builder.add(i, ADDRESS(PAIR_LANES * k)) for k in range(4)]
            one, two = _four_terms(builder, [terms(part, PAIR_LANES) for part in parts])
            return add_floats(one, two, a, b)

        def one_block(block: Any, a: Any, b: Any) -> Any:
            i = builder.add(four, builder.mul(block, ADDRESS(PAIR_LANES)))
            if double:
                fetch(i, PAIR_LANES)
            g, h = terms(i, PAIR_LANES)
            return add(g, h, a, b)

        four = ADDRESS(0)
        if not double:
            blocks = builder.udiv(n, ADDRESS(4 * PAIR_LANES))
            _in_lanes(builder, PAIR_LANES, (first, second), blocks, four_blocks)
            four = builder.mul(blocks, ADDRESS(4 * PAIR_LANES))
        blocks = builder.udiv(builder.sub(n, four), ADDRESS(PAIR_LANES))
        _in_lanes(builder, PAIR_LANES, (first, second), blocks, one_block)
        whole = builder.add(four, builder.mul(blocks, ADDRESS(PAIR_LANES)))
        with cgutils.for_range_slice(builder, whole, n, ADDRESS(1)) as (i, _):
            lane = builder.sub(i, whole)
            a, b = (_numbers_at(builder, _DOUBLE, 1, sums, lane) for sums in (first, second))
            g, h = terms(i, 1)
            a, b = add(g, h, a, b)
            _put_numbers(builder, _DOUBLE, first, lane, a)
            _put_numbers(builder, _DOUBLE, second, lane, b)
        return context.get_dummy_value()

    word = types.intp
    third = weight if weight == types.none else word
    return types.none(word, word, third, word, scale, word, kinds), codegen


@intrinsic
def added_up(typingctx: Any, lanes: Any) -> Any:
    """The sum of PAIR_LANES doubles: those 8 apart first, then 4, 2 and 1."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = [_numbers_at(builder, _DOUBLE, PAIR_LANES, arguments[0], ADDRESS(0))]
        return _folded(builder, v, lambda a, b: [builder.fadd(a[0], b[0])])[0]

    return types.float64(types.intp), codegen


def _four_terms(builder: Any, terms: Any) -> Any:
    """The sum of four g, and of four g xhat."""
    (t0, h0), (t1, h1), (t2, h2), (t3, h3) = terms
    first = builder.fadd(builder.fadd(t0, t1), builder.fadd(t2, t3))
    one = build_multiply_add(builder, t0, h0, builder.fmul(t1, h1))
    two = build_multiply_add(builder, t2, h2, builder.fmul(t3, h3))
    return first, builder.fadd(one, two)


def _fetch_numbers(builder: Any, kind: Any, array: Any, i: Any, n: int, ahead: Any = None) -> None:
    """Ask for n numbers that lie `ahead` bytes further."""
    ahead = ADDRESS(PREFETCH_BYTES) if ahead is None else ahead
    at = builder.add(builder.add(array, ahead), builder.mul(i, ADDRESS(_size(kind))))
    for line in range(0, n * _size(kind), 64):
        build_prefetch(builder, builder.add(at, ADDRESS(line)))


@intrinsic
def apply_back_rows(
    typingctx: Any, arrays: Any, steps: Any, n: Any, scales: Any, weight: Any, sums: Any, kinds: Any
) -> Any:
    """dx of n elements of one row or of four, and what they add to the weights' gradients.

    `arrays` are the addresses of x, dy and dx, `steps` the bytes from a row of each to the next;
    `scales` hi, r, shift, c1 and c2 of each row. A weight is an address, or one number times r;
    None is 1. The sums gw and gb are addresses of doubles, or both None. The next four rows are
    asked for in the meantime; of one row where dx goes a step further.
    """
    rows = scales.count
    number = scales.dtype.dtype
    collecting = sums.dtype != types.none
    kind, stored = kinds

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        n, weight = arguments[2], arguments[4]
        gw, gb = cgutils.unpack_tuple(builder, arguments[5], 2)
        steps = cgutils.unpack_tuple(builder, arguments[1], 3)
        scales = [
            cgutils.unpack_tuple(builder, row, 5)
            for row in cgutils.unpack_tuple(builder, arguments[3], rows)
        ]
        xs, dys, dxs = (
            [builder.add(array, builder.mul(step, ADDRESS(k))) for k in range(rows)]
            for array, step in zip(
                cgutils.unpack_tuple(builder, arguments[0], 3), steps, strict=True
            )
        )
        given = signature.args[4]

        def slope(i: Any, k: int, r: Any) -> Any:
            if given == types.none:
                return r
            if isinstance(given, types.Float):
                return _repeated(builder, k, weight)
            return builder.fmul(_numbers_at(builder, own, k, weight, i), r)

        def some(i: Any, k: int, applied: Sequence[int], collecting: bool) -> None:
            terms, results = [], []
            for row in range(rows) if collecting else applied:
                hi, r, shift, c1, c2 = (_repeated(builder, k, v) for v in scales[row])
                t = _numbers_at(builder, stored, k, dys[row], i)
                d = builder.fsub(_numbers_at(builder, kind, k, xs[row], i), hi)
                h = build_multiply_add(builder, d, r, shift)
                terms.append((t, h))
                if row in applied:
                    v = build_multiply_add(builder, t, slope(i, k, r), builder.fneg(c1))
                    results.append(build_multiply_add(builder, builder.fneg(h), c2, v))
            for row, v in zip(applied, results, strict=True):
                _put_numbers(builder, kind, dxs[row], i, v)
            if collecting:
                t, h = terms[0]
                added = _four_terms(builder, terms) if rows == 4 else (t, builder.fmul(t, h))
                for array, v in zip((gb, gw), added, strict=True):
                    total = _numbers_at(builder, _DOUBLE, k, array, i)
                    total = builder.fadd(total, _as_doubles(builder, v))
                    _put_numbers(builder, _DOUBLE, array, i, total)

        def fetch(i: Any) -> None:
            for x, dy, dx in zip(xs, dys, dxs, strict=True):
                ahead = [builder.mul(step, ADDRESS(rows)) for step in steps]
                if rows == 4:
                    _fetch_numbers(builder, kind, x, i, line, ahead[0])
                    _fetch_numbers(builder, stored, dy, i, line, ahead[1])
                if rows == 1 or _size(kind) == 2:  # four rows of floats take non-temporal stores
                    _fetch_numbers(builder, kind, dx, i, line, ahead[2])

        own = types.NumberClass(number)
        block, line = 512 // number.bitwidth, 64 // _size(kind)
        loops: list[tuple[Sequence[int], bool, set[int]]]
        loops = [(range(rows), collecting, {line, block, 1})]
        if number == types.float64 and MULTIPLY_ADD == "extended":
            # x87 has no vectors, and registers for one row (13.9 and not 24.9 ms for 4096x768)
            gradients: list[tuple[Sequence[int], bool, set[int]]] = [((), True, {1})]
            loops = [*gradients * collecting, *(((row,), False, {1}) for row in range(rows))]
        for applied, collected, counts in loops:
            begin = ADDRESS(0)
            for count in sorted(counts, reverse=True):
                end = builder.and_(n, ADDRESS(-count))
                with cgutils.for_range_slice(builder, begin, end, ADDRESS(count)) as (i, _):
                    if count == line:
                        fetch(i)
                    for part in range(0, count, block):
                        some(builder.add(i, ADDRESS(part)), min(block, count), applied, collected)
                begin = end
        return context.get_dummy_value()

    word = types.intp
    third = weight if isinstance(weight, (types.Float, types.NoneType)) else word
    three = types.UniTuple(word, 3)
    own_sums = types.UniTuple(word, 2) if collecting else sums
    return types.none(three, three, word, scales, third, own_sums, kinds), codegen


@intrinsic
def apply_lines(
    typingctx: Any, x: Any, y: Any, size: Any, scale: Any, affine: Any, e: Any, how: Any
) -> Any:
    """`size` bytes of y = relu(((x - hi) r + shift) w + b + e), 64 at a time.

    `scale` is hi, r and shift, `affine` w and b, `how` is relu, ahead and non-temporal. A scale or
    weight is one number or the address of many; None leaves away what it stands for. x and e are
    asked for `ahead` bytes in advance. For non-temporal stores y is a multiple of 64:
    LLVM itself vectorises no loop of these, and asks of any other whether x and y overlap.
    """
    kind = next((v for v in (scale[1], affine[1]) if isinstance(v, types.Float)), types.float32)
    given = [x, y, size, *scale, *affine, e, *how]
    n = 512 // kind.bitwidth

    def codegen(context: Any, builder: Any, signature: Any, tuples: Any) -> Any:
        number = context.get_value_type(kind)
        lanes = ir.VectorType(number, n)
        there = [argument != types.none for argument in given]
        arguments = [*tuples[:3], *cgutils.unpack_tuple(builder, tuples[3], 3)]
        arguments += [*cgutils.unpack_tuple(builder, tuples[4], 2), tuples[5]]
        arguments += cgutils.unpack_tuple(builder, tuples[6], 3)

        with cgutils.for_range(builder, builder.udiv(arguments[2], ADDRESS(64))) as loop:
            at = builder.mul(loop.index, ADDRESS(64))

            def place(i: int) -> Any:
                return builder.add(arguments[i], at)

            def line(i: int) -> Any:
                if isinstance(given[i], types.Float):
                    return _repeated(builder, n, arguments[i])
                pointer = builder.inttoptr(checked(builder, place(i), 64), lanes.as_pointer())
                return builder.load(pointer, align=kind.bitwidth // 8)

            if there[10]:
                for i in (0, 8) if there[8] else (0,):
                    build_prefetch(builder, builder.add(place(i), arguments[10]))
            t = build_multiply_add(builder, builder.fsub(line(0), line(3)), line(4), line(5))
            if there[6]:
                t = build_multiply_add(builder, t, line(6), line(7))
            if there[8]:
                t = builder.fadd(t, line(8))
            if there[9]:
                nothing = ir.Constant(lanes, [0.0] * n)
                t = builder.select(builder.fcmp_ordered("<", t, nothing), nothing, t)
            align = 64 if there[11] else kind.bitwidth // 8
            to = builder.inttoptr(checked(builder, place(1), 64), lanes.as_pointer())
            stored = builder.store(t, to, align=align)
            if there[11]:
                stored.set_metadata("nontemporal", builder.module.add_metadata([WORD(1)]))
        return context.get_dummy_value()

    return types.none(x, y, size, scale, affine, e, how), codegen
