r"""``P + B A`` rounded once, correctly: the same bits on every machine, device and number of threads.

Equation: ``out_ij = RN(p_ij + sum_k b_ik a_kj)``: the real number, rounded to nearest (ties to even) into the element
type. A matrix product comes close to that number, in whatever order the machine adds: for a sum of n terms within

    gamma_n sum |terms|,   gamma_n = n u / (1 - n u)

of it (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1), u the unit roundoff of the type
it is done in. So the product is done in a type that is a little wider than the result's, float32 for 16 bits, and both
ends of an interval that holds the real number are rounded. Where they agree, the value is proved. The few elements left
(one in a thousand or fewer) are looked at one by one: with float64 sums and their bound, and where even that leaves
two values, in twice the precision and a fixed order (``twofold``). Where a real number lies within 2^-100 of a tie,
relative to its terms, that decides, which is the same everywhere, too.

The way back, ``RN(W' - B A)``, is the same function. ``rounded_sum`` tells in passing where it will miss.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from loraforge.checkpoint import fused
from loraforge.checkpoint.floats import FORMATS, Allocate, Array, bits_of, largest, ordered, round_once
from loraforge.checkpoint.twofold import dot_at

Corrections: TypeAlias = tuple[Array, Array]
"""Ascending flat places, and what to add to the ordered bits there."""

CHUNK = 131_072  # elements: their five buffers stay in a core's second cache, and Python's part is small beside them
_GATHERED = 1 << 20  # elements of factors that are gathered at a time
_NOWHERE = np.empty(0, np.int64)
_WORDS = 8  # bytes that are compared at a time
_FAR = 2.0**120  # float32 holds what is below, and sums of it
_UNIT, _LEAST = 2.0**-53, 2.0**-1060


class Columns:
    """The right factor of products, (R, n) in float64, and what is computed of it once for all rows."""

    def __init__(self, a: Tensor) -> None:
        self.lines: Array = a.T.to(torch.float64).contiguous().numpy()
        """It as (n, R): a column's numbers lie side by side."""
        self.a = torch.from_numpy(self.lines).T
        self.norm = column_norm(self.a)
        norms = _norms(self.a)
        self.norms: Array = np.maximum.reduceat(norms, range(0, len(norms), 64)) if len(norms) else norms
        """Bounds of the norms of each 64 columns."""
        self._as: dict[torch.dtype, Tensor] = {torch.float64: self.a}

    def to(self, wide: torch.dtype) -> Tensor:
        """Return it in another type."""
        if wide not in self._as:
            self._as[wide] = self.a.to(wide).contiguous()
        return self._as[wide]


@dataclass(frozen=True, slots=True)
class Left:
    """The left factor of a product, (rows, R), in float64 and float32.

    They are arrays, since numpy takes rows of them without letting go of the interpreter's lock (see ``Workspace``).
    """

    b: Array
    single: Array
    norms: Array

    @classmethod
    def of(cls, b: Tensor) -> Self:
        """Return a factor that is given in float64."""
        return cls(b.contiguous().numpy(), b.to(torch.float32).contiguous().numpy(), _norms(b.T))

    def __getitem__(self, rows: slice) -> "Left":
        """Return some of the rows; nothing is computed anew."""
        return Left(self.b[rows], self.single[rows], self.norms[rows])

    def __neg__(self) -> "Left":
        """Return ``-B``."""
        return Left(-self.b, -self.single, self.norms)

    def to(self, wide: torch.dtype) -> Tensor:
        """Return it in float64 or float32."""
        return torch.from_numpy(self.b if wide == torch.float64 else self.single)


@dataclass(frozen=True, slots=True)
class Product:
    """``B A`` of some rows. ``b_norm`` bounds the norms of B's rows."""

    left: Left
    right: Columns
    b_norm: float

    @property
    def reach(self) -> float:
        """What no ``sum_k |b_ik| |a_kj|`` is above (Cauchy, Schwarz)."""
        return self.b_norm * self.right.norm

    @property
    def fits_single(self) -> bool:
        """Whether float32 holds the factors and their product, far from its end."""
        return max(self.reach, self.b_norm, self.right.norm) < _FAR

    def gamma(self, unit: float, more: int) -> float:
        """The relative error of a sum of R + ``more`` terms in any order."""
        n = self.right.a.shape[0] + more
        return n * unit / (1 - n * unit)

    def of(self, rows: slice) -> "Product":
        """Return the product of some of the rows."""
        return Product(self.left[rows], self.right, self.b_norm)

    def negated(self) -> "Product":
        """Return ``-B A``."""
        return Product(-self.left, self.right, self.b_norm)


