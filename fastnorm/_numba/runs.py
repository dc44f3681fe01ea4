"""Groups that are lists of contiguous runs, forward: p runs of s elements each."""

from __future__ import annotations

from typing import Any

from numba import njit, prange

from fastnorm._numba import plan, scalar
from fastnorm._numba.activations import activate, is_jitted
from fastnorm._numba.apply import add, add_to, affine_step, apply_run, store
from fastnorm._numba.compiling import KERNEL, inner, part
from fastnorm._numba.elements import get, is_double, piece
from fastnorm._numba.moments import moments
from fastnorm._numba.scales import in_range, out_of_range, scale_of_given, scale_of_unit
from fastnorm.schedule import BLOCK


@inner
def at(steps, operand, a, b):
    """Where an operand keeps what belongs to group (a, b)."""
    return steps[operand, 5] + steps[operand, 0] * a + steps[operand, 1] * b


@inner
def steps_of(steps, operand):
    """The strides of an operand, and where its first element lies: numbers, without an array.

    An array in a tuple is counted each time it is taken out.
    """
    return (
        steps[operand, 0], steps[operand, 1], steps[operand, 2], steps[operand, 3],
        steps[operand, 5],
    )  # fmt: skip


@inner
def run_at(own, group, p, t):
    """Where element t of run p of group (a, b) lies."""
    return own[4] + own[0] * group[0] + own[1] * group[1] + own[2] * p + own[3] * t


@inner
def copied(x, t):
    """Numbers that are computed in, side by side."""
    for i in range(t.size):
        t[i] = get(x[i])


@inner
def chosen(x, mask, step, t):
    """Those that a mask chooses; how many."""
    m = 0
    first = 0 if step >= 0 else mask.size - 1
    for i in range(x.size):
        if mask[first + i * step]:
            t[m] = get(x[i])
            m += 1
    return m


@part
def add_runs(group, n_s, first, last, steps, x, addend, total):
    """x + addend of elements [first, last) of a group."""
    while first < last:
        p = first // n_s
        t = first - p * n_s
        n = min(last - first, n_s - t)
        o = run_at(steps_of(steps, plan.X), group, p, t)
        e = run_at(steps_of(steps, plan.ADDEND), group, p, t)
        to = run_at(steps_of(steps, plan.SOURCE), group, p, t)
        add_to(piece(x, o, n), piece(addend, e, n), piece(total, to, n))
        first += n


@part
def block_moments(source, mask, tile, group, block, own, asked):
    """Moments of elements [first, last) of a group: where they lie, or in copies side by side.

    Without a mask they lie side by side.
    """
    first, last = block
    n_s, of_source, of_mask = own
    centred, whole, masked = asked
    p = first // n_s
    o = run_at(of_source, group, p, first - p * n_s)
    if mask is None:
        return moments(piece(source, o, last - first), centred)
    m = 0
    f = first
    while f < last:
        p = f // n_s
        t = f - p * n_s
        n = last - f if whole else min(last - f, n_s - t)
        o = run_at(of_source, group, p, t)
        if n == last - first and not masked:
            return moments(piece(source, o, n), centred)
        if masked:
            at_mask, step = run_at(of_mask, group, p, t), of_mask[3]
            lowest = min(at_mask, at_mask + step * (n - 1))
            some = mask[lowest : lowest + abs(step) * (n - 1) + 1]
            m += chosen(piece(source, o, n), some, step, tile[m:])
        else:
            copied(piece(source, o, n), piece(tile, m, n))
            m += n
        f += n
    return moments(tile[:m], centred)


@part
def split_moments(source, mask, tile, group, split, own, asked):
    """Those of a split of a group: its blocks', merged in their order."""
    first, last = split
    found = (0.0, 0.0, 0.0, 0.0, 0.0)
    for f in range(first, last, BLOCK):
        some = block_moments(source, mask, tile, group, (f, min(f + BLOCK, last)), own, asked)
        found = scalar.merge(found, some) if f > first else some
    return found


@inner
def write_moments(into, o, step, found):
    """Five numbers, a step apart."""
    into[o], into[o + step], into[o + 2 * step] = found[0], found[1], found[2]
    into[o + 3 * step], into[o + 4 * step] = found[3], found[4]


@inner
def read_moments(of, o, step):
    """The same."""
    return of[o], of[o + step], of[o + 2 * step], of[o + 3 * step], of[o + 4 * step]


