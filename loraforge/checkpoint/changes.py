r"""What a merge does to one tensor: ``forward`` makes the new values, ``guess`` goes back as far as arithmetic can.

    Sum        W' = RN(W + sum_i c_i B_i A_i)           weights of every kind, biases of lora_bias
    SumInTurn  the same as PEFT computes it: float32 (float64 where the base is), one adapter after the other
    Dora       W' = RN(f (W + dW)), f = m / |W + dW|    arXiv:2402.09353, eq. 5; the norm is that of the original W
    Replaced   W' = what the adapter carries whole      modules_to_save, trained biases
    Rows       some rows of W' = what it carries        trainable tokens

A tensor is seen as a matrix: its first dimension by all the others. Each change is elementwise in W once its factors
are known, so any block, and any page of a file, can be computed alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from loraforge.adapter.mapped import discard
from loraforge.checkpoint.exact import Columns, Corrections, Left, Product, column_norm, differences, rounded_sum
from loraforge.checkpoint.floats import Allocate, Array, round_pair
from loraforge.checkpoint.workspace import Workspace
from loraforge.errors import NumericalError

_ENOUGH = 64  # rows of a float32 product
_KEPT = 1 << 20  # elements of a left factor that is converted once, not block by block
ReadRows: TypeAlias = Callable[[slice], Tensor]


@dataclass(frozen=True, slots=True)
class Outcome:
    """New values of a block, and what the way back from them misses, where it was asked for.

    ``finite`` says that they are known to be, where that costs nothing.
    """

    values: Tensor
    back: Corrections | None = None
    finite: bool = False


class Change(Protocol):
    """One tensor's change. ``rows`` says which of its rows ``block`` (rows, n) holds."""

    kind: str

    @property
    def aux(self) -> bytes:
        """What an undo needs beyond the adapters."""
        ...

    def prepare(self, read: ReadRows, blocks: Sequence[slice], space: Allocate) -> None:
        """See the whole original tensor once, where that is needed."""
        ...

    def forward(self, block: Tensor, rows: slice, space: Allocate, *, back: bool) -> Outcome:
        """Return the new values of an original block; with ``back`` also what ``guess`` of them will miss."""
        ...

    def guess(self, block: Tensor, rows: slice, space: Allocate) -> Tensor:
        """Return an estimate of the original of a new block, the same bits everywhere."""
        ...

    def target(self, block: Tensor, rows: slice, space: Allocate) -> Tensor | None:
        """Return what the new values stand for, in float64, where they are rounded from something."""
        ...

    def release(self) -> None:
        """Let go of what was computed or read for this tensor; it can be had again."""
        ...


@dataclass(frozen=True)
class Term:
    """``coefficient * rows_factor @ columns``: (m, r) by (r, n), in the adapter's element types.

    ``flipped`` says that the factors are ``A^T`` and ``B^T``: float32 products of the two orders differ in bits.
    ``looked_up`` says that they are an embedding's, whose update PEFT rounds to the base's type before it adds it.
    """

    rows_factor: Tensor
    columns: Tensor
    coefficient: float
    flipped: bool = False
    looked_up: bool = False


