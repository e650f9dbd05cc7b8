"""Which files repositories hold, with their histories: what a user may name without sending it, and what counts."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from loraforge_registry.digest import Digest
from loraforge_registry.errors import LoraforgeError
from loraforge_registry.server import repos
from loraforge_registry.server.accounts import User
from loraforge_registry.server.hub import Hub
from loraforge_registry.server.recent import Recent
from loraforge_registry.server.repos import Repository


@dataclass(frozen=True, slots=True)
class _Held:
    heads: tuple[Digest, ...]
    commits: frozenset[Digest]
    files: Mapping[Digest, int]


_NOTHING = _Held((), frozenset(), {})
_MOST = 400_000  # commits and files; a repository that has more is kept alone
_HELD = Recent[str, _Held](_MOST)  # by the name of the repository


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
        found = []
        for other in repos.everything(self.hub, self.user):
            with suppress(LoraforgeError, OSError):  # what is damaged is for fsck to say, and for its own users
                found.append(blobs_of(self.hub, other))
        return found


def blobs_of(hub: Hub, repository: Repository) -> Mapping[Digest, int]:
    """All files of all commits of a repository, with their sizes; kept until a name of it moves.

    Cost: the record of each new commit is read; of all of them, where some are gone.
    """
    heads = repository.record.needs
    held = _HELD.get(repository.name) or _NOTHING
    if held.heads != heads:
        held = _held(hub, heads, held)
        _HELD.put(repository.name, held, min(1 + len(held.commits) + len(held.files), _MOST))
    return held.files


def _held(hub: Hub, heads: tuple[Digest, ...], before: _Held) -> _Held:
    commits = frozenset(digest for digest, _ in repos.history(hub, *heads))
    if not before.commits <= commits:
        before = _NOTHING
    files = dict(before.files)
    for digest in commits - before.commits:
        found = hub.refs.blobs(digest)
        files |= repos.revision_of(hub, digest).commit.blobs if found is None else found
    return _Held(heads, commits, files)
