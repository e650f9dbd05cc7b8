"""What is here for whoever asks: repositories with a few facts each, and where any artifact is, now or in a history."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from urllib.parse import quote

from loraforge_registry.digest import Digest
from loraforge_registry.errors import LoraforgeError
from loraforge_registry.facts import Facts
from loraforge_registry.repositories import Outline
from loraforge_registry.server import forest, repos
from loraforge_registry.server.accounts import User
from loraforge_registry.server.api import head_of
from loraforge_registry.server.hub import Hub
from loraforge_registry.server.recent import Recent
from loraforge_registry.server.repos import Repository
from loraforge_registry.tree_facts import TreeFacts

MAX_HEADS = 100  # branches and tags of one repository that are asked whether they hold a tree
MAX_UNREAD = 40_000  # nodes of trees that are read for one answer: about a second
_PASTS = Recent[str, tuple[tuple[Digest, ...], Mapping[Digest, Digest]]](200_000)


@dataclass(frozen=True, slots=True)
class Entry:
    """A repository at its head, in a list; ``facts`` are of the adapter or the tree there, if there is one."""

    repository: Repository
    facts: Facts | TreeFacts | None
    time: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where an artifact is: a repository, and the name or the commit of a revision; None is its head."""

    repository: Repository
    artifact: Digest
    revision: str | None

    @property
    def href(self) -> str:
        """The path of its page."""
        return f"/{quote(self.repository.id)}" + (f"/tree/{quote(self.revision, safe='')}" if self.revision else "")

    def node(self, path: str) -> str:
        """The path of the page of a node of the tree there."""
        return node_page(self.repository, self.revision, path)


