r"""The leading singular vectors of a dense matrix, without its whole decomposition.

A randomised range finder with power iterations (Halko, Martinsson and Tropp, arXiv:0909.4061, algorithms 4.4 and 5.1):
``Q`` (m, q) is an orthonormal basis of ``(D D^T)^p D G`` for a Gaussian G (n, q), then ``D ~ Q (Q^T D)``. Departures
from the paper: QR follows every product, not every second one, and a sketch that proves too narrow begins again from
the basis it has, so that its iterations are not lost.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loraforge import lowrank
from loraforge.lowrank import Factored

POWER = 2  # iterations: noise has a flat spectrum, in which each one tells little more
FIRST = 32  # directions of the first sketch where the rank is not known
_BLOCK = 1 << 18  # elements: what a core's cache holds of a block's buffers


@dataclass(frozen=True, slots=True)
class Width:
    """How wide a sketch may become: ``first`` directions, then more up to ``most``, each time ``spare`` beside them.

    The last ``spare`` singular values of a sketch are too small to be told from what it did not see.
    """

    first: int
    most: int
    spare: int


def sketch(d: Tensor, width: Width, seed: int, is_enough: Callable[[Tensor], bool]) -> Factored:
    r"""Return the leading part of the singular value decomposition of ``D``, in factored form.

    Equation: ``Q = qr((D D^T)^p D G)``, ``D ~ Q (Q^T D) = U S V^T``, wider until ``is_enough(S)``.

    Shapes: d (m, n) -> as ``lowrank.decompose`` of ``Q^T D`` (q, n) and ``Q`` (m, q), q <= most + spare.
    Numerics: products and QR in d's own type, the core in float64. Singular values are never too large by more than
        rounding; those of a gap's upper side are right to ``(s_{q+1} / s_k)^(4p+2)``.
    Cost: 2p + 2 products of 2 m n q operations for each width; widths double.
    """
    generator = torch.Generator().manual_seed(seed)
    limit = min(width.most + width.spare, *d.shape)
    q = min(width.first + width.spare, limit)
    start = torch.randn(d.shape[1], q, generator=generator, dtype=d.dtype)
    while True:
        basis = _orthonormal(d @ start)
        for _ in range(POWER if q < min(d.shape) else 0):  # a full basis spans everything
            basis = _orthonormal(d @ _orthonormal(d.T @ basis))  # (m, q)
        rows = basis.T @ d  # (q, n)
        found = lowrank.decompose(rows, basis)
        if q == limit or is_enough(found.s[: q - width.spare]):
            return found
        wider = min(2 * q, limit)
        fresh = torch.randn(d.shape[1], wider - q, generator=generator, dtype=d.dtype)
        start, q = torch.cat([_orthonormal(rows.T), fresh / math.sqrt(d.shape[1])], dim=1), wider


def residual(d: Tensor, a: Tensor, b: Tensor) -> float:
    """Return ``|D - B A|_F^2`` of factors as they will be kept.

    Shapes: d (m, n), a (r, n), b (m, r).
    Numerics: the product in d's own type, so that 1e-7 of ``|D|`` is the least that can be seen; squares in float64.
    Cost: 2 m n r operations, and a block's memory.
    """
    a, b = a.to(d.dtype), b.to(d.dtype)
    return sum(_square(torch.addmm(d[rows], b[rows], a, alpha=-1)) for rows in blocks(d))


def _orthonormal(matrix: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(matrix)[0]
    return q


def _square(block: Tensor) -> float:
    flat = block.reshape(-1).to(torch.float64)
    return float(torch.dot(flat, flat))


def blocks(d: Tensor) -> Iterator[slice]:
    """Yield the rows of a matrix in pieces whose temporaries stay in a cache."""
    step = max(1, _BLOCK // d.shape[1])
    return (slice(start, start + step) for start in range(0, d.shape[0], step))
