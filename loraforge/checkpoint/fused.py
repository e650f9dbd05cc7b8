"""A merge into bfloat16 as one pass, compiled by numba where that is installed.

What is computed is defined in ``exact``, whose own loop gives the same bits in some twenty passes. Here a few rows of
the product are made, added, rounded and decided while they are in a core's first caches; and since Python is not asked
in between, threads run side by side.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loraforge.checkpoint.floats import Allocate, Array, bits_of

try:
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    from loraforge.checkpoint.panels import HEIGHT, compiled, product_of_rows, widest
except ImportError:  # the extra [fast] is not installed
    AVAILABLE = False
else:
    AVAILABLE = True
    U16, U32, I16, I32, F32, F64 = np.uint16, np.uint32, np.int16, np.int32, np.float32, np.float64
    TILE = 4096  # elements, whose buffers stay in a core's first cache
    OPEN, UNPROVED = I16(2), I32(1 << 20)
    UNIT = F32(2.1 * 2.0**-24)  # of the sum's own size: for the last addition, and for that of the bound

    @intrinsic
    def _bits(_typing, x):  # noqa: ARG001 - this is how numba calls it
        def generate(_context, builder, _signature, args):
            return builder.bitcast(args[0], ir.IntType(32))

        return types.uint32(types.float32), generate

    @intrinsic
    def _float(_typing, x):  # noqa: ARG001
        def generate(_context, builder, _signature, args):
            return builder.bitcast(args[0], ir.FloatType())

        return types.float32(types.uint32), generate

    @compiled
    def _value(bits):
        return _float(U32(bits) << U32(16))

    @compiled
    def _nearest_once(x):
        """Round float64 to bfloat16's bits by way of round-to-odd in float32, which makes two roundings one."""
        single = F32(x)
        bits = _bits(single)
        if F64(single) != x and bits & U32(1) == U32(0) and math.isfinite(single):
            if single == 0:
                bits = (_bits(F32(math.copysign(1.0, x))) & U32(0x80000000)) | U32(1)
            else:
                bits = bits + U32(1) if (x > F64(single)) == (single > 0) else bits - U32(1)
        even = (bits >> U32(16)) & U32(1)
        return U16((bits + U32(0x7FFF) + even) >> U32(16))  # a carry goes into the exponent, where it belongs

    @compiled
    def _ordered(bits):
        return I32(bits) if bits < U16(0x8000) else I32(0x7FFF) - I32(bits)

    @compiled
    def _interval(w, total, radius):
        """Return ``W + total``, how far it may be from the real number, and both ends of that, rounded.

        An end that is a tie may go either way here: the real number lies strictly inside.
        """
        y = total + _value(w)
        error = radius + UNIT * abs(y)
        high, low = (_bits(y + error) + U32(0x8000)) >> U32(16), (_bits(y - error) + U32(0x8000)) >> U32(16)
        return y, error, U16(high), U16(low)

    @compiled
    def _round_ends(p, sums, columns, row, lost, values, flags):
        """Round upper ends into ``values``, and flag where the lower ones are others."""
        widest()
        for j in range(p.size):
            _, _, high, low = _interval(p[j], sums[j], columns[j] * row + lost)
            values[j] = high
            flags[j] = high ^ low

    @compiled
    def _summary(values, flags):
        """Return all flags in one, and twice the greatest magnitude's bits."""
        widest()
        any_flag, top = U16(0), U16(0)
        for j in range(values.size):
            any_flag |= flags[j]
            twice = U16(values[j] << U16(1))  # a maximum of this is fast code, of the magnitude itself it is not
            top = max(top, twice)
        return any_flag, top

    @compiled
    def _flag_crossings(p, values, flags):
        """Flag where the way back may miss (``exact._crossings``)."""
        widest()
        for j in range(p.size):
            below = I16((p[j] & U16(0x7FFF)) - U16(1)) | I16(0x7F)
            flags[j] |= U16(I16(values[j] & U16(0x7FFF)) > below)

    @compiled
    def _sum_at(start, sign, b, a, gamma, j):
        """Return ``start + sign sum_k b_k a_k`` at flat place j in float64, and a bound of its error."""
        row, column = j // a.shape[0], j % a.shape[0]
        total, size = start, abs(start)
        for k in range(b.shape[1]):
            term = sign * b[row, k] * a[column, k]
            total += term
            size += abs(term)
        return total, gamma * size + 2.0**-1060

    @compiled
    def _flagged(flags, words, marks):
        """Put the places of flags that are set into ``marks``, without a branch: return where there, from and to."""
        count = 0
        for q in range(words.size):
            marks[count] = 4 * q
            count += words[q] != 0
        end = count
        for i in range(count):
            for j in range(marks[i], marks[i] + 4):
                marks[end] = j
                end += flags[j] != 0
        return count, end

    @compiled
    def _steps_back(p, sums, radii, steps):
        """Say where ``W' - B A`` rounds to beside W, as far as that is plain: 0 for W, 1 for the next up, -1 for down.

        OPEN is for what is not plain: near a tie, beyond the next number, about zero, or where W' itself is in doubt.
        The gap to the next number is an ulp of W away from zero, and of the number below W towards it. W' minus the sum
        is exact; the error allows for rounding the comparisons.
        """
        widest()
        for i in range(p.size):
            y, error, high, low = _interval(p[i], sums[i], radii[i])
            delta, size, positive = _value(high) - y, p[i] & U16(0x7FFF), p[i] < U16(0x8000)
            binade = (size if (delta > 0) == positive else size - U16(1)) & U16(0x7F80)
            half, far, error = _value(binade) * F32(2.0**-8), abs(delta), F32(2.1) * error
            plain = (high == low) & (binade >= U16(0x0480)) & (binade < U16(0x7F80))
            stays, moves = far + error < half, (far - error > half) & (far + error < half + half)
            step = I16(1) if delta > 0 else I16(-1)
            steps[i] = OPEN if not (plain & (stays | moves)) else (I16(0) if stays else step)

    @compiled
    def _guess(w, w_new, x, error, b, a, gamma, j):  # noqa: PLR0913, PLR0917 - scalars and arrays of a kernel
        """Return both ends of the way back at flat place j, rounded, where W' came from a sum within error of x."""
        near, error = w + (w_new - x), error + 2.0**-50 * (abs(w) + abs(w_new))
        low, high = _nearest_once(near - error), _nearest_once(near + error)
        if low != high:
            near, error = _sum_at(w_new, -1.0, b, a, gamma, j)
            low, high = _nearest_once(near - error), _nearest_once(near + error)
        return low, high

    @compiled
    def _decide(p, total, radius, values, b, a, gamma, back, j):  # noqa: PLR0913, PLR0917
        """Decide one element that is not plain: its value, and the step back to P from there, or UNPROVED."""
        y, radius_there, high, low = _interval(p, total, radius)
        w, x, error = F64(_value(p)), F64(y), 2 * F64(radius_there)
        if not math.isfinite(w):
            values[j] = p
            return I32(0)
        if high != low:
            x, error = _sum_at(w, 1.0, b, a, gamma, j)
            low, values[j] = _nearest_once(x - error), _nearest_once(x + error)
            if low != values[j]:
                return UNPROVED
        if not back:
            return I32(0)
        low, high = _guess(w, F64(_value(values[j])), x, error, b, a, gamma, j)
        return I32(_ordered(low) - _ordered(p)) if low == high else UNPROVED

    @compiled
    def _sorted_out(places, units):
        """Return the places with a correction, their corrections, and the places without."""
        proved = 0
        for i in range(units.size):
            proved += units[i] != 0
        good, steps, open_ = np.empty(proved, np.int64), np.empty(proved, I16), np.empty(units.size - proved, np.int64)
        i = j = 0
        for place, step in zip(places, units):  # noqa: B905 - numba knows no strict
            if step != 0:
                good[i], steps[i] = place, step
                i += 1
            else:
                open_[j] = place
                j += 1
        return good, steps, open_

    @compiled
    def _gather(p, sums, bound, marks, some):
        """Put what is known of marked elements side by side: P, its sum, and how far that may be from the real one."""
        columns, rows, lost = bound
        some_p, some_sums, radii = some
        row, begin = 0, 0
        for i in range(marks.size):
            while marks[i] >= begin + columns.size:
                row, begin = row + 1, begin + columns.size
            some_p[i], some_sums[i] = p[marks[i]], sums[marks[i]]
            radii[i] = columns[marks[i] - begin] * rows[row] + lost

    @compiled
    def _pass(p, single, bound, values, exact, gamma, back, scratch, places, units):  # noqa: PLR0913, PLR0917
        """Round, and decide what is flagged; return what ``Passed`` holds.

        ``places`` and ``units`` are room for it: a place has its correction, or 0 where nothing was proved.
        """
        sums, flags, marks, steps, some_p, some_sums, radii = scratch
        columns, rows, lost = bound
        found, top, n = 0, U16(0), columns.size
        products, height, width = sums.reshape(sums.size), max(1, TILE // n), min(n, TILE)
        for first in range(0, rows.size, HEIGHT):
            last = min(first + HEIGHT, rows.size)
            product_of_rows(single[0], single[1], first, last - first, sums, p, values)
            for row in range(first, last, height):
                for column in range(0, n, width):
                    lines, across = min(height, last - row), min(width, n - column)
                    start, size = row * n + column, lines * across  # either some lines, or part of one
                    w, new, total = p[start : start + size], values[start : start + size], products[start - first * n :]
                    of_columns = columns[column : column + across]
                    for i in range(lines):
                        j = slice(i * across, (i + 1) * across)
                        _round_ends(w[j], total[j], of_columns, rows[row + i], lost, new[j], flags[j])
                    doubtful, highest = _summary(new, flags)
                    if not back and not doubtful:
                        top = max(top, highest)
                        continue
                    if back:
                        _flag_crossings(w, new, flags)
                    mark, end = _flagged(flags, flags[:size].view(np.uint64), marks)
                    here, anew = marks[mark:end], False  # whether the greatest was only a guess
                    _gather(w, total, (of_columns, rows[row:], lost), here, (some_p, some_sums, radii))
                    _steps_back(some_p[: here.size], some_sums, radii, steps)
                    for i in range(here.size):
                        j, step = start + here[i], I32(steps[i])
                        if step == OPEN:
                            guess = values[j]
                            step = _decide(some_p[i], some_sums[i], radii[i], values, *exact, gamma, back, j)
                            if values[j] != guess:
                                top = max(top, U16(values[j] << U16(1)))
                                anew |= U16(guess << U16(1)) == highest
                        places[found], units[found] = j, 0 if step == UNPROVED else -step
                        found += step != 0
                    top = max(top, _summary(new, flags)[1] if anew else highest)
        return (top >> U16(1), *_sorted_out(places[:found], units[:found]))


@dataclass(frozen=True, slots=True)
class Passed:
    """What one pass over a chunk found: see ``exact.rounded_sum``; nothing is known of ``unproved`` places."""

    top: int
    places: Array
    units: Array
    unproved: Array


def one_pass(  # noqa: PLR0913 - a kernel's arrays
    p: Tensor,
    single: tuple[Array, Array],
    bound: tuple[Array, Array, float],
    values: Tensor,
    exact: tuple[Array, Array],
    gamma: float,
    allocate: Allocate,
    *,
    back: bool,
) -> Passed:
    """Round P plus a product of float32 factors into ``values``.

    ``bound`` says how far that product may be from the real one: columns (n,), rows (rows,), and a number; at i, j it
    is ``rows_i columns_j`` and that number more.

    Shapes: p, values (rows, n), n a multiple of four; ``single`` (rows, R) and (R, n), ``exact`` (rows, R) and (n, R),
        all contiguous.
    Numerics: float64 sums of R + 1 terms are within ``gamma`` of the sum of their magnitudes.
    """
    shape = (p.shape[0], p.shape[1])
    old, new = (bits_of(tensor).reshape(-1).view(np.uint16) for tensor in (p, values))
    places, units = (
        allocate(name, dtype, shape).numpy().reshape(-1)
        for name, dtype in (("places", torch.int32), ("units", torch.int16))
    )
    sums = allocate("sums", torch.float32, (HEIGHT, shape[1])).numpy()
    scratch = (
        sums,
        np.empty(TILE, U16),
        np.empty(2 * TILE, np.int32),
        *(np.empty(TILE, t) for t in (I16, U16, F32, F32)),
    )
    limits = (*bound[:2], F32(bound[2]))
    return Passed(*_pass(old, single, limits, new, exact, gamma, back, scratch, places, units))
