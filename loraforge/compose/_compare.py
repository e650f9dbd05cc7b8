"""How two adapters differ, by what they compute: the gauge and the rank of their factors make no difference."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from loraforge import lowrank
from loraforge.adapter import Adapter, LowRank
from loraforge.compose._additive import check_finite

_ROUNDING = 1e-14  # what float64 leaves of a difference that is none


@dataclass(frozen=True)
class Difference:
    """How one target differs: ``|dW|_F`` on both sides, and ``|dW_1 - dW_2|_F`` relative to the larger of them.

    A side without the target has norm None and counts as zero; ``relative`` is None where the shapes differ.
    """

    target: str
    norm_before: float | None
    norm_after: float | None
    relative: float | None

    @property
    def size(self) -> float:
        """The larger norm."""
        return max(self.norm_before or 0.0, self.norm_after or 0.0)


def compare(before: Adapter, after: Adapter) -> list[Difference]:
    """Compare two adapters target by target.

    Raises:
        NumericalError: NaN or infinity in a factor.

    Cost: O((m + n) (r1 + r2)^2) for each target that both have; no dense matrix.
    """
    check_finite(before)
    check_finite(after)
    names = sorted({*before.targets, *after.targets})
    return [_difference(name, before.targets.get(name), after.targets.get(name)) for name in names]


def overall(differences: Iterable[Difference]) -> float:
    """Return the norm of all differences together, relative to that of the larger adapter."""
    rows = list(differences)
    total = max(sum((r.norm_before or 0) ** 2 for r in rows), sum((r.norm_after or 0) ** 2 for r in rows))
    lost = sum(((1.0 if row.relative is None else row.relative) * row.size) ** 2 for row in rows)
    return float((lost / total) ** 0.5) if total else 0.0


def _difference(name: str, before: LowRank | None, after: LowRank | None) -> Difference:
    norms = [None if pair is None else _norm(pair) for pair in (before, after)]
    size = max(norm or 0.0 for norm in norms)
    if before is None or after is None:
        relative: float | None = 1.0 if size else 0.0
    elif (before.kind, before.shape) != (after.kind, after.shape):
        relative = None
    else:
        relative = _norm_of_difference(before, after) / size if size else 0.0
        relative = 0.0 if relative < _ROUNDING else relative
    return Difference(name, norms[0], norms[1], relative)


def _norm_of_difference(before: LowRank, after: LowRank) -> float:
    """``|dW_1 - dW_2|`` as the norm of one stack: a difference of norms would lose half the digits."""
    (a1, b1), (a2, b2) = before.matrices, after.matrices
    a = torch.cat([a1.double(), a2.double().to(a1.device)])
    b = torch.cat([b1.double() * before.scale, b2.double().to(b1.device) * -after.scale], dim=1)
    return lowrank.norm(a, b)


def _norm(pair: LowRank) -> float:
    a, b = pair.matrices
    return abs(pair.scale) * lowrank.norm(a, b)
