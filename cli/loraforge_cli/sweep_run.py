"""Several adapters trained at once on one base, and each of them into the store when it ends."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import click

import loraforge
from loraforge.adapter import Adapter
from loraforge.errors import TrainingError
from loraforge.registry import Registry
from loraforge.training import Member, Metrics, Trained, train_many
from loraforge.training.checkpoints import METRICS
from loraforge.training.provenance import base_digest, trained
from loraforge_cli.describe import Described
from loraforge_cli.options import Session
from loraforge_cli.output import note
from loraforge_cli.sweep_plan import Ready, are_judged_alike, steps_of
from loraforge_cli.sweep_report import best_loss, metrics_line, show_results
from loraforge_cli.sweep_settings import Sweep
from loraforge_cli.train_run import (
    Prepared,
    RunResult,
    check_free,
    data_line,
    inputs_of,
    interruptible,
    memory_named,
    prepare,
    report_of,
    store_trained,
)
from loraforge_registry.canonical import Value
from loraforge_registry.names import RefName

_LOG_EVERY = 10


@dataclass(frozen=True)
class _Keeper:
    """What has been seen of each adapter, and where it goes."""

    registry: Registry
    ready: Ready
    inputs: Mapping[str, Mapping[str, Value]]
    force: bool
    seen: dict[str, dict[int, Metrics]] = field(default_factory=dict)
    stored: dict[str, Described] = field(default_factory=dict)

    def store(self, name: str, adapter: Adapter, called: RefName | None = None) -> Described:
        """Store an adapter with the lineage that a run of its own would give it."""
        entry, prepared = self.ready.each[name]
        parent = prepared.parent
        start = None if parent is None else parent.adapter
        derivation = trained(entry.settings.config, self.inputs[name], start, version=loraforge.__version__)
        made = RunResult(adapter, derivation, report_of(self.history(name)))
        return store_trained(self.registry, parent, made, called or entry.name, force=self.force)

    def history(self, name: str) -> list[Metrics]:
        """Return all steps of an adapter, those before the run was resumed too."""
        return [m for _, m in sorted({**steps_before(self.ready.sweep.run, name), **self.seen.get(name, {})}.items())]


def prepare_sweep(session: Session, sweep: Sweep) -> Ready:
    """Read the base once, and each adapter's data.

    Raises:
        TrainingError: a contest whose adapters are not judged by the same data.
    """
    each = {}
    first: Prepared | None = None
    for entry in sweep.entries:
        prepared = prepare(session, entry.settings, first)
        first = first or prepared
        each[str(entry.name)] = entry, prepared
    ready = Ready(sweep, each)
    for contest, names in ready.contests.items():
        if sweep.halving is not None and len(names) > 1 and not are_judged_alike(ready, names):
            raise TrainingError(
                f"{contest}: halving judges its {len(names)} adapters by their loss on the same data: give valid, or "
                "val_split with the same data and seed for all"
            )
    return ready


def run_sweep(session: Session, ready: Ready, *, resume: bool, force: bool) -> None:
    """Train all, store each that ends, and print how it went."""
    registry, base = Registry(session.store_path), base_digest(ready.sweep.entries[0].settings.base)
    for called in {RefName.parse(name) for name in ready.each} | set(ready.contests):
        check_free(registry, called, force=force or resume)  # what ended before a break has its name already
    inputs = {name: inputs_of(prepared, base) for name, (_, prepared) in ready.each.items()}
    for name, (_, prepared) in ready.each.items():
        if prepared.counted.truncated or prepared.counted.skipped:
            note(f"data of {name}: {data_line(prepared.counted)}", quiet=session.quiet)
    keeper = _Keeper(registry, ready, inputs, force)
    found = _train(session, keeper, resume=resume)
    if found.apart is not None:
        note(f"the adapters took turns on the base: {found.apart}", quiet=session.quiet)
    history = {name: keeper.history(name) for name in ready.each}
    winners = _winners(ready, found, history)
    for contest, winner in winners.items():
        keeper.store(winner, found[winner], contest)
    show_results(session, ready, found, keeper.stored, history, winners)
    for error in found.failed.values():
        note(str(error))
    if any(not any(name in found for name in names) for names in ready.contests.values()):
        raise click.exceptions.Exit(1)


def _train(session: Session, keeper: _Keeper, *, resume: bool) -> Trained:
    ready, sweep = keeper.ready, keeper.ready.sweep
    totals = {name: steps_of(ready, name) for name in ready.each}
    with interruptible(session) as interrupted, steps_shown(session, totals) as show, memory_named():

        def on_step(name: str, metrics: Metrics) -> None:
            keeper.seen.setdefault(name, {})[metrics.step] = metrics
            show(name, metrics)

        def on_end(name: str, adapter: Adapter) -> None:
            keeper.stored[name] = keeper.store(name, adapter)

        found = train_many(
            next(iter(ready.each.values()))[1].model,
            {name: _member(ready, name, keeper.inputs[name]) for name in ready.each},
            halving=sweep.halving,
            at_once=sweep.at_once,
            run=sweep.run,
            resume=resume,
            on_step=on_step,
            on_end=on_end,
            should_stop=interrupted,
        )
    if interrupted() and len(keeper.stored) + len(found.failed) + len(found.dropped) < len(ready.each):
        kept = f"all are kept in {sweep.run}: the same command with --resume goes on"
        note(f"stopped; {kept if sweep.run else 'those that were not done are lost (with --run DIR they are kept)'}")
        raise click.exceptions.Exit(130)
    return found


def _member(ready: Ready, name: str, inputs: Mapping[str, object]) -> Member:
    entry, prepared = ready.each[name]
    competes = ready.sweep.halving is not None and len(ready.contests[entry.contest]) > 1
    contest = str(entry.contest) if competes else None
    return Member(prepared.loader, entry.settings.config, prepared.valid, inputs=inputs, contest=contest)


def _winners(ready: Ready, found: Trained, history: Mapping[str, Sequence[Metrics]]) -> dict[RefName, str]:
    """The best of each grid whose adapters are judged alike; it takes the grid's own name."""
    winners: dict[RefName, str] = {}
    for contest, names in ready.contests.items():
        done = {name: loss for name in names if name in found and (loss := best_loss(history[name])) is not None}
        if len(names) > 1 and done and are_judged_alike(ready, names):
            winners[contest] = min(done, key=lambda name: done[name])
    return winners


