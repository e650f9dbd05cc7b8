"""Nodes on a path, and the changes that they make to a base."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraforge.checkpoint.changes import Change
from loraforge.checkpoint.plan import Ingredient, plan_changes
from loraforge.checkpoint.reader import Checkpoint
from loraforge.tree.cache import Cache
from loraforge_registry.digest import Digest
from loraforge_registry.trees import TreeRecord, only_path


def path_of(record: TreeRecord, path: str) -> dict[str, Digest]:
    """Return the nodes from the base to ``path``, that one last; none for the base, ``""``.

    Raises:
        NotFoundError: there is no such node.
    """
    return dict(only_path(record, path).nodes) if path else {}


def below(record: TreeRecord, path: str) -> list[str]:
    """Return the descendants of a node, parents before children."""
    return sorted(other for other in record.nodes if other.startswith(f"{path}/"))


def ingredients(cache: Cache, path: Mapping[str, Digest]) -> list[Ingredient]:
    """Return the adapters of a path for a merge, each under the name of its node."""
    return [Ingredient(cache.open(digest), 1.0, name) for name, digest in path.items()]


Key = tuple[Digest, ...]
"""What is in a tensor beside the base: the nodes that change it, the first of the path first."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a node's path does to each tensor that it changes: the change, and the nodes that it is of."""

    changes: Mapping[str, Change]
    keys: Mapping[str, Key]


class Plans:
    """Plans by node: a digest fixes the path, so none can be stale. As many are kept as adapters are."""

    def __init__(self, checkpoint: Checkpoint, cache: Cache) -> None:
        self._checkpoint, self._cache = checkpoint, cache
        self._touched: dict[Digest, tuple[str, ...]] = {}
        self._known: dict[Key, Plan] = {}

    def of(self, path: Mapping[str, Digest]) -> Plan:
        """Return the plan of a path.

        Raises:
            CompositionError: a node does not fit the base, or what is below it.
        """
        steps = tuple(path.values())
        if steps in self._known and all(step in self._cache for step in steps):
            for step in reversed(steps):
                self._cache.open(step)  # asked for now; the parent last, so that it stays longest
            return self._known[steps]
        found = ingredients(self._cache, path)
        changes = plan_changes(self._checkpoint, found) if found else {}
        for step, one in zip(steps, found, strict=True):
            if step not in self._touched:
                self._touched[step] = tuple(plan_changes(self._checkpoint, [one]))
        keys: dict[str, Key] = {}
        for step in steps:
            for name in self._touched[step]:
                keys[name] = (*keys.get(name, ()), step)
        self._known = {key: plan for key, plan in self._known.items() if all(step in self._cache for step in key)}
        self._known[steps] = Plan(changes, keys)
        return self._known[steps]


def check_fits(base: Checkpoint, cache: Cache, paths: Sequence[Mapping[str, Digest]]) -> None:
    """Refuse nodes that could not be merged into the base, before a tree names them.

    Raises:
        CompositionError: naming the node and what does not fit.
    """
    for path in paths:
        if path:
            plan_changes(base, ingredients(cache, path))
