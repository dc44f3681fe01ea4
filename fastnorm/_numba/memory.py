"""Memory by its address, and the instructions that Numba has no name for, for kernels on the CPU.

A *kind* tells how numbers are stored: `np.float32`, `np.float64`, `np.int16` for the bits of a
float16, `np.uint16` for those of a bfloat16. `load` and `store` convert to and from the number that
is computed in, `real(kind)`.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from llvmlite import binding, ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic, overload, register_jitable

from fastnorm import _core
from fastnorm._numba import scalar

# Every function of `scalar` can be called from compiled code. Its sums are never reordered, whoever
# calls it: the centring would be lost.
AHEAD = 4096  # bytes that are asked for in advance
LANES, PAIRS = 32, 16  # sums of doubles side by side, forward and backward
STRICT = {"fastmath": False, "error_model": "numpy"}
for _name, _function in list(vars(scalar).items()):
    if getattr(_function, "__module__", "") == scalar.__name__ and _name not in ("fma", "mac"):
        register_jitable(**STRICT)(_function)


def _multiply_add() -> str:
    """How the Cython kernels add to a product; without them, how they would on this processor."""
    if _core.kernels is not None:
        return str(_core.kernels.multiply_add())
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "fused"
    return "fused" if binding.get_host_cpu_features().get("fma", False) else "extended"


MULTIPLY_ADD = _multiply_add()


def _sources() -> int:
    """A number that changes with what a kernel is compiled from: Numba itself looks at one file."""
    folder = Path(__file__).parent
    files = (folder / f"{name}.py" for name in ("scalar", "memory", "forward", "backward"))
    times = tuple((s.st_mtime_ns, s.st_size) for s in (f.stat() for f in files))
    return hash((*times, *MULTIPLY_ADD.encode())) | 1


SOURCES = _sources()


# --- Instructions ---------------------------------------------------------------------------------

_ADDRESS, _WORD = ir.IntType(64), ir.IntType(32)


class _Extended(ir.Type):
    """The 80 bits of x87, 64 of them digits, for which llvmlite has no name."""

    def _to_string(self) -> str:
        return "x86_fp80"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Extended)

    def __hash__(self) -> int:
        return hash(_Extended)


def _multiplied_and_added(builder: Any, a: Any, b: Any, c: Any, summed: bool = False) -> Any:
    """a * b + c of numbers, or of as many side by side, as _core/numbers.h has it (fma or mac)."""
    n = a.type.count if isinstance(a.type, ir.VectorType) else 0
    kind = a.type.element if n else a.type
    if MULTIPLY_ADD == "fused":
        name = f"llvm.fma.v{n}{kind.intrinsic_name}" if n else f"llvm.fma.{kind.intrinsic_name}"
        whole = ir.FunctionType(a.type, [a.type] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, whole, name), [a, b, c])
    if summed or (kind == ir.DoubleType() and MULTIPLY_ADD == "plain"):
        return builder.fadd(builder.fmul(a, b), c)
    wider: Any = _Extended() if kind == ir.DoubleType() else ir.DoubleType()
    wider = ir.VectorType(wider, n) if n else wider
    a, b, c = (builder.fpext(v, wider) for v in (a, b, c))
    wide = builder.fadd(builder.fmul(a, b), c)
    return builder.fptrunc(wide, ir.VectorType(kind, n) if n else kind)


def _in_numba(summed: bool) -> Any:
    @intrinsic
    def multiplied_and_added(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
        if not (isinstance(a, types.Float) and b == a and c == a):
            return None

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            a, b, c = arguments
            return _multiplied_and_added(builder, a, b, c, summed)

        return a(a, b, c), codegen

    return multiplied_and_added


_fma, _mac = _in_numba(False), _in_numba(True)


@overload(scalar.fma, jit_options=STRICT, strict=False)
def _overload_fma(a: Any, b: Any, c: Any) -> Any:
    return lambda a, b, c: _fma(a, b, c)


@overload(scalar.mac, jit_options=STRICT, strict=False)
def _overload_mac(a: Any, b: Any, c: Any) -> Any:
    return lambda a, b, c: _mac(a, b, c)


def _pointer(context: Any, builder: Any, kind: Any, address: Any, index: Any) -> Any:
    number = context.get_value_type(kind)
    base = builder.inttoptr(address, number.as_pointer())
    return builder.gep(base, [index])


@intrinsic
def read(typingctx: Any, address: Any, index: Any, kind: Any) -> Any:
    """Element `index` of the array of `kind` that begins at `address`."""
    number = kind.instance_type

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, number, arguments[0], arguments[1])
        return builder.load(pointer, align=number.bitwidth // 8)

    return number(types.intp, types.intp, kind), codegen


@intrinsic
def write(typingctx: Any, address: Any, index: Any, value: Any) -> Any:
    """Write element `index` of the array that begins at `address`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, value, arguments[0], arguments[1])
        builder.store(arguments[2], pointer, align=value.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(types.intp, types.intp, value), codegen


@intrinsic
def stream_line(typingctx: Any, to: Any, source: Any) -> Any:
    """Copy 64 bytes, past the caches, to an address that is a multiple of 64."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line = ir.VectorType(ir.IntType(64), 8)
        to, source = (builder.inttoptr(a, line.as_pointer()) for a in arguments)
        stored = builder.store(builder.load(source, align=1), to, align=64)
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.none(types.intp, types.intp), codegen


@intrinsic
def fence(typingctx: Any) -> Any:
    """What was written before is seen before what is written after."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), codegen


def _prefetch(builder: Any, address: Any) -> None:
    byte = ir.IntType(8).as_pointer()
    function = builder.module.declare_intrinsic(
        "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, _WORD, _WORD, _WORD])
    )
    builder.call(function, [builder.inttoptr(address, byte), _WORD(0), _WORD(3), _WORD(1)])


@intrinsic
def fetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line at an address that will be read soon."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _prefetch(builder, arguments[0])
        return context.get_dummy_value()

    return types.none(types.intp), codegen


@intrinsic
def take(typingctx: Any, address: Any) -> Any:
    """The whole number at an address, one more afterwards: no two threads take the same."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = ir.IntType(64)
        pointer = builder.inttoptr(arguments[0], number.as_pointer())
        return builder.atomic_rmw("add", pointer, number(1), "seq_cst")

    return types.int64(types.intp), codegen


@intrinsic
def call(typingctx: Any, function: Any, address: Any, n: Any) -> Any:
    """Call the compiled loop of an activation, which begins at an address, in place."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [word] * 6)
        loop = builder.inttoptr(arguments[0], kind.as_pointer())
        builder.call(loop, [word(0), *arguments[1:], word(0), word(0), word(0)])
        return context.get_dummy_value()

    return types.none(types.intp, types.intp, types.intp), codegen


@intrinsic
def record_at(typingctx: Any, address: Any, kind: Any) -> Any:
    """The record of a NumPy dtype that begins at an address."""
    record = kind.dtype

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(record))

    return record(types.intp, kind), codegen


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


