r"""Linear algebra on factors: a matrix ``D = B @ A`` is handled without ever being formed.

Letters, as in Hu et al. (arXiv:2106.09685): ``a`` (r, n) and ``b`` (m, r), so that ``b @ a`` is (m, n); R is the rank
of a stack, the sum of the ranks in it. Everything here is a pure function of tensors; the work is done in float64 on
the device of the inputs (on the CPU where that device has no float64), and returned in float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factored:
    """The singular value decomposition of ``b @ a``, its bases still inside their QR factors.

    ``s`` (p) descends, p = min(m, n, R); ``size`` is ``|b|_F |a|_F``, which its rounding errors are in proportion to.
    ``u_core`` (pb, p) and ``v_core`` (pa, p) are the singular vectors in the coordinates of the two orthonormal bases,
    which are kept as LAPACK leaves them (``geqrf``).
    """

    s: Tensor
    size: float
    u_core: Tensor
    v_core: Tensor
    _b_qr: tuple[Tensor, Tensor]
    _a_qr: tuple[Tensor, Tensor]

    def bases(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the first ``count`` singular vectors of both sides: (m, count) and (n, count).

        The largest entry of each left vector (the first of equals) is positive, so that the bases depend on the
        product alone, not on the library that computed them, wherever singular values are distinct.
        """
        left, right = _expand(self._b_qr, self.u_core[:, :count]), _expand(self._a_qr, self.v_core[:, :count])
        signs = _signs(left)
        return left * signs, right * signs


def decompose(a: Tensor, b: Tensor) -> Factored:
    r"""Return the SVD of ``b @ a`` from its factors.

    Equation: ``B = Q_B R_B``, ``A^T = Q_A R_A``, ``R_B R_A^T = U S V^T``; then
    ``B A = (Q_B U) S (Q_A V)^T``.

    Shapes: a (R, n), b (m, R).
    Numerics: Householder QR and SVD in float64; singular values are right to about 1e-15 of ``|b| |a|``.
    Cost: O((m + n) R^2 + R^3) operations, O((m + n) R) numbers; the (m, n) product is never formed.
    """
    a, b = _work(a), _work(b)
    b_qr = _qr(b)
    a_qr = _qr(a.T)
    r_b, r_a = _r_factor(b_qr), _r_factor(a_qr)
    core = r_b @ r_a.T  # (min(m, R), min(n, R))
    # the core is small: on the CPU whatever the device, where LAPACK neither waits for a queue nor gives up
    u, s, vh = torch.linalg.svd(core.cpu(), full_matrices=False)
    return Factored(s, float(r_b.norm() * r_a.norm()), u.to(b.device), vh.T.to(a.device), b_qr, a_qr)


def truncate(found: Factored, rank: int) -> tuple[Tensor, Tensor]:
    r"""Return the best factors of ``rank``: ``A' = S_k^(1/2) V_k^T`` and ``B' = U_k S_k^(1/2)``.

    Equation: Eckart and Young (1936): no matrix of that rank is nearer in the Frobenius or the spectral norm. The
    singular values are split evenly, which keeps both factors in the range of 16-bit floats.

    Shapes: -> (rank, n), (m, rank).
    """
    left, right = found.bases(rank)
    root = found.s[:rank].sqrt().to(left.device)
    return (right * root).T, left * root


def tail_error(s: Tensor, rank: int) -> float:
    """Return the Frobenius norm of what a truncation to ``rank`` drops: ``sqrt(sum_{i > rank} s_i^2)``."""
    return float(s[rank:].square().sum().sqrt())


def numerical_rank(found: Factored) -> int:
    """Count the singular values above rounding: those over ``1e-13 |b| |a|``."""
    return int((found.s > 1e-13 * found.size).sum())


def rank_for_energy(s: Tensor, share: float) -> int:
    """Return the smallest rank whose singular values hold ``share`` of ``sum s_i^2``; 0 for a zero matrix."""
    energy = s.square().cumsum(0)
    if not len(s) or energy[-1] == 0:
        return 0
    # a hair below the share: the cumulated sum may miss its own total by one rounding
    return int((energy < share * energy[-1] * (1 - 1e-15)).sum()) + 1


def norm(a: Tensor, b: Tensor) -> float:
    """Return the Frobenius norm of ``b @ a``: that of ``R_B R_A^T``, with no cancellation."""
    return float(torch.linalg.matrix_norm(_core(a, b)))


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Return the singular values of ``b @ a``, descending: those of ``R_B R_A^T`` (see ``decompose``).

    Shapes: a (R, n), b (m, R) -> (min(m, n, R),), on the CPU.
    Cost: as ``decompose``, without what its bases take.
    """
    values: Tensor = torch.linalg.svdvals(_core(a, b).cpu())
    return values


def inner(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> float:
    """Return the Frobenius inner product of ``b1 @ a1`` and ``b2 @ a2``.

    Equation: ``<B1 A1, B2 A2> = sum_ij (B1^T B2)_ij (A1 A2^T)_ij``.

    Shapes: a1 (r1, n), b1 (m, r1), a2 (r2, n), b2 (m, r2).
    Cost: O((m + n) r1 r2); the (m, n) products are never formed.
    """
    a1, b1 = _work(a1), _work(b1)
    a2, b2 = _work(a2).to(a1.device), _work(b2).to(b1.device)
    return float(((b1.T @ b2) * (a1 @ a2.T)).sum())


def _work(tensor: Tensor) -> Tensor:
    if tensor.device.type == "mps":  # has no float64
        tensor = tensor.cpu()
    return tensor.detach().to(torch.float64)


def _core(a: Tensor, b: Tensor) -> Tensor:
    """``R_B R_A^T``, which has the singular values of ``b @ a``: (min(m, R), min(n, R))."""
    return _r_factor(_qr(_work(b))) @ _r_factor(_qr(_work(a).T)).T


def _qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Householder QR, Q left as reflectors: forming it would cost as much again, and only k columns are wanted."""
    reflectors, tau = torch.geqrf(matrix)
    return reflectors, tau


def _r_factor(qr: tuple[Tensor, Tensor]) -> Tensor:
    reflectors, _ = qr
    return reflectors[: min(reflectors.shape)].triu()


def _expand(qr: tuple[Tensor, Tensor], core: Tensor) -> Tensor:
    """Return ``Q @ core`` for a core of min(rows, columns) rows."""
    reflectors, tau = qr
    padded = core.new_zeros(reflectors.shape[0], core.shape[1])
    padded[: core.shape[0]] = core
    return torch.ormqr(reflectors, tau, padded)


def _signs(u: Tensor) -> Tensor:
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0)
