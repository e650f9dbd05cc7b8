"""``file:///DIR``: another store on this machine. A push is a pull by the other side."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from loraforge_registry.digest import Digest
from loraforge_registry.errors import ConflictError, NotFoundError, ReferenceSyntaxError, StoreError
from loraforge_registry.manifest import File
from loraforge_registry.names import Reference, RefName
from loraforge_registry.remotes.address import StoreAddress
from loraforge_registry.remotes.offer import Listed, Offer, OfferedTree, Published, RemoteFile
from loraforge_registry.remotes.transfer import Received, receive
from loraforge_registry.remotes.trees import receive_tree
from loraforge_registry.store import Store
from loraforge_registry.system import Buffer
from loraforge_registry.trees import TreeRecord


class StoreRemote:
    """A store, as a remote. What it offers is kept from its collections until ``pins`` is closed."""

    def __init__(self, store: Store, address: StoreAddress, pins: ExitStack) -> None:
        self._store = store
        self._address = address
        self._pins = pins

    def list(self) -> Sequence[Listed]:
        """Return the store's names."""
        self._check_there()
        return [Listed(str(line.ref), str(line.digest)) for line in self._store.ls() if line.digest is not None]

    def offer(self) -> Offer:
        """Offer what the reference behind the ``#`` means."""
        self._check_there()
        reference = self._address.reference
        if reference is None:
            raise ReferenceSyntaxError(f"{self._address}: which adapter? Write {self._address}#NAME:TAG")
        digest = self._store.resolve(reference)
        self._pins.enter_context(self._store.reading(digest))
        return self._offer(digest, Reference.parse(reference).ref)

    def tree(self) -> OfferedTree | None:
        """Offer the tree that the reference behind the ``#`` means, where it means one."""
        self._check_there()
        reference = self._address.reference
        if reference is None:
            return None
        return self.tree_of(self._store.resolve(reference), Reference.parse(reference).ref)

    def tree_of(self, digest: Digest, name: RefName | None = None) -> OfferedTree | None:
        """Offer a tree by its digest; what nodes were made from is kept with it."""
        self._pins.enter_context(self._store.reading(digest))
        record = self._store.record(digest)
        if not isinstance(record, TreeRecord):
            return None
        return OfferedTree(f"file://{self._store.path}#{name or digest}", name, record)

    def node(self, tree: OfferedTree, path: str) -> Offer:
        """Offer a node of a tree, which the tree keeps."""
        return self._offer(tree.record.nodes[path], None)

    def find(self, digest: Digest) -> Offer | None:
        """Offer an artifact by its digest: one in the lineage of what was offered before, which is kept with that."""
        return self._offer(digest, None) if self._store.has(digest) else None

    def fetch(self, offer: Offer, file: RemoteFile) -> Iterator[Buffer]:  # noqa: ARG002 - a store needs only the digest
        """Yield a file's bytes, checked against its digest."""
        if file.digest is None:
            raise StoreError(f"{self._address}: {file.path} has no digest")
        return self._store.chunks(File(file.path, file.digest, file.size))

    def publish(self, store: Store, digest: Digest, name: RefName | None, *, force: bool) -> Published:
        """Let the other store take the artifact with its lineage."""
        self._check_writable()
        wanted = name if self._address.reference is None else RefName.parse(self._address.reference)
        if wanted is None:
            raise ReferenceSyntaxError(f"{self._address}: under which name? Write {self._address}#NAME:TAG")
        with ExitStack() as pins:
            source = StoreRemote(store, StoreAddress(store.path), pins)
            got = self._take(source, digest, wanted, force=force)
        missing = [f"its parent {parent} is in neither store" for parent in got.missing]
        return Published(f"file://{self._store.path}#{wanted}", got.received, got.skipped, tuple(missing))

    def _take(self, source: "StoreRemote", digest: Digest, name: RefName, *, force: bool) -> Received:
        tree = source.tree_of(digest)
        if tree is not None:
            return receive_tree(self._store, source, tree, name, force=force, lineage=True, what="push")
        return receive(self._store, source, source.offer_of(digest), name, force=force, lineage=True, what="push")

    def offer_of(self, digest: Digest) -> Offer:
        """Offer an artifact that must be there."""
        self._pins.enter_context(self._store.reading(digest))
        return self._offer(digest, None)

    def _offer(self, digest: Digest, name: RefName | None) -> Offer:
        manifest = self._store.manifest(digest)
        return Offer(
            where=f"file://{self._store.path}#{name or digest}",
            name=name,
            files=tuple(RemoteFile(file.path, file.size, file.digest) for file in manifest.files),
            artifact=digest,
            derivation=manifest.derivation,
            report=manifest.report,
        )

    def _check_there(self) -> None:
        if not self._store.exists:
            raise NotFoundError(f"there is no store at {self._store.path}")

    def _check_writable(self) -> None:
        """A store is made in a directory that is there: a mistyped or unmounted path is not filled."""
        if not self._store.exists and not self._store.path.is_dir():
            raise NotFoundError(f"{self._store.path} is not there; make the directory, and the store is made in it")
        if not self._store.exists and any(self._store.path.iterdir()):
            raise ConflictError(f"{self._store.path} is not empty, and no store; name a store or an empty directory")
