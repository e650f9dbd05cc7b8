"""Trees changed as a whole: prune, move, graft, squash, rebase.

Each makes new artifacts where a node's parent changes, moves the tree's name once, and leaves the old nodes in the
store until a collection. What changes the meaning of a node that was not named is refused, unless the caller says so.
"""

from collections.abc import Sequence

from loraforge.compose import Reranked, Term
from loraforge.errors import ConflictError
from loraforge.formats import peft
from loraforge.tree.flatten import made
from loraforge.tree.model import Node, Tree, atop, check_named
from loraforge.tree.nodes import below, path_of
from loraforge_registry.digest import Digest
from loraforge_registry.manifest import Artifact, Derivation, Input
from loraforge_registry.trees import TreeRecord, check_path, parent_path

VERSION = 1
Changed = dict[str, Digest | None]


def prune(tree: Tree, path: str, *, recursive: bool = False) -> list[str]:
    """Take a node away, with ``recursive`` all that grew on it, too; return the paths that went.

    Raises:
        ConflictError: nodes grew on it.
    """
    record = tree.check_moves()
    path_of(record, check_named(path))
    children = below(record, path)
    if children and not recursive:
        raise ConflictError(
            f"{_few(children)} grew on {path}, and would go with it: say so (recursive, --recursive), or move or "
            f"squash "
            "them first"
        )
    tree.commit(record, dict.fromkeys((path, *children)), f"tree prune {path}")
    return [path, *children]


def move(tree: Tree, old: str, new: str, *, keep_delta: bool = False) -> Node:
    """Give a node another path, and all that grew on it.

    Under the same parent that is a new name for the same artifacts. Elsewhere it is the same update on other weights,
    so what these nodes compute changes: that takes ``keep_delta``.

    Raises:
        ConflictError: the place is taken, below the node itself, or atop another node without ``keep_delta``.
    """
    record = tree.check_free(new)
    path_of(record, check_named(old))
    if new.startswith(f"{old}/"):
        raise ConflictError(f"{new} is on {old} itself: move it elsewhere")
    moved = [old, *below(record, old)]
    if parent_path(old) == parent_path(new):
        changed: Changed = dict.fromkeys(moved)
        changed |= {new + path.removeprefix(old): record.nodes[path] for path in moved}
        tree.commit(record, changed, f"tree move {old} {new}", check=False)
        return tree.node(new)
    if not keep_delta:
        raise ConflictError(
            f"atop {parent_path(new) or 'the base'} the update of {_few(moved)} means other weights: say so "
            "(keep_delta, --keep-delta), or rebase, which keeps the weights"
        )
    with tree.registry.store.session():
        again = _standing(tree, record, old, tree.artifact(record, parent_path(new)), "move")
        tree.commit(record, _carried(tree, record, old, new, again), f"tree move {old} {new}")
    return tree.node(new)


def graft(tree: Tree, path: str, source: Artifact) -> Node:
    """Put an adapter that was made elsewhere onto a node, marked as such.

    Raises:
        ConflictError, NotFoundError: the place is taken, or there is nothing to put it on.
        CompositionError: it does not fit the base, where that is at hand.
    """
    record = tree.check_free(path)
    parent = tree.artifact(record, parent_path(path))
    with tree.registry.store.session():
        report = tree.registry.store.manifest(source.digest).report
        derivation = atop(parent, Derivation("graft", VERSION, (Input(source),)))
        found = tree.registry.store.put_again(source.digest, derivation, report=report)
        tree.commit(record, {path: found.digest}, f"tree graft {path}")
    return Node(tree, path, found.digest)


def squash(
    tree: Tree, path: str, *, onto: str = "", rank: int | None = None, energy: float | None = None, force: bool = False
) -> Node:
    """Make one node of the chain above ``onto`` (the base) that ends in ``path``: ``onto/NAME``, with the same weights.

    Nodes of the chain on which something else stands stay as well. What grew on ``path`` stands on the new node, with
    the same weights, too. With ``rank`` or ``energy`` the node is only near the chain, and so is all that grew on it:
    that takes ``force``.

    Raises:
        ConflictError: the place is taken, or what grew on it would change.
        CompositionError: the chain does not add up.
    """
    record = tree.check_moves()
    steps = path_of(record, check_named(path))
    chain = list(steps)[len(path_of(record, onto)) :]
    if onto and not path.startswith(f"{onto}/"):
        raise ConflictError(f"{path} does not stand on {onto}: name a node that it grew on, or none for the base")
    if len(chain) < 2:
        raise ConflictError(f"{path} is one node atop {onto or 'the base'} already: nothing is to be squashed")
    _check_children(record, path, changed=(rank, energy) != (None, None), force=force)
    new = f"{onto}/{path.rpartition('/')[2]}".removeprefix("/")
    gone = [step for step in chain if not _branches_off(record, step, chain, path)]
    if new in record.nodes and new not in gone:
        raise ConflictError(f"{new} is there already: move it first")
    terms = [(tree.cache.open(record.nodes[step]), 1.0) for step in chain]
    with tree.registry.store.session():
        node = _put(tree, record, terms, "squash", onto or None, rank=rank, energy=energy)
        changed: Changed = dict.fromkeys(gone)
        changed |= _carried(tree, record, path, new, node)
        tree.commit(record, changed, f"tree squash {path}")
    return tree.node(new)