def steps_before(run: str | None, name: str) -> dict[int, Metrics]:
    """The steps of an adapter that a run's metrics tell of."""
    path = None if run is None else Path(run).expanduser() / METRICS
    if path is None or not path.exists():
        return {}
    lines = [line for line in map(json.loads, path.read_text().splitlines()) if line["name"] == name]
    known = {one.name for one in fields(Metrics)}
    return {line["step"]: Metrics(**{key: line[key] for key in line.keys() & known}) for line in lines}


@contextmanager
def steps_shown(session: Session, totals: Mapping[str, int | None]) -> Iterator[Callable[[str, Metrics], None]]:
    """A bar of all steps on a terminal, else a line every so many steps; both on stderr."""

    def log(name: str, metrics: Metrics) -> None:
        if metrics.step % _LOG_EVERY == 0 or metrics.step in (1, totals[name]) or metrics.eval_loss is not None:
            of = f"/{totals[name]}" if totals[name] else ""
            note(f"{name}  step {metrics.step}{of}  {metrics_line(metrics)}", quiet=session.quiet)

    if session.quiet or not sys.stderr.isatty():
        yield log
        return
    from tqdm import tqdm

    total = None if None in totals.values() else sum(steps or 0 for steps in totals.values())
    with tqdm(desc=f"training {len(totals)}", total=total, unit="step", leave=False, file=sys.stderr) as bar:

        def step(name: str, metrics: Metrics) -> None:
            bar.set_postfix_str(f"{name} {metrics_line(metrics)}", refresh=False)
            bar.update()

        yield step