@part
def apply_split(source, y, weight, bias, group, split, own):
    """A split of a group from x to y, where nothing comes between."""
    f, last = split
    n_s, _, whole, far, scale = own[:5]
    of_source, of_y, of_weight, of_bias = own[5:]
    while f < last:
        p = f // n_s
        t = f - p * n_s
        n = last - f if whole else min(last - f, n_s - t)
        o, to = run_at(of_source, group, p, t), run_at(of_y, group, p, t)
        wo, bo = run_at(of_weight, group, p, t), run_at(of_bias, group, p, t)
        wn, bn = n * min(of_weight[3], 1), n * min(of_bias[3], 1)
        w, v = piece(weight, wo, max(wn, 1)), piece(bias, bo, max(bn, 1))
        apply_run(piece(source, o, n), piece(y, to, n), scale, w, v, far)
        f += n


@part
def apply_staged(source, y, weight, bias, group, split, own, residual, tile, status, act):
    """The same through a tile in the first cache: x, y and the residual may be one array."""
    f, last = split
    n_s, stage, whole, far, scale = own[:5]
    of_source, of_y, of_weight, of_bias, of_residual, first, number = own[5:]
    while f < last:
        p = f // n_s
        t = f - p * n_s
        n = min(last - f if whole else min(last - f, n_s - t), stage)
        o, to = run_at(of_source, group, p, t), run_at(of_y, group, p, t)
        wo, bo = run_at(of_weight, group, p, t), run_at(of_bias, group, p, t)
        wn, bn = n * min(of_weight[3], 1), n * min(of_bias[3], 1)
        w, v = piece(weight, wo, max(wn, 1)), piece(bias, bo, max(bn, 1))
        t_slice = tile[:n]
        if first:
            one, zero = tile[BLOCK : BLOCK + 1], tile[BLOCK + 1 :]
            apply_run(piece(source, o, n), t_slice, scale, one, zero, far)
        else:
            apply_run(piece(source, o, n), t_slice, scale, w, v, far)
        if residual is not None and of_residual[5]:
            r = run_at(of_residual, group, p, t)
            add(t_slice, piece(residual, r, n))
        activate(act, number, t_slice, status)
        if first and act is not None:
            affine_step(t_slice, w, v)
        store(t_slice, piece(y, to, n))
        f += n


