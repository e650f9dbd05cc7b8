"""The adapters that a server's repository shows as ``name:tag`` (SPEC.md section 13)."""

from collections.abc import Mapping

from loraforge_registry.digest import Digest
from loraforge_registry.errors import LoraforgeError, ReferenceSyntaxError
from loraforge_registry.names import DEFAULT_TAG, RefName
from loraforge_registry.records import Records
from loraforge_registry.repositories import CommitRecord, RepositoryRecord

MAIN = "main"


def repository_at(records: Records, digest: Digest | None) -> RepositoryRecord | None:
    """The repository that a record is; None where it is something else, or cannot be read, which others say."""
    try:
        found = None if digest is None else records.read(digest)
    except (LoraforgeError, OSError):
        return None
    return found if isinstance(found, RepositoryRecord) else None


def shown(records: Records, name: str, repository: RepositoryRecord) -> Mapping[str, Digest]:
    """The artifacts of a repository by tag: its tags, its branches, and ``latest`` for what ``main`` is.

    A branch or tag that cannot be a tag here (``feat/a``), or whose commit holds no adapter, is passed over.
    """
    named = {**repository.tags, **repository.branches}
    if MAIN in named:
        named[DEFAULT_TAG] = named[MAIN]
    found = {}
    for tag, digest in named.items():
        commit = records.read(digest)
        if isinstance(commit, CommitRecord) and commit.adapter is not None and _is_tag(name, tag):
            found[tag] = commit.adapter
    return found


def _is_tag(name: str, tag: str) -> bool:
    try:
        RefName(name, tag)
    except ReferenceSyntaxError:
        return False
    return True
