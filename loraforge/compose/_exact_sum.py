r"""A sum whose merge has the same bits as that of its terms: what a path of a tree is, as one adapter.

Equation: ``sum_i c_i B_i A_i = [c_1 B_1 .. c_n B_n] [A_1; ..; A_n]``. A merge rounds ``c_i B_i`` to float64 and the sum
once into the weight's type; the factors here are stored so that it finds the same numbers: in float32 where that holds
``c_i B_i`` exactly (scales that are equal, or powers of two), else B in float64.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loraforge.adapter import Adapter, LowRank
from loraforge.compose._additive import Term
from loraforge.compose._linear import linear
from loraforge.errors import CompositionError
from loraforge_registry.config import scale_of


def exact_sum(terms: Sequence[Term], *, base: str) -> Adapter:
    """Return the weighted sum of adapters in factors that hold the same real number (see the module).

    Numerics: exact but for a lora_bias, which is rounded once.

    Raises:
        CompositionError: as ``linear``.
    """
    if len(terms) == 1 and terms[0][1] == 1:
        return terms[0][0]
    total = linear(terms, base=base)
    targets = {}
    for name, pair in total.targets.items():
        parts = [(adapter.targets[name], weight) for adapter, weight in terms if name in adapter.targets]
        targets[name] = pair if len(parts) == 1 and parts[0][1] == 1 else _exact(pair, parts)
    return replace(total, targets=targets)


def _exact(total: LowRank, parts: Sequence[tuple[LowRank, float]]) -> LowRank:
    """Return the sum of pairs in factors that a merge computes with as it would with the pairs."""
    rank, scales = sum(pair.rank for pair, _ in parts), [weight * pair.scale for pair, weight in parts]
    a = _narrowest(torch.cat([pair.a.to(torch.float64) for pair, _ in parts], dim=0))
    shared = abs(scales[0]) * rank
    if len({abs(scale) for scale in scales}) == 1 and scale_of(shared, rank, rslora=False) == abs(scales[0]):
        signs = [math.copysign(1.0, scale) for scale in scales]
        return replace(total, a=a, b=_beside(parts, signs), alpha=shared, rslora=False)
    return replace(total, a=a, b=_beside(parts, scales), alpha=float(rank), rslora=False)


def _beside(parts: Sequence[tuple[LowRank, float]], factors: Sequence[float]) -> Tensor:
    scaled = [pair.b.to(torch.float64) * factor for (pair, _), factor in zip(parts, factors, strict=True)]
    return _narrowest(torch.cat(scaled, dim=1))


def _narrowest(factor: Tensor) -> Tensor:
    """Return a factor in float32, if that holds it exactly."""
    single = factor.to(torch.float32)
    return single if torch.equal(single.to(torch.float64), factor) else factor


def itself(terms: Sequence[Term]) -> Adapter:
    """Return the one adapter that there is: what is grafted or moved stays what it is.

    Raises:
        CompositionError: there are more, or it has a weight.
    """
    if len(terms) != 1 or terms[0][1] != 1:
        raise CompositionError(f"expected one adapter of weight 1, got {len(terms)}")
    return terms[0][0]
