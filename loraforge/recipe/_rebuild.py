"""Deriving an adapter again from what its manifest says, to see whether it comes out the same."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loraforge.adapter import Adapter, content_id
from loraforge.checkpoint.extract import extract
from loraforge.compose import Kind, check_parameters, compare, overall, perform
from loraforge.errors import CompositionError, NotFoundError
from loraforge.recipe._steps import adapter_of
from loraforge.registry import Registry, load
from loraforge_registry.digest import Digest
from loraforge_registry.manifest import Artifact, Derivation, Input, Manifest
from loraforge_registry.paths import AnyPath

_LISTED = 6
_EXTRACT: Mapping[str, Kind] = {
    "rank": "whole",
    "energy": "number",
    "auto": "flag",
    "max_rank": "whole",
    "oversample": "whole",
    "seed": "whole",
    "save": "text",
    "drop": "text",
}
"""What an extraction's derivation says. It works on checkpoints, so it is no row of the table of operations."""


@dataclass(frozen=True)
class Rebuilt:
    """An adapter derived again: ``expected`` is the content id of the stored one, ``found`` that of this one.

    ``distance`` is ``|dW - dW'|_F / |dW|_F`` over all targets, and 0.0 where they are the same; where it is 0 and
    they are not, other things than the updates differ.
    """

    adapter: Adapter
    operation: str
    expected: Digest
    found: Digest
    distance: float

    @property
    def same(self) -> bool:
        """Whether both compute the same, bit for bit."""
        return self.expected == self.found


@dataclass(frozen=True)
class _Kitchen:
    """Where inputs come from: the store, adapters that were brought along, two checkpoints."""

    registry: Registry
    brought: dict[Digest, Adapter] = field(default_factory=dict)
    checkpoints: tuple[AnyPath, AnyPath] | None = None


def rebuild(
    reference: str,
    registry: Registry | None = None,
    *,
    sources: Sequence[Adapter | AnyPath] = (),
    checkpoints: tuple[AnyPath, AnyPath] | None = None,
) -> Rebuilt:
    """Derive a stored adapter again from its inputs, and compare; nothing is stored.

    Its inputs are taken as they are stored, every byte checked; what was never stored on the way is derived again.

    Args:
        reference: the adapter, in the store.
        registry: the store; without it the default one.
        sources: adapters that the derivation knows by content, and that are not in the store.
        checkpoints: base and fine-tune, for what was extracted.

    Raises:
        NotFoundError: an input is not here; all that are missing are named.
        CompositionError: it was not derived, or by what no algebra repeats (a training).
    """
    registry = registry or Registry()
    digest = registry.store.resolve(reference)
    with registry.store.reading(digest):
        manifest = registry.store.manifest(digest)
        derivation = _derivation(reference, manifest)
        brought = {}
        for source in sources:
            adapter = source if isinstance(source, Adapter) else load(source, registry=registry)
            brought[content_id(adapter)] = adapter
        kitchen = _Kitchen(registry, brought, checkpoints)
        _check_present(reference, derivation, kitchen)
        stored = _original(registry, digest, manifest) if derivation.operation == "extract" else None
        adapter = _derive(derivation, kitchen, stored)
        found = content_id(adapter)
        same = found == manifest.content_id
        distance = 0.0 if same else overall(compare(registry.load(str(digest)), adapter))
    return Rebuilt(adapter, derivation.operation, manifest.content_id, found, distance)


def _derivation(reference: str, manifest: Manifest) -> Derivation:
    if manifest.derivation is None:
        raise CompositionError(f"{reference} was not derived: it was pushed as it is, and there is nothing to repeat")
    return manifest.derivation


def _original(registry: Registry, digest: Digest, manifest: Manifest) -> Adapter:
    """The stored adapter: what an extraction was told and its derivation does not say is read off it."""
    adapter = registry.load(str(digest))
    return replace(adapter, derivation=manifest.derivation)


def _derive(derivation: Derivation, kitchen: _Kitchen, stored: Adapter | None = None) -> Adapter:
    if derivation.operation == "extract":
        return _extract(derivation, kitchen, stored)
    derivation = _without_place(derivation)
    terms = [(_open(item.source, kitchen), item.weight) for item in derivation.inputs]
    made = perform(derivation.operation, terms, derivation.parameters, version=derivation.version)
    return adapter_of(made)


