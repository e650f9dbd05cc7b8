"""Tiles of ``RN(P + B A)`` in bfloat16: some rows by some vectors of columns, from the product to the rounded numbers.

The product of a tile is summed in registers, as BLAS libraries do it (Goto and van de Geijn, Anatomy of
High-Performance Matrix Multiplication, 2008); with so few terms in a sum nothing needs packing. It is as fast as
theirs, and there it is added and rounded: what is not written to memory need not be read again, which takes as long.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_FEATURES = binding.get_host_cpu_features()
LANES = 16 if _FEATURES.get("avx512f") else 8 if _FEATURES.get("avx") else 4
HEIGHT = 4  # rows of a tile
_VECTORS = 4 if LANES == 16 else 2  # columns of a tile: as many sums as half of the registers hold
SPAN = LANES * _VECTORS
UNIT = np.float32(2.1 * 2.0**-24)  # of a sum's own size: for its last addition, and for that of the bound
_I1, _I8, _I16, _I32, _I64, _F32 = *(ir.IntType(bits) for bits in (1, 8, 16, 32, 64)), ir.FloatType()

compiled: Callable[..., Any] = njit(nogil=True, cache=True, error_model="numpy")


@intrinsic
def bits_of_single(_typing, x):
    """Return a float32's bits."""

    def generate(_context, builder, _signature, args):
        return builder.bitcast(args[0], _I32)

    return types.uint32(types.float32), generate


@intrinsic
def single_of_bits(_typing, x):
    """Return the float32 of these bits."""

    def generate(_context, builder, _signature, args):
        return builder.bitcast(args[0], _F32)

    return types.float32(types.uint32), generate


@intrinsic
def error_of(_typing, y, radius):
    """Return ``UNIT |y| + radius``, the same bits as in a tile."""

    def generate(_context, builder, _signature, args):
        magnitude = builder.and_(builder.bitcast(args[0], _I32), ir.Constant(_I32, 0x7FFFFFFF))
        return _error(builder, builder.bitcast(magnitude, _F32), args[1])

    return types.float32(types.float32, types.float32), generate


@intrinsic
def lowest(_typing, word):
    """Return the place of the lowest bit that is set."""

    def generate(_context, builder, _signature, args):
        return builder.cttz(args[0], ir.Constant(_I1, 1))

    return types.int64(types.uint64), generate


def _error(builder, magnitude, radius):
    kind = magnitude.type
    unit = ir.Constant(kind, float(UNIT) if kind == _F32 else [float(UNIT)] * LANES)
    if not _FEATURES.get("fma"):
        return builder.fadd(builder.fmul(magnitude, unit), radius)
    name = "llvm.fma.f32" if kind == _F32 else f"llvm.fma.v{LANES}f32"
    fused = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
    return builder.call(fused, [magnitude, unit, radius])


