r"""What an adapter is made of: the least squares of its update on those of others.

Equation: ``min_c |dW - sum_i c_i dW_i|_F`` over a few of the candidates, all inner products from the factors. Which
few: orthogonal least squares (Chen, Billings and Luo, Int. J. Control 50, 1989): always the candidate whose part
orthogonal to those taken so far takes most off the residual, by the Gram matrix alone; one without such a part is a
combination of them, and is passed over. In the end what another one has made needless is dropped again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraforge import lowrank
from loraforge.adapter import Adapter, LowRank
from loraforge.compose._additive import check_additive, check_finite
from loraforge.errors import CompositionError, LoraforgeError

_DEPENDENT = 1e-10  # share of a candidate's |dW|^2 below which it is a combination of those taken
_NOTHING_LEFT = 1e-13  # share of |dW|^2 that rounding to float32 leaves of an exact combination, and more
_GAIN = 0.01  # share of the residual's square that a candidate must take off


@dataclass(frozen=True)
class Part:
    """One adapter of a combination: its coefficient, and ``|c_i dW_i|_F / |dW|_F``."""

    label: str
    coefficient: float
    size: float


@dataclass(frozen=True)
class Explanation:
    """An adapter as a combination of others, largest parts first.

    ``residual`` is ``|dW - sum_i c_i dW_i|_F / |dW|_F``, computed from the factors of the difference, without
    cancellation; ``targets`` the same by target, where the adapter has an update; ``left_out`` says of candidates
    that could not take part why.
    """

    parts: tuple[Part, ...]
    residual: float
    targets: Mapping[str, float]
    candidates: int
    left_out: Mapping[str, str]


def explain(adapter: Adapter, candidates: Mapping[str, Adapter], *, most: int = 16) -> Explanation:
    """Return the combination of at most ``most`` candidates that comes nearest to an adapter, if fewer do not.

    Whole saved tensors and biases take no part: only updates are compared.

    Numerics: inner products and the normal equations in float64: coefficients are right to about 1e-16 times the
        square of the condition of the candidates taken.
    Cost: for each candidate one inner product with the adapter and one with each candidate taken,
        O((m + n) r1 r2) for each target; the residual O((m + n) R^2). Nothing dense.

    Raises:
        CompositionError: the adapter is not additive, or zero; no candidates.
        NumericalError: NaN or infinity in a factor of it.
    """
    _check_plain(adapter)
    check_finite(adapter)
    fit, left_out = _fitting(adapter, candidates)
    size = _inner(adapter, adapter)
    if size == 0:
        raise CompositionError("the adapter's update is zero: there is nothing to explain")
    labels = list(fit)
    taken = _choose(adapter, [fit[label] for label in labels], size, most)
    parts = [(labels[place], coefficient) for place, coefficient in taken]
    lost = _residuals(adapter, [(fit[label], coefficient) for label, coefficient in parts])
    sizes = {label: abs(c) * (_inner(fit[label], fit[label]) / size) ** 0.5 for label, c in parts}
    return Explanation(
        parts=tuple(Part(label, c, sizes[label]) for label, c in sorted(parts, key=lambda part: -sizes[part[0]])),
        residual=(sum(norm**2 for norm in lost.values()) / size) ** 0.5,
        targets=_relative(adapter, lost),
        candidates=len(fit),
        left_out=left_out,
    )


def _choose(adapter: Adapter, others: Sequence[Adapter], size: float, most: int) -> list[tuple[int, float]]:
    """Orthogonal least squares: places and coefficients of the candidates taken."""
    with_target = torch.tensor([_inner(adapter, other) for other in others], dtype=torch.float64)
    sizes = torch.tensor([_inner(other, other) for other in others], dtype=torch.float64)
    apart, left = sizes.clone(), with_target.clone()  # of the parts orthogonal to those taken
    rows: list[Tensor] = []  # inner products of the orthonormal directions with every candidate
    gram: dict[int, Tensor] = {}
    residual = size
    while len(gram) < most and residual > _NOTHING_LEFT * size:
        usable = apart > _DEPENDENT * sizes
        gains = torch.where(usable, left.square() / torch.where(usable, apart, 1.0), 0.0)
        best = int(gains.argmax()) if len(gains) else -1
        if best < 0 or float(gains[best]) <= _GAIN * residual:
            break
        gram[best] = torch.tensor([_inner(others[best], other) for other in others], dtype=torch.float64)
        new = gram[best] - sum((row[best] * row for row in rows), torch.zeros_like(sizes))
        row = new / apart[best].sqrt()
        residual -= float(gains[best])
        left = left - left[best] / apart[best].sqrt() * row
        apart = (apart - row.square()).clamp_min(0)
        apart[best] = 0.0
        rows.append(row)
    return _without_needless(gram, with_target, size)


def _without_needless(gram: Mapping[int, Tensor], with_target: Tensor, size: float) -> list[tuple[int, float]]:
    """Drop, one after another, what the rest has made needless, and solve for the coefficients of what stays."""
    places = list(gram)
    while places:
        chosen = torch.stack([gram[place][places] for place in places])
        inverse = torch.linalg.inv(chosen)
        coefficients = inverse @ with_target[places]
        residual = max(size - float(coefficients @ with_target[places]), 0.0)
        added = coefficients.square() / inverse.diagonal()  # what leaving one out adds to the residual's square
        least = int(added.argmin())
        without = residual + float(added[least])
        if without > _NOTHING_LEFT * size and float(added[least]) > _GAIN * without:
            return list(zip(places, coefficients.tolist(), strict=True))
        places.pop(least)
    return []


def _residuals(adapter: Adapter, parts: Sequence[tuple[Adapter, float]]) -> dict[str, float]:
    """Return ``|dW - sum_i c_i dW_i|_F`` of every target that any of them has."""
    names = sorted({name for other in (adapter, *(part for part, _ in parts)) for name in other.targets})
    terms = [(adapter, 1.0), *((part, -coefficient) for part, coefficient in parts)]
    return {name: _norm([(t.targets[name], c) for t, c in terms if name in t.targets]) for name in names}


def _norm(terms: Sequence[tuple[LowRank, float]]) -> float:
    device = terms[0][0].a.device
    a = torch.cat([pair.matrices[0].double().to(device) for pair, _ in terms])
    b = torch.cat([pair.matrices[1].double().to(device) * (pair.scale * c) for pair, c in terms], dim=1)
    return lowrank.norm(a, b)


def _relative(adapter: Adapter, lost: Mapping[str, float]) -> dict[str, float]:
    norms = {name: _norm([(pair, 1.0)]) for name, pair in adapter.targets.items()}
    return {name: lost[name] / norm for name, norm in norms.items() if norm}


def _inner(first: Adapter, second: Adapter) -> float:
    """``<dW_1, dW_2>`` over all targets that both have."""
    return sum(
        pair.scale * other.scale * lowrank.inner(*pair.matrices, *other.matrices)
        for name, pair in first.targets.items()
        if (other := second.targets.get(name)) is not None
    )


def _fitting(adapter: Adapter, candidates: Mapping[str, Adapter]) -> tuple[dict[str, Adapter], dict[str, str]]:
    """Sort candidates into those whose updates can be compared, and the reasons of the others."""
    fit: dict[str, Adapter] = {}
    left_out: dict[str, str] = {}
    for label, other in candidates.items():
        try:
            _check_plain(other)
            check_finite(other)
            _check_shapes(adapter, other)
            fit[label] = other
        except LoraforgeError as error:
            left_out[label] = str(error)
    if not candidates:
        raise CompositionError("there are no other adapters to explain it by; name some (among, --among)")
    return fit, left_out


def _check_plain(adapter: Adapter) -> None:
    check_additive(adapter)
    for name, pair in adapter.targets.items():
        if pair.groups > 1:
            raise CompositionError(f"target {name!r} is a grouped convolution")


def _check_shapes(adapter: Adapter, other: Adapter) -> None:
    common = adapter.targets.keys() & other.targets.keys()
    if not common:
        raise CompositionError("no target in common")
    for name in sorted(common):
        mine, theirs = adapter.targets[name], other.targets[name]
        if (mine.kind, mine.shape) != (theirs.kind, theirs.shape):
            raise CompositionError(f"target {name!r} is {list(theirs.shape)}, not {list(mine.shape)}")
