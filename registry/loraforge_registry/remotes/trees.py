"""A tree from a remote into a store: nodes that are missing, then the record that names them, then the name.

What a record says of parents is compared with what its nodes say before their weights are asked for; each node passes
the gates of a push, and the store looks at the whole once more before anything has the name.
"""

from collections.abc import Mapping
from dataclasses import replace

from loraforge_registry.digest import Digest
from loraforge_registry.errors import ConflictError, ManifestError, NotFoundError
from loraforge_registry.names import DEFAULT_TAG, RefName
from loraforge_registry.remotes.offer import Offer, OfferedTree, Remote
from loraforge_registry.remotes.transfer import Received, ancestors, take
from loraforge_registry.store import Store
from loraforge_registry.trees import TreeRecord, parent_path


def receive_tree(
    store: Store,
    remote: Remote,
    tree: OfferedTree,
    name: RefName,
    *,
    force: bool,
    lineage: bool,
    what: str,
) -> Received:
    """Store a tree that a remote offers, or one path of it, and name it.

    A path joins the nodes that a tree of this name has here already. With ``lineage`` comes what nodes were made from.

    Raises:
        ConflictError: the name means something that would be lost.
        FormatError: a node is refused, or is not what the record says; the name is as it was.
        RemoteError: the remote stopped, or its bytes are not those that it announced.
    """
    wanted = tree.record
    current = store.lookup(name)
    record = _becomes(store, name, current, wanted, joins=not tree.whole, force=force)
    with store.session() as session:
        session.pin(*wanted.needs)
        offers = {path: remote.node(tree, path) for path, node in wanted.nodes.items() if not store.has(node)}
        _check_parents(store, wanted, offers)
        here = [store.manifest(digest).size for digest in wanted.needs if store.has(digest)]
        got = [take(store, remote, offer) for offer in offers.values()]
        above, missing = ancestors(store, remote, wanted.needs, fetch=lineage)
        digest = store.put_tree(record, name, expected=current, what=what)
    received = sum(one.received for one in (*got, *above))
    return Received(digest, received, sum(here) + sum(one.skipped for one in (*got, *above)), tuple(missing))


def _becomes(
    store: Store, name: RefName, current: Digest | None, wanted: TreeRecord, *, joins: bool, force: bool
) -> TreeRecord:
    """Return what the name is to mean, where nothing is lost by that."""
    known = None if current is None or not store.has(current) else store.record(current)
    if known is None or known == wanted:
        return wanted
    if not isinstance(known, TreeRecord) or known.base != wanted.base:
        return _unless(
            force, wanted, f"{name} is {'a tree on another base' * isinstance(known, TreeRecord) or 'an adapter'}"
        )
    lost = [path for path, digest in known.nodes.items() if wanted.nodes.get(path) != digest]
    if joins:
        changed = [path for path in lost if path in wanted.nodes]
        if changed:
            return _unless(force, wanted, f"{name} has another {changed[0]}")
        wanted = replace(known, nodes=dict(sorted({**known.nodes, **wanted.nodes}.items())))
        lost = []
    if name.tag != DEFAULT_TAG and wanted != known:
        return _unless(force, wanted, f"{name} is another tree, sha256:{current.short if current else ''}")
    if lost and not _came_from_there(store, name):
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        return _unless(force, wanted, f"{name} has {lost[0]}{more} that would go: it was changed here")
    return wanted


def _unless(force: bool, wanted: TreeRecord, why: str) -> TreeRecord:  # noqa: FBT001 - the one question
    if not force:
        raise ConflictError(f"{why}; choose another name, or --force")
    return wanted


def _came_from_there(store: Store, name: RefName) -> bool:
    """Whether the last who moved the name was somebody else's change that came in, and nobody here."""
    try:
        moves = [move for move in store.reflog(name.name) if move.tag == name.tag]
    except NotFoundError:
        return False
    return bool(moves) and moves[-1].what.partition(" ")[0] in ("pull", "push")


def _check_parents(store: Store, tree: TreeRecord, offers: Mapping[str, Offer]) -> None:
    """Refuse a record whose nodes were not made atop those that their paths put them on."""
    for path, digest in tree.nodes.items():
        above = parent_path(path)
        expected = None if above is None else tree.nodes[above]
        if path in offers:
            derivation = offers[path].derivation
            parent = derivation.parent if derivation is not None else None
            found = None if parent is None else parent.digest
        else:
            found = store.manifest(digest).parent
        if found != expected:
            raise ManifestError(
                f"node {path!r} was made atop {found or 'the base'}, its place is atop {expected or 'the base'}; "
                "nothing was stored"
            )
