"""The face of the registry: artifacts in, artifacts out, by digest and by name."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from loraforge_registry import bundle, index, listing, naming, objects, refs
from loraforge_registry.canonical import Value
from loraforge_registry.check import Report, check
from loraforge_registry.collect import Collection, collect
from loraforge_registry.digest import Digest
from loraforge_registry.errors import (
    ConflictError,
    ManifestError,
    NotFoundError,
)
from loraforge_registry.export import export, export_tree
from loraforge_registry.files import Files
from loraforge_registry.index import Summary
from loraforge_registry.ingest import Incoming, ingest, open_source
from loraforge_registry.layout import Layout
from loraforge_registry.listing import Named, Usage
from loraforge_registry.manifest import (
    WEIGHTS_FILE,
    Artifact,
    Derivation,
    File,
    Manifest,
    encode_manifest,
)
from loraforge_registry.names import Reference, RefName
from loraforge_registry.new_store import check_format, make_store
from loraforge_registry.paths import AnyPath, default_store, expand
from loraforge_registry.records import Record, Records, has
from loraforge_registry.refs import Move
from loraforge_registry.repair import repair
from loraforge_registry.sessions import Session, open_session, reading
from loraforge_registry.system import Buffer
from loraforge_registry.trees import TreeRecord, encode_tree, only_path, untruths

__all__ = ["Named", "Store", "Usage"]


class Store:
    """A directory of adapters. It is made at the first write; reading an absent one finds nothing.

    Raises:
        StoreError: ``path`` is something else than a store, or one of a newer format.
    """

    def __init__(self, path: AnyPath | None = None) -> None:
        self.path = default_store() if path is None else expand(path)
        self._files: Files | None = Files(self.path) if check_format(self.path) else None
        self._own = threading.local()  # a session belongs to one thread

    @property
    def exists(self) -> bool:
        """Whether there is a store; one that is not is made at the first write."""
        return self._files is not None

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Keep all that is put, tagged or read in the block from collection until its end; blocks may nest."""
        outer: Session | None = getattr(self._own, "session", None)
        if outer is not None:
            yield outer
            return
        with open_session(self._writable()) as session:
            self._own.session = session
            try:
                yield session
            finally:
                self._own.session = None

    def reading(self, digest: Digest) -> AbstractContextManager[None]:
        """Keep an artifact from collection while it is read; a store that cannot be written is read without."""
        return reading(self._readable(), digest)

    def put(
        self,
        incoming: Incoming,
        *,
        derivation: Derivation | None = None,
        report: Mapping[str, Value] | None = None,
        name: RefName | None = None,
        force: bool = False,
        expected: Digest | None = None,
    ) -> Artifact:
        """Store an adapter and, with ``name``, point that ref at it.

        The tag ``latest`` moves freely; any other moves only with ``force``, or to where it is already.

        Raises:
            FormatError: the adapter is refused, or is not the artifact ``expected``; nothing is stored.
            ConflictError: the tag means another artifact; the adapter is stored, and reachable by its digest.
        """
        files = self._writable()
        with self.session() as session:
            session.pin(*(derivation.artifacts() if derivation else ()))
            artifact = ingest(files, session, incoming, derivation=derivation, report=report, expected=expected)
            if name is not None:
                what = "push" if derivation is None else derivation.operation
                naming.move(files, session, artifact.digest, name, force=force, what=what)
            listing.keep_summary(files, artifact.digest)
        return artifact

    def put_again(
        self, digest: Digest, derivation: Derivation, *, report: Mapping[str, Value] | None = None
    ) -> Artifact:
        """Record the files of an artifact a second time, as made otherwise; nothing is copied.

        Raises:
            NotFoundError: it is not in the store.
        """
        files = self._writable()
        with self.session() as session:
            session.pin(digest, *derivation.artifacts())
            self._make_durable(digest)
            again = replace(self.manifest(digest), derivation=derivation, report=report)
            session.pin(*again.blobs)
            found, _ = objects.put(files, session, objects.MANIFESTS, [encode_manifest(again)])
        return Artifact(found, again.content_id)

    def put_tree(self, tree: TreeRecord, name: RefName, *, expected: Digest | None, what: str) -> Digest:
        """Store a tree whose nodes are in the store, and move ``name`` from ``expected`` to it; return its digest.

        Raises:
            ConflictError: the name means something else than ``expected`` by now.
            NotFoundError: a node is not there.
            ManifestError: a node was not made atop the one that its path puts it on.
        """
        files = self._writable()
        with self.session() as session:
            session.pin(*tree.needs)
            for digest in tree.needs:
                self._make_durable(digest)
            for untrue in untruths(tree, Records(files).read):
                raise ManifestError(untrue)
            digest, _ = objects.put(files, session, objects.MANIFESTS, [encode_tree(tree)])
            if digest != expected:
                refs.move_ref(files, session, name, expected=expected, new=digest, who=naming.who(), what=what)
            listing.keep_summary(files, digest)
        return digest

    def tag(self, digest: Digest, name: RefName, *, force: bool = False, what: str = "tag") -> None:
        """Point a ref at a record that is in the store; ``put`` says when it may move.

        Raises:
            ConflictError: the tag means another artifact.
            NotFoundError: the artifact is not there.
        """
        files = self._writable()
        with self.session() as session:
            session.pin(digest)
            self._make_durable(digest)
            naming.move(files, session, digest, name, force=force, what=what)

    def _make_durable(self, digest: Digest) -> None:
        """Make a record that is pinned last, behind all that it needs: its writer may not have got so far."""
        files = self._readable()
        record = self.record(digest)
        for needed in record.needs:
            self._make_durable(needed)
        for blob, size in record.blobs.items():
            with objects.opened(files, objects.BLOBS, blob, size):
                objects.make_durable(files, objects.BLOBS, blob)
        objects.make_durable(files, objects.MANIFESTS, digest)

    def remove(self, name: RefName) -> Digest:
        """Remove a ref and return what it pointed at; the bytes stay until they are collected.

        Raises:
            NotFoundError: there is no such ref.
        """
        if self._files is None:
            raise NotFoundError(f"there is no {name} in {self.path}")
        old = refs.read_ref(self._files, name)
        if old is None:
            raise naming.missing(self._files, name)
        with self.session() as session:
            refs.move_ref(self._files, session, name, expected=old, new=None, who=naming.who(), what="rm")
        return old

    def gc(self, *, dry_run: bool, now: bool = False) -> Collection:
        """Collect what no name, lineage or running process needs (see ``collect.collect``).

        Raises:
            StoreError: a ref or manifest is damaged, or locks do not work here; nothing was touched.
        """
        if self._files is None:
            return Collection((), (), 0, 0)
        return collect(self._files, dry_run=dry_run, now=now)

    def fsck(self, *, deep: bool = False) -> Report:
        """Check the store; nothing is written (see ``check.check``)."""
        return check(self._readable(), deep=deep)

    def repair(self, report: Report, source: AnyPath | None = None) -> list[str]:
        """Put right what a check found, with the help of another store; return the places that were.

        Raises:
            NotFoundError: there is no store at ``source``.
            StoreError: locks do not work here.
        """
        files = self._readable()
        if source is None:
            return repair(files, report.problems)
        path = expand(source)
        if not check_format(path):
            raise NotFoundError(f"there is no store at {path}")
        return repair(files, report.problems, Files(path))

    def resolve(self, text: str) -> Digest:
        """Return the artifact that ``name[:tag]``, ``name@sha256:<hex>`` or ``sha256:<prefix>`` means.

        Raises:
            ReferenceSyntaxError: not a reference, or a prefix of several artifacts.
            NotFoundError: nothing there.
        """
        if self._files is not None:
            return naming.resolve(self._files, text)
        reference = Reference.parse(text)
        raise NotFoundError(f"there is no {reference.ref or text} in {self.path}")

    def lookup(self, name: RefName) -> Digest | None:
        """Return what a ref points at, or the adapter that a repository shows under that name; else None."""
        return None if self._files is None else naming.lookup(self._files, name)

    def record(self, digest: Digest) -> Record:
        """Read a record of any kind, checked against its digest.

        Raises:
            NotFoundError: it is not in the store.
            StoreError, ManifestError: it is damaged.
        """
        return Records(self._readable()).read(digest)

    def manifest(self, digest: Digest) -> Manifest:
        """Read an adapter's manifest, checked against its digest.

        Raises:
            NotFoundError: it is not in the store.
            StoreError, ManifestError: it is damaged, or a record of another kind.
        """
        return Records(self._readable()).manifest(digest)

    def tree(self, digest: Digest) -> TreeRecord:
        """Read the record of a tree.

        Raises:
            NotFoundError: it is not in the store.
            StoreError, ManifestError: it is damaged, or a record of another kind.
        """
        found = self.record(digest)
        if not isinstance(found, TreeRecord):
            raise ManifestError(f"{digest} is an adapter, expected a tree: loraforge tree create makes one")
        return found

    def layout(self, manifest: Manifest) -> Layout:
        """Which tensor is what, in an artifact of this store."""
        return listing.layout_of(self._readable(), manifest)

    def read_file(self, file: File, limit: int) -> bytes:
        """Read one small file of an artifact, checked against its digest."""
        return objects.read_all(self._readable(), objects.BLOBS, file.digest, limit)

    def holds(self, file: File) -> bool:
        """Whether a file's bytes are there, whole; they are read and hashed."""
        return self._files is not None and objects.is_whole(self._files, objects.BLOBS, file.digest, file.size)

    def chunks(self, file: File) -> Iterator[Buffer]:
        """Yield a file's bytes; what is damaged raises at its end (see ``objects.verified``)."""
        return objects.verified(self._readable(), objects.BLOBS, file.digest, file.size)

    @contextmanager
    def open_weights(self, manifest: Manifest) -> Iterator[int]:
        """Open the weights of an artifact; their length is checked, their bytes are not."""
        file = manifest.file(WEIGHTS_FILE)
        with objects.opened(self._readable(), objects.BLOBS, file.digest, file.size) as fd:
            yield fd

    def export(self, digest: Digest, target: Path, *, node: str | None = None) -> None:
        """Write an artifact out as a PEFT directory, every byte checked; a tree as one such for every path.

        With ``node`` only for that one, and those that it stands on.
        """
        with self.reading(digest):
            record = self.record(digest)
            if isinstance(record, TreeRecord):
                record = record if node is None else only_path(record, node)
                nodes = {path: self.manifest(node) for path, node in record.nodes.items()}
                export_tree(self._readable(), nodes, target)
            else:
                export(self._readable(), self.manifest(digest), target)

    def export_bundle(self, roots: Sequence[Digest], names: Mapping[RefName, Digest], target: AnyPath) -> int:
        """Write artifacts with their lineage, and names for them, into one file (see ``bundle``); return its size.

        Raises:
            ConflictError: ``target`` exists with other contents.
            StoreError: something stored is damaged; nothing is left at ``target``.
        """
        files, path = self._readable(), expand(target)
        if path.resolve().is_relative_to(files.root.resolve()):
            raise ConflictError(f"{path} is inside the store {files.root}; name a file elsewhere")
        with ExitStack() as stack:
            for root in roots:
                stack.enter_context(self.reading(root))
            return bundle.write_bundle(files, roots, names, path)

    def import_bundle(
        self, source: AnyPath, *, name: RefName | None = None, force: bool = False
    ) -> tuple[tuple[Digest, ...], Mapping[RefName, Digest]]:
        """Store the artifacts of a bundle, and give them its names; return its roots and the names.

        With ``name`` its only root gets that one instead.

        Raises:
            FormatError: it is damaged, or holds what a push would refuse; nothing is stored.
            ConflictError: a tag means another artifact; everything is stored, and the tags before it are made.
        """
        path = expand(source)
        with open_source(path) as fd:
            found = bundle.read_bundle(path, fd)
            if name is not None and len(found.roots) != 1:
                raise ConflictError(f"{path} holds {len(found.roots)} artifacts, which cannot all be {name}")
            wanted = dict(found.names) if name is None else {name: found.roots[0]}
            with self.session() as session:
                bundle.store_bundle(self._writable(), session, found)
                for ref, digest in wanted.items():
                    naming.move(self._writable(), session, digest, ref, force=force, what="import")
        return found.roots, wanted

    def ls(self, name: str | None = None) -> list[Named]:
        """Return every ref with a line about its artifact, sorted; ``name`` keeps one name's tags.

        Cost: one small file read a ref, and one query of the index. A row that is missing there is made again.
        """
        return [] if self._files is None else listing.list_named(self._files, name)

    def reflog(self, name: str) -> list[Move]:
        """Return the moves of a name's tags, oldest first.

        Raises:
            NotFoundError: the name has no history here.
        """
        moves = [] if self._files is None else refs.read_reflog(self._files, RefName(name).name)
        if not moves:
            raise NotFoundError(f"{name} has no history in {self.path}")
        return moves

    def usage(self) -> Usage:
        """Count bytes; what is reachable is what refs name, and the lineage of that.

        Raises:
            StoreError, ManifestError: a ref or manifest is damaged, so that nothing can be called reclaimable.
        """
        return Usage(0, 0, 0, 0) if self._files is None else listing.usage(self._files)

    def find_content(self, content_id: Digest) -> Digest | None:
        """Return an artifact that computes this, named or not, or None.

        Cost: one query of the index; an artifact that is missing there costs reading its manifest.
        """
        if self._files is None:
            return None
        known = index.read_summaries(self.path)
        for digest in objects.list_digests(self._files, objects.MANIFESTS):
            found = known.get(digest) or self.record(digest)
            if isinstance(found, Summary | Manifest) and found.content_id == content_id:
                return digest
        return None

    def has(self, digest: Digest) -> bool:
        """Whether the store holds an artifact."""
        return self._files is not None and has(self._files, digest)

    def recall(self, work: Digest) -> Digest | None:
        """Return the artifact that ``remember`` was told of for this work, if it is here still.

        Within ``session`` it stays until the session's end.
        """
        found = None if self._files is None else index.read_result(self.path, work)
        if found is None:
            return None
        session: Session | None = getattr(self._own, "session", None)
        if session is not None:
            session.pin(found)
        return found if self.has(found) else None

    def remember(self, work: Digest, artifact: Digest) -> None:
        """Keep in the index what a piece of work came to, so that nobody does it twice; the row may be lost."""
        index.write_result(self._writable().root, work, artifact)

    def _readable(self) -> Files:
        if self._files is None:
            raise NotFoundError(f"there is no store at {self.path}")
        return self._files

    def _writable(self) -> Files:
        if self._files is None:
            make_store(self.path)
            self._files = Files(self.path)
        return self._files
