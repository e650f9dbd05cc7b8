"""A sweep with its data: who competes with whom, and what would run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from loraforge.layers import inject
from loraforge.training.loop import make_plan
from loraforge_cli.options import Session
from loraforge_cli.output import count, emit, size, table
from loraforge_cli.sweep_settings import Entry, Sweep
from loraforge_cli.train_run import Prepared
from loraforge_registry.names import RefName


@dataclass(frozen=True)
class Ready:
    """A sweep, and the settings and data of each of its adapters, on one base."""

    sweep: Sweep
    each: Mapping[str, tuple[Entry, Prepared]]

    @property
    def contests(self) -> dict[RefName, list[str]]:
        """The names of each contest's adapters."""
        found: dict[RefName, list[str]] = {}
        for name, (entry, _) in self.each.items():
            found.setdefault(entry.contest, []).append(name)
        return found


def are_judged_alike(ready: Ready, names: Sequence[str]) -> bool:
    """Whether there is an evaluation of adapters, and it is of the same rows."""
    valid = [ready.each[name][1].valid for name in names]
    first = valid[0]
    return first is not None and all(one is not None and one.rows == first.rows for one in valid)


def steps_of(ready: Ready, name: str) -> int | None:
    """Return how many steps an adapter has, where that is known."""
    entry, prepared = ready.each[name]
    return make_plan(prepared.loader, entry.settings.config).total


def show_sweep(session: Session, ready: Ready) -> None:
    """Print what a sweep would do."""
    trained = {name: _trained(ready, name) for name in ready.each}
    state = 4 * sum(nbytes for _, nbytes in trained.values())  # itself, gradient, two moments
    model = next(iter(ready.each.values()))[1].model
    base = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    rungs = {contest: plan for contest in ready.contests if (plan := _rungs(ready, contest))}
    if session.as_json:
        rows = [
            {
                "adapter": name,
                "settings": {**entry.own, **entry.grid},
                "samples": len(prepared.counted.rows),
                "steps": steps_of(ready, name),
                "trainable": trained[name][0],
            }
            for name, (entry, prepared) in ready.each.items()
        ]
        halving = {str(name): [{"step": step, "kept": kept} for step, kept in plan] for name, plan in rungs.items()}
        document = {"dry_run": True, "adapters": rows, "halving": halving}
        emit({**document, "bytes_of_base": base, "bytes_of_training_state": state})
        return
    shown = [
        [
            name,
            said(entry.own),
            str(len(prepared.counted.rows)),
            str(steps_of(ready, name) or "?"),
            count(trained[name][0]),
        ]
        for name, (entry, prepared) in ready.each.items()
    ]
    click.echo(table(["ADAPTER", "ITS OWN", "SAMPLES>", "STEPS>", "TRAINED>"], shown))
    click.echo(f"\nmemory: {size(base)} base, once; {size(state)} training state; without activations")
    for contest, plan in rungs.items():
        goes = ", ".join(f"{kept} after {step} steps" for step, kept in plan)
        click.echo(f"{contest}: of {len(ready.contests[contest])} go on {goes}")


def _trained(ready: Ready, name: str) -> tuple[int, int]:
    """The number of parameters an adapter trains, and their bytes."""
    entry, prepared = ready.each[name]
    injected = inject(prepared.model, entry.settings.config)
    parameters = list(injected.parameters().values())
    injected.remove()
    return sum(p.numel() for p in parameters), sum(p.numel() * p.itemsize for p in parameters)


def _rungs(ready: Ready, contest: RefName) -> list[tuple[int, int]]:
    halving, names = ready.sweep.halving, ready.contests[contest]
    if halving is None or len(names) < 2:
        return []
    longest = max(steps_of(ready, name) or 0 for name in names)
    return halving.plan(len(names), longest - 1)


def said(settings: Mapping[str, Any]) -> str:
    """Return settings in a line."""
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in settings.items()
    )