@dataclass(frozen=True, slots=True)
class Rounded:
    """``values`` is the result; ``finite`` says that it is known to hold no infinity or NaN.

    ``back`` is what to add to ``rounded_sum`` of the values and the negated product to have P again, where that was
    asked for.
    """

    values: Tensor
    back: Corrections | None = None
    finite: bool = False


@dataclass(frozen=True, slots=True)
class Estimate:
    """Real numbers known to lie within ``error`` of float64 ``values``."""

    values: Array
    error: "Array | float"


def column_norm(a: Tensor) -> float:
    """Return a bound of the norms of the columns of a (R, n)."""
    if not a.numel():
        return 0.0
    wide = a.to(torch.float64)
    square = float((wide * wide).sum(dim=0).max())
    if _LEAST < square < math.inf:
        return math.sqrt(square) * (1 + 1e-9)
    return math.sqrt(a.shape[0]) * float(wide.abs().max())  # squares beyond float64, or none at all


def _norms(a: Tensor) -> Array:
    """Return bounds of the norms of the columns of a (R, n) in float32, but for what ``_lost`` is far above."""
    found: Tensor = torch.linalg.vector_norm(a, dim=0)
    return np.asarray(found.mul_(1 + 2.0**-20).to(torch.float32).numpy())


def rounded_sum(p: Tensor, product: Product, dtype: torch.dtype, allocate: Allocate, *, back: bool = False) -> Rounded:
    """Return ``P + B A``, rounded once into ``dtype``; with ``back`` (P is of that type) also the way back to P.

    Shapes: p (rows, n), of any float type -> (rows, n); the result lives in ``allocate``'s buffers.
    Numerics: correct rounding of the real number (see the module); NaN and infinity pass through.
    Cost: a matrix product and some passes over the block, nearly all in a core's cache; with ``back`` also some fifty
        operations for one or two elements of a hundred.
    """
    values = allocate("values", dtype, (p.shape[0], p.shape[1]))
    if not p.numel():
        return Rounded(values, differences(p.to(dtype), values), finite=True)
    if 0 in (product.b_norm, product.right.norm) and p.dtype == dtype:
        values.copy_(p)
        return Rounded(values, differences(p, values))
    if dtype == torch.float64:
        return _rounded_twofold(p, product, values, back=back)
    if fused.AVAILABLE and {p.dtype, dtype} == {torch.bfloat16} and product.fits_single:
        return _fused_sum(p, product, values, allocate, back=back)
    wide, radius = _interval(p, product, dtype)
    found = [_ends(p[rows], product.of(rows), radius, wide, values[rows], allocate, back=back) for rows in _chunks(p)]
    starts = [rows.start * p.shape[1] for rows in _chunks(p)]
    doubtful = np.concatenate([ends.doubtful + start for ends, start in zip(found, starts, strict=True)])
    bits_of(values).reshape(-1)[doubtful] = bits_of(settle(p, product, doubtful, dtype))
    if not back:
        return Rounded(values)
    crossed = np.concatenate([ends.crossed + start for ends, start in zip(found, starts, strict=True)])
    # what was computed at a place is within twice the radius of the real number, and what follows rounds in float64
    near = Estimate(np.concatenate([ends.lower for ends in found]) + radius, 4 * radius)
    return Rounded(values, _way_back(p, values, product, crossed, near))


def _fused_sum(p: Tensor, product: Product, values: Tensor, allocate: Allocate, *, back: bool) -> Rounded:
    """Do the same in one pass; what that leaves unproved is settled, and the way back from there found, as ever."""
    # as ``reach``, by rows and 64 columns
    rows = product.left.norms * np.float32(1.05 * product.gamma(2.0**-24, 5))
    limit = product.right.norms, rows, 1.05 * _lost(product, torch.float32)
    single = product.left.single, product.right.to(torch.float32).numpy()
    exact = product.left.b, product.right.lines
    found = fused.one_pass(p, single, limit, values, exact, product.gamma(_UNIT, 2), allocate, back=back)
    corrections, unproved = (found.places, found.units), found.unproved
    if len(unproved):
        bits_of(values).reshape(-1)[unproved] = bits_of(settle(p, product, unproved, values.dtype))
        corrections = _merged(corrections, _way_back(p, values, product, unproved)) if back else corrections
    return Rounded(values, corrections if back else None, found.finite)


