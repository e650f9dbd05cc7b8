r"""What a merge does to one tensor: ``forward`` makes the new values, ``guess`` goes back as far as arithmetic can.

    Sum        W' = RN(W + sum_i c_i B_i A_i)           weights of every kind, biases of lora_bias
    SumInTurn  the same as PEFT computes it: float32, one adapter after the other
    Dora       W' = RN(f (W + dW)), f = m / |W + dW|    arXiv:2402.09353, eq. 5; the norm is that of the original W
    Replaced   W' = what the adapter carries whole      modules_to_save, trained biases
    Rows       some rows of W' = what it carries        trainable tokens

A tensor is seen as a matrix: its first dimension by all the others. Each change is elementwise in W once its factors
are known, so any block, and any page of a file, can be computed alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from loraforge.checkpoint import exact
from loraforge.checkpoint.exact import FORMATS, Array, Product, bits_of
from loraforge.checkpoint.workspace import Workspace

_ENOUGH = 64  # rows of a float32 product
ReadRows: TypeAlias = Callable[[slice], Tensor]


@dataclass(frozen=True, slots=True)
class Outcome:
    """New values of a block; ``sums`` the float64 numbers before rounding, where there are any."""

    values: Tensor
    sums: Tensor | None = None
    doubtful: Array = field(default_factory=lambda: np.arange(0))


class Change(Protocol):
    """One tensor's change. ``rows`` says which of its rows ``block`` (rows, n) holds."""

    kind: str

    @property
    def aux(self) -> bytes:
        """What an undo needs beyond the adapters."""
        ...

    def prepare(self, read: ReadRows, blocks: Sequence[slice], space: Workspace) -> None:
        """See the whole original tensor once, where that is needed."""
        ...

    def forward(self, block: Tensor, rows: slice, space: Workspace) -> Outcome:
        """Return the new values of an original block."""
        ...

    def guess(self, block: Tensor, rows: slice, space: Workspace) -> Tensor:
        """Return an estimate of the original of a new block, the same bits everywhere."""
        ...


@dataclass(frozen=True)
class Term:
    """``coefficient * rows_factor @ columns``: (m, r) by (r, n), in the adapter's element types.

    ``flipped`` says that the factors are ``A^T`` and ``B^T``: float32 products of the two orders differ in bits.
    """

    rows_factor: Tensor
    columns: Tensor
    coefficient: float
    flipped: bool = False


class LowRankSum:
    """``sum_i c_i B_i A_i`` by rows, in float64; ``c_i B_i`` is rounded to float64 once."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms = tuple(terms)
        self._a = torch.cat([term.columns.to(torch.float64) for term in terms]).contiguous()
        self._a_norm = exact.column_norm(self._a)
        norms = [abs(term.coefficient) * exact.column_norm(term.rows_factor.T) for term in terms]
        self._b_norm = math.hypot(*norms) * (1 + 1e-9)

    def rows(self, rows: slice) -> Product:
        """Return the product's rows."""
        b = torch.cat([term.coefficient * term.rows_factor[rows].to(torch.float64) for term in self.terms], dim=1)
        return Product(b.contiguous(), self._a, self._a_norm, self._b_norm)