@inner
def runs(work, told, arrays, y, residual, mask, added, tile, act):
    """What a task asks for, of groups [begin, end), or of splits of groups.

    `y`, `residual`, `mask` and `added` (x, addend and their sum) may be None, and `tile` where
    results need none.
    """
    task, begin, end = work
    numbers, steps, eps = told
    source, weight, bias, mean, var, rstd, parts, status = arrays
    if tile is not None:
        tile[BLOCK], tile[BLOCK + 1] = 1.0, 0.0  # the weight and bias of no step
    splits, n_b, n_s = numbers[plan.SPLITS], numbers[plan.B], numbers[plan.S]
    span, length = numbers[plan.SPLIT], numbers[plan.P] * n_s
    given, scaling, fields = numbers[plan.GIVEN], numbers[plan.SCALING], numbers[plan.FIELDS]
    with_stats, tabulated = numbers[plan.WITH_STATS], numbers[plan.TABULATED]
    centred, masked = numbers[plan.CENTRED] != 0, numbers[plan.MASKED] != 0
    asked = centred, numbers[plan.WHOLE_SUMS] != 0, masked
    of_source, of_mask = steps_of(steps, plan.SOURCE), steps_of(steps, plan.MASK)
    of_stats = steps_of(steps, plan.STATS)
    own = n_s, of_source, of_mask
    whole, far = numbers[plan.WHOLE_OUTPUT] != 0, numbers[plan.FAR] != 0
    of_y, of_weight = steps_of(steps, plan.Y), steps_of(steps, plan.WEIGHT)
    of_bias, of_residual = steps_of(steps, plan.BIAS), steps_of(steps, plan.RESIDUAL)
    with_residual = numbers[plan.WITH_RESIDUAL]
    stage, first_act = numbers[plan.STAGE], numbers[plan.ACTIVATION_FIRST] != 0
    number, with_addend = numbers[plan.ACTIVATION], numbers[plan.WITH_ADDEND]
    if tabulated:
        # one scale costs as much as normalising 50 numbers; samples share them
        for b in range(n_b):
            o = run_at(of_stats, (0, b), 0, 0)
            rstd[o] = scale_of_given(mean[o], var[o], eps, scaling, source)[2]
    each = 1 if task == plan.WHOLE else splits
    item, split = begin // each, begin % each
    a, b = item // n_b, item % n_b
    fresh = True  # the group has not been begun
    scale = (0.0, 0.0, 0.0, 1.0, False)
    for i in range(begin, end):
        group = a, b
        o = run_at(of_stats, group, 0, 0)
        found = (0.0, 0.0, 0.0, 0.0, 0.0)
        if task == plan.APPLY:
            if fresh and not given:
                for other in range(splits):
                    some = read_moments(parts, 5 * (item * splits + other), 1)
                    found = scalar.merge(found, some) if other > 0 else some
        else:
            for other in range(split, splits):
                bounds = span * other, min(span * other + span, length)
                if added is not None and with_addend:
                    add_runs(group, n_s, bounds[0], bounds[1], steps, added[0], added[1], added[2])
                if not given:
                    some = split_moments(source, mask, tile, group, bounds, own, asked)
                    found = scalar.merge(found, some) if other > split else some
                if task == plan.MOMENTS:
                    break
        if task == plan.MOMENTS:
            write_moments(parts, 5 * i, 1, found)
        elif y is None and fields:
            write_moments(mean, o, fields, found)
        elif fresh:
            if tabulated:
                r = rstd[o]
                scale = mean[o], 0.0, r, 1.0, out_of_range(mean[o], r, source)
            elif given:
                scale = scale_of_given(mean[o], var[o], eps, scaling, source)
            else:
                unit = 1.0
                if is_double(source):
                    place = (
                        (length // n_s, n_s, 1),
                        (run_at(of_source, group, 0, 0), of_source[2], of_source[3], 0),
                        (run_at(of_mask, group, 0, 0), of_mask[2], of_mask[3], 0),
                    )
                    options = scaling, centred, masked
                    found, unit = in_range(found, eps, options, source, mask, place)
                m, rest, v, r = scale_of_unit(found, eps, scaling, unit, source)
                if with_stats:
                    mean[o], var[o], rstd[o] = m / unit, v / unit / unit, r * unit
                scale = m, rest, r, unit, unit != 1.0 or out_of_range(m, r, source)
        if y is not None and task != plan.MOMENTS:
            begins = span * split
            bounds = begins, min(begins + span, length) if task == plan.APPLY else length
            if tile is None:
                how = n_s, stage, whole, far, scale, of_source, of_y, of_weight, of_bias
                apply_split(source, y, weight, bias, group, bounds, how)
            else:
                last = (*of_residual, with_residual)
                ways = (
                    n_s, stage, whole, far, scale, of_source, of_y, of_weight, of_bias, last,
                    first_act, number,
                )  # fmt: skip
                apply_staged(
                    source, y, weight, bias, group, bounds, ways, residual, tile, status, act
                )
        # the next split, group and sample
        split += 1
        fresh = split == each
        if fresh:
            split = 0
            item += 1
            b += 1
            if b == n_b:
                a, b = a + 1, 0


TILE = BLOCK + 2  # numbers of a thread's tile


@inner
def tile_of(tiles, turn):
    """The tile of a turn, or None."""
    if tiles is None:
        return None
    return tiles[TILE * turn : TILE * (turn + 1)]


def compile_runs(signature: Any, act: Any, parallel: bool, sources: int) -> Any:
    """The kernel of runs; `act` is an activation or None."""
    key = sources + parallel  # not the same on disk

    @njit(signature, parallel=parallel, cache=not is_jitted(act), **KERNEL)
    def kernel(
        turns, items, task, numbers, steps, eps, source, weight, bias, mean, var, rstd, parts,
        status, y, residual, mask, added, tiles,
    ):  # fmt: skip
        if key != 0:
            arrays = source, weight, bias, mean, var, rstd, parts, status
            told = numbers, steps, eps
            for turn in prange(turns):
                work = task, items * turn // turns, items * (turn + 1) // turns
                tile = tile_of(tiles, turn)
                runs(work, told, arrays, y, residual, mask, added, tile, act)

    return kernel