class LowRankSum:
    """``sum_i c_i B_i A_i`` by rows, in float64; ``c_i B_i`` is rounded to float64 once.

    Nothing is read before it is needed, and all of it is let go by ``release``: a model has many of these.
    """

    def __init__(self, name: str, terms: Sequence[Term]) -> None:
        self.name = name
        self.terms = tuple(terms)
        self._factors: tuple[Columns, float, Left | None] | None = None

    def rows(self, rows: slice) -> Product:
        """Return the product's rows.

        Raises:
            NumericalError: the factors' norms are beyond what float64 can hold.
        """
        right, b_norm, whole = self._factors = self._factors or self._read()
        return Product(whole[rows] if whole is not None else Left.of(self._left(rows)), right, b_norm)

    def release(self) -> None:
        """Forget the factors."""
        self._factors = None
        for term in self.terms:
            discard(term.rows_factor)
            discard(term.columns)

    def _left(self, rows: slice) -> Tensor:
        parts = [term.rows_factor[rows].to(torch.float64) * term.coefficient for term in self.terms]
        return _joined(parts, dim=1)

    def _read(self) -> tuple[Columns, float, "Left | None"]:
        right = Columns(_joined([term.columns.to(torch.float64) for term in self.terms], dim=0))
        norms = [abs(term.coefficient) * column_norm(term.rows_factor.T) for term in self.terms]
        b_norm = math.hypot(*norms) * (1 + 1e-9)
        if not math.isfinite(right.norm * b_norm):
            raise NumericalError(f"the update of {self.name!r} is beyond what float64 can hold")
        size = self.terms[0].rows_factor.shape[0] * right.a.shape[0]
        return right, b_norm, Left.of(self._left(slice(None))) if size <= _KEPT else None


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=dim)


@dataclass
class Sum:
    """The exact weighted sum of updates, rounded once."""

    delta: LowRankSum
    kind: str = "sum"
    aux: bytes = b""

    def prepare(self, read: ReadRows, blocks: Sequence[slice], space: Allocate) -> None:
        """Do nothing: every element stands alone."""

    def forward(self, block: Tensor, rows: slice, space: Allocate, *, back: bool) -> Outcome:
        """Return ``RN(W + dW)``."""
        found = rounded_sum(block, self.delta.rows(rows), block.dtype, space, back=back)
        return Outcome(found.values, found.back, found.finite)

    def guess(self, block: Tensor, rows: slice, space: Allocate) -> Tensor:
        """Return ``RN(W' - dW)``."""
        return rounded_sum(block, self.delta.rows(rows).negated(), block.dtype, space).values

    def target(self, block: Tensor, rows: slice, space: Allocate) -> Tensor | None:
        """Return ``W + dW``."""
        product = self.delta.rows(rows)
        target = space("target", torch.float64, (block.shape[0], block.shape[1])).copy_(block)
        return target.addmm_(product.left.to(torch.float64), product.right.a)

    def release(self) -> None:
        """Forget the factors."""
        self.delta.release()


