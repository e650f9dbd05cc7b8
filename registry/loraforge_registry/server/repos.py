"""Repositories: by id, for whoever asks, with the revisions that their names and commits mean.

A repository that clients made has a record of its own (``repositories``). A name that ``loraforge push`` made on this
machine is one, too, which can only be read: each tag is a commit without a parent, ``latest`` is the branch ``main``. A
tree there is shown as a push of it would be (SPEC.md section 15), but for the card; its records are made here.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

from loraforge_registry import git
from loraforge_registry.digest import Digest
from loraforge_registry.errors import LoraforgeError, NotFoundError, ReferenceSyntaxError
from loraforge_registry.facts import Facts
from loraforge_registry.hub_record import Record, encode_record
from loraforge_registry.hub_tree_record import TreeOnHub, encode_tree_record
from loraforge_registry.manifest import RECORD_FILE, WEIGHTS_FILE, Manifest
from loraforge_registry.names import DEFAULT_TAG, RefName
from loraforge_registry.repositories import (
    CommitRecord,
    CommittedFile,
    Outline,
    RepositoryRecord,
    encode_repository,
    repository_name,
)
from loraforge_registry.server.accounts import User
from loraforge_registry.server.errors import bad_request, forbidden, no_repository, no_revision, unauthorised
from loraforge_registry.server.hub import Hub
from loraforge_registry.server.pasts import Commit, Pasts
from loraforge_registry.server.recent import Recent
from loraforge_registry.tree_facts import TreeFacts
from loraforge_registry.trees import TreeRecord

MAIN = "main"
MAX_FOLDERS = 2_000  # nodes of a tree on this machine that are served as files
MAX_MADE = 16 * 1024 * 1024  # bytes of the records that are made for it
_ID = re.compile(r"(?:([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)/)?([A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?)")
_REVISION = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._+/-]{0,198}[A-Za-z0-9_+])?")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository as it is now. ``digest`` is its record's, None for a name that was made on this machine."""

    name: str
    record: RepositoryRecord
    digest: Digest | None

    @property
    def id(self) -> str:
        """How its maker spelt it."""
        return self.record.id

    @property
    def namespace(self) -> str:
        """Whose it is; empty for one without."""
        return self.record.id.lower().rpartition("/")[0]


@dataclass(frozen=True, slots=True)
class Revision:
    """A commit, with its id worked out; ``digest`` is of its record, or of the artifact or tree that it shows.

    ``made`` are files of it that are in no store: the records of a tree that was made on this machine.
    """

    id: str
    digest: Digest
    commit: CommitRecord
    made: Mapping[Digest, bytes] = field(default_factory=dict)

    @property
    def outline(self) -> Outline:
        """What a walk needs of it."""
        commit = self.commit
        stated = None if commit.adapter else commit.stated
        return Outline(self.id, commit.parent, commit.adapter, commit.author.time, stated)


def name_of(identity: str) -> str:
    """The store's name for a repository.

    Raises:
        RefusedError: 400, not an id that a repository can have.
    """
    if _ID.fullmatch(identity) is None or "--" in identity or ".." in identity or len(identity) > 96:
        raise bad_request(f"{identity[:120]!r} is not the id of a repository")
    try:
        return RefName(repository_name(identity)).name
    except ReferenceSyntaxError as error:
        raise bad_request(f"{identity!r} cannot be kept here: {error}") from error


def check_revision(name: str) -> None:
    """Refuse what cannot be the name of a branch or a tag.

    Raises:
        RefusedError: 400.
    """
    hides = _COMMIT.fullmatch(name) and len(name) == 40
    if _REVISION.fullmatch(name) is None or ".." in name or "//" in name or name.startswith("refs/") or hides:
        raise bad_request(f"{name[:120]!r} cannot be the name of a branch or tag")


def may_read(hub: Hub, repository: Repository, user: User | None) -> bool:
    """Whether somebody may see a repository at all."""
    if user is None:
        return hub.settings.anonymous and not repository.record.private
    return not repository.record.private or user.may_read(repository.namespace)


def find(hub: Hub, identity: str, user: User | None) -> Repository:
    """Return a repository.

    Raises:
        RefusedError: it is not there, or not for this user.
    """
    found = load(hub, name_of(identity))
    if found is None or not may_read(hub, found, user):
        raise no_repository(identity, known=user is not None)
    return found


