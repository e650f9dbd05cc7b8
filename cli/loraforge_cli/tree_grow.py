"""Nodes trained atop their parents, and put into their tree."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import click

from loraforge.adapter import content_id
from loraforge.errors import TrainingError
from loraforge.formats import peft
from loraforge.training import Member, Metrics, ranks, train_many
from loraforge.training.loop import make_plan
from loraforge.training.provenance import trained
from loraforge.tree import Node, Tree
from loraforge.tree.model import atop
from loraforge.tree.nodes import path_of
from loraforge.version import __version__
from loraforge_cli.options import Session
from loraforge_cli.output import note
from loraforge_cli.sweep_run import steps_before, steps_shown
from loraforge_cli.train_parent import Parent
from loraforge_cli.train_run import (
    Prepared,
    RunResult,
    inputs_of,
    interruptible,
    memory_named,
    prepare,
    report_of,
    show_plan,
    train_once,
)
from loraforge_cli.train_settings import TrainSettings
from loraforge_registry.digest import Digest
from loraforge_registry.trees import TreeRecord, parent_path


@dataclass(frozen=True)
class Growth:
    """One node to be trained: where, and how."""

    path: str
    settings: TrainSettings


def grow(
    session: Session, tree: Tree, growths: Sequence[Growth], *, resume: bool, in_turns: bool = False
) -> Iterator[Node]:
    """Train nodes and yield each that is in the tree; siblings in one run on their parent's weights.

    ``in_turns`` trains one after the other, each to the bit what it would be alone: at once it is that to the rounding
    of products with more rows. A node may stand on one that was named before it.
    """
    for above, siblings in groupby(growths, lambda growth: parent_path(growth.path)):
        some = list(siblings)
        if in_turns or len(some) == 1:
            each = (replace(one, settings=_own_run(one, alone=len(growths) == 1)) for one in some)
            yield from (grow_one(session, tree, one, resume=resume) for one in each)
        else:
            yield from _grow_together(session, tree, some, above, resume=resume)


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


def _own_run(growth: Growth, *, alone: bool) -> TrainSettings:
    """Give each of several nodes a directory of its own in --run."""
    run = growth.settings.run
    return growth.settings if run is None or alone else _in_run(growth.settings, growth.path)


def _in_run(settings: TrainSettings, path: str) -> TrainSettings:
    return settings if settings.run is None else replace(settings, run=str(Path(settings.run) / path.replace("/", "-")))


def _grow_together(
    session: Session, tree: Tree, growths: Sequence[Growth], above: str | None, *, resume: bool
) -> list[Node]:
    """Train siblings in one run, and put all of them into the tree in one move."""
    record = tree.check_free(*(growth.path for growth in growths))
    ready: dict[str, Prepared] = {}
    for growth in growths:
        _check_plain(record, growth)
        first = next(iter(ready.values()), None)
        ready[growth.path] = prepare(session, growth.settings, first, parent=_parent(tree, record, growth.path))
    made = _train_together(session, ready, record.base, f"{above or 'base'}-children", resume=resume)
    with tree.registry.store.session():
        new: dict[str, Digest | None] = {}
        for path, one in made.items():
            derivation = atop(tree.artifact(record, above), one.derivation, 1.0)
            incoming = peft.encode(one.adapter)
            new[path] = tree.registry.store.put(incoming, derivation=derivation, report=one.report).digest
        tree.commit(record, new, f"tree grow {' '.join(new)}")
    return [Node(tree, path, digest) for path, digest in new.items() if digest is not None]


def _train_together(
    session: Session, ready: Mapping[str, Prepared], base: Digest, place: str, *, resume: bool
) -> dict[str, RunResult]:
    """Train adapters on one model; nothing is stored.

    Raises:
        TrainingError, NumericalError: one of them cannot be trained; none is taken.
    """
    some = next(iter(ready.values()))
    run = _in_run(some.settings, place).run
    inputs = {path: inputs_of(prepared, base) for path, prepared in ready.items()}
    members = {
        path: Member(one.loader, one.settings.config, one.valid, inputs=inputs[path]) for path, one in ready.items()
    }
    seen: dict[str, dict[int, Metrics]] = {path: steps_before(run if resume else None, path) for path in ready}
    totals = {path: make_plan(one.loader, one.settings.config).total for path, one in ready.items()}
    with interruptible(session) as interrupted, steps_shown(session, totals) as show, memory_named():

        def on_step(path: str, metrics: Metrics) -> None:
            seen[path][metrics.step] = metrics
            show(path, metrics)

        found = train_many(some.model, members, run=run, resume=resume, on_step=on_step, should_stop=interrupted)
    if interrupted() and any(max(seen[path], default=0) != total for path, total in totals.items()):
        kept = f"kept in {run}: the same command with --resume goes on" if run else "lost (with --run DIR it is kept)"
        note(f"stopped; what was trained is {kept}")
        raise click.exceptions.Exit(130)
    if found.apart is not None:
        note(f"the nodes took turns on the base: {found.apart}", quiet=session.quiet)
    parent = None if some.parent is None else some.parent.adapter
    return {
        path: RunResult(
            found[path],  # raises what went wrong with it
            trained(prepared.settings.config, inputs[path], parent, version=__version__),
            report_of([metrics for _, metrics in sorted(seen[path].items())]),
        )
        for path, prepared in ready.items()
    }


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
