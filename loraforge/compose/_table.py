"""Every operation on adapters, one row each: what ``compose``, a recipe and ``rebuild`` run.

A derivation names a row by operation and version, and gives its parameters; equal inputs then give an equal result.
A row is never changed so that its result changes: that is another version, beside the old one.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loraforge.adapter import Adapter
from loraforge.compose._additive import Term
from loraforge.compose._exact_sum import exact_sum, itself
from loraforge.compose._linear import linear
from loraforge.compose._rerank import Reranked, check_criteria, rerank
from loraforge.compose._select import check_selection, select
from loraforge.errors import CompositionError
from loraforge_registry.canonical import Value

Kind = Literal["flag", "whole", "number", "text", "numbers", "patterns"]
"""What a parameter is: patterns are a text, or a list of texts."""


@dataclass(frozen=True)
class Operation:
    """One row: a pure function of weighted adapters (one adapter, where not ``many``) and parameters."""

    combine: Callable[..., Adapter | Reranked]
    many: bool
    parameters: Mapping[str, Kind]
    summary: str
    source: str
    check: Callable[..., object] = lambda **_: None
    """Refuses parameters that can be seen to be wrong without an adapter."""
    offered: bool = True
    """Whether recipes and ``compose`` may ask for it: some are what trees do."""


_RERANK: Mapping[str, Kind] = {
    "rank": "whole",
    "energy": "number",
    "max_parameters": "whole",
    "min_rank": "whole",
    "max_rank": "whole",
}
_SELECT: Mapping[str, Kind] = {
    "include": "patterns",
    "exclude": "patterns",
    "gradient": "numbers",
    "layers": "whole",
    "drop_saved": "flag",
}

OPERATIONS: Mapping[tuple[str, int], Operation] = {
    ("linear", 1): Operation(
        combine=linear,
        many=True,
        parameters={"base": "text", "drop_saved": "flag"},
        summary="the weighted sum of the updates; ranks add",
        source="task arithmetic, arXiv:2212.04089",
    ),
    ("rerank", 1): Operation(
        combine=rerank,
        many=False,
        parameters=_RERANK,
        summary="the best approximation at a lower rank",
        source="Eckart and Young, 1936",
        check=check_criteria,
    ),
    ("select", 1): Operation(
        combine=select,
        many=False,
        parameters=_SELECT,
        summary="some of the targets, weighted by layer",
        source="mergekit's filters and gradients, arXiv:2403.13257",
        check=check_selection,
    ),
    **{
        (name, 1): Operation(
            combine=exact_sum,
            many=True,
            parameters={"base": "text"},
            summary=f"{summary}, in factors whose merge has the same bits",
            source="the block form of a sum of products",
            offered=False,
        )
        for name, summary in {
            "flatten": "the sum of a path of a tree",
            "squash": "the sum of a part of a path",
            "rebase": "an update with the difference of two paths",
        }.items()
    },
    **{
        (name, 1): Operation(
            combine=itself, many=True, parameters={}, summary=summary, source="the adapter itself", offered=False
        )
        for name, summary in {"graft": "made elsewhere, put into a tree", "move": "put onto another parent"}.items()
    },
}

LATEST: Mapping[str, int] = {name: max(v for n, v in OPERATIONS if n == name) for name, _ in OPERATIONS}
"""The version of each operation that new work is done with."""

METHODS: Mapping[str, Operation] = {
    n: row for n, version in LATEST.items() if (row := OPERATIONS[n, version]).many and row.offered
}
"""The ways to combine several adapters."""


def perform(
    name: str, terms: Sequence[Term], parameters: Mapping[str, Any], *, version: int | None = None
) -> Adapter | Reranked:
    """Run an operation, in its latest version or the one that a derivation names.

    Raises:
        CompositionError: no such operation or version; a parameter that it has not, or of a wrong type; a number of
            adapters, or weights, that it does not take; and what the operation itself refuses.
    """
    row = operation(name, version)
    check_parameters(name, row.parameters, parameters)
    if row.many:
        return row.combine(terms, **parameters)
    if len(terms) != 1 or terms[0][1] != 1:
        raise CompositionError(f"{name} takes one adapter of weight 1, got {len(terms)}")
    return row.combine(terms[0][0], **parameters)


def operation(name: str, version: int | None = None) -> Operation:
    """Return a row of the table.

    Raises:
        CompositionError: there is none.
    """
    found = OPERATIONS.get((name, LATEST.get(name, 0) if version is None else version))
    if found is None:
        asked = name if version is None else f"{name} {version}"
        known = ", ".join(sorted(LATEST) if version is None else [f"{n} {v}" for n, v in sorted(OPERATIONS)])
        raise CompositionError(f"there is no operation {asked[:60]!r}; this version of loraforge has {known}")
    return found


def check_parameters(name: str, known: Mapping[str, Kind], parameters: Mapping[str, Value]) -> None:
    """Refuse parameters that an operation has not, or of another kind.

    Raises:
        CompositionError: naming the first.
    """
    for key, value in parameters.items():
        if key not in known:
            raise CompositionError(f"{name} has no parameter {key[:60]!r}{_did_you_mean(key, known)}")
        if not _FITS[known[key]](value):
            raise CompositionError(f"{name}: {key} is {value!r:.60}, expected {_EXPECTED[known[key]]}")


def _did_you_mean(word: str, known: Mapping[str, object]) -> str:
    """The way out for a name that is none."""
    near = difflib.get_close_matches(word.replace("-", "_"), known, 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}"


_EXPECTED: Mapping[Kind, str] = {
    "flag": "true or false",
    "whole": "a whole number",
    "number": "a number",
    "text": "text",
    "numbers": "a list of numbers",
    "patterns": "a list of names, or one text",
}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are(value: object, fits: Callable[[object], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(fits, value))


_FITS: Mapping[Kind, Callable[[object], bool]] = {
    "flag": lambda value: isinstance(value, bool),
    "whole": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": _is_number,
    "text": lambda value: isinstance(value, str),
    "numbers": lambda value: _are(value, _is_number),
    "patterns": lambda value: isinstance(value, str) or _are(value, lambda item: isinstance(item, str)),
}
