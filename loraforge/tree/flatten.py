"""A path as one adapter on the base: the same real number, so that a merge of it has the same bits."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loraforge.adapter import Adapter, identity
from loraforge.compose import Reranked, Term, exact_sum, rerank
from loraforge_registry.canonical import Value
from loraforge_registry.manifest import Derivation, Input

VERSION = 1


def flatten(
    path: Sequence[Adapter], *, base: str, rank: int | None = None, energy: float | None = None
) -> Adapter | Reranked:
    """Return the sum of a path's adapters as one plain adapter; with ``rank`` or ``energy`` the nearest, and its error.

    Raises:
        CompositionError: what does not add up (DoRA, saved modules), naming it.
    """
    return made([(adapter, 1.0) for adapter in path], "flatten", base=base, rank=rank, energy=energy)


def made(
    terms: Sequence[Term],
    operation: str,
    *,
    base: str,
    parameters: Mapping[str, Value] | None = None,
    rank: int | None = None,
    energy: float | None = None,
) -> Adapter | Reranked:
    """Return ``compose.exact_sum`` under the name of an operation; with ``rank`` or ``energy`` re-ranked."""
    inputs = tuple(Input(identity(adapter), weight) for adapter, weight in terms)
    derivation = Derivation(operation, VERSION, inputs, {"base": base, **(parameters or {})})
    flat = replace(exact_sum(terms, base=base), derivation=derivation, origin=None)
    return flat if rank is None and energy is None else rerank(flat, rank, energy=energy)
