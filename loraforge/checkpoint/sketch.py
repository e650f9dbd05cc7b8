r"""The leading singular vectors of a dense matrix, without its whole decomposition.

A randomised range finder (Halko, Martinsson and Tropp, arXiv:0909.4061) that keeps all its power iterations, not only
the last: ``Q`` is an orthonormal basis of ``[D G, (D D^T) D G, (D D^T)^2 D G, ...]`` for a Gaussian G (n, q), and
``D ~ Q (Q^T D)`` (block Krylov: Musco and Musco, arXiv:1504.05477). For as many products with D that comes ten times
nearer to the best approximation, or more, where singular values fall slowly, as those of fine-tunes do. QR stands
between the products, and every block is made orthogonal to those before, so that ``Q^T D`` costs no product of its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loraforge import lowrank
from loraforge.lowrank import Factored

_BLOCKS = 8  # at most, or four times the columns that are wanted; 3 where values fall fast, 4 or 5 where slowly
_CONVERGED = 5e-4  # the share of the error's square that a further block may take away for it to be the last
_ROUNDING = 1e-9  # the share of |D|^2 that sums of float32 products cannot tell from nothing
_ELEMENTS = 1 << 20  # of a piece of a matrix: a few MB, which caches hold, and enough work for the threads to share


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a sketch is for: ``count(s)`` of the singular values s, if there are that many, and at most ``most``.

    ``spare`` more directions than that are looked for, since the last ones of a basis are never good.
    """

    count: Callable[[Tensor], int]
    most: int
    spare: int


def sketch(d: Tensor, total: float, wanted: Wanted, width: int, seed: int) -> Factored:
    r"""Return the leading part of the singular value decomposition of ``D``, in factored form.

    Equation: ``D ~ Q (Q^T D) = U S V^T``; ``|D - D_k|^2 = |D|^2 - sum_{i <= k} s_i^2`` says when it is good enough.

    Shapes: d (m, n), ``total`` is |D|_F^2 -> as ``lowrank.decompose`` of factors (p, n) and (m, p), p <= most + spare.
    Numerics: products and QR in d's own type, the rest in float64. Singular values are never too large by more than
        rounding; the error of a truncation is above the best one's by some 1e-4 of it.
    Cost: a block of ``width`` columns takes 4 m n width operations and (m + n) width numbers; 3 to 5 blocks, more
        where more singular values are wanted.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(d.shape[1], min(width, *d.shape), generator=generator, dtype=d.dtype)
    basis, rows = d.new_empty(d.shape[0], 0), d.new_empty(0, d.shape[1])
    before = start.new_zeros(0, dtype=torch.float64)
    for left in reversed(range(max(_BLOCKS, -(-4 * wanted.most // start.shape[1])))):
        block = _orthonormal(d @ start, to=basis)  # (m, q)
        back = d.T @ block  # (n, q)
        basis, rows = torch.cat([basis, block], dim=1), torch.cat([rows, back.T])
        energies, vectors = _spectrum(rows)
        count = min(wanted.count(energies.sqrt()), wanted.most)
        full = basis.shape[1] == min(d.shape)
        if left == 0 or full or (count < len(energies) and _has_converged(energies, before, count, total)):
            break
        start, before = _qr(back)[:, : min(d.shape) - basis.shape[1]], energies
    kept = vectors[:, : count + wanted.spare]
    return lowrank.decompose(kept.T @ rows.to(torch.float64), basis.to(torch.float64) @ kept)


def residual(d: Tensor, a: Tensor, b: Tensor) -> float:
    """Return ``|D - B A|_F^2`` of factors as they will be kept.

    Shapes: d (m, n), a (r, n), b (m, r).
    Numerics: the product in d's own type, so that 1e-7 of ``|D|`` is the least that can be seen; squares in float64.
    Cost: 2 m n r operations, and a piece's memory.
    """
    a, b = a.to(d.dtype), b.to(d.dtype)
    return sum(_square(torch.addmm(d[rows], b[rows], a, alpha=-1)) for rows in pieces(d))


def pieces(d: Tensor) -> Iterator[slice]:
    """Yield the rows of a matrix in pieces whose temporaries stay in a cache."""
    step = max(1, _ELEMENTS // d.shape[1])
    return (slice(start, start + step) for start in range(0, d.shape[0], step))


def _has_converged(energies: Tensor, before: Tensor, count: int, total: float) -> bool:
    """Whether the last block took next to nothing away from the error of the truncation."""
    held = float(energies[:count].sum())
    gained = held - float(before[:count].sum())
    return gained <= _CONVERGED * max(total - held, 0.0) + _ROUNDING * total


def _spectrum(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return squared singular values of ``Q^T D``, descending, and left singular vectors, from its Gram matrix."""
    wide = rows.to(torch.float64)
    energies, vectors = torch.linalg.eigh(wide @ wide.T)
    return energies.flip(0).clamp_(min=0), vectors.flip(1)


def _orthonormal(matrix: Tensor, to: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns, without what ``to`` spans.

    Three times: where nothing but rounding is left of a column, the first makes it a direction of rounding, which may
    lie anywhere; the second takes it out of ``to`` once more, and the third what rounding that left.
    """
    if not to.shape[1]:
        return _qr(matrix)
    for _ in range(3):
        matrix = _qr(torch.addmm(matrix, to, to.T @ matrix, alpha=-1))
    return matrix


def _qr(matrix: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(matrix)[0]
    return q


def _square(block: Tensor) -> float:
    flat = block.reshape(-1).to(torch.float64)
    return float(torch.dot(flat, flat))