@dataclass
class Sum:
    """The exact weighted sum of updates, rounded once."""

    delta: LowRankSum
    kind: str = "sum"
    aux: bytes = b""

    def prepare(self, read: ReadRows, blocks: Sequence[slice], space: Workspace) -> None:
        """Do nothing: every element stands alone."""

    def forward(self, block: Tensor, rows: slice, space: Workspace) -> Outcome:
        """Return ``RN(W + dW)``."""
        wide = space("wide", torch.float64, tuple(block.shape)).copy_(block)
        found = exact.rounded_sum(wide, self.delta.rows(rows), block.dtype, space)
        return Outcome(found.values, found.sums, found.doubtful)

    def guess(self, block: Tensor, rows: slice, space: Workspace) -> Tensor:
        """Return ``RN(W' - dW)``."""
        wide = space("wide", torch.float64, tuple(block.shape)).copy_(block)
        return exact.rounded_sum(wide, self.delta.rows(rows).negated(), block.dtype, space).values

    def corrections(self, block: Tensor, outcome: Outcome, rows: slice) -> tuple[Array, Array]:
        """Return where ``guess`` will differ from the original block, and by how much, without a dense guess.

        ``|W' - x| <= ulp(W')/2`` for the exact x, so ``W' - dW`` lies within half an ulp of W, and rounds to W,
        unless W' is in a higher binade, W is a power of two (whose lower neighbour is nearer), or x was near a tie.
        """
        if outcome.sums is None or block.dtype == torch.float64:
            return _differences(block, self.guess(outcome.values, rows, Workspace()))
        kind = FORMATS[block.dtype]
        old, new = bits_of(block).reshape(-1), bits_of(outcome.values).reshape(-1)
        candidate = (new & kind.exponent) > (old & kind.exponent)
        candidate |= (old & kind.mantissa) == 0
        candidate[outcome.doubtful] = True
        places = np.flatnonzero(candidate)
        if not len(places):
            return places, np.empty(0, old.dtype)
        product = self.delta.rows(rows).negated()
        w, w_new = (t.reshape(-1)[torch.from_numpy(places)].to(torch.float64).numpy() for t in (block, outcome.values))
        sums = outcome.sums.numpy().reshape(-1)[places]
        size = np.abs(w) + np.abs(w_new) + np.abs(sums)
        near = exact.Estimate(w + (w_new - sums), product.error + 4 * product.gamma * size)
        guessed = bits_of(exact.settle(outcome.values, product, places, near, block.dtype))
        differences = exact.ordered(old[places]) - exact.ordered(guessed)
        kept = np.flatnonzero(differences)
        return places[kept], differences[kept]


@dataclass
class SumInTurn(Sum):
    """PEFT's arithmetic: each update in float32, added and rounded one after the other."""

    def forward(self, block: Tensor, rows: slice, space: Workspace) -> Outcome:  # noqa: ARG002 - no scratch needed
        """Return what ``merge_adapter`` of PEFT leaves, to the bit: ``W += (B @ A) * scale`` for each adapter."""
        values = block.clone()
        for term in self.delta.terms:
            # of few rows a BLAS makes a product by another kernel, with other bits than in the whole
            first = max(0, min(rows.start, rows.stop - _ENOUGH))
            left, right = term.rows_factor[first : rows.stop].float(), term.columns.float()
            delta = (right.T @ left.T).T if term.flipped else left @ right
            values += delta[rows.start - first :] * term.coefficient
        product = self.delta.rows(rows)
        return Outcome(values, torch.addmm(block.to(torch.float64), product.b, product.a))

    def corrections(self, block: Tensor, outcome: Outcome, rows: slice) -> tuple[Array, Array]:
        """Return where the exact way back differs from the original block."""
        return _differences(block, self.guess(outcome.values, rows, Workspace()))


@dataclass
class Dora:
    """Weight-decomposed: the sum, scaled so that its rows (or columns) have the norms the adapter says.

    Numerics: ``T = W + dW`` rounded once to float32 (float64 for a float64 base), norms by a fixed tree of float64
    additions, ``f = RN32(m / norm)``; ``f T`` is exact in float64 and rounded once. The norms are kept in the receipt.
    """

    delta: LowRankSum
    magnitude: Tensor
    by_row: bool
    kind: str = "dora"
    factor: Tensor | None = None

    @property
    def aux(self) -> bytes:
        """The factors, float32."""
        return b"" if self.factor is None else self.factor.numpy().tobytes()

    def load(self, aux: bytes) -> None:
        """Take the factors of a receipt instead of computing them."""
        self.factor = torch.from_numpy(np.frombuffer(aux, np.float32).copy())

    def prepare(self, read: ReadRows, blocks: Sequence[slice], space: Workspace) -> None:
        """Compute the norms of ``W + dW``."""
        if self.factor is not None:
            return
        parts = []
        for rows in blocks:
            squares = self._total(read(rows), rows, space).to(torch.float64).square().numpy()
            parts.append(_tree_sum(squares.T if self.by_row else squares))
        norms = torch.from_numpy(np.sqrt(np.concatenate(parts) if self.by_row else _tree_sum(np.stack(parts))))
        self.factor = (self.magnitude.to(torch.float64).reshape(-1) / norms).to(torch.float32)

    def forward(self, block: Tensor, rows: slice, space: Workspace) -> Outcome:
        """Return ``RN(f T)``."""
        sums = self._total(block, rows, space).to(torch.float64) * self._factor(rows)
        return Outcome(_rounded(sums, block.dtype), sums)

    def guess(self, block: Tensor, rows: slice, space: Workspace) -> Tensor:
        """Return ``RN(g W' - dW)`` with ``g = RN32(1 / f)``; the product is exact in float64."""
        inverse = (1 / self._factor(rows)).to(torch.float32).to(torch.float64)
        wide = torch.nan_to_num(block.to(torch.float64) * inverse, posinf=0, neginf=0)
        return exact.rounded_sum(wide, self.delta.rows(rows).negated(), block.dtype, space).values

    def _total(self, block: Tensor, rows: slice, space: Workspace) -> Tensor:
        between = torch.float64 if block.dtype == torch.float64 else torch.float32
        wide = space("wide", torch.float64, tuple(block.shape)).copy_(block)
        return exact.rounded_sum(wide, self.delta.rows(rows), between, space).values

    def _factor(self, rows: slice) -> Tensor:
        assert self.factor is not None, "prepare() or load() comes first"  # noqa: S101 - an order of calls, not input
        wide = self.factor.to(torch.float64)
        return wide[rows, None] if self.by_row else wide[None, :]


