"""``file:///DIR``: another store on this machine. A push is a pull by the other side."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from loraforge_registry.digest import Digest
from loraforge_registry.errors import ConflictError, NotFoundError, ReferenceSyntaxError, StoreError
from loraforge_registry.manifest import File
from loraforge_registry.names import Reference, RefName
from loraforge_registry.remotes.address import StoreAddress
from loraforge_registry.remotes.offer import Listed, Offer, Published, RemoteFile
from loraforge_registry.remotes.transfer import receive
from loraforge_registry.remotes.trees import copy_tree
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
        return self._offer(self._store.resolve(reference), Reference.parse(reference).ref)

    def tree(self) -> tuple[Store, Digest] | None:
        """Return where the tree is that the reference behind the ``#`` means, or None where it means an adapter."""
        self._check_there()
        if self._address.reference is None:
            return None
        digest = self._store.resolve(self._address.reference)
        return (self._store, digest) if isinstance(self._store.record(digest), TreeRecord) else None

    def find(self, digest: Digest) -> Offer | None:
        """Offer an artifact by its digest."""
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
        if isinstance(store.record(digest), TreeRecord):
            where = f"file://{self._store.path}#{wanted}"
            return copy_tree(store, self._store, digest, wanted, force=force, where=where)
        with ExitStack() as pins:
            source = StoreRemote(store, StoreAddress(store.path), pins)
            got = receive(self._store, source, source.offer_of(digest), wanted, force=force, lineage=True, what="push")
        missing = [f"its parent {parent} is in neither store" for parent in got.missing]
        return Published(f"file://{self._store.path}#{wanted}", got.received, got.skipped, tuple(missing))

    def offer_of(self, digest: Digest) -> Offer:
        """Offer an artifact that must be there."""
        return self._offer(digest, None)

    def _offer(self, digest: Digest, name: RefName | None) -> Offer:
        self._pins.enter_context(self._store.reading(digest))
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
