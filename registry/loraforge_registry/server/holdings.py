"""Which files repositories hold, with their histories: what a user may name without sending it, and what counts."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from loraforge_registry.digest import Digest
from loraforge_registry.server import repos
from loraforge_registry.server.accounts import User
from loraforge_registry.server.hub import Hub
from loraforge_registry.server.recent import Recent
from loraforge_registry.server.repos import Repository

_BROUGHT = Recent[Digest, Mapping[Digest, int]](200_000)  # files that a commit has and the one before it has not
_HELD = Recent[str, tuple[tuple[Digest, ...], Mapping[Digest, int]]](200_000)  # files, by the name of the repository


@dataclass(frozen=True)
class Nameable:
    """The blobs that a user may name in a commit: what they sent, or can read in some repository."""

    hub: Hub
    user: User
    repository: Repository

    def size(self, digest: Digest) -> int | None:
        """The length of a blob that may be named; it is pinned."""
        there = self.hub.blobs.size(digest)
        if there is None:
            return None
        mine = self.hub.staged.size(self.user.name, digest) is not None or digest in blobs_of(self.hub, self.repository)
        return there if mine or any(digest in held for held in self._elsewhere) else None

    @cached_property
    def _elsewhere(self) -> list[Mapping[Digest, int]]:
        return [blobs_of(self.hub, other) for other in repos.everything(self.hub, self.user)]


def blobs_of(hub: Hub, repository: Repository) -> Mapping[Digest, int]:
    """All files of all commits of a repository, with their sizes; kept until a name of it moves.

    Cost: each commit is read once.
    """
    heads = repository.record.needs
    known = _HELD.get(repository.name)
    if known is None or known[0] != heads:
        known = heads, _held(hub, heads)
        _HELD.put(repository.name, known, 1 + len(known[1]))
    return known[1]


def _held(hub: Hub, heads: tuple[Digest, ...]) -> Mapping[Digest, int]:
    held = dict[Digest, int]()
    last, files = None, dict[Digest, int]()
    for digest, outline in reversed(repos.history(hub, *heads)):
        brought = _BROUGHT.get(digest)
        if brought is None:
            before = files if outline.parent == last else _files(hub, outline.parent)
            last, files = digest, _files(hub, digest)
            brought = {file: size for file, size in files.items() if file not in before}
            _BROUGHT.put(digest, brought, 1 + len(brought))
        held |= brought
    return held


def _files(hub: Hub, digest: Digest | None) -> dict[Digest, int]:
    if digest is None:
        return {}
    found = hub.refs.blobs(digest)
    return dict(repos.revision_of(hub, digest).commit.blobs) if found is None else found
