"""What a remote offers, and the one small interface that every remote has."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from loraforge_registry.canonical import Value
from loraforge_registry.digest import Digest
from loraforge_registry.manifest import Derivation
from loraforge_registry.names import RefName
from loraforge_registry.store import Store
from loraforge_registry.system import Buffer
from loraforge_registry.trees import TreeRecord, only_path


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of an adapter as a remote announces it: nothing of this is believed, it says what to compare with.

    ``digest`` is the SHA-256 of the adapter's file, ``git_id`` the id that git gives the remote's file; at least one is
    known. The adapter's file begins behind the first ``skip`` of the remote's bytes.
    """

    path: str
    size: int
    digest: Digest | None
    git_id: str | None = None
    skip: int = 0


@dataclass(frozen=True, slots=True)
class Offer:
    """One adapter on a remote, pinned: ``where`` means these bytes tomorrow, too.

    ``artifact`` is its digest where that is known before the files have come. ``notes`` are for the user. Its files lie
    in ``folder``, below what the remote's address means.
    """

    where: str
    name: RefName | None
    files: tuple[RemoteFile, ...]
    artifact: Digest | None = None
    derivation: Derivation | None = None
    report: Mapping[str, Value] | None = None
    notes: tuple[str, ...] = ()
    folder: str = ""

    def file(self, path: str) -> RemoteFile | None:
        """The file at ``path``, if there is one."""
        return next((file for file in self.files if file.path == path), None)


@dataclass(frozen=True, slots=True)
class OfferedTree:
    """A tree on a remote, pinned as an ``Offer`` is; its record is canonical, whether it is true is not known yet.

    Where ``whole`` is false, the record is only one path of the tree that is there.
    """

    where: str
    name: RefName | None
    record: TreeRecord
    whole: bool = True

    def along(self, path: str) -> "OfferedTree":
        """Return one path of it; what is no node raises NotFoundError."""
        return replace(self, record=only_path(self.record, path), whole=False)


@dataclass(frozen=True, slots=True)
class Listed:
    """One name on a remote, and the artifact or commit that it means."""

    name: str
    target: str


@dataclass(frozen=True, slots=True)
class Published:
    """What a push did: where the adapter is now, bytes of files that went there, and that were there already."""

    where: str
    sent: int
    skipped: int
    notes: tuple[str, ...] = ()


class Remote(Protocol):
    """A place that adapters are pulled from and pushed to.

    Raises (every method):
        NotFoundError: there is nothing of this name.
        RemoteError: it cannot be reached, or says no.
        FormatError: what is there is no adapter that may be stored.
    """

    def list(self) -> Sequence[Listed]:
        """Return its names."""

    def offer(self) -> Offer:
        """Say what the address means: one artifact, now."""

    def tree(self) -> OfferedTree | None:
        """Return the tree that the address means, now; None where it means an adapter, or nothing yet."""

    def node(self, tree: OfferedTree, path: str) -> Offer:
        """Offer a node of a tree: the artifact that the tree's record names, or what is there is refused."""

    def find(self, digest: Digest) -> Offer | None:
        """Return the offer of an artifact, where the remote has it: a parent in a lineage."""

    def fetch(self, offer: Offer, file: RemoteFile) -> Iterator[Buffer]:
        """Yield the bytes of the remote's file, ``file.size`` of them, checked with ``git_id`` where that is known."""

    def publish(self, store: Store, digest: Digest, name: RefName | None, *, force: bool) -> Published:
        """Put an artifact of a store there, and name it; what is there already is not sent.

        Raises:
            ConflictError: the name means another artifact, or the remote moved meanwhile.
        """
