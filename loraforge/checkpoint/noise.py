r"""The rounding noise in a difference of weights: how much there is, and how far its singular values reach.

An element's rounding error is nearly uniform on half an ulp to either side, its variance ``ulp^2 / 12``. An (m, n)
matrix of independent errors of one variance sigma^2 has its largest singular value at ``sigma (sqrt m + sqrt n)``
(Geman, 1980). Weights have large rows and columns, and with them large ulps: then it lies higher, by twice for rows
whose sizes vary by half. ``edge_of`` takes the variances by row and column into account.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loraforge.checkpoint.sketch import pieces

_GRID, _STEPS = 32, 16  # points at which the edge is looked for, and halvings for each
# where the exponent's bits are, in which integer type, and how many bits of mantissa follow
_LAYOUT = {
    torch.bfloat16: (torch.int16, 0x7F80, 7),
    torch.float16: (torch.int16, 0x7C00, 10),
    torch.float32: (torch.int32, 0x7F800000, 23),
    torch.float64: (torch.int64, 0x7FF0000000000000, 52),
}


@dataclass(frozen=True, slots=True)
class Squares:
    """Sums of the squares of a matrix's elements, or of their variances: by row (m,) and by column (n,), float64."""

    rows: Tensor
    columns: Tensor

    @property
    def total(self) -> float:
        """``|D|_F^2``; the lesser where rows and columns do not agree."""
        return min(float(self.rows.sum()), float(self.columns.sum()))

    def at_most(self, other: "Squares") -> "Squares":
        """Return the smaller sum of each row and column."""
        return Squares(torch.minimum(self.rows, other.rows), torch.minimum(self.columns, other.columns))


def squares(d: Tensor) -> Squares:
    """Return the sums of ``d^2``.

    Numerics: squares, and sums within a block of rows, in d's own type, blocks in float64.
    """
    return _summed(d, lambda block: block.square())


def rounding_noise(w: Tensor) -> Squares:
    """Return the sums of ``ulp(w)^2 / 12``, the variances of one rounding of w's elements to their type.

    Numerics: an element's ulp is ``2^(exponent - mantissa bits)``, read off its bits; ulps below 1e-19 count as zero.
    """
    integer, mask, mantissa = _LAYOUT[w.dtype]
    work = torch.float64 if w.dtype == torch.float64 else torch.float32
    least, unit = torch.finfo(w.dtype).tiny, 4.0**-mantissa / 12

    def variance(block: Tensor) -> Tensor:
        power = (block.view(integer) & mask).view(w.dtype).to(work)  # 2^exponent
        return power.clamp_(min=least).square_().mul_(unit)

    return _summed(w, variance)


def edge_of(noise: Squares) -> float:
    r"""Return the largest singular value to expect of independent errors of variances ``sigma_ij^2 = a_i c_j``.

    Equation: the squared singular values end at ``min_e h(e) / f`` over e below ``1 / max c``, with f below
    ``1 / max a`` such that ``f g(f) = e h(e)``, ``h(e) = sum_j c_j / (1 - c_j e)``, ``g(f) = sum_i a_i / (1 - a_i f)``:
    where the equations of Zhang (2006) and of Couillet and Hachem (arXiv:1310.8094) for ``a^(1/2) X c^(1/2)`` cease to
    have a real solution. It is ``sigma (sqrt m + sqrt n)`` for equal variances.

    Numerics: float64; the minimum is flat, and right to 1e-3 or better, from above.
    """
    total = noise.total
    if not total:
        return 0.0
    a, c = noise.rows / noise.rows.max(), noise.columns / noise.columns.max()
    e = torch.linspace(0, 1, _GRID + 2, dtype=torch.float64)[1:-1]  # (grid,), of 1 / max c
    h = (c / (1 - c * e[:, None])).sum(1)
    low, high = torch.zeros_like(e), torch.ones_like(e)
    for _ in range(_STEPS):
        f = (low + high) / 2
        small = f * (a / (1 - a * f[:, None])).sum(1) < e * h
        low, high = torch.where(small, f, low), torch.where(small, high, f)
    shares = float(noise.rows.max() / noise.rows.sum() * noise.columns.max() / noise.columns.sum())
    return math.sqrt(shares * total * float((h / low).min()))  # in units of the largest a_i c_j until here


def _summed(d: Tensor, square: Callable[[Tensor], Tensor]) -> Squares:
    rows, columns = torch.empty(d.shape[0], dtype=torch.float64), torch.zeros(d.shape[1], dtype=torch.float64)
    for place in pieces(d):
        found = square(d[place])
        rows[place] = found.sum(1).to(torch.float64)
        columns += found.sum(0)
    return Squares(rows, columns)