# A kernel: (address of its record, of the thread's room, its first turn, turns, task). A record
# begins with a counter of the turns that are taken.
KERNEL = types.void(*[types.intp] * 5)
COUNTERS = ("turn",)


@intrinsic
def _call_kernel(
    typingctx: Any, f: Any, record: Any, memory: Any, turn: Any, turns: Any, task: Any
) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 5)
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.none(*[types.intp] * 6), codegen


@njit(nogil=True, cache=True)
def alone(kernel, record, memory, task):
    """Call the kernel that begins at an address, for all there is to do."""
    write(record, 0, 1)
    _call_kernel(kernel, record, memory, 0, 1, task)


@njit(nogil=True, cache=True, parallel=True)
def together(kernel, record, memory, room, turns, task, threads):
    """Call it in several threads, which take turns, their first in their own order."""
    write(record, 0, threads)
    for i in prange(threads):
        _call_kernel(kernel, record, memory + room * i, i, turns, task)


# --- Numbers --------------------------------------------------------------------------------------
# Intrinsics too: as functions they would be compiled a hundred times.


def _stored(kind: Any) -> str:
    """The kind that a Numba type argument stands for."""
    return str(kind.instance_type)


def _computed(kind: Any) -> Any:
    """The Numba type that numbers of a kind are computed in."""
    return types.float64 if _stored(kind) == "float64" else types.float32


def _bits(kind: Any) -> Any:
    """The Numba type of a kind in memory; of a float16 or bfloat16 its bits."""
    return kind.instance_type if isinstance(kind.instance_type, types.Float) else types.uint16


@intrinsic
def load(typingctx: Any, address: Any, index: Any, kind: Any) -> Any:
    """Element `index` at `address`, as a number that is computed in."""
    stored, computed = _bits(kind), _computed(kind)
    convert = {"uint16": scalar.from_bf16, "int16": scalar.from_f16}.get(_stored(kind))

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, stored, arguments[0], arguments[1])
        value = builder.load(pointer, align=stored.bitwidth // 8)
        if convert is not None:
            value = context.compile_internal(builder, convert, computed(stored), [value])
        return value

    return computed(types.intp, types.intp, kind), codegen


@intrinsic
def store(typingctx: Any, address: Any, index: Any, value: Any, kind: Any) -> Any:
    """Write element `index` at `address`, rounded to its kind."""
    stored, computed = _bits(kind), _computed(kind)
    convert = {"uint16": scalar.to_bf16, "int16": scalar.to_f16}.get(_stored(kind))

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = arguments[2]
        if convert is not None:
            value = context.compile_internal(builder, convert, stored(computed), [value])
        pointer = _pointer(context, builder, stored, arguments[0], arguments[1])
        builder.store(value, pointer, align=stored.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(types.intp, types.intp, computed, kind), codegen


@intrinsic
def read_real(typingctx: Any, address: Any, index: Any, kind: Any) -> Any:
    """Element `index` of the array of numbers that are computed in at `address`."""
    computed = _computed(kind)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, computed, arguments[0], arguments[1])
        return builder.load(pointer, align=computed.bitwidth // 8)

    return computed(types.intp, types.intp, kind), codegen


@intrinsic
def real(typingctx: Any, value: Any, kind: Any) -> Any:
    """`value` as a number that is computed in: a float64 for float64, else a float32."""
    computed = _computed(kind)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.cast(builder, arguments[0], value, computed)

    return computed(value, kind), codegen


@intrinsic
def is_double(typingctx: Any, kind: Any) -> Any:
    """Whether numbers of this kind are computed with in float64."""
    answer = _stored(kind) == "float64"

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_constant(types.boolean, answer)

    return types.boolean(kind), codegen


@intrinsic
def is_half(typingctx: Any, kind: Any) -> Any:
    """Whether numbers of this kind are float16."""
    answer = _stored(kind) == "int16"

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_constant(types.boolean, answer)

    return types.boolean(kind), codegen


@intrinsic
def size_of(typingctx: Any, kind: Any) -> Any:
    """Bytes of a stored number."""
    size = kind.instance_type.bitwidth // 8

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_constant(types.intp, size)

    return types.intp(kind), codegen
