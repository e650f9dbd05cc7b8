"""What lists say of a tree, and what says quickly whether something is a node of it."""

from array import array
from bisect import bisect_left
from dataclasses import dataclass

from loraforge_registry.digest import Digest
from loraforge_registry.trees import TreeRecord

_TOLD = 501  # characters of a base's name


@dataclass(frozen=True, slots=True)
class TreeFacts:
    """What lists say of a tree; of the name of its base only the beginning, where that is long."""

    digest: Digest
    base: str
    nodes: int


def facts_of_tree(digest: Digest, tree: TreeRecord) -> TreeFacts:
    """Return the facts about a tree."""
    return TreeFacts(digest, tree.base_name[:_TOLD], len(tree.nodes))


@dataclass(frozen=True, slots=True)
class Members:
    """What of a tree says whether something is a node of it, in eight bytes a node."""

    heads: "array[int]"  # the first eight bytes of each digest, sorted

    def may_hold(self, artifact: Digest) -> bool:
        """Whether an artifact may be a node; False is certain, True is for the record to say."""
        head = _head(artifact)
        at = bisect_left(self.heads, head)
        return at < len(self.heads) and self.heads[at] == head


def members_of(tree: TreeRecord) -> Members:
    """Gather the nodes of a tree."""
    return Members(array("Q", sorted(map(_head, tree.nodes.values()))))


def _head(digest: Digest) -> int:
    return int.from_bytes(digest.raw[:8])
