"""An adapter as a combination of those that a store knows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from loraforge import lowrank
from loraforge.adapter import Adapter, content_id
from loraforge.compose import LATEST, Explanation, layer_of
from loraforge.compose import explain as combination
from loraforge.errors import CompositionError
from loraforge.registry import Registry, load
from loraforge_registry.digest import Digest
from loraforge_registry.manifest import Derivation, Manifest
from loraforge_registry.names import DEFAULT_TAG
from loraforge_registry.paths import AnyPath
from loraforge_registry.store import Store
from loraforge_registry.trees import TreeRecord


def explain(
    source: Adapter | AnyPath,
    registry: Registry | None = None,
    *,
    among: Sequence[AnyPath] = (),
    derived: bool = False,
    most: int = 16,
) -> Explanation:
    """Write an adapter as a combination of others, with the residual (the method: ``loraforge.compose.explain``).

    Args:
        source: the adapter: one in memory, a path, or a reference into the store.
        registry: the store; without it the default one.
        among: the adapters to write it by; without them those that have a name in the store or are in the adapter's
            lineage, are of the same base, and were not themselves combined, selected or re-ranked.
        derived: those that were, too, but for the ones made from this adapter.
        most: how many to take at most.

    Raises:
        NotFoundError: it is not there.
        CompositionError: it cannot be compared (DoRA, say), or there is nothing to compare it with.
    """
    adapter, candidates = _opened(source, registry or Registry(), among, derived=derived)
    return combination(adapter, candidates, most=most)


def explain_layers(
    source: Adapter | AnyPath,
    registry: Registry | None = None,
    *,
    among: Sequence[AnyPath] = (),
    derived: bool = False,
    most: int = 16,
) -> dict[int | None, Explanation]:
    """Do as ``explain`` with each layer for itself: a gradient over layers has other coefficients in each.

    The layer of a target is the first number in its path, None where there is none; a layer whose update is zero is
    left out. Raises as ``explain``.
    """
    adapter, candidates = _opened(source, registry or Registry(), among, derived=derived)
    found = {}
    for layer in sorted({layer_of(name) for name in adapter.targets}, key=lambda n: -1 if n is None else n):
        part = _in_layer(adapter, layer)
        if any(lowrank.norm(*pair.matrices) for pair in part.targets.values()):
            here = {label: _in_layer(other, layer) for label, other in candidates.items()}
            found[layer] = combination(part, here, most=most)
    if not found:
        raise CompositionError("the adapter's update is zero: there is nothing to explain")
    return found


def _in_layer(adapter: Adapter, layer: int | None) -> Adapter:
    return replace(adapter, targets={n: pair for n, pair in adapter.targets.items() if layer_of(n) == layer})


def _opened(
    source: Adapter | AnyPath, registry: Registry, among: Sequence[AnyPath], *, derived: bool
) -> tuple[Adapter, dict[str, Adapter]]:
    """Return the adapter, and what it is to be written by."""
    adapter = source if isinstance(source, Adapter) else load(source, registry=registry)
    if among:
        return adapter, {str(other): load(other, registry=registry) for other in among}
    known = _known(adapter, registry.store, derived=derived)
    return adapter, {label: registry.load(str(digest)) for label, digest in known}


def _known(adapter: Adapter, store: Store, *, derived: bool) -> Iterator[tuple[str, Digest]]:
    """Yield the artifacts to compare with, one for each function, by a name where they have one."""
    labels = _labels(store)
    for digest in _ancestors(store, adapter.derivation):
        labels.setdefault(digest, f"sha256:{digest.short}")
    own = content_id(adapter)
    seen = {own}
    for digest, label in labels.items():
        manifest = store.manifest(digest)
        if manifest.content_id in seen or not _may_be_one_base(adapter.settings.base_name, manifest.base_name):
            continue
        if manifest.derivation is not None and manifest.derivation.operation in LATEST:
            above = {store.manifest(d).content_id for d in _ancestors(store, manifest.derivation)}
            if not derived or own in above:
                continue
        seen.add(manifest.content_id)
        yield label, digest


def _labels(store: Store) -> dict[Digest, str]:
    """One name for each artifact that has one: a fixed tag rather than the moving latest, or the path of a node."""
    lines = sorted(store.ls(), key=lambda line: (line.ref.tag == DEFAULT_TAG, line.ref))
    found: dict[Digest, str] = {}
    for line in lines:
        if line.digest is None or line.problem is not None:
            continue
        record = store.record(line.digest)
        if isinstance(record, Manifest):
            found.setdefault(line.digest, str(line.ref))
        elif isinstance(record, TreeRecord):
            for path, digest in record.nodes.items():
                found.setdefault(digest, f"{line.ref.name}/{path}")
    return found


def _ancestors(store: Store, derivation: Derivation | None) -> Mapping[Digest, None]:
    """The artifacts that something was made from, and those in turn, as far as the store has them."""
    found: dict[Digest, None] = {}
    todo = list(derivation.artifacts()) if derivation else []
    while todo:
        digest = todo.pop()
        if digest not in found and store.has(digest):
            found[digest] = None
            above = store.manifest(digest).derivation
            todo += above.artifacts() if above else ()
    return found


def _may_be_one_base(one: str | None, other: str | None) -> bool:
    return one is None or other is None or one == other
