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
    from loraforge.checkpoint.panels import (
        HEIGHT,
        LANES,
        SPAN,
        bits_of_single,
        compiled,
        error_of,
        lowest,
        single_of_bits,
        tile,
        tile_and_back,
        widest,
    )
except ImportError:  # the extra [fast] is not installed
    AVAILABLE = False
else:
    AVAILABLE = True
    U16, U32, U64, I16, I32, F32, F64 = np.uint16, np.uint32, np.uint64, np.int16, np.int32, np.float32, np.float64
    TILE = 4096  # elements that are looked at together
    OPEN, UNPROVED = I16(2), I32(1 << 20)
    SAFE = U32(0x7F7F0000)  # the bits of the greatest bfloat16: what is below in magnitude is rounded to a finite one

    @compiled
    def _value(bits):
        return single_of_bits(U32(bits) << U32(16))

    @compiled
    def _nearest_once(x):
        """Round float64 to bfloat16's bits by way of round-to-odd in float32, which makes two roundings one."""
        single = F32(x)
        bits = bits_of_single(single)
        if F64(single) != x and bits & U32(1) == U32(0) and math.isfinite(single):
            if single == 0:
                bits = (bits_of_single(F32(math.copysign(1.0, x))) & U32(0x80000000)) | U32(1)
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
        error = error_of(y, radius)
        high, low = bits_of_single(y + error) + U32(0x8000), bits_of_single(y - error) + U32(0x8000)
        return y, error, U16(high >> U32(16)), U16(low >> U32(16))

    @compiled
    def _round_edge(p, single, values, first, count, begin, n, sums, limit, marks, tops, back):  # noqa: PLR0913, PLR0917
        """Do what a tile does, for the columns from ``begin`` on, or rows, that fill none."""
        b, a = single
        norms, rows, lost = limit
        for i in range(count):
            sums[i, begin:] = 0
            for k in range(a.shape[0]):
                for j in range(begin, n):
                    sums[i, j] += b[first + i, k] * a[k, j]
            for j in range(begin, n):
                place = (first + i) * n + j
                y, _, high, low = _interval(p[place], sums[i, j], norms[j // 64] * rows[first + i] + lost)
                values[place] = high
                tops[0] = max(tops[0], bits_of_single(abs(y)))
                below = I16((p[place] & U16(0x7FFF)) - U16(1)) | I16(0x7F)
                if high != low or (back and I16(high & U16(0x7FFF)) > below):
                    marks[i, j // 64] |= U64(1) << U64(j % 64)

    @compiled
    def _round_rows(p, single, values, first, count, n, sums, limit, marks, tops, back):  # noqa: PLR0913, PLR0917
        """Round the upper ends of some rows into ``values``; mark where the lower are others, or W may not return."""
        norms, rows, lost = limit
        whole = n // SPAN * SPAN if count == HEIGHT else 0
        limits = np.empty(HEIGHT, F32)
        marks[:, whole // 64 :] = 0
        for column in range(0, whole, SPAN):
            for i in range(HEIGHT):
                limits[i] = norms[column // 64] * rows[first + i] + lost
            if back:
                tile_and_back(sums, single[0], single[1], p, values, limits, marks, tops, first, column)
            else:
                tile(sums, single[0], single[1], p, values, limits, marks, tops, first, column)
        if whole < n:
            _round_edge(p, single, values, first, count, whole, n, sums, limit, marks, tops, back)

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
        good, steps, open_ = np.empty(proved, I32), np.empty(proved, I16), np.empty(units.size - proved, np.int64)
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
    def _decide_all(some, count, values, exact, gamma, back, room, found):  # noqa: PLR0913, PLR0917
        """Decide marked elements; put those with a correction, or that are not proved, behind ``found`` others."""
        marks, some_p, some_sums, radii, steps = some
        places, units = room
        _steps_back(some_p[:count], some_sums, radii, steps)
        for i in range(count):
            j, step = marks[i], I32(steps[i])
            if step == OPEN:
                step = _decide(some_p[i], some_sums[i], radii[i], values, exact[0], exact[1], gamma, back, j)
            places[found], units[found] = j, 0 if step == UNPROVED else -step
            found += step != 0
        return found

    @compiled
    def _pass(p, single, limit, values, exact, gamma, back, scratch, room):  # noqa: PLR0913, PLR0917
        """Round, and decide what is marked; return what ``Passed`` holds.

        ``room`` is for places and units: a place has its correction, or 0 where nothing was proved.
        """
        sums, marks, some = scratch
        norms, rows, lost = limit
        some_marks, some_p, some_sums, radii, _ = some
        found, count, n = 0, 0, single[1].shape[1]
        tops = np.zeros(LANES, U32)
        first, lines = (
            0,
            rows.size % HEIGHT or HEIGHT,
        )  # the first tiles and the second may overlap, so that all are whole
        while first < rows.size:
            _round_rows(p, single, values, first, min(HEIGHT, rows.size - first), n, sums, limit, marks, tops, back)
            for i in range(lines):
                for w in range(marks.shape[1]):
                    word = marks[i, w]
                    if word == 0:
                        continue
                    if count > TILE - 64:
                        found, count = _decide_all(some, count, values, exact, gamma, back, room, found), 0
                    radius, begin = norms[w] * rows[first + i] + lost, (first + i) * n + 64 * w
                    while word != 0:
                        j = lowest(word)
                        word &= word - U64(1)
                        some_marks[count], some_p[count], radii[count] = begin + j, p[begin + j], radius
                        some_sums[count] = sums[i, 64 * w + j]
                        count += 1
            first, lines = first + lines, HEIGHT
        found = _decide_all(some, count, values, exact, gamma, back, room, found)
        return (tops.max() < SAFE, *_sorted_out(room[0][:found], room[1][:found]))


@dataclass(frozen=True, slots=True)
class Passed:
    """What one pass over a block found: see ``exact.rounded_sum``; nothing is known of ``unproved`` places.

    ``finite`` says that all values are; otherwise they may be.
    """

    finite: bool
    places: Array
    units: Array
    unproved: Array


def one_pass(  # noqa: PLR0913 - a kernel's arrays
    p: Tensor,
    single: tuple[Array, Array],
    limit: tuple[Array, Array, float],
    values: Tensor,
    exact: tuple[Array, Array],
    gamma: float,
    allocate: Allocate,
    *,
    back: bool,
) -> Passed:
    """Round P plus a product of float32 factors into ``values``.

    ``limit`` says how far that product may be from the real one: for each 64 columns, for each row, and a number; at
    i, j it is ``rows_i columns_(j // 64)`` and that number more.

    Shapes: p, values (rows, n); ``single`` (rows, R) and (R, n), ``exact`` (rows, R) and (n, R), all contiguous.
    Numerics: float64 sums of R + 1 terms are within ``gamma`` of the sum of their magnitudes.
    """
    shape = (p.shape[0], p.shape[1])
    old, new = (bits_of(tensor).reshape(-1).view(np.uint16) for tensor in (p, values))
    places, units = (
        allocate(name, dtype, shape).numpy().reshape(-1)
        for name, dtype in (("places", torch.int32), ("units", torch.int16))
    )
    sums = allocate("sums", torch.float32, (HEIGHT, shape[1])).numpy()
    marks = np.empty((HEIGHT, -(-shape[1] // 64)), U64)
    some = tuple(np.empty(TILE, t) for t in (np.int64, U16, F32, F32, I16))
    limits = (*limit[:2], F32(limit[2]))
    return Passed(*_pass(old, single, limits, new, exact, gamma, back, (sums, marks, some), (places, units)))