def rebase(
    tree: Tree, path: str, onto: str, *, rank: int | None = None, energy: float | None = None, force: bool = False
) -> Node:
    r"""Put a node onto another one, with the same weights: its update is fitted to the new parent.

    Equation: ``d' = d + sum(old path) - sum(new path)``, so that ``base + new path + d'`` is the same real number; with
    ``rank`` or ``energy`` the nearest to that, and then what grew on the node changes, too: that takes ``force``.

    Raises:
        ConflictError: the place is taken, on the node itself, or what grew on it would change.
        CompositionError: the paths do not add up.
    """
    record = tree.check_moves()
    old, new = path_of(record, check_named(path)), path_of(record, onto)
    place = f"{onto}/{path.rpartition('/')[2]}".removeprefix("/")
    if f"{onto}/".startswith(f"{path}/"):
        raise ConflictError(f"{onto} grew on {path}, which cannot stand on it")
    if onto == (parent_path(path) or ""):
        raise ConflictError(f"{path} stands on {onto or 'the base'} already")
    check_path(place)
    if place in record.nodes:
        raise ConflictError(f"{place} is there already: move it first")
    _check_children(record, path, changed=(rank, energy) != (None, None), force=force)
    weights = dict.fromkeys(old.values(), 1.0)
    for digest in new.values():
        weights[digest] = weights.get(digest, 0.0) - 1.0
    terms = [(tree.cache.open(digest), weight) for digest, weight in weights.items() if weight]
    with tree.registry.store.session():
        node = _put(tree, record, terms, "rebase", onto or None, rank=rank, energy=energy)
        tree.commit(record, _carried(tree, record, path, place, node), f"tree rebase {path} {onto}".rstrip())
    return tree.node(place)


def _put(
    tree: Tree,
    record: TreeRecord,
    terms: Sequence[Term],
    operation: str,
    parent: str | None,
    *,
    rank: int | None,
    energy: float | None,
) -> Artifact:
    """Store a sum as a node atop ``parent``."""
    found = made(terms, operation, base=record.base_name, rank=rank, energy=energy)
    adapter = found.adapter if isinstance(found, Reranked) else found
    report = found.report.as_record() if isinstance(found, Reranked) else None
    derivation = adapter.derivation
    assert derivation is not None  # noqa: S101 - ``made`` gives one
    return tree.registry.store.put(
        peft.encode(adapter), derivation=atop(tree.artifact(record, parent), derivation), report=report
    )


def _standing(tree: Tree, record: TreeRecord, path: str, parent: Artifact | None, operation: str) -> Artifact:
    digest = record.nodes[path]
    manifest = tree.registry.store.manifest(digest)
    derivation = atop(parent, Derivation(operation, VERSION, (Input(Artifact(digest, manifest.content_id)),)))
    return tree.registry.store.put_again(digest, derivation, report=manifest.report)


def _carried(tree: Tree, record: TreeRecord, old: str, new: str, node: Artifact) -> Changed:
    """Return the change that puts ``node`` at ``new``, and what grew on ``old`` onto it."""
    moved = below(record, old)
    changed: Changed = dict.fromkeys((old, *moved))
    changed[new] = node.digest
    stands = {old: node}
    for path in moved:  # parents before children
        stands[path] = _standing(tree, record, path, stands[parent_path(path) or ""], "move")
        changed[new + path.removeprefix(old)] = stands[path].digest
    return changed


def _branches_off(record: TreeRecord, step: str, chain: Sequence[str], path: str) -> bool:
    """Whether a node of a chain is needed by others than the chain, and what grew on its end."""
    return any(other not in chain and not other.startswith(f"{path}/") for other in below(record, step))


def _check_children(record: TreeRecord, path: str, *, changed: bool, force: bool) -> None:
    children = below(record, path)
    if changed and children and not force:
        raise ConflictError(
            f"{_few(children)} grew on {path}, and would change by the error of the re-rank: say so (force, --force), "
            f"or "
            "leave the rank out"
        )


def _few(paths: Sequence[str]) -> str:
    return f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}"