@dataclass
class Replaced:
    """The whole tensor is another one."""

    values: Tensor
    kind: str = "replaced"
    aux: bytes = b""

    def prepare(self, read: ReadRows, blocks: Sequence[slice], space: Workspace) -> None:
        """Do nothing."""

    def forward(self, block: Tensor, rows: slice, space: Workspace) -> Outcome:  # noqa: ARG002 - nothing to compute
        """Return the adapter's values."""
        return Outcome(self.values[rows].to(block.dtype).contiguous())

    def guess(self, block: Tensor, rows: slice, space: Workspace) -> Tensor:  # noqa: ARG002 - nothing to compute
        """Return the new values: a trained tensor is near the one it began as."""
        return block


@dataclass
class Rows:
    """Some rows are others: token number to row of ``values``."""

    places: Mapping[int, int]
    values: Tensor
    kind: str = "rows"
    aux: bytes = b""

    def prepare(self, read: ReadRows, blocks: Sequence[slice], space: Workspace) -> None:
        """Do nothing."""

    def forward(self, block: Tensor, rows: slice, space: Workspace) -> Outcome:  # noqa: ARG002 - nothing to compute
        """Return the block with its trained rows."""
        new = block.clone()
        for row, place in self.places.items():
            if rows.start <= row < rows.stop:
                new[row - rows.start] = self.values[place].to(block.dtype)
        return Outcome(new)

    def guess(self, block: Tensor, rows: slice, space: Workspace) -> Tensor:  # noqa: ARG002 - nothing to compute
        """Return the new values."""
        return block


def corrections(change: Change, block: Tensor, outcome: Outcome, rows: slice) -> tuple[Array, Array]:
    """Return where ``change.guess`` differs from the original block, as places in it and ordered differences."""
    if isinstance(change, Sum):
        return change.corrections(block, outcome, rows)
    return _differences(block, change.guess(outcome.values, rows, Workspace()))


def corrected(guess: Tensor, places: Array, differences: Array) -> Tensor:
    """Put corrections onto a guess: the inverse of ``corrections``."""
    bits = bits_of(guess).reshape(-1)
    bits[places] = exact.ordered(exact.ordered(bits[places]) + differences)
    return guess


def _differences(block: Tensor, guess: Tensor) -> tuple[Array, Array]:
    old, guessed = bits_of(block).reshape(-1), bits_of(guess).reshape(-1)
    places = np.flatnonzero(old != guessed)
    return places, exact.ordered(old[places]) - exact.ordered(guessed[places])


def _rounded(sums: Tensor, dtype: torch.dtype) -> Tensor:
    flat = sums.numpy().reshape(-1)
    return exact.round_pair(flat, np.zeros_like(flat), dtype).view(sums.shape)


def _tree_sum(squares: Array) -> Array:
    """Sum over the first axis by halves: one order of additions, whatever the machine."""
    while len(squares) > 1:
        half = len(squares) // 2
        rest = squares[2 * half :]
        squares = np.concatenate((squares[:half] + squares[half : 2 * half], rest))
    return np.asarray(squares[0])
