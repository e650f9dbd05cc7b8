"""One step: its operation on its terms; what it is known by; and a rehearsal that finds what cannot work."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from loraforge.adapter import Adapter, LowRank
from loraforge.compose import LATEST, Reranked, layers_of, perform
from loraforge.errors import CompositionError, ConfigError, NumericalError, RecipeError
from loraforge.recipe._nodes import Place
from loraforge.recipe._schema import Document, Step, Term
from loraforge_registry import canonical
from loraforge_registry.digest import Digest


def evaluate(step: Step, adapters: Mapping[str, Adapter], layers: int) -> Adapter | Reranked:
    """Run a step's operation on adapters by name.

    Raises:
        RecipeError: what the operation refuses, with the place of the term or step.
    """
    terms = [(_part(step, term, adapters[term.adapter], layers), term.weight) for term in step.terms]
    with _placed(step.place):
        return perform(step.operation, terms, step.parameters)


def adapter_of(made: Adapter | Reranked) -> Adapter:
    """The adapter that an operation made."""
    return made.adapter if isinstance(made, Reranked) else made


def work_of(step: Step, digests: Mapping[str, Digest], layers: int) -> Digest:
    """Return what a step is known by: operation, version, parameters and the artifacts that go in."""
    document: dict[str, Any] = {
        "schema": "loraforge.work/1",
        "operation": step.operation,
        "version": LATEST[step.operation],
        "parameters": dict(step.parameters),
        "inputs": [[t.weight, digests[t.adapter].raw, _selection(step, t, layers)] for t in step.terms],
    }
    return Digest.of(canonical.encode(document, max_bytes=None))  # never read back


def layers_in(document: Document, adapters: Mapping[str, Adapter]) -> int:
    """Return the layers that gradients go over: what the recipe says, else up to the last that any input is in."""
    return document.layers or layers_of(name for adapter in adapters.values() for name in adapter.targets)


def rehearse(document: Document, adapters: Mapping[str, Adapter], layers: int) -> None:
    """Run all steps on adapters of rank one that are zero: names, shapes, bases and weights that do not fit show here.

    Raises:
        RecipeError: as ``evaluate``, before anything is computed or stored.

    Cost: O(m + n) for each target and step.
    """
    known = {name: _hollow(adapter) for name, adapter in adapters.items()}
    for step in document.order:
        known[step.name] = adapter_of(evaluate(step, known, layers))


def _hollow(adapter: Adapter) -> Adapter:
    targets = {name: _hollow_pair(pair) for name, pair in adapter.targets.items()}
    return replace(adapter, targets=targets, origin=None, derivation=None)


def _hollow_pair(pair: LowRank) -> LowRank:
    rank = pair.groups
    a, b = torch.zeros_like(pair.a[:rank]), torch.zeros_like(pair.b[:, :1])
    bias = None if pair.bias is None else torch.zeros_like(pair.bias)
    return replace(pair, a=a, b=b, bias=bias, alpha=pair.scale * rank, rslora=False)


def _part(step: Step, term: Term, adapter: Adapter, layers: int) -> Adapter:
    if not term.selection:
        return adapter
    with _placed(term.place):
        return adapter_of(perform("select", [(adapter, 1.0)], _selection(step, term, layers)))


def _selection(step: Step, term: Term, layers: int) -> dict[str, Any]:
    """The parameters of ``select`` for a term; none where all of the adapter is taken."""
    found = dict(term.selection)
    if "gradient" in found:
        found["layers"] = max(layers, 1)
    if found and step.parameters.get("drop_saved"):
        found["drop_saved"] = True
    return found


@contextmanager
def _placed(place: Place) -> Iterator[None]:
    try:
        yield
    except (CompositionError, ConfigError, NumericalError) as error:
        raise RecipeError(f"{place}: {error}") from error
