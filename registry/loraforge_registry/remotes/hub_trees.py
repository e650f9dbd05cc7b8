"""A tree into a repository on the Hub: one commit, each node in the folder that is its path (SPEC.md section 15)."""

from collections.abc import Mapping

from loraforge_registry.config import MAX_BYTES
from loraforge_registry.digest import Digest
from loraforge_registry.errors import ConflictError
from loraforge_registry.git import git_id
from loraforge_registry.hub_record import Record, encode_record
from loraforge_registry.hub_tree_record import TreeOnHub, encode_tree_record
from loraforge_registry.ingest import MAX_README
from loraforge_registry.manifest import CONFIG_FILE, FILES, README_FILE, RECORD_FILE, WEIGHTS_FILE, Manifest
from loraforge_registry.names import RefName
from loraforge_registry.remotes.hub import HubRemote
from loraforge_registry.remotes.hub_answers import Snapshot
from loraforge_registry.remotes.hub_offers import MAIN
from loraforge_registry.remotes.hub_push import (
    HARMLESS,
    MODELS,
    check_text,
    check_token,
    commit_files,
    goal_of,
    head_of,
    may_write_readme,
    set_tag,
    tree_of,
)
from loraforge_registry.remotes.offer import Published
from loraforge_registry.remotes.tree_card import tree_card
from loraforge_registry.store import Store
from loraforge_registry.trees import TreeRecord

_OF_A_NODE = (*FILES, RECORD_FILE)


def publish_tree(remote: HubRemote, store: Store, digest: Digest, name: RefName | None, *, force: bool) -> Published:
    """Put a tree into a repository, which is made where it is missing; folders of nodes that it lost go.

    Raises:
        ConflictError: as for an adapter; or the repository holds one, or a node is called as a file of ours.
        RemoteError: the hub says no, breaks off, or has other bytes afterwards than were sent.
    """
    check_token(remote)
    with store.reading(digest):
        tree = store.tree(digest)
        _check_names(tree)
        head, notes = head_of(remote)
        goal, done = goal_of(remote, digest, name, force=force)
        if done is not None:
            size = sum(store.manifest(node).size for node in tree.needs)
            return Published(str(remote.address.at(done)), 0, size, tuple(notes))
        head = head if goal.branch == MAIN else remote.snapshot(goal.branch)
        before = tree_of(remote, head)
        wanted = _wanted(remote, store, TreeOnHub(digest, tree), head, before, notes, force=force)
        gone = _gone(remote, head, before, wanted, notes, force=force)
        commit, sent, skipped = commit_files(remote, store, wanted, head, goal, gone)
        if goal.tag is not None:
            set_tag(remote, goal.tag, commit)
    return Published(str(remote.address.at(goal.tag or commit)), sent, skipped, tuple(notes))


def _check_names(tree: TreeRecord) -> None:
    taken = next((path for path in tree.nodes if RECORD_FILE in path.split("/")), None)
    if taken is not None:
        raise ConflictError(
            f"{taken}: a repository has a file {RECORD_FILE} where this node's folder would be; rename the node first "
            "(loraforge tree move)"
        )


def _wanted(
    remote: HubRemote,
    store: Store,
    found: TreeOnHub,
    head: Snapshot,
    before: TreeOnHub | None,
    notes: list[str],
    *,
    force: bool,
) -> dict[str, bytes | Manifest]:
    """The files as they are to be in the repository; a manifest stands for its weights."""
    tree, wanted = found.tree, dict[str, bytes | Manifest]()
    nodes = {path: store.manifest(node) for path, node in tree.nodes.items()}
    for path, manifest in nodes.items():
        wanted |= {f"{path}/{name}": data for name, data in _node(store, tree.nodes[path], manifest).items()}
    card = tree_card(
        remote.address.repo, found.digest, tree, nodes, {path: _ranks(store, m) for path, m in nodes.items()}
    )
    git = {README_FILE: git_id([card], len(card))}
    if may_write_readme(remote, head, card, before, notes, own=False, force=force):
        wanted[README_FILE] = card
    else:
        git = {}
    wanted[RECORD_FILE] = encode_tree_record(TreeOnHub(found.digest, tree, git))
    if tree.base_name.startswith("/"):
        notes.append(
            f"its record names the base by its place on this machine, {tree.base_name}, which others will read"
        )
    return wanted


def _node(store: Store, digest: Digest, manifest: Manifest) -> dict[str, bytes | Manifest]:
    """The files of a node's folder: those of its artifact, to the byte, and its record."""
    limits = {CONFIG_FILE: MAX_BYTES, README_FILE: MAX_README}
    small = {f.path: store.read_file(f, limits[f.path]) for f in manifest.files if f.path in limits}
    check_text(small.get(README_FILE, b""))
    git = {path: git_id([data], len(data)) for path, data in small.items()}
    return {**small, WEIGHTS_FILE: manifest, RECORD_FILE: encode_record(Record(digest, manifest, git))}


def _ranks(store: Store, manifest: Manifest) -> str:
    ranks = sorted({target.rank for target in store.layout(manifest).targets.values()})
    return f"{ranks[0]}{f' to {ranks[-1]}' if len(ranks) > 1 else ''}"


def _gone(
    remote: HubRemote,
    head: Snapshot,
    before: TreeOnHub | None,
    wanted: Mapping[str, object],
    notes: list[str],
    *,
    force: bool,
) -> list[str]:
    """The files of nodes that the tree there had, and has no more; whatever is not ours stays, and is named.

    Raises:
        ConflictError: there is another model.
    """
    old = [f"{path}/{name}" for path in before.tree.nodes for name in _OF_A_NODE] if before else []
    root = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name in head.files]
    others = sorted(set(head.files) - {*wanted, *old, *root, *HARMLESS, README_FILE, RECORD_FILE})
    models = root + [name for name in others if name == "config.json" or name.endswith(MODELS)]
    if models and (root or before is None) and not force:
        raise ConflictError(
            f"{remote.address} holds {', '.join(models[:3])} and no tree; name another repository, or --force"
        )
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        notes.append(f"left there as they are: {', '.join(others[:5])}{more}")
    return [name for name in dict.fromkeys((*old, *root)) if name in head.files and name not in wanted]
