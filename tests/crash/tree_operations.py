"""An operation on a tree, killed or refused at whatever call: the tree is the old one or the new one.

    python -m tests.crash.tree_operations squash

It runs in a process of its own, whose forks are quick: that of a test has grown large.
"""

import json
import sys

import loraforge as lf
from loraforge_cli.tree_view import lines, view
from loraforge_registry.digest import Digest
from loraforge_registry.names import RefName
from tests.crash.store_derivations import TREES, grow, plant
from tests.crash.store_faults import run
from tests.crash.store_world import in_memory, loraforge, restore, snapshot


def strike(name):
    """Strike each call of an operation in turn; how many that were, and what was wrong afterwards."""
    with in_memory() as root:
        plant(root)
        return _strike(root, snapshot(root / "store"), name)


def _strike(root, start, name):
    words = [word.replace("{root}", str(root)) for word in TREES.get(name, ())]
    action = (lambda: grow(root)) if name == "grow" else loraforge("--store", root / "store", *words)
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
    return injections, wrong


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


if __name__ == "__main__":
    struck, found = strike(sys.argv[1])
    json.dump({"injections": struck, "wrong": found}, sys.stdout)
