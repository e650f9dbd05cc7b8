r"""Re-rank: the best approximation of every update at a lower rank, with the error it makes.

Equation: with ``dW = U S V^T``, ``|dW - dW_k|_F^2 = sum_{i>k} s_i^2`` and no rank-k matrix is nearer (Eckart and
Young, 1936). The decomposition comes from the factors (``lowrank.decompose``).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from loraforge import lowrank
from loraforge.adapter import Adapter, LowRank, identity
from loraforge.compose._additive import check_additive
from loraforge.errors import CompositionError
from loraforge.lowrank import Factored
from loraforge_registry.canonical import Value
from loraforge_registry.manifest import Derivation, Input

_MOST = 2**53


@dataclass(frozen=True)
class TargetReport:
    """What re-ranking did to one target.

    ``error`` is ``|dW - dW_k|_F / |dW|_F``; ``spectrum`` all singular values of dW, descending; ``norm`` is |dW|_F.
    """

    rank_before: int
    rank: int
    error: float
    norm: float
    spectrum: tuple[float, ...]


@dataclass(frozen=True)
class RerankReport:
    """What re-ranking did: by target, and over all of them (``error`` relative to the norm of everything)."""

    targets: Mapping[str, TargetReport]
    error: float
    parameters_before: int
    parameters: int

    def as_record(self) -> dict[str, Value]:
        """The part that a manifest keeps; six digits, so that equal work on other machines gives equal records."""
        targets: dict[str, Value] = {
            name: {"error": _six(t.error), "rank": t.rank, "rank_before": t.rank_before}
            for name, t in self.targets.items()
        }
        return {"error": _six(self.error), "targets": targets}


@dataclass(frozen=True)
class Reranked:
    """A re-ranked adapter and what it cost."""

    adapter: Adapter
    report: RerankReport


def rerank(
    adapter: Adapter,
    rank: int | None = None,
    *,
    energy: float | None = None,
    max_parameters: int | None = None,
    min_rank: int = 1,
    max_rank: int | None = None,
) -> Reranked:
    """Return the adapter with every update replaced by its best approximation at a lower rank.

    Exactly one of ``rank``, ``energy`` and ``max_parameters`` says how low. No target gets more than its numerical
    rank; one that keeps its rank keeps its factors bit for bit.

    Args:
        adapter: any number of targets of any kinds.
        rank: the rank of every target.
        energy: the smallest rank for each target that keeps this share of its ``|dW|_F^2``.
        max_parameters: the number of elements that all factors together may have. Directions are taken in the order
            of ``s^2 / (m + n)`` over all targets, which is optimal at every budget that it meets exactly, and within
            one direction's gain of the optimum otherwise.
        min_rank: with energy and max_parameters, the least rank of a target (where it has that much).
        max_rank: with energy and max_parameters, the greatest.

    Numerics: QR and SVD in float64; new factors are rounded once, to float32 (float64 if the source is).
    Cost: O((m + n) R^2 + R^3) for each target, memory O((m + n) R) beyond the result; nothing dense.

    Raises:
        CompositionError: not exactly one criterion, one out of range, or an adapter that is not additive.
        NumericalError: NaN or infinity in a factor.
    """
    parameters = check_criteria(
        rank, energy=energy, max_parameters=max_parameters, min_rank=min_rank, max_rank=max_rank
    )
    check_additive(adapter)
    _refuse_grouped(adapter)
    if max_parameters is not None:
        choose = _within_budget(adapter, min_rank, max_rank, max_parameters)
    else:
        choose = partial(_rank_of_one, rank=rank, energy=energy, min_rank=min_rank, max_rank=max_rank)
    done = {name: _rerank_one(name, pair, choose) for name, pair in adapter.targets.items()}
    result = Adapter(
        targets={name: pair for name, (pair, _) in done.items()},
        settings=replace(
            adapter.settings, target_modules=None, exclude_modules=None, layers_to_transform=None, layers_pattern=()
        ),
        extras=adapter.extras,
        derivation=Derivation("rerank", 1, (Input(identity(adapter)),), parameters),
    )
    return Reranked(result, _overall({name: report for name, (_, report) in done.items()}, adapter, result))


def _rerank_one(name: str, pair: LowRank, choose: Callable[[str, Factored], int]) -> tuple[LowRank, TargetReport]:
    """Decompose, choose a rank from what is found, truncate."""
    found = _decompose(pair)
    rank = choose(name, found)
    norm = float(found.s.square().sum().sqrt())
    error = lowrank.tail_error(found.s, rank) / norm if norm else 0.0
    report = TargetReport(pair.rank, rank, error, norm, tuple(found.s.tolist()))
    return _truncate(name, pair, found, rank), report


def _decompose(pair: LowRank) -> Factored:
    """The decomposition of dW, the scale in its singular values (its sign goes back on in ``_truncate``)."""
    found, scale = lowrank.decompose(*pair.matrices), abs(pair.scale)
    return replace(found, s=found.s * scale, size=found.size * scale)


def _truncate(name: str, pair: LowRank, found: Factored, rank: int) -> LowRank:
    if rank == pair.rank:
        return replace(pair, alpha=pair.scale * pair.rank, rslora=False)
    a, b = lowrank.truncate(found, rank)
    b = b if pair.scale > 0 else -b
    dtype = torch.float64 if pair.a.dtype == torch.float64 else torch.float32
    result = LowRank(
        kind=pair.kind,
        a=a.to(device=pair.a.device, dtype=dtype).reshape(rank, *pair.a.shape[1:]).contiguous(),
        b=b.to(device=pair.b.device, dtype=dtype).reshape(pair.b.shape[0], rank, *pair.b.shape[2:]).contiguous(),
        alpha=float(rank),
        bias=None if pair.bias is None else (pair.bias.to(torch.float64) * pair.scale).to(dtype),
    )
    result.check_finite(name)  # factors near the end of float32 can leave it
    return result


def _overall(reports: Mapping[str, TargetReport], before: Adapter, after: Adapter) -> RerankReport:
    lost = sum((t.error * t.norm) ** 2 for t in reports.values())
    total = sum(t.norm**2 for t in reports.values())
    return RerankReport(reports, (lost / total) ** 0.5 if total else 0.0, before.parameters, after.parameters)


def _rank_of_one(
    _name: str, found: Factored, *, rank: int | None, energy: float | None, min_rank: int, max_rank: int | None
) -> int:
    wanted = rank if energy is None else max(lowrank.rank_for_energy(found.s, energy), min_rank)
    return min(wanted or 1, _most(found, max_rank))


def _most(found: Factored, max_rank: int | None) -> int:
    """The most rank a target may get: what is there above the rounding of its factors; at least 1."""
    there = max(lowrank.numerical_rank(found), 1)
    return there if max_rank is None else min(there, max_rank)


def _within_budget(
    adapter: Adapter, min_rank: int, max_rank: int | None, budget: int
) -> Callable[[str, Factored], int]:
    """Give ranks in the order of error removed for each parameter, ``s^2 / (m + n)``, while they fit.

    The singular values of all targets are needed before the first is truncated, so each is decomposed twice: keeping
    the bases of a 7B adapter meanwhile would take twice its size.
    """
    spectra: dict[str, torch.Tensor] = {}
    most: dict[str, int] = {}
    for name, pair in adapter.targets.items():
        found = _decompose(pair)
        spectra[name], most[name] = found.s, _most(found, max_rank)
    cost = {name: pair.parameters // pair.rank for name, pair in adapter.targets.items()}  # m + n
    ranks = {name: min(min_rank, most[name]) for name in spectra}
    left = budget - sum(cost[name] * k for name, k in ranks.items())
    if left < 0:
        raise CompositionError(
            f"max_parameters {budget} is less than the {budget - left} that rank {min_rank} on every target takes"
        )
    gains = [
        (float(s[k]) ** 2 / cost[name], name) for name, s in spectra.items() for k in range(ranks[name], most[name])
    ]
    # sorting is stable and a target's gains descend, so its directions are taken in their order
    for _, name in sorted(gains, key=lambda gain: -gain[0]):
        if cost[name] <= left:
            ranks[name] += 1
            left -= cost[name]
    return lambda name, _found: ranks[name]


def check_criteria(
    rank: int | None = None,
    *,
    energy: float | None = None,
    max_parameters: int | None = None,
    min_rank: int = 1,
    max_rank: int | None = None,
) -> dict[str, Value]:
    """Refuse what is no criterion, and return the given ones as a derivation records them."""
    given: dict[str, Value] = {
        key: value
        for key, value in (("rank", rank), ("energy", energy), ("max_parameters", max_parameters))
        if value is not None
    }
    if len(given) != 1:
        raise CompositionError(
            f"{' and '.join(given) or 'nothing'} given; say exactly one of rank, energy, max_parameters"
        )
    if energy is not None and not 0 < energy <= 1:
        raise CompositionError(f"energy is {energy}; expected a share above 0, up to 1")
    for name, value in (
        ("rank", rank),
        ("max_parameters", max_parameters),
        ("min_rank", min_rank),
        ("max_rank", max_rank),
    ):
        if value is not None and value < 1:
            raise CompositionError(f"{name} is {value}; expected at least 1")
        if value is not None and value > _MOST:
            raise CompositionError(f"{name} is {value}; expected at most {_MOST}")
    if max_rank is not None and max_rank < min_rank:
        raise CompositionError(f"max_rank {max_rank} is below min_rank {min_rank}")
    if rank is not None and (min_rank > 1 or max_rank is not None):
        raise CompositionError("min_rank and max_rank go with energy or max_parameters, not with rank")
    limits: dict[str, Value] = {"min_rank": min_rank} if min_rank > 1 else {}
    return given | limits | ({"max_rank": max_rank} if max_rank is not None else {})


def _refuse_grouped(adapter: Adapter) -> None:
    for name, pair in adapter.targets.items():
        if pair.groups > 1:
            raise CompositionError(f"target {name!r} is a grouped convolution: it cannot be re-ranked")


def _six(number: float) -> float:
    return float(f"{number:.6g}")
