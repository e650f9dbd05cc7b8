"""A merge into bfloat16 as one pass over a chunk, compiled by numba where that is installed.

What is computed is defined in ``exact``, whose own loop gives the same bits in some twenty passes. One pass takes a
third of the time; and since Python is not asked in between, threads run side by side.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loraforge.checkpoint.floats import Allocate, Array, bits_of

try:
    from llvmlite import ir
    from numba import njit, types
    from numba.extending import intrinsic
except ImportError:  # the extra [fast] is not installed
    AVAILABLE = False
else:
    AVAILABLE = True
    U16, U32, I16, I32, F32, F64 = np.uint16, np.uint32, np.int16, np.int32, np.float32, np.float64
    TILE = 4096  # elements, whose buffers stay in a core's first cache
    UNIT = F32(2.1 * 2.0**-24)  # of the sum's own size: for the last addition, and for that of the bound

    _compiled = njit(nogil=True, cache=True, error_model="numpy")

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

    @_compiled
    def _value(bits):
        return _float(U32(bits) << U32(16))

    @_compiled
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

    @_compiled
    def _ordered(bits):
        return I32(bits) if bits < U16(0x8000) else I32(0x7FFF) - I32(bits)

    @_compiled
    def _interval(w, total, radius):
        """Return ``W + total``, how far it may be from the real number, and both ends of that, rounded.

        An end that is a tie may go either way here: the real number lies strictly inside.
        """
        y = total + _value(w)
        error = radius + UNIT * abs(y)
        high, low = (_bits(y + error) + U32(0x8000)) >> U32(16), (_bits(y - error) + U32(0x8000)) >> U32(16)
        return y, error, U16(high), U16(low)

    @_compiled
    def _round_ends(p, sums, radius, values, flags):
        for j in range(p.size):
            _, _, high, low = _interval(p[j], sums[j], radius)
            values[j] = high
            flags[j] = high ^ low

    @_compiled
    def _flag_crossings(p, values, flags):
        """Flag where the way back may miss (``exact._crossings``)."""
        for j in range(p.size):
            below = I16((p[j] & U16(0x7FFF)) - U16(1)) | I16(0x7F)
            flags[j] |= U16(I16(values[j] & U16(0x7FFF)) > below)

    @_compiled
    def _top(values):
        """Return the greatest magnitude's bits."""
        top = U16(0)
        for j in range(values.size):
            twice = U16(values[j] << U16(1))  # a maximum of this is fast code, of the magnitude itself it is not
            top = max(top, twice)
        return top >> U16(1)

    @_compiled
    def _sum_at(start, sign, b, a, gamma, j):
        """Return ``start + sign sum_k b_k a_k`` at flat place j in float64, and a bound of its error."""
        row, column = j // a.shape[1], j % a.shape[1]
        total, size = start, abs(start)
        for k in range(b.shape[1]):
            term = sign * b[row, k] * a[k, column]
            total += term
            size += abs(term)
        return total, gamma * size + 2.0**-1060

    @_compiled
    def _nearer(w, delta, error):
        """Say what ``w + delta`` rounds to, as far as that is plain: 0 for w, 1 for the next number up, -1 for down.

        2 is for what is not plain: near a tie, beyond the next number, or about zero. The gap to the next number is an
        ulp of w away from zero, and of the number below w towards it.
        """
        size, value = w & U16(0x7FFF), _value(w)
        binade = (size if (delta > 0) == (value > 0) else size - U16(1)) & U16(0x7F80)
        if not U16(0x0080) <= binade < U16(0x7F80):
            return 2
        gap, far = F64(_value(binade)) * 2.0**-7, abs(delta)
        if far + error < gap / 2:
            return 0
        if far - error > gap / 2 and far + error < gap:
            return 1 if delta > 0 else -1
        return 2

    @_compiled
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

    @_compiled
    def _guess(w, w_new, x, error, b, a, gamma, j):  # noqa: PLR0913, PLR0917 - scalars and arrays of a kernel
        """Return both ends of the way back at flat place j, rounded, where W' came from a sum within error of x."""
        near, error = w + (w_new - x), error + 2.0**-50 * (abs(w) + abs(w_new))
        low, high = _nearest_once(near - error), _nearest_once(near + error)
        if low != high:
            near, error = _sum_at(w_new, -1.0, b, a, gamma, j)
            low, high = _nearest_once(near - error), _nearest_once(near + error)
        return low, high

    @_compiled
    def _pass(p, sums, radius, values, b, a, gamma, back, flags, marks, places, units):  # noqa: C901, PLR0913, PLR0917
        """Round, and decide what is flagged; return the greatest magnitude, and how many places were found.

        A place has its correction in ``units``, or 0 where nothing was proved. ``places`` may lie in the memory of
        ``sums``: as many of those are used up by then.
        """
        found, top = 0, U16(0)
        for start in range(0, p.size, TILE):
            size = min(TILE, p.size - start)
            tile = slice(start, start + size)
            _round_ends(p[tile], sums[tile], radius, values[tile], flags)
            if back:
                _flag_crossings(p[tile], values[tile], flags)
            first, end = _flagged(flags, flags[:size].view(np.uint64), marks)
            for i in range(first, end):
                j = start + marks[i]
                y, radius_there, high, low = _interval(p[j], sums[j], radius)
                w, x, error = F64(_value(p[j])), F64(y), 2 * F64(radius_there)
                if not math.isfinite(w):
                    values[j] = p[j]
                    continue
                if high != low:
                    x, error = _sum_at(w, 1.0, b, a, gamma, j)
                    low, values[j] = _nearest_once(x - error), _nearest_once(x + error)
                    if low != values[j]:
                        places[found], units[found] = j, 0
                        found += 1
                        continue
                if not back:
                    continue
                w_new = F64(_value(values[j]))
                step = _nearer(p[j], w_new - x, error + 2.0**-50 * (abs(w_new) + abs(x)))
                if step == 2:
                    low, high = _guess(w, w_new, x, error, b, a, gamma, j)
                    if low != high:
                        places[found], units[found] = j, 0
                        found += 1
                        continue
                    step = _ordered(low) - _ordered(p[j])
                if step != 0:
                    places[found], units[found] = j, -step
                    found += 1
            top = max(top, _top(values[tile]))
        return top, found


