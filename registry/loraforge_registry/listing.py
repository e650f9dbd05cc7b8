"""A line about each name, and what the bytes of a store are for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraforge_registry import index, names, objects, refs
from loraforge_registry.collect import named
from loraforge_registry.config import MAX_BYTES, parse_config
from loraforge_registry.digest import Digest
from loraforge_registry.errors import LoraforgeError, ManifestError, NotFoundError, StoreError
from loraforge_registry.files import Files
from loraforge_registry.index import Summary
from loraforge_registry.layout import Layout, read_layout
from loraforge_registry.manifest import CONFIG_FILE, Manifest
from loraforge_registry.names import RefName
from loraforge_registry.records import Records
from loraforge_registry.shown import repository_at, shown
from loraforge_registry.trees import TreeRecord


@dataclass(frozen=True, slots=True)
class Named:
    """One line of ``ls``: a ref, and what it points at; ``problem`` where that cannot be read."""

    ref: RefName
    digest: Digest | None
    summary: Summary | None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of a store: what the names add up to, what lies on disk, what no name or lineage needs."""

    artifacts: int
    logical: int
    physical: int
    reclaimable: int


def list_named(files: Files, name: str | None = None) -> list[Named]:
    """Return every ref with a line about its artifact, sorted; ``name`` keeps one name's tags.

    Cost: one small file read a ref, and one query of the index. A row that is missing there is made again.
    """
    known = index.read_summaries(files.root)
    new: dict[Digest, Summary] = {}
    lines = [
        _line(files, one, digest, known, new)
        for ref, found in refs.list_refs(files)
        if name is None or ref.name == name
        for one, digest in _shown(files, ref, found, known)
    ]
    index.write_summaries(files.root, new)
    return lines


def usage(files: Files) -> Usage:
    """Count bytes; what is reachable is what refs name, and the lineage of that.

    Raises:
        StoreError, ManifestError: a ref or manifest is damaged, so that nothing can be called reclaimable.
    """
    reachable = Records(files).reachable(named(files))
    sizes = {
        (area, digest): files.size(objects.shard(area, digest), digest.hex) or 0
        for area in (objects.BLOBS, objects.MANIFESTS)
        for digest in objects.list_digests(files, area)
    }
    needed = {(objects.MANIFESTS, digest) for digest in reachable}
    needed |= {(objects.BLOBS, blob) for record in reachable.values() for blob in record.blobs}
    trash = sum(files.size("trash", name) or 0 for name in files.names("trash"))
    physical = sum(sizes.values()) + trash
    return Usage(
        artifacts=sum(area == objects.MANIFESTS for area, _ in sizes),
        logical=sum(record.size for record in reachable.values() if isinstance(record, Manifest)),
        physical=physical,
        reclaimable=physical - sum(sizes.get(key, 0) for key in needed),
    )


def keep_summary(files: Files, digest: Digest) -> None:
    """Put the line about a record into the index, for those who list."""
    index.write_summaries(files.root, {digest: _summarise(files, digest)})


def layout_of(files: Files, manifest: Manifest) -> Layout:
    """Which tensor is what, in a stored artifact."""
    config = objects.read_all(files, objects.BLOBS, manifest.file(CONFIG_FILE).digest, MAX_BYTES)
    return read_layout(parse_config(config), [tensor.entry for tensor in manifest.tensors])


def _shown(
    files: Files, ref: RefName, found: Digest | StoreError, known: Mapping[Digest, Summary]
) -> Sequence[tuple[RefName, Digest | StoreError]]:
    """The lines of a ref: itself, or for a repository what it shows."""
    if isinstance(found, StoreError) or found in known or ref.tag != names.DEFAULT_TAG:
        return [(ref, found)]
    records = Records(files)
    repository = repository_at(records, found)
    if repository is None:
        return [(ref, found)]
    try:
        return sorted((RefName(ref.name, tag), digest) for tag, digest in shown(records, ref.name, repository).items())
    except (StoreError, NotFoundError, ManifestError) as error:
        return [(ref, StoreError(str(error)))]


def _line(
    files: Files,
    ref: RefName,
    found: Digest | StoreError,
    known: Mapping[Digest, Summary],
    new: dict[Digest, Summary],
) -> Named:
    if isinstance(found, StoreError):
        return Named(ref, None, None, str(found))
    summary = known.get(found) or new.get(found)
    if summary is None:
        try:
            summary = new[found] = _summarise(files, found)
        except (LoraforgeError, OSError) as error:
            return Named(ref, found, None, str(error))
    return Named(ref, found, summary)


def _summarise(files: Files, digest: Digest) -> Summary:
    record = Records(files).read(digest)
    if isinstance(record, TreeRecord):
        return _of_tree(digest, record, [_summarise(files, node) for node in record.nodes.values()])
    manifest = Records(files).manifest(digest)
    layout = layout_of(files, manifest)
    return Summary(
        content_id=manifest.content_id,
        base=manifest.base_name,
        rank=max(target.rank for target in layout.targets.values()),
        targets=len(layout.targets),
        parameters=manifest.parameters,
        size=manifest.size,
        operation=manifest.derivation.operation if manifest.derivation else None,
    )


def _of_tree(digest: Digest, tree: TreeRecord, nodes: Sequence[Summary]) -> Summary:
    """One line about a tree: the largest rank, all nodes together."""
    return Summary(
        content_id=digest,  # a tree is what its nodes and base are, and its record says just that
        base=tree.base_name,
        rank=max((node.rank for node in nodes), default=0),
        targets=max((node.targets for node in nodes), default=0),
        parameters=sum(node.parameters for node in nodes),
        size=sum(node.size for node in nodes),
        operation=f"tree of {len(nodes)}",
    )