def find_to_write(hub: Hub, identity: str, user: User | None) -> Repository:
    """Return a repository that this user may change.

    Raises:
        RefusedError: 401, 403 or 404.
    """
    found = find(hub, identity, user)
    check_writer(user, found.namespace)
    if found.digest is None:
        raise forbidden(
            f"{identity} was made by loraforge push on the server's machine: it can be read here, not changed"
        )
    return found


def check_writer(user: User | None, namespace: str) -> User:
    """Return the user, who may write there.

    Raises:
        RefusedError: 401 or 403.
    """
    if user is None:
        raise unauthorised()
    if not user.may_write(namespace):
        raise forbidden(f"this token may not write to {namespace or 'names without a namespace'}")
    return user


def load(hub: Hub, name: str, called: Sequence[str] | None = None) -> Repository | None:
    """Return what is under a name, whoever asks; ``called`` is what its tags are called, where that is known."""
    digest = hub.refs.read(name)
    if digest is not None:
        record = hub.refs.record(digest)
        if isinstance(record, RepositoryRecord):
            return Repository(name, record, digest)
    return _of_this_machine(hub, name, called)


def everything(hub: Hub, user: User | None) -> Iterator[Repository]:
    """Yield every repository that somebody may see, by name; what is damaged is for ``fsck`` to say."""
    for name, called in hub.refs.names().items():
        try:
            found = load(hub, name, called)
        except (LoraforgeError, OSError):
            continue
        if found is not None and may_read(hub, found, user):
            yield found


def change(hub: Hub, repository: Repository, record: RepositoryRecord | None, *, user: User, what: str) -> bool:
    """Make a repository what ``record`` says (None takes it away); False where it has changed meanwhile."""
    new = None if record is None else hub.refs.put_record(encode_repository(record))
    if new == repository.digest:
        return True
    return hub.refs.swap(repository.name, repository.digest, new, who=user.name, what=what)


def revision_of(hub: Hub, digest: Digest) -> Revision:
    """Return the commit of a record, or the one that an artifact would be.

    Raises:
        NotFoundError: it is not there.
    """
    return _KNOWN.get_or(digest, lambda: _load_revision(hub, digest), _weight)


# they never change: a digest is of all that they are
_KNOWN = Recent[Digest, Revision](100_000)  # files of commits, all together
_OUTLINES = Recent[Digest, Outline](50_000)
_PASTS = Pasts(50_000)
_FACTS = Recent[Digest, Facts | TreeFacts](50_000)


def _weight(revision: Revision) -> int:
    return 1 + len(revision.commit.files) + sum(map(len, revision.made.values())) // 400


def _load_revision(hub: Hub, digest: Digest) -> Revision:
    record = hub.refs.record(digest)
    if isinstance(record, CommitRecord):
        return Revision(record.id, digest, record)
    if not isinstance(record, Manifest | TreeRecord):
        raise NotFoundError(f"{digest} is no commit")
    what = "artifact" if isinstance(record, Manifest) else "tree"
    files, made = (_files(hub, record), {}) if isinstance(record, Manifest) else _tree_files(hub, digest, record)
    commit = CommitRecord(files, git.Signature("loraforge", 0), f"{what} {digest}", adapter=digest)
    return Revision(commit.id, digest, commit, made)


def resolve(hub: Hub, repository: Repository, revision: str) -> Revision:
    """Return what a branch, a tag, a commit or the beginning of one means.

    Raises:
        RefusedError: nothing there.
    """
    plain = revision
    tables: tuple[Mapping[str, Digest], ...] = (repository.record.branches, repository.record.tags)
    if revision.startswith("refs/heads/"):
        plain, tables = revision[11:], tables[:1]
    elif revision.startswith("refs/tags/"):
        plain, tables = revision[10:], tables[1:]
    for table in tables:
        if plain in table:
            return revision_of(hub, table[plain])
    if _COMMIT.fullmatch(revision) and len(revision) == 40:
        digest = _PASTS.find(partial(_past, hub), _heads(repository), revision)
        if digest is not None:
            return revision_of(hub, digest)
    elif _COMMIT.fullmatch(revision):
        found = {outline.id: digest for digest, outline in history(hub, *_heads(repository))}
        ids = [identity for identity in found if identity.startswith(revision)]
        if len(ids) == 1:
            return revision_of(hub, found[ids[0]])
    raise no_revision(revision[:200])