def settle(p: Tensor, product: Product, places: Array, dtype: torch.dtype, near: Estimate | None = None) -> Tensor:
    """Return the elements of ``P + B A`` at flat ``places`` (k,), rounded once; ``near`` is what is known of them.

    Shapes: p (rows, n), of any float type.

    Cost: some twenty operations for each place that ``near`` proves, 5 R more for one that it does not, and 20 R for
        one that float64 does not prove.
    """
    if near is None:
        step = max(1, _GATHERED // (product.right.a.shape[0] + 1))
        parts = [_settle_some(p, product, places[i : i + step], dtype) for i in range(0, len(places), step)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=dtype)
    found, unproved = _prove(near, dtype)
    bits_of(found)[unproved] = bits_of(settle(p, product, places[unproved], dtype))
    return found


def differences(wanted: Tensor, found: Tensor) -> Corrections:
    """Return the corrections that make ``found`` what is ``wanted``."""
    old, guessed = bits_of(wanted).reshape(-1), bits_of(found).reshape(-1)
    places = np.flatnonzero(old != guessed)
    return places, ordered(old[places]) - ordered(guessed[places])


def corrected(found: Tensor, corrections: Corrections) -> Tensor:
    """Put corrections onto what they were made for: the inverse of ``differences``."""
    places, units = corrections
    bits = bits_of(found).reshape(-1)
    bits[places] = ordered(ordered(bits[places]) + units)
    return found


def _chunks(p: Tensor) -> Iterator[slice]:
    step = max(1, CHUNK // p.shape[1])
    return (slice(first, min(first + step, p.shape[0])) for first in range(0, p.shape[0], step))


def _interval(p: Tensor, product: Product, dtype: torch.dtype) -> tuple[torch.dtype, float]:
    """Return the type to compute sums in, and how far they may be from the real numbers.

    The product errs by gamma of its terms; adding P, adding the radius and taking it off again, and going from float64
    to a short type by way of float32 round once each. Below the normal numbers anything may be 0.
    """
    reach, size = product.reach, largest(p)
    short = dtype.itemsize == 2
    single = short and p.itemsize == 2 and product.fits_single and reach + size < _FAR
    wide = torch.float32 if single else torch.float64
    unit = torch.finfo(wide).eps / 2
    last = torch.finfo(torch.float32).eps / 2 if short else unit
    return wide, 1.05 * (product.gamma(unit, 5) * reach + 3 * last * (reach + size) + _lost(product, wide))


def _lost(product: Product, wide: torch.dtype) -> float:
    """What underflow may take from a sum of products."""
    return torch.finfo(wide).tiny * (product.right.a.shape[0] + 8) * (1 + product.right.norm + product.b_norm)


def _product(product: Product, wide: torch.dtype, allocate: Allocate) -> Tensor:
    a = product.right.to(wide)
    b = product.left.to(wide)
    return torch.mm(b, a, out=allocate("sums", wide, (b.shape[0], a.shape[1])))


@dataclass(frozen=True, slots=True)
class _Ends:
    """Flat places where the ends of the interval round apart; and where the way back may miss, with the lower ends."""

    doubtful: Array
    crossed: Array
    lower: Array


def _ends(
    p: Tensor, product: Product, radius: float, wide: torch.dtype, values: Tensor, allocate: Allocate, *, back: bool
) -> _Ends:
    """Round the upper ends into ``values``, and compare them with the lower ones.

    The product comes first, so that its error is one of small numbers.
    """
    shape = (p.shape[0], p.shape[1])
    sums = _product(product, wide, allocate)
    sums.add_(p if p.dtype == wide else allocate("wide", wide, shape).copy_(p))
    values.copy_(sums.add_(radius))
    lower = allocate("lower", values.dtype, shape).copy_(sums.sub_(2 * radius))
    doubtful = _differing(values, lower)
    crossed = _crossings(p, values, doubtful, lower, allocate) if back else doubtful[:0]
    return _Ends(doubtful, crossed, sums.numpy().reshape(-1).take(crossed).astype(np.float64))


def _differing(first: Tensor, second: Tensor) -> Array:
    """Return the flat places, few of many, where two tensors have other bits."""
    x, y = bits_of(first).reshape(-1), bits_of(second).reshape(-1)
    if len(x) % (_WORDS * 8):
        return np.flatnonzero(x != y)
    # eight bytes at a time, then eight of those: nearly all are equal
    words = x.view(np.int64) != y.view(np.int64)
    inside = _spread(np.flatnonzero(words.view(np.int64)), 8)
    places = _spread(inside[words[inside]], 8 // x.itemsize)
    found: Array = places[x[places] != y[places]]
    return found


def _spread(groups: Array, size: int) -> Array:
    """Return the members of groups of that size."""
    members: Array = np.add.outer(groups * size, np.arange(size)).reshape(-1)
    return members


def _crossings(p: Tensor, values: Tensor, doubtful: Array, scratch: Tensor, allocate: Allocate) -> Array:
    """Return the flat places where the way back from ``values`` may not end at P: one or two of a hundred.

    With x the real sum, ``|W' - x| <= ulp(W') / 2``, so ``W' - B A`` lies that near to W. It rounds to W unless this is
    more than half of W's distance to its nearer neighbour, the one below: where W' has a greater exponent than the
    number below W. For W = 0 that is everywhere, and in a tie, which is among the doubtful, it may be just so much.
    """
    kind = FORMATS[values.dtype]
    below = np.bitwise_and(bits_of(p), kind.magnitude, out=bits_of(scratch))
    below -= 1
    below |= kind.mantissa  # the last number of its binade; -1 for W = 0
    size = np.bitwise_and(bits_of(values), kind.magnitude, out=bits_of(allocate("size", p.dtype, tuple(p.shape))))
    mask = np.greater(size, below, out=allocate("mask", torch.bool, tuple(p.shape)).numpy()).reshape(-1)
    mask[doubtful] = True
    return np.flatnonzero(mask)


def _way_back(p: Tensor, values: Tensor, product: Product, places: Array, sums: Estimate | None = None) -> Corrections:
    """Return the corrections of the way back, which is right but for some of ``places``.

    ``sums`` are what is known of ``P + B A`` there: ``W' - B A`` is ``W + (W' - (W + B A))``.
    """
    at = torch.from_numpy(places)
    w, w_new = (tensor.reshape(-1)[at] for tensor in (p, values))
    near = None
    if sums is not None:
        with np.errstate(invalid="ignore", over="ignore"):
            there = w.to(torch.float64).numpy() + (w_new.to(torch.float64).numpy() - sums.values)
        near = Estimate(there, sums.error)
    guess = settle(values, product.negated(), places, p.dtype, near)
    wrong, units = differences(w, guess)
    return places[wrong], units


def _merged(first: Corrections, second: Corrections) -> Corrections:
    places, units = (np.concatenate(both) for both in zip(first, second, strict=True))
    order = np.argsort(places, kind="stable")
    return places[order], units[order]


def _settle_some(p: Tensor, product: Product, places: Array, dtype: torch.dtype) -> Tensor:
    rows, columns = np.divmod(places, p.shape[1])
    start = p.reshape(-1)[torch.from_numpy(places)].to(torch.float64).numpy()
    b, a = product.left.b[rows].T, product.right.a.numpy()[:, columns]  # (R, k)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        terms = b * a
        error = 1.01 * product.gamma(_UNIT, 2) * (np.abs(start) + np.abs(terms).sum(axis=0)) + _LEAST
        found, unproved = _prove(Estimate(start + terms.sum(axis=0), error), dtype)
    if len(unproved):
        bits_of(found)[unproved] = bits_of(dot_at(start[unproved], b[:, unproved], a[:, unproved], dtype))
    return found


def _prove(near: Estimate, dtype: torch.dtype) -> tuple[Tensor, Array]:
    """Round both ends of an estimate; return one, and the places where they differ."""
    with np.errstate(invalid="ignore", over="ignore"):
        both = round_once(np.concatenate((near.values - near.error, near.values + near.error)), dtype)
    low, high = both[: len(near.values)], both[len(near.values) :]
    return low, np.flatnonzero(bits_of(low) != bits_of(high))


def _rounded_twofold(p: Tensor, product: Product, values: Tensor, *, back: bool) -> Rounded:
    """Into float64 there is nothing wider: every element in twice the precision."""
    for rows in _chunks(p):
        b, a = product.left.b[rows].T[:, :, None], product.right.a.numpy()[:, None, :]
        values[rows] = dot_at(p[rows].to(torch.float64).numpy(), b, a, torch.float64)
    if not back:
        return Rounded(values)
    guess = _rounded_twofold(values, product.negated(), torch.empty_like(values), back=False).values
    return Rounded(values, differences(p, guess))