@dataclass
class SumInTurn(Sum):
    """PEFT's arithmetic: each update in float32 (float64 for a float64 base), added and rounded one after the other."""

    def forward(self, block: Tensor, rows: slice, space: Allocate, *, back: bool) -> Outcome:
        """Return what ``merge_adapter`` of PEFT leaves, to the bit: ``W += (B @ A) * scale`` for each adapter."""
        values = block.clone()
        wide = torch.float64 if block.dtype == torch.float64 else torch.float32  # PEFT widens a short base's factors
        for term in self.delta.terms:
            # of few rows a BLAS makes a product by another kernel, with other bits than in the whole
            first = max(0, min(rows.start, rows.stop - _ENOUGH))
            left, right = term.rows_factor[first : rows.stop].to(wide), term.columns.to(wide)
            delta = (right.T @ left.T).T if term.flipped else left @ right
            update = delta[rows.start - first :] * term.coefficient
            values += update.to(block.dtype) if term.looked_up else update
        return Outcome(values, differences(block, self.guess(values, rows, space)) if back else None)


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

    def prepare(self, read: ReadRows, blocks: Sequence[slice], space: Allocate) -> None:
        """Compute the norms of ``W + dW``."""
        if self.factor is not None:
            return
        parts = []
        for rows in blocks:
            squares = self._total(read(rows), rows, space).to(torch.float64).square().numpy()
            parts.append(_tree_sum(squares.T if self.by_row else squares))
        norms = torch.from_numpy(np.sqrt(np.concatenate(parts) if self.by_row else _tree_sum(np.stack(parts))))
        self.factor = (self.magnitude.to(torch.float64).reshape(-1) / norms).to(torch.float32)

    def forward(self, block: Tensor, rows: slice, space: Allocate, *, back: bool) -> Outcome:
        """Return ``RN(f T)``."""
        values = _rounded(self._scaled(block, rows, space), block.dtype)
        return Outcome(values, differences(block, self.guess(values, rows, space)) if back else None)

    def guess(self, block: Tensor, rows: slice, space: Allocate) -> Tensor:
        """Return ``RN(g W' - dW)`` with ``g = RN32(1 / f)``; the product is exact in float64."""
        inverse = (1 / self._factor(rows)).to(torch.float32).to(torch.float64)
        wide = torch.nan_to_num(block.to(torch.float64) * inverse, posinf=0, neginf=0)
        return rounded_sum(wide, self.delta.rows(rows).negated(), block.dtype, space).values

    def target(self, block: Tensor, rows: slice, space: Allocate) -> Tensor | None:  # noqa: ARG002 - see below
        """Return ``f T``."""
        # not in ``space``, where the new values may lie
        return self._scaled(block, rows, Workspace())

    def release(self) -> None:
        """Forget the factors of the update; those of the norms stay, for the receipt."""
        self.delta.release()

    def _scaled(self, block: Tensor, rows: slice, space: Allocate) -> Tensor:
        return self._total(block, rows, space).to(torch.float64) * self._factor(rows)

    def _total(self, block: Tensor, rows: slice, space: Allocate) -> Tensor:
        between = torch.float64 if block.dtype == torch.float64 else torch.float32
        return rounded_sum(block, self.delta.rows(rows), between, space).values

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

    def prepare(self, read: ReadRows, blocks: Sequence[slice], space: Allocate) -> None:
        """Do nothing."""

    def forward(self, block: Tensor, rows: slice, space: Allocate, *, back: bool) -> Outcome:  # noqa: ARG002 - nothing to compute
        """Return the adapter's values."""
        values = self.values[rows].to(block.dtype).contiguous()
        return Outcome(values, differences(block, values) if back else None)

    def guess(self, block: Tensor, rows: slice, space: Allocate) -> Tensor:  # noqa: ARG002 - nothing to compute
        """Return the new values: a trained tensor is near the one it began as."""
        return block

    def target(self, block: Tensor, rows: slice, space: Allocate) -> Tensor | None:
        """Return nothing: these values are what they are."""

    def release(self) -> None:
        """Let go of the values."""
        discard(self.values)


@dataclass
class Rows:
    """Some rows are others: token number to row of ``values``."""

    places: Mapping[int, int]
    values: Tensor
    kind: str = "rows"
    aux: bytes = b""

    def prepare(self, read: ReadRows, blocks: Sequence[slice], space: Allocate) -> None:
        """Do nothing."""

    def forward(self, block: Tensor, rows: slice, space: Allocate, *, back: bool) -> Outcome:  # noqa: ARG002 - nothing to compute
        """Return the block with its trained rows."""
        new = block.clone()
        for row, place in self.places.items():
            if rows.start <= row < rows.stop:
                new[row - rows.start] = self.values[place].to(block.dtype)
        return Outcome(new, differences(block, new) if back else None)

    def guess(self, block: Tensor, rows: slice, space: Allocate) -> Tensor:  # noqa: ARG002 - nothing to compute
        """Return the new values."""
        return block

    def target(self, block: Tensor, rows: slice, space: Allocate) -> Tensor | None:
        """Return nothing: these values are what they are."""

    def release(self) -> None:
        """Let go of the values."""
        discard(self.values)


def _rounded(sums: Tensor, dtype: torch.dtype) -> Tensor:
    flat = sums.numpy().reshape(-1)
    return round_pair(flat, np.zeros_like(flat), dtype).view(sums.shape)


def _tree_sum(squares: Array) -> Array:
    """Sum over the first axis by halves: one order of additions, whatever the machine."""
    while len(squares) > 1:
        half = len(squares) // 2
        rest = squares[2 * half :]
        squares = np.concatenate((squares[:half] + squares[half : 2 * half], rest))
    return np.asarray(squares[0])
