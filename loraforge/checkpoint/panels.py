"""``B A`` of a few rows at a time, for a kernel that uses them at once: they never leave a core's first caches.

The product of a tile, some rows by some vectors of columns, is summed in registers, as BLAS libraries do it (Goto and
van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008); with so few terms in a sum nothing needs
packing. It is as fast as theirs, and what comes out is not written to memory and read again, which takes as long.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_FEATURES = binding.get_host_cpu_features()
LANES = 16 if _FEATURES.get("avx512f") else 8 if _FEATURES.get("avx") else 4
HEIGHT = 4  # rows of a tile
_VECTORS = 4 if LANES == 16 else 2  # columns of a tile: as many sums as half of the registers hold
SPAN = LANES * _VECTORS
_LINE = 64  # bytes of a cache line

compiled: Callable[..., Any] = njit(nogil=True, cache=True, error_model="numpy")


@intrinsic
def _tile(_typing, out, b, a, row, column):
    """Put ``b[row : row + HEIGHT] @ a[:, column : column + SPAN]`` into ``out[:HEIGHT, column : column + SPAN]``."""

    def generate(context, builder, signature, arguments):
        place, left, right = (
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args[:3], arguments[:3], strict=True)
        )
        row, column = arguments[3:]
        terms, width = builder.extract_value(right.shape, 0), builder.extract_value(right.shape, 1)
        lanes, number = ir.VectorType(ir.FloatType(), LANES), ir.IntType(64)

        def vector(array, line, step):
            index = builder.add(builder.add(builder.mul(width, line), column), number(step * LANES))
            return builder.bitcast(builder.gep(array.data, [index]), lanes.as_pointer())

        def spread(line, k):
            index = builder.add(builder.mul(terms, builder.add(row, number(line))), k)
            one = builder.insert_element(_none(lanes), builder.load(builder.gep(left.data, [index])), ir.IntType(32)(0))
            everywhere = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
            return builder.shuffle_vector(one, _none(lanes), everywhere)

        sums = [[cgutils.alloca_once(builder, lanes) for _ in range(_VECTORS)] for _ in range(HEIGHT)]
        for line in sums:
            for place_of_sum in line:
                builder.store(ir.Constant(lanes, [0.0] * LANES), place_of_sum)
        with cgutils.for_range(builder, terms) as loop:
            columns = [builder.load(vector(right, loop.index, step), align=4) for step in range(_VECTORS)]
            for i, line in enumerate(sums):
                factor = spread(i, loop.index)
                for place_of_sum, values in zip(line, columns, strict=True):
                    term = builder.fmul(factor, values, flags=("contract",))
                    total = builder.fadd(term, builder.load(place_of_sum), flags=("contract",))
                    builder.store(total, place_of_sum)
        for i, line in enumerate(sums):
            for step, place_of_sum in enumerate(line):
                builder.store(builder.load(place_of_sum), vector(place, number(i), step), align=4)
        return context.get_dummy_value()

    return types.void(out, b, a, types.intp, types.intp), generate


def _none(kind):
    return ir.Constant(kind, ir.Undefined)


@intrinsic
def widest(_typing):
    """Let the loops of the function in which this stands use the widest registers; LLVM prefers half of AVX-512's."""

    def generate(context, builder, _signature, _arguments):
        set.add(builder.function.attributes, f'"prefer-vector-width"="{32 * LANES}"')  # llvmlite knows fewer than LLVM
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _fetch(_typing, array, index):
    """Ask for the cache line of an element that is used soon."""

    def generate(context, builder, signature, arguments):
        place = context.make_array(signature.args[0])(context, builder, arguments[0])
        byte = builder.bitcast(builder.gep(place.data, [arguments[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte.type, number, number, number])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(fetch, [byte, number(0), number(2), number(1)])  # to read, into the second cache, data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@compiled
def product_of_rows(b, a, first, count, out, base, result):
    """Put ``b[first : first + count] @ a`` into ``out``; and have the same rows of two flat arrays at hand by then.

    Shapes: b (rows, R), a (R, n), out (HEIGHT, n), contiguous float32; base and result (rows n) of 16 bits; ``count``
        at most HEIGHT.
    Numerics: float32 sums of R terms in their order, with or without a fused multiplication.
    """
    whole = a.shape[1] // SPAN * SPAN if count == HEIGHT else 0
    for column in range(0, whole, SPAN):
        _tile(out, b, a, first, column)
        begin = first * a.shape[1] + HEIGHT * column
        for j in range(begin, min(begin + HEIGHT * SPAN, base.size), _LINE // base.itemsize):
            _fetch(base, j)
            _fetch(result, j)
    for i in range(count):
        out[i, whole:] = 0
        for k in range(a.shape[0]):
            for j in range(whole, a.shape[1]):
                out[i, j] += b[first + i, k] * a[k, j]
