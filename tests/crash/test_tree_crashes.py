"""Whatever operation on a tree is killed or refused at whatever call: the tree is the old one or the new one."""

import pytest
import torch

import loraforge as lf
from loraforge.formats import peft
from loraforge.tree import Tree, reshape
from loraforge.tree.model import atop
from loraforge_cli.tree_view import lines, view
from loraforge_registry.digest import Digest
from loraforge_registry.manifest import Artifact, Derivation
from loraforge_registry.names import RefName
from loraforge_registry.trees import parent_path
from tests.checkpoints import a_base, adapter_for, write_base
from tests.crash.store_faults import run
from tests.crash.store_world import in_memory, loraforge, quick_disk, restore, snapshot

Q, V = "model.layers.0.q", "model.layers.0.v"
NODES = ("french", "french/law", "french/law/contract", "german")


@pytest.fixture(scope="module")
def world():
    """A store with the tree t, and a loose adapter, in memory."""
    torch.set_num_threads(1)  # threads do not come along into a fork
    with in_memory() as root, quick_disk():
        registry = lf.Registry(root / "store")
        write_base(root / "base", a_base())
        tree = Tree.create(registry, "t", root / "base")
        for number, path in enumerate(NODES):
            reshape.graft(tree, path, _stored(registry, number))
        _stored(registry, 9, "loose:v1")
        yield root, snapshot(root / "store")


def _stored(registry, seed, name=None):
    digest = registry.push(adapter_for(a_base(), seed=seed, targets=(Q, V)), name)
    return Artifact(digest, registry.store.manifest(digest).content_id)


def grown(root):
    """What growing does once a node is trained."""
    tree = Tree.open(lf.Registry(root / "store"), "t")
    record, path = tree.record, "german/new"
    derivation = atop(tree.artifact(record, parent_path(path)), Derivation("train", 1, (), {}), 1.0)
    with tree.registry.store.session():
        incoming = peft.encode(adapter_for(a_base(), seed=7, targets=(Q, V)))
        new = tree.registry.store.put(incoming, derivation=derivation).digest
        tree.commit(record, {path: new}, f"tree grow {path}")


COMMANDS = {
    "create": ("tree", "create", "u", "--base", "{root}/base"),
    "graft": ("tree", "graft", "t", "french/loose", "loose:v1"),
    "move": ("tree", "move", "t", "french/law", "french/laws"),
    "move --keep-delta": ("tree", "move", "t", "german", "french/german", "--keep-delta"),
    "rebase": ("tree", "rebase", "t", "german", "--onto", "french"),
    "squash": ("tree", "squash", "t", "french/law"),
    "prune": ("tree", "prune", "t", "german"),
    "flatten": ("tree", "flatten", "t", "french/law", "--as", "flat:v1"),
    "rm": ("rm", "t"),
    "tag": ("tag", "t", "t:v1"),
}


def _state(root) -> dict[str, Digest | None]:
    store = lf.Registry(root / "store").store
    return {name: store.lookup(RefName.parse(name)) for name in ("t", "t:v1", "u", "flat:v1")}


def _check_whole(root, wrong, what):
    """Every tree that is there can be shown, and the store is sound."""
    store = lf.Registry(root / "store").store
    for name, digest in _state(root).items():
        if digest is not None and name[0] in "tu" and not lines(view(store, digest, RefName.parse(name))):
            wrong.append(f"{what}: {name} cannot be shown")
    report = store.fsck()
    if not report.holds:
        wrong.append(f"{what}: {report.problems}")


@pytest.mark.parametrize("name", ["grow", *COMMANDS])
def test_a_tree_is_the_old_or_the_new_one(world, name):
    root, start = world
    words = [word.replace("{root}", str(root)) for word in COMMANDS.get(name, ())]
    action = (lambda: grown(root)) if name == "grow" else loraforge("--store", root / "store", *words)
    restore(root / "store", start)
    old = _state(root)
    done = run(action)
    assert done.code == 0, done.err
    new = _state(root)
    assert new != old
    wrong, injections = [], 0
    for fault, step in (("kill", 1), ("EIO once", 3), ("ENOSPC", 5)):
        for at in range(0, len(done.calls), step):
            if done.calls[at][0] == "flock":
                continue
            restore(root / "store", start)
            ended = run(action, fault, at)
            injections += 1
            what = f"{name}, {fault} at {at} ({done.calls[at][0]})"
            now = _state(root)
            if now not in (old, new) or (ended.code == 0 and now != new):
                wrong.append(f"{what}: {now}")
            _check_whole(root, wrong, what)
            if now == old and run(action).code != 0:
                wrong.append(f"{what}: the next one fails")
            if _state(root) != new:
                wrong.append(f"{what}: the next one ends in {_state(root)}")
    restore(root / "store", start)
    assert not wrong, "\n".join(wrong[:20])
    assert injections > 10