@dataclass(frozen=True, slots=True)
class Passed:
    """What one pass over a chunk found: see ``exact.rounded_sum``; nothing is known of ``unproved`` places."""

    top: int
    places: Array
    units: Array
    unproved: Array


def one_pass(  # noqa: PLR0913 - a kernel's arrays
    p: Tensor,
    sums: Tensor,
    radius: float,
    values: Tensor,
    factors: tuple[Tensor, Tensor],
    gamma: float,
    allocate: Allocate,
    *,
    back: bool,
) -> Passed:
    """Add P to float32 ``sums`` that are within ``radius`` of the products of ``factors``, and round into ``values``.

    The sums are lost: places are noted in their memory.

    Shapes: p, sums, values (rows, n), n a multiple of four; factors (rows, R) and (R, n) in float64.
    Numerics: float64 sums of R + 1 terms are within ``gamma`` of the sum of their magnitudes.
    """
    old, new = (bits_of(tensor).reshape(-1).view(np.uint16) for tensor in (p, values))
    flat = sums.numpy().reshape(-1)
    places, units = flat.view(np.int32), allocate("units", torch.int16, tuple(p.shape)).numpy().reshape(-1)
    flags, marks = np.empty(TILE, np.uint16), np.empty(2 * TILE + 8, np.int32)
    b, a = factors[0].numpy(), factors[1].numpy()
    top, found = _pass(old, flat, np.float32(radius), new, b, a, gamma, back, flags, marks, places, units)
    places, units = places[:found].astype(np.int64), units[:found].copy()
    proved = units != 0
    return Passed(int(top), places[proved], units[proved], places[~proved])