def _without_place(derivation: Derivation) -> Derivation:
    """Leave out of a node's derivation which node of a tree it is atop: nothing of it was computed from that."""
    parent = derivation.parent
    if parent is None:
        return derivation
    inputs = tuple(item for item in derivation.inputs if item.source != parent or item.weight)
    return replace(
        derivation, inputs=inputs, parameters={k: v for k, v in derivation.parameters.items() if k != "parent"}
    )


def _open(source: Artifact | Digest | Derivation, kitchen: _Kitchen) -> Adapter:
    if isinstance(source, Derivation):
        return _derive(source, kitchen)
    content = source.content_id if isinstance(source, Artifact) else source
    if isinstance(source, Artifact) and kitchen.registry.store.has(source.digest):
        return kitchen.registry.load(str(source.digest))
    if content in kitchen.brought:
        return kitchen.brought[content]
    return kitchen.registry.load(str(kitchen.registry.store.find_content(content)))


def _extract(derivation: Derivation, kitchen: _Kitchen, stored: Adapter | None) -> Adapter:
    assert kitchen.checkpoints is not None, "checked"  # noqa: S101 - by _check_present
    if derivation.version != 1:
        raise CompositionError(f"extract {derivation.version}; this version of loraforge has extract 1: upgrade it")
    check_parameters("extract", _EXTRACT, derivation.parameters)
    said: dict[str, Any] = dict(derivation.parameters)
    save, drop = str(said.pop("save", "")), str(said.pop("drop", ""))
    extracted = extract(
        *kitchen.checkpoints,
        save="auto" if save == "auto" else "none" if save == "none" else tuple(filter(None, save.split(", "))),
        drop=tuple(filter(None, drop.split(", "))),
        base_name=None if stored is None else stored.settings.base_name,
        fan_in_fan_out=None if stored is None else stored.settings.fan_in_fan_out,
        **said,
    ).adapter
    if extracted.derivation is None or extracted.derivation.inputs != derivation.inputs:
        found = extracted.derivation.inputs if extracted.derivation else ()
        raise CompositionError(
            f"these are not the checkpoints that it was extracted from: expected {_checkpoints(derivation.inputs)}, "
            f"found {_checkpoints(found)}"
        )
    return extracted


def _checkpoints(inputs: Sequence[Input]) -> str:
    short = [item.source.short if isinstance(item.source, Digest) else "?" for item in inputs]
    return " and ".join(f"content {name}" for name in reversed(short))


def _check_present(reference: str, derivation: Derivation, kitchen: _Kitchen) -> None:
    """Name everything that is missing at once, before anything is computed."""
    missing = list(dict.fromkeys(_missing(derivation, kitchen)))
    if missing:
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        raise NotFoundError(f"{reference} cannot be derived again: {'; '.join(missing[:_LISTED])}{more}")


def _missing(derivation: Derivation, kitchen: _Kitchen) -> Iterator[str]:
    if derivation.operation == "train":
        raise CompositionError(
            "it was trained, and no algebra repeats that: train it again with the data and settings that "
            "`loraforge show --json` has"
        )
    if derivation.operation == "extract":
        if kitchen.checkpoints is None:
            yield (
                f"it was extracted from two checkpoints, {_checkpoints(derivation.inputs)}; say where they are "
                "(checkpoints=(base, finetuned), --base and --finetuned)"
            )
        return
    for item in _without_place(derivation).inputs:
        if isinstance(item.source, Derivation):
            yield from _missing(item.source, kitchen)
        elif not _is_here(item.source, kitchen):
            name = item.source.digest if isinstance(item.source, Artifact) else f"content {item.source}"
            yield f"{name} is not in the store; pull it, or say where it is (sources=, --with)"


def _is_here(source: Artifact | Digest, kitchen: _Kitchen) -> bool:
    store = kitchen.registry.store
    if isinstance(source, Artifact) and store.has(source.digest):
        return True
    content = source.content_id if isinstance(source, Artifact) else source
    return content in kitchen.brought or store.find_content(content) is not None