class _Tile:
    """Writes the code of a tile: vectors of columns from ``column`` on, of the rows from ``row`` on."""

    def __init__(self, context, builder, signature, arguments):  # noqa: ANN204 - numba has no types
        self.builder = builder
        self.sums, self.left, self.right, self.base, self.result, self.limits, self.marks, self.top = (
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args[:-2], arguments[:-2], strict=True)
        )
        self.row, self.column = arguments[-2:]
        self.terms, self.width = (builder.extract_value(self.right.shape, axis) for axis in (0, 1))

    def at(self, array, line, step, lane=None):
        """The place of a vector of a matrix of ``width`` columns, in any of its lines."""
        index = self.builder.add(self.builder.mul(self.width, line), self.column)
        place = self.builder.gep(array.data, [self.builder.add(index, _I64(step * LANES))])
        return place if lane is None else self.builder.bitcast(place, ir.VectorType(lane, LANES).as_pointer())

    def all_of(self, number):
        """A vector of one number: of the code, or that is known when it runs."""
        if not isinstance(number, ir.Value):
            return ir.Constant(ir.VectorType(_I32, LANES), [number] * LANES)
        one = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
        one = self.builder.insert_element(one, number, _I32(0))
        return self.builder.shuffle_vector(one, ir.Constant(one.type, ir.Undefined), self.all_of(0))

    def products(self):
        """Sum ``B A``; return a vector of sums for each line and step."""
        builder, lanes = self.builder, ir.VectorType(_F32, LANES)
        sums = [[cgutils.alloca_once(builder, lanes) for _ in range(_VECTORS)] for _ in range(HEIGHT)]
        for line in sums:
            for place in line:
                builder.store(ir.Constant(lanes, [0.0] * LANES), place)
        with cgutils.for_range(builder, self.terms) as loop:
            columns = [builder.load(self.at(self.right, loop.index, v, _F32), align=4) for v in range(_VECTORS)]
            for i, line in enumerate(sums):
                index = builder.add(builder.mul(self.terms, builder.add(self.row, _I64(i))), loop.index)
                factor = self.all_of(builder.load(builder.gep(self.left.data, [index])))
                for place, column in zip(line, columns, strict=True):
                    term = builder.fmul(factor, column, flags=("contract",))
                    builder.store(builder.fadd(term, builder.load(place), flags=("contract",)), place)
        return [[builder.load(place) for place in line] for line in sums]

    def rounded(self, i, step, total, radius, back):
        """Round the upper ends of one vector into the result; return which are doubtful, and the magnitudes."""
        builder, row = self.builder, self.builder.add(self.row, _I64(i))
        words, singles = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)
        old = builder.zext(builder.load(self.at(self.base, row, step, _I16), align=2), words)
        y = builder.fadd(total, builder.bitcast(builder.shl(old, self.all_of(16)), singles))
        size = builder.and_(builder.bitcast(y, words), self.all_of(0x7FFFFFFF))
        error = _error(builder, builder.bitcast(size, singles), radius)
        high, low = (
            builder.add(builder.bitcast(end, words), self.all_of(0x8000))
            for end in (builder.fadd(y, error), builder.fsub(y, error))
        )
        doubtful = builder.icmp_unsigned(">", builder.xor(high, low), self.all_of(0xFFFF))
        new = builder.lshr(high, self.all_of(16))
        builder.store(builder.trunc(new, ir.VectorType(_I16, LANES)), self.at(self.result, row, step, _I16), align=2)
        if back:
            doubtful = builder.or_(doubtful, self.crossed(old, new))
        return doubtful, size

    def crossed(self, old, new):
        """Where the way back may miss (``exact._crossings``)."""
        builder, magnitude = self.builder, self.all_of(0x7FFF)
        below = builder.or_(builder.sub(builder.and_(old, magnitude), self.all_of(1)), self.all_of(0x7F))
        return builder.icmp_signed(">", builder.and_(new, magnitude), below)

    def write(self, back):
        """Write all of it."""
        builder, marked = self.builder, ir.IntType(SPAN)
        greatest = builder.bitcast(self.top.data, ir.VectorType(_I32, LANES).as_pointer())
        top = builder.load(greatest, align=4)
        words = builder.udiv(builder.add(self.width, _I64(63)), _I64(64))
        marks = builder.bitcast(self.marks.data, _I8.as_pointer())
        for i, line in enumerate(self.products()):
            radius = self.all_of(builder.load(builder.gep(self.limits.data, [_I64(i)])))
            found = ir.Constant(marked, 0)
            for step, total in enumerate(line):
                builder.store(total, self.at(self.sums, _I64(i), step, _F32), align=4)
                doubtful, size = self.rounded(i, step, total, radius, back)
                top = builder.select(builder.icmp_unsigned(">", size, top), size, top)
                bits = builder.zext(builder.bitcast(doubtful, ir.IntType(LANES)), marked)
                found = builder.or_(found, builder.shl(bits, ir.Constant(marked, step * LANES)))
            byte = builder.add(builder.mul(words, _I64(8 * i)), builder.udiv(self.column, _I64(8)))
            builder.store(found, builder.bitcast(builder.gep(marks, [byte]), marked.as_pointer()), align=1)
        builder.store(top, greatest, align=4)


def _tile_of(*, back: bool) -> Any:  # noqa: ANN401 - numba has no types
    def tile(_typing, sums, left, right, base, result, limits, marks, top, row, column):  # noqa: PLR0913, PLR0917
        """Make a tile of ``RN(base + left right)``, whole in both directions.

        Shapes: sums (HEIGHT, n), left (rows, R), right (R, n) float32; base, result (rows n) of 16 bits; limits
            (HEIGHT,) float32, of each row's product; marks (HEIGHT, words) of 64 bits, one for each column, set where
            the ends of the interval round apart; top (LANES,) uint32, the greatest magnitudes.
        """

        def generate(context, builder, signature, arguments):
            _Tile(context, builder, signature, arguments).write(back)
            return context.get_dummy_value()

        return types.void(sums, left, right, base, result, limits, marks, top, types.intp, types.intp), generate

    return intrinsic(tile)


tile, tile_and_back = _tile_of(back=False), _tile_of(back=True)


@intrinsic
def widest(_typing):
    """Let the loops of the function in which this stands use the widest registers; LLVM prefers half of AVX-512's."""

    def generate(context, builder, _signature, _arguments):
        set.add(builder.function.attributes, f'"prefer-vector-width"="{32 * LANES}"')  # llvmlite knows fewer than LLVM
        return context.get_dummy_value()

    return types.void(), generate