def _heads(repository: Repository) -> Iterator[Digest]:
    """What has names, branches first; not ``needs``, as most often the first will do."""
    return chain(repository.record.branches.values(), repository.record.tags.values())


def outline_of(hub: Hub, digest: Digest) -> Outline:
    """Return the outline of a commit, or of the one that an artifact would be.

    Raises:
        NotFoundError: it is not there.
    """
    return _OUTLINES.get_or(digest, lambda: next(_past(hub, digest))[1])


def _past(hub: Hub, head: Digest) -> Iterator[Commit]:
    commits = hub.refs.past(head)
    first = next(commits, None)
    if first is None:  # an artifact or a tree, before which nothing is
        first = head, revision_of(hub, head).outline
    yield first
    yield from commits


def known_of(hub: Hub, digest: Digest) -> Facts | TreeFacts | None:
    """Return what lists say of an artifact or a tree; None for what is not there, damaged, or another record."""
    cached = _FACTS.get(digest)
    if cached is None:
        with suppress(LoraforgeError, OSError):
            cached = hub.refs.facts(digest)
        if cached is not None:
            _FACTS.put(digest, cached, 1)
    return cached


def facts_of(hub: Hub, digest: Digest) -> Facts | None:
    """Return what lists say of an artifact; None for anything else."""
    found = known_of(hub, digest)
    return found if isinstance(found, Facts) else None


def history(hub: Hub, *heads: Digest) -> list[Commit]:
    """Return commits and all before them, each once, newest first.

    Raises:
        NotFoundError: one is not there.
    """
    found, problem = _PASTS.walk(partial(_past, hub), heads)
    if problem is not None:
        raise problem
    return found


def readable_history(hub: Hub, *heads: Digest) -> list[Commit]:
    """As ``history``, without what is damaged, which is for ``fsck`` to say."""
    return _PASTS.walk(partial(_past, hub), heads)[0]


def _of_this_machine(hub: Hub, name: str, called: Sequence[str] | None) -> Repository | None:
    tags = {tag: digest for tag, digest in hub.refs.tags(name, called).items() if known_of(hub, digest) is not None}
    if not tags:
        return None
    identity = name.replace("--", "/", 1)
    branches = {MAIN: tags.pop(DEFAULT_TAG, None) or tags[max(tags)]}
    return Repository(name, RepositoryRecord(identity, 0, branches=branches, tags=tags), None)


def _files(hub: Hub, manifest: Manifest) -> dict[str, CommittedFile]:
    """The files of an artifact; git has ids for all but the weights, by their bytes."""
    files = {}
    for file in manifest.files:
        small = file.path != WEIGHTS_FILE
        data = b"".join(bytes(piece) for piece in hub.blobs.read(file.digest, 0, file.size)) if small else b""
        files[file.path] = CommittedFile(file.digest, file.size, git.blob_id(data) if small else None)
    return files


def _tree_files(hub: Hub, digest: Digest, tree: TreeRecord) -> tuple[dict[str, CommittedFile], dict[Digest, bytes]]:
    """The folders of a tree, with the records that say what it is, in memory.

    Of a tree that is too large for that, files without records; of one too large for a commit, none. What cannot be
    read has no folder, which its page says.
    """
    files, made, size = dict[str, CommittedFile](), dict[Digest, bytes](), 0
    if len(tree.nodes) > MAX_FOLDERS:
        return files, made
    records = {RECORD_FILE: encode_tree_record(TreeOnHub(digest, tree))}
    for path, node in tree.nodes.items():
        with suppress(LoraforgeError, OSError):
            manifest = hub.refs.record(node)
            if isinstance(manifest, Manifest):
                folder = _files(hub, manifest)
                files |= {f"{path}/{name}": file for name, file in folder.items()}
                if size <= MAX_MADE:
                    ids = {name: file.blob for name, file in folder.items() if file.blob is not None}
                    record = records[f"{path}/{RECORD_FILE}"] = encode_record(Record(node, manifest, ids))
                    size += len(record)
    if size <= MAX_MADE and not any(RECORD_FILE in path.split("/") for path in tree.nodes):
        made = {Digest.of(data): data for data in records.values()}
        files |= {path: CommittedFile(Digest.of(d), len(d), git.blob_id(d)) for path, d in records.items()}
    return files, made
