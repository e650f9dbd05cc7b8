r"""``P + B A`` rounded once, correctly: the same bits on every machine, device and number of threads.

Equation: ``out_ij = RN(p_ij + sum_k b_ik a_kj)``: the real number, rounded to nearest (ties to even) into the element
type. A float64 matrix product comes close to that number, in whatever order the machine adds. Its distance is at most

    |s - x| <= gamma (|p| + sum_k |b_ik| |a_kj|),   gamma = (R + 2) 2^-53 / (1 - (R + 2) 2^-53)

(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1), so wherever both ends of that interval
round to one value, the value is proved. The few elements left are evaluated in twice the precision, in a fixed order
(Ogita, Rump and Oishi, Accurate sum and dot product, 2005, Dot2), and rounded from there by way of round-to-odd
(Boldo and Melquiond, 2008), which makes two roundings one. Where a real number lies within 2^-100 of a tie, relative
to its terms, Dot2 decides, which is the same everywhere, too.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array: TypeAlias = npt.NDArray[Any]
Allocate: TypeAlias = Callable[[str, torch.dtype, tuple[int, ...]], Tensor]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNIT = 2.0**-53
_SPLIT = 2.0**27 + 1  # Dekker's constant for float64


@dataclass(frozen=True, slots=True)
class Format:
    """A floating-point element type, seen as integers of its width."""

    magnitude: int
    exponent: int
    mantissa: int


FORMATS = {
    torch.bfloat16: Format(0x7FFF, 0x7F80, 0x007F),
    torch.float16: Format(0x7FFF, 0x7C00, 0x03FF),
    torch.float32: Format(0x7FFF_FFFF, 0x7F80_0000, 0x007F_FFFF),
    torch.float64: Format((1 << 63) - 1, 0x7FF << 52, (1 << 52) - 1),
}


@dataclass(frozen=True, slots=True)
class Product:
    """``B A`` of some rows, in float64: b (rows, R), a (R, n).

    ``a_norm`` bounds the norms of a's columns, ``b_norm`` those of b's rows; without it they are looked at.
    """

    b: Tensor
    a: Tensor
    a_norm: float
    b_norm: float | None = None

    @property
    def gamma(self) -> float:
        """The relative error of a sum of this many products in float64, in any order."""
        n = self.a.shape[0] + 2
        return n * _UNIT / (1 - n * _UNIT)

    @property
    def error(self) -> float:
        """What of the error of a sum does not shrink with the sum: ``2 gamma max|b_i| max|a_j|`` (Cauchy, Schwarz)."""
        b_norm = column_norm(self.b.T) if self.b_norm is None else self.b_norm
        return 2.1 * self.gamma * b_norm * self.a_norm

    def negated(self) -> "Product":
        """Return ``-B A``."""
        return Product(-self.b, self.a, self.a_norm, self.b_norm)


@dataclass(frozen=True, slots=True)
class Rounded:
    """``values`` is the result, ``sums`` the float64 sums it came from, ``doubtful`` where those did not decide."""

    values: Tensor
    sums: Tensor
    doubtful: Array


def column_norm(a: Tensor) -> float:
    """Return a bound of the norms of the columns of a (R, n), for ``Product``."""
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    return float(torch.linalg.vector_norm(a, dim=0, dtype=wide).max()) * (1 + 1e-4) if a.numel() else 0.0


def rounded_sum(p: Tensor, product: Product, dtype: torch.dtype, allocate: Allocate) -> Rounded:
    """Return ``P + B A``, rounded once into ``dtype``.

    Shapes: p (rows, n) float64 -> (rows, n); the result lives in ``allocate``'s buffers.
    Numerics: correct rounding of the real number (see the module); NaN and infinity pass through.
    Cost: a float64 matrix product, and about ten passes over the block.
    """
    shape = (p.shape[0], p.shape[1])
    sums = torch.addmm(p, product.b, product.a, out=allocate("sums", torch.float64, shape))
    if dtype == torch.float64:
        p_array = p.numpy()
        pairs = ((b[:, None], a[None, :]) for b, a in zip(product.b.numpy().T, product.a.numpy(), strict=True))
        values = torch.from_numpy(_with_sign_of(_dot2(p_array, pairs)[0], p_array))
        return Rounded(values, sums, np.arange(0))
    high, suspects = _interval(sums, product, dtype, allocate)
    doubtful = np.flatnonzero(suspects)
    if len(doubtful):
        found = sums.numpy().reshape(-1)[doubtful]
        error = product.error + 4 * product.gamma * np.abs(found)
        settled = settle(p, product, doubtful, Estimate(found, error), dtype)
        bits_of(high).reshape(-1)[doubtful] = bits_of(settled)
    return Rounded(high, sums, doubtful)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Real numbers known to lie within ``error`` of float64 ``values``."""

    values: Array
    error: Array


