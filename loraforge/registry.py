"""Adapters in and out of a store: where the algebra meets the registry."""

from dataclasses import replace

from loraforge.adapter import Adapter
from loraforge.compose import Reranked
from loraforge.formats import peft
from loraforge_registry.config import MAX_BYTES
from loraforge_registry.digest import Digest
from loraforge_registry.errors import ConflictError, FormatError, ReferenceSyntaxError, StoreError
from loraforge_registry.header import Header, read_header
from loraforge_registry.ingest import TensorHasher, open_adapter
from loraforge_registry.manifest import CONFIG_FILE, Artifact, Manifest
from loraforge_registry.names import RefName
from loraforge_registry.paths import AnyPath, expand, is_path
from loraforge_registry.remotes import OfferedTree, is_url, open_remote, receive, receive_tree
from loraforge_registry.store import Named, Store
from loraforge_registry.system import read_chunks


class Registry:
    """A content-addressed store of adapters on this machine.

    ``path`` is the store's directory; without it ``LORAFORGE_STORE``, else the platform's data directory. It is made at
    the first push.

    Raises:
        StoreError: the directory is something else than a store, or of a newer format.
    """

    def __init__(self, path: AnyPath | None = None) -> None:
        self.store = Store(path)

    def push(
        self,
        source: Adapter | Reranked | AnyPath,
        name: str | None = None,
        *,
        to: str | None = None,
        force: bool = False,
    ) -> Digest:
        """Store an adapter and return its artifact digest; with ``name`` (``name[:tag]``), name it so.

        With ``to`` it then goes to a remote, ``hf://org/repo[@tag]`` or ``file:///dir[#name:tag]``, where only what is
        missing is sent, and a tag other than ``latest`` becomes one. A PEFT directory is kept byte for byte; an adapter
        in memory is written in canonical form, with how it was derived, and a re-ranked one with the error it makes.
        Pushing the same again changes nothing. The tag ``latest`` moves, others only with ``force``.

        Raises:
            FormatError: the files are refused; nothing is stored.
            ConflictError: the tag means another artifact already, here or there, or the remote moved meanwhile.
            RemoteError: the remote cannot be reached, or says no.
        """
        digest = self._push(source, name, force=force)
        if to is not None:
            with open_remote(to) as remote:
                remote.publish(self.store, digest, None if name is None else RefName.parse(name), force=force)
        return digest

    def _push(self, source: Adapter | Reranked | AnyPath, name: str | None, *, force: bool) -> Digest:
        ref = None if name is None else RefName.parse(name)
        report = source.report.as_record() if isinstance(source, Reranked) else None
        source = source.adapter if isinstance(source, Reranked) else source
        if isinstance(source, Adapter):
            incoming = peft.encode(source)
            found = self.store.put(incoming, derivation=source.derivation, report=report, name=ref, force=force)
            return found.digest
        with open_adapter(expand(source)) as incoming:
            return self.store.put(incoming, name=ref, force=force).digest

    def load(self, reference: str, *, verify: bool = True) -> Adapter:
        """Open a stored adapter by ``name[:tag]``, ``name@sha256:<hex>`` or ``sha256:<prefix>``.

        Cost: with ``verify`` every tensor is read and hashed once (BLAKE3, gigabytes a second); without, only the
        header is read and damage to the store would go unseen.

        Raises:
            NotFoundError: nothing has this reference.
            StoreError: what is stored is damaged.
        """
        digest = self.store.resolve(reference)
        with self.store.reading(digest):
            return self._load(digest, verify=verify)

    def _load(self, digest: Digest, *, verify: bool) -> Adapter:
        manifest = self.store.manifest(digest)
        config = self.store.read_file(manifest.file(CONFIG_FILE), MAX_BYTES)
        with self.store.open_weights(manifest) as fd:
            try:
                header = read_header(fd)
                if verify:
                    _verify(fd, header, manifest)
                adapter = peft.read(fd, header, config)
            except (FormatError, ConflictError) as error:  # it was well-formed when it was stored
                raise StoreError(f"{digest} is damaged in {self.store.path}: {error}") from error
        return replace(adapter, origin=Artifact(digest, manifest.content_id), derivation=manifest.derivation)

    def pull(
        self,
        source: str,
        to: AnyPath | None = None,
        *,
        name: str | None = None,
        node: str | None = None,
        with_lineage: bool = False,
        force: bool = False,
    ) -> Digest:
        """Take an adapter or a tree from a remote into the store, or write a stored one as PEFT directories, or both.

        ``source`` is a reference, or a URL: ``hf://org/repo[@revision]`` or ``file:///dir#name[:tag]``; ``name`` is
        what it is called here; ``node`` is the end of the only path that is taken of a tree. Every byte is checked.
        Returns the digest of the artifact, or of the tree.

        Raises:
            NotFoundError: nothing has this reference.
            ConflictError: ``to`` exists with other contents, or ``name`` means another artifact.
            FormatError: the remote's adapter is refused; nothing is stored.
            RemoteError: the remote cannot be reached, or its bytes are not what it announced.
        """
        if is_url(source):
            digest = self._receive(source, name, node, lineage=with_lineage, force=force)
        else:
            digest = self.store.resolve(source)
        if to is not None:
            self.store.export(digest, expand(to), node=node)
        return digest

    def _receive(self, url: str, name: str | None, node: str | None, *, lineage: bool, force: bool) -> Digest:
        with open_remote(url) as remote:
            tree = remote.tree()
            if node is not None and tree is None:
                raise ReferenceSyntaxError(f"{url} is an adapter; node= is about a tree")
            offer = remote.offer() if tree is None else tree if node is None else tree.along(node)
            ref = offer.name if name is None else RefName.parse(name)
            if ref is None:
                raise ReferenceSyntaxError(f"{url}: under which name? Give name=")
            what = f"pull {offer.where}"
            if isinstance(offer, OfferedTree):
                got = receive_tree(self.store, remote, offer, ref, force=force, lineage=lineage, what=what)
            else:
                got = receive(self.store, remote, offer, ref, force=force, lineage=lineage, what=what)
            return got.digest

    def ls(self) -> list[Named]:
        """Return every name with a line about its artifact, sorted."""
        return self.store.ls()

    def tag(self, reference: str, name: str, *, force: bool = False) -> None:
        """Give an artifact another name."""
        self.store.tag(self.store.resolve(reference), RefName.parse(name), force=force)

    def remove(self, name: str) -> None:
        """Take a name away; the bytes stay until they are collected."""
        self.store.remove(RefName.parse(name))


def load(source: AnyPath, *, registry: Registry | None = None) -> Adapter:
    """Open an adapter: a path (contains a ``/``, or exists), or a reference into the store.

    Raises:
        NotFoundError: nothing is there.
        FormatError: what is there is no adapter that can be used.
    """
    if is_path(source):
        return peft.load(source)
    return (registry or Registry()).load(str(source))


def _verify(fd: int, header: Header, manifest: Manifest) -> None:
    hasher = TensorHasher(header)
    for chunk in read_chunks(fd):
        hasher.feed(chunk)
    hasher.check_complete()
    if sorted(hasher.tensors, key=lambda tensor: tensor.entry.name) != list(manifest.tensors):
        raise FormatError("its tensors are not the ones that were stored")