@dataclass(frozen=True)
class Around:
    """What one reader may see. What they may not see is as if it were not there."""

    hub: Hub
    user: User | None

    @cached_property
    def repositories(self) -> list[Repository]:
        """All of them, by name; looked at once."""
        return list(repos.everything(self.hub, self.user))

    def entries(self) -> Iterator[Entry]:
        """Yield each repository with the facts about its head."""
        for repository in self.repositories:
            head = repository.record.branches[head_of(repository)]
            outline = outline_at(self.hub, repository, head) or Outline("", None, None, 0)
            yield Entry(repository, forest.facts_at(self.hub, outline), outline.time)

    @cached_property
    def names(self) -> Mapping[Digest, str]:
        """Where each adapter is that a branch or a tag means."""
        return {adapter: repository.id for adapter, repository in self._heads()}

    def made_from(self, artifact: Digest) -> list[str]:
        """The repositories that have something made from an artifact, by a branch or a tag."""
        return sorted({repository.id for facts, repository in self._facts() if artifact in facts.made_from})

    def alike(self, content_id: Digest) -> list[str]:
        """The repositories that have what computes just this, by a branch or a tag."""
        return sorted({repository.id for facts, repository in self._facts() if facts.content_id == content_id})

    def places(self, artifact: Digest) -> list[Place]:
        """Everywhere that an artifact is, in histories too: each repository once, with its newest such revision."""
        found = ((repository, self._past(repository).get(artifact)) for repository in self.repositories)
        return [self._place(repository, artifact, commit) for repository, commit in found if commit is not None]

    def places_of_content(self, content_id: Digest) -> list[Place]:
        """Everywhere that there is an artifact of this content; each of these artifacts once in a repository."""
        return [
            self._place(repository, artifact, commit)
            for repository in self.repositories
            for artifact, commit in self._past(repository).items()
            if (facts := repos.facts_of(self.hub, artifact)) is not None and facts.content_id == content_id
        ]

    def trees_with(self, artifact: Digest) -> Iterator[tuple[Place, str]]:
        """Yield the trees of branches and tags that have an artifact as a node, each repository once, and its path.

        A call reads so many nodes of trees that were not read before, and no more: another will read on.
        """
        unread, unnamed, found = MAX_UNREAD, MAX_UNREAD, set[str]()
        for repository, head, outline, facts in self._trees():
            members = forest.members_of_tree(facts)
            if members is None and facts.nodes <= unread:
                unread -= facts.nodes
                members = forest.read_members(self.hub, outline, facts)
            if repository.name in found or facts.nodes > unnamed or not (members and members.may_hold(artifact)):
                continue
            unnamed -= facts.nodes
            path = self._path(outline, artifact)
            if path is not None:
                found.add(repository.name)
                yield self._place(repository, artifact, head), path

    def _trees(self) -> Iterator[tuple[Repository, Digest, Outline, TreeFacts]]:
        """Yield the trees that branches and tags mean, those at the head of each repository first."""
        for repository in self.repositories:
            first = repository.record.branches[head_of(repository)]
            for head in islice(dict.fromkeys((first, *repository.record.needs)), MAX_HEADS):
                outline = outline_at(self.hub, repository, head)
                facts = None if outline is None else forest.facts_at(self.hub, outline)
                if outline is not None and isinstance(facts, TreeFacts):
                    yield repository, head, outline, facts

    def _path(self, at: Outline, artifact: Digest) -> str | None:
        with suppress(LoraforgeError, OSError):
            tree = forest.tree_at(self.hub, at)
            nodes = () if tree is None else tree.record.nodes.items()
            return next((path for path, digest in nodes if digest == artifact), None)
        return None

    def _heads(self) -> Iterator[tuple[Digest, Repository]]:
        for repository in self.repositories:
            for head in repository.record.needs:
                outline = outline_at(self.hub, repository, head)
                if outline is not None and outline.adapter is not None:
                    yield outline.adapter, repository

    def _facts(self) -> Iterator[tuple[Facts, Repository]]:
        for adapter, repository in self._heads():
            facts = repos.facts_of(self.hub, adapter)
            if facts is not None:
                yield facts, repository

    def _past(self, repository: Repository) -> Mapping[Digest, Digest]:
        """Every artifact of a repository, with the newest commit that is it; kept until a name of it moves."""
        heads = repository.record.needs
        known = _PASTS.get(repository.name)
        if known is None or known[0] != heads:
            known = heads, dict(_walk(self.hub, repository))
            _PASTS.put(repository.name, known, 1 + len(known[1]))
        return known[1]

    def _place(self, repository: Repository, artifact: Digest, commit: Digest) -> Place:
        record = repository.record
        if record.branches.get(head_of(repository)) == commit:
            return Place(repository, artifact, None)
        named = (name for table in (record.tags, record.branches) for name, at in sorted(table.items()) if at == commit)
        return Place(repository, artifact, next(named, None) or repos.outline_of(self.hub, commit).id)


def node_page(repository: Repository, revision: str | None, path: str) -> str:
    """The path of the page of a node of a tree; without a revision, of the tree at the head."""
    return f"/{quote(repository.id)}/tree/{quote(revision or head_of(repository), safe='')}/{quote(path)}"


def outline_at(hub: Hub, repository: Repository, commit: Digest) -> Outline | None:
    """What a walk needs; None for what is damaged, which is for ``fsck`` to say."""
    if repository.digest is None:  # made on this machine: an artifact, and nobody wrote when
        return Outline("", None, commit, 0)
    try:
        return repos.outline_of(hub, commit)
    except (LoraforgeError, OSError):
        return None


def _artifact(hub: Hub, outline: Outline) -> Digest | None:
    """The adapter or the tree that a commit holds."""
    if outline.adapter is not None or outline.stated is None:
        return outline.adapter
    facts = forest.facts_at(hub, outline)
    return facts.digest if isinstance(facts, TreeFacts) else None


def _walk(hub: Hub, repository: Repository) -> Iterator[tuple[Digest, Digest]]:
    """Yield artifacts with their commits: older ones first, the main branch last."""
    heads = (repository.record.branches[head_of(repository)], *repository.record.needs)
    if repository.digest is None:  # made on this machine: each is an artifact, and nothing is before it
        yield from ((head, head) for head in reversed(heads))
        return
    for commit, outline in reversed(repos.readable_history(hub, *heads)):
        artifact = _artifact(hub, outline)
        if artifact is not None:
            yield artifact, commit