def settle(p: Tensor, product: Product, places: Array, near: Estimate, dtype: torch.dtype) -> Tensor:
    """Return the elements of ``P + B A`` at flat ``places`` (k,), rounded once, from what they are known to be near.

    Shapes: p (rows, n), of any float type.

    Cost: some twenty operations for each place; about 20 R more for one that rounds to another value at the other
        end of its estimate.
    """
    ends = np.concatenate((near.values - near.error, near.values + near.error))
    both = _round(ends, dtype)
    low, high = both[: len(places)], both[len(places) :]
    # zeros are never proved: whose sign they keep is seen in the terms
    open_ = np.flatnonzero((bits_of(low) != bits_of(high)) | (near.values == 0))
    if len(open_):
        rows, columns = np.divmod(places[open_], p.shape[1])
        base = p.reshape(-1)[torch.from_numpy(places[open_])].to(torch.float64).numpy()
        settled = dot_at(base, product.b.numpy()[rows].T, product.a.numpy()[:, columns], dtype)
        bits_of(low)[open_] = bits_of(settled)
    return low


def dot_at(p: Array, b: Array, a: Array, dtype: torch.dtype) -> Tensor:
    """Return ``p + sum_k b_k a_k``, rounded once into ``dtype``.

    Shapes: p (k,), b and a (R, k), all float64.
    """
    high, low = _dot2(p, zip(b, a, strict=True))
    rounded = round_pair(high, low, dtype)
    zero = np.flatnonzero((high == 0) & (p == 0))  # nothing was added: the base's zero keeps its sign
    if len(zero):
        rounded[torch.from_numpy(zero)] = torch.from_numpy(p[zero]).to(dtype)
    return rounded


def round_pair(high: Array, low: Array, dtype: torch.dtype) -> Tensor:
    """Round ``high + low`` (float64, |low| at most half an ulp of high) once into ``dtype``.

    Numerics: into a shorter type by round-to-odd on the way, so that the last rounding sees on which side of a tie
        the number lies.
    """
    return torch.from_numpy(high) if dtype == torch.float64 else _round(_to_odd(high, low), dtype)


def _round(values: Array, dtype: torch.dtype) -> Tensor:
    """Round float64 numbers once into a shorter type; torch would go through float32, and round twice."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        single = values.astype(np.float32)
        if dtype == torch.float32:
            return torch.from_numpy(single)
        return torch.from_numpy(_to_odd(single, values - single)).to(dtype)


def ordered(bits: Array) -> Array:
    """Map bits seen as signed integers so that neighbours are one apart, through zero, too; its own inverse."""
    return np.where(bits < 0, bits ^ np.iinfo(bits.dtype).max, bits)


def bits_of(values: Tensor) -> Array:
    """Return a tensor's bits as signed integers of its width, without a copy."""
    return np.asarray(values.view(_INTEGERS[values.itemsize]).numpy())


