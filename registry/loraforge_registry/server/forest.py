"""Trees of adapters in repositories: recognised by the record at a commit's root, or by that which a name here means.

A stranger's record is read once, within a limit, and kept by the digest of its bytes. Lists need a few facts of it.
"""

from contextlib import suppress
from dataclasses import dataclass

from loraforge_registry.digest import Digest
from loraforge_registry.errors import FormatError, LoraforgeError
from loraforge_registry.facts import Facts
from loraforge_registry.hub_tree_record import TreeOnHub, decode_tree_record
from loraforge_registry.manifest import RECORD_FILE
from loraforge_registry.repositories import CommitRecord, CommittedFile, Outline
from loraforge_registry.server import repos
from loraforge_registry.server.hub import Hub
from loraforge_registry.server.recent import Recent
from loraforge_registry.tree_facts import Members, TreeFacts, facts_of_tree, members_of
from loraforge_registry.trees import TreeRecord

MAX_STATED = 2 * 1024 * 1024  # of a tree's record: ten thousand nodes have one

_FACTS = Recent[Digest, TreeFacts | str](50_000)  # by the blob of the record; a text says why there is no tree
_TREES = Recent[Digest, TreeOnHub](50_000)  # nodes, by the same
_MEMBERS = Recent[Digest, Members](2_500_000)  # nodes, by the tree


@dataclass(frozen=True, slots=True)
class Tree:
    """A tree at a commit. ``is_here`` says that its nodes are artifacts of this store, else they are its folders."""

    digest: Digest
    record: TreeRecord
    is_here: bool


def facts_at(hub: Hub, at: Outline | CommitRecord) -> Facts | TreeFacts | None:
    """Return what lists say of the adapter or the tree that a commit holds."""
    if at.adapter is not None:
        return repos.known_of(hub, at.adapter)
    found = None if at.stated is None else _stated(hub, at.stated)
    return found if isinstance(found, TreeFacts) else None


def problem_at(hub: Hub, commit: CommitRecord) -> str:
    """Say why a commit with a record at its root is shown as no tree; empty where there is nothing to say."""
    found = "" if commit.adapter is not None or commit.stated is None else _stated(hub, commit.stated)
    return found if isinstance(found, str) else ""


def tree_at(hub: Hub, at: Outline | CommitRecord) -> Tree | None:
    """Return the tree that a commit holds, if it holds one.

    Raises:
        NotFoundError: its record went meanwhile.
    """
    facts = facts_at(hub, at)
    if not isinstance(facts, TreeFacts):
        return None
    if at.adapter is not None:
        record = hub.refs.record(at.adapter)
        return Tree(at.adapter, record, is_here=True) if isinstance(record, TreeRecord) else None
    found = None if at.stated is None else _read(hub, at.stated)
    return None if found is None else Tree(found.digest, found.tree, is_here=False)


def members_of_tree(facts: TreeFacts) -> Members | None:
    """Return what says which nodes a tree has, where it was read before."""
    return _MEMBERS.get(facts.digest)


def read_members(hub: Hub, at: Outline | CommitRecord, facts: TreeFacts) -> Members | None:
    """Read what says which nodes a tree has; None where it cannot be read."""
    with suppress(LoraforgeError, OSError):
        tree = tree_at(hub, at)
        if tree is not None:
            members = members_of(tree.record)
            _MEMBERS.put(facts.digest, members, 1 + facts.nodes)
            return members
    return None


def _stated(hub: Hub, file: CommittedFile) -> TreeFacts | str:
    known = _FACTS.get(file.digest)
    if known is None:
        try:
            found = _read(hub, file)
            known = "" if found is None else facts_of_tree(found.digest, found.tree)
        except FormatError as error:
            known = str(error)[:500]
        except (LoraforgeError, OSError):
            return f"{RECORD_FILE} cannot be read"
        _FACTS.put(file.digest, known, 1)
    return known


def _read(hub: Hub, file: CommittedFile) -> TreeOnHub | None:
    known = _TREES.get(file.digest)
    if known is None:
        if file.size > MAX_STATED:
            raise FormatError(f"{RECORD_FILE} has {file.size:,} bytes; what is read of it here is {MAX_STATED:,}")
        known = decode_tree_record(b"".join(bytes(piece) for piece in hub.blobs.read(file.digest, 0, file.size)))
        if known is not None:
            _TREES.put(file.digest, known, 1 + len(known.tree.nodes) + len(known.tree.base_name) // 400)
    return known
