"""Nodes trained atop their parents, and put into their tree."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loraforge.adapter import content_id
from loraforge.errors import TrainingError
from loraforge.formats import peft
from loraforge.training import ranks
from loraforge.tree import Node, Tree
from loraforge.tree.model import atop
from loraforge.tree.nodes import path_of
from loraforge_cli.options import Session
from loraforge_cli.train_parent import Parent
from loraforge_cli.train_run import prepare, show_plan, train_once
from loraforge_cli.train_settings import TrainSettings
from loraforge_registry.trees import TreeRecord, parent_path


@dataclass(frozen=True)
class Growth:
    """One node to be trained: where, and how."""

    path: str
    settings: TrainSettings


def grow(session: Session, tree: Tree, growths: Sequence[Growth], *, resume: bool) -> list[Node]:
    """Train nodes, one after the other; each is in the tree when the next begins, so one may stand on another.

    This is where several siblings would be trained in one run: they have the same parent, the same weights below.
    """
    return [grow_one(session, tree, growth, resume=resume) for growth in growths]


def grow_one(session: Session, tree: Tree, growth: Growth, *, resume: bool) -> Node:
    """Train one node on its parent's weights, which are those of ``loraforge tree merge``."""
    record = tree.check_free(growth.path)
    _check_plain(record, growth)
    prepared = prepare(session, growth.settings, parent=_parent(tree, record, growth.path))
    made = train_once(session, prepared, resume=resume)
    if ranks.rank() > 0:
        return Node(tree, growth.path, record.base)
    with tree.registry.store.session():
        derivation = atop(tree.artifact(record, parent_path(growth.path)), made.derivation, 1.0)
        found = tree.registry.store.put(peft.encode(made.adapter), derivation=derivation, report=made.report)
        tree.commit(record, {growth.path: found.digest}, f"tree grow {growth.path}")
    return Node(tree, growth.path, found.digest)


def show(session: Session, tree: Tree, growth: Growth) -> None:
    """Print what would be trained."""
    record = tree.check_free(growth.path)
    _check_plain(record, growth)
    show_plan(session, prepare(session, growth.settings, parent=_parent(tree, record, growth.path)))


def beside(settings: TrainSettings, path: str, *, alone: bool) -> TrainSettings:
    """Give each of several nodes a directory of its own in --run."""
    if settings.run is None or alone:
        return settings
    return replace(settings, run=str(Path(settings.run) / path.replace("/", "-")))


def _parent(tree: Tree, record: TreeRecord, path: str) -> Parent | None:
    above = parent_path(path)
    if above is None:
        return None
    path_adapters = tuple(tree.cache.open(digest) for digest in path_of(record, above).values())
    return Parent(above, path_adapters[-1], content_id(path_adapters[-1]), path_adapters)


def _check_plain(record: TreeRecord, growth: Growth) -> None:
    """Refuse before hours of training what could not be added up with what is below.

    Raises:
        TrainingError: DoRA atop a node.
    """
    above = parent_path(growth.path)
    if above is not None and growth.settings.config.dora and above in record.nodes:
        raise TrainingError(
            f"{growth.path}: DoRA scales base and updates together, so it does not add up with {above} below it; leave "
            "--dora out"
        )
