"""Which adapters are where, and which were made from which, as far as whoever asks may see them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from urllib.parse import quote

from loraforge_registry.digest import Digest
from loraforge_registry.manifest import Derivation, Manifest
from loraforge_registry.server import describe, repos
from loraforge_registry.server.accounts import User
from loraforge_registry.server.api import head_of
from loraforge_registry.server.around import outline_at
from loraforge_registry.server.hub import Hub
from loraforge_registry.server.repos import Repository


@dataclass(frozen=True, slots=True)
class Place:
    """A repository that has an adapter; ``revision`` where it is not what people see first."""

    repository: str
    revision: str | None
    made_from: Sequence[Digest]
    read: Callable[[], Manifest | None]

    @property
    def derivation(self) -> Derivation | None:
        """How it was made; read when it is asked for, as few are."""
        manifest = self.read()
        return None if manifest is None else manifest.derivation

    @property
    def label(self) -> str:
        """What it is called."""
        return self.repository if self.revision is None else f"{self.repository} @ {self.revision}"

    @property
    def path(self) -> str:
        """Its page."""
        at = "" if self.revision is None else f"/tree/{quote(self.revision, safe='')}"
        return f"/{quote(self.repository)}{at}"


@dataclass(frozen=True)
class Relations:
    """The adapters of all branches and tags of all repositories that somebody may see, each in one place."""

    places: Mapping[Digest, Place]

    @property
    def names(self) -> Mapping[Digest, str]:
        """The repository of each."""
        return {digest: place.repository for digest, place in self.places.items()}

    def made_from(self, digest: Digest) -> Sequence[Place]:
        """Where the adapters are that were made from this one."""
        found = [place for place in self.places.values() if digest in place.made_from]
        return sorted(found, key=lambda place: place.label)


def relations(hub: Hub, user: User | None, near: str = "") -> Relations:
    """Look at what is there now; of several copies the one in the namespace ``near`` is taken, else the first made."""
    places: dict[Digest, Place] = {}
    everything = repos.everything(hub, user)
    for repository in sorted(everything, key=lambda found: (found.namespace != near, found.record.created)):
        for revision, head in _heads(repository):
            outline = outline_at(hub, repository, head)
            adapter = None if outline is None else outline.adapter
            facts = None if adapter is None else repos.facts_of(hub, adapter)
            if adapter is None or facts is None:
                continue
            known = places.get(adapter)
            if known is None or (known.revision is not None and revision is None):
                read = partial(describe.adapter_at, hub, adapter)
                places[adapter] = Place(repository.id, revision, facts.made_from, read)
    return Relations(places)


def _heads(repository: Repository) -> Iterator[tuple[str | None, Digest]]:
    """What the names of a repository mean, the one that people see first without its name."""
    first, record = head_of(repository), repository.record
    for name, digest in (*record.branches.items(), *record.tags.items()):
        yield (None if name == first else name), digest