def _interval(sums: Tensor, product: Product, dtype: torch.dtype, allocate: Allocate) -> tuple[Tensor, Array]:
    """Round both ends of an interval that holds the real number; return one, and where they are not proved equal.

    The interval is ``s (1 +- delta)``: delta covers what of the error shrinks with s, and what does not is smaller
    than that wherever ``|s| >= least``.
    """
    shape = (sums.shape[0], sums.shape[1])
    if dtype == torch.float32:
        work = sums
        delta = max(2.0**-42, 4 * product.gamma)
        least = 2 * (product.error + 2.0**-1060) / delta
    else:  # through float32, whose own rounding (2^-24) delta covers as well
        work = allocate("single", torch.float32, shape).copy_(sums)
        delta = 2.0**-21
        least = (product.error + 2.0**-148) * 2.0**22
    scaled = allocate("scaled", work.dtype, shape)
    high = allocate("high", dtype, shape).copy_(torch.mul(work, 1 + delta, out=scaled))
    low = allocate("low", dtype, shape).copy_(torch.mul(work, 1 - delta, out=scaled))
    high_bits, low_bits = bits_of(high), bits_of(low)
    suspects = allocate("suspects", torch.bool, shape).numpy()
    small = allocate("small", torch.bool, shape).numpy()
    np.not_equal(high_bits, low_bits, out=suspects)
    np.bitwise_and(high_bits, FORMATS[dtype].magnitude, out=low_bits)  # low has done its work
    np.logical_or(suspects, np.less(low_bits, _bits_above(least, dtype), out=small), out=suspects)
    return high, suspects.reshape(-1)


@functools.lru_cache(maxsize=1024)
def _bits_above(value: float, dtype: torch.dtype) -> int:
    """The bits of a number of ``dtype`` that is greater than ``value``."""
    nearest = int(bits_of(torch.tensor([value], dtype=torch.float64).to(dtype))[0])
    return min(nearest + 2, FORMATS[dtype].magnitude)


def _dot2(p: Array, pairs: Iterable[tuple[Array, Array]]) -> tuple[Array, Array]:
    """``p + sum b_k a_k`` as a sum of two float64, each operation by itself: no order is left to the machine."""
    high, low = p.astype(np.float64, copy=True), np.zeros_like(p, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for b, a in pairs:
            product, product_error = _two_product(b, a)
            high, error = _two_sum(high, product)
            low = low + (error + product_error)
        return _two_sum(high, low)


def _two_sum(x: Array, y: Array) -> tuple[Array, Array]:
    """Knuth: s + e = x + y exactly."""
    s = x + y
    t = s - x
    return s, (x - (s - t)) + (y - t)


def _two_product(x: Array, y: Array) -> tuple[Array, Array]:
    """Dekker and Veltkamp: p + e = x y exactly; without a fused multiply-add, which not every machine has."""
    p = x * y
    x_high, x_low = _halves(x)
    y_high, y_low = _halves(y)
    return p, ((x_high * y_high - p) + x_high * y_low + x_low * y_high) + x_low * y_low


def _halves(x: Array) -> tuple[Array, Array]:
    c = _SPLIT * x
    high = c - (c - x)
    return high, x - high


def _to_odd(value: Array, rest: Array) -> Array:
    """Of the two neighbours around ``value + rest`` take the one whose last bit is 1; exact numbers stay."""
    integer = np.int64 if value.dtype == np.float64 else np.int32
    bits: Array = value.view(integer)
    move = (rest != 0) & ((bits & 1) == 0) & np.isfinite(value)
    away = np.where((rest > 0) == (value > 0), 1, -1).astype(integer)  # the next bit pattern is the next number
    found: Array = np.where(move, bits + away, bits).view(value.dtype)
    zero = np.flatnonzero(move & (value == 0))
    found[zero] = np.nextafter(value[zero], np.copysign(math.inf, rest[zero]).astype(value.dtype))
    return found


def _with_sign_of(values: Array, p: Array) -> Array:
    """Where nothing was added to a zero, the base's zero keeps its sign."""
    return np.where((values == 0) & (p == 0), p, values)
