"""How a sweep went: a row for each adapter."""

import math
from collections.abc import Mapping, Sequence

import click

from loraforge.training import Metrics, Trained
from loraforge_cli.describe import Described
from loraforge_cli.options import Session
from loraforge_cli.output import emit, table
from loraforge_cli.sweep_plan import Ready
from loraforge_registry.names import RefName


def show_results(
    session: Session,
    ready: Ready,
    found: Trained,
    stored: Mapping[str, Described],
    history: Mapping[str, Sequence[Metrics]],
    winners: Mapping[RefName, str],
) -> None:
    """Print a table, or one JSON document."""
    if session.as_json:
        rows = [
            {
                "adapter": name,
                "settings": {**entry.own, **entry.grid},
                "state": _state(name, found, winners),
                "steps": _steps(history[name]),
                "loss": history[name][-1].loss if history[name] else None,
                "eval_loss": _judged(name, found, history),
                "error": str(found.failed[name]) if name in found.failed else None,
                **(stored[name].as_json() if name in stored else {}),
            }
            for name, (entry, _) in ready.each.items()
        ]
        best = {str(contest): name for contest, name in winners.items()}
        emit({"adapters": rows, "best": best, "in_turns": found.apart})
        return
    shown = [
        [
            name,
            str(_steps(history[name])),
            _four(history[name][-1].loss if history[name] else None),
            _four(_judged(name, found, history)),
            _state(name, found, winners),
        ]
        for name in ready.each
    ]
    click.echo(table(["ADAPTER", "STEPS>", "LOSS>", "EVAL>", ""], shown))
    for contest, name in winners.items():
        click.echo(f"{contest} is {name}")


def best_loss(steps: Sequence[Metrics]) -> float | None:
    """Return the least loss of all evaluations."""
    losses = [m.eval_loss for m in steps if m.eval_loss is not None and math.isfinite(m.eval_loss)]
    return min(losses) if losses else None


def metrics_line(metrics: Metrics) -> str:
    """Return what a step did, in a line."""
    judged = "" if metrics.eval_loss is None else f"  eval {metrics.eval_loss:.4f}"
    return f"loss {metrics.loss:.4f}{judged}  lr {metrics.lr:.3g}"


def _state(name: str, found: Trained, winners: Mapping[RefName, str]) -> str:
    if name in winners.values():
        return "best"
    return "stored" if name in found else "dropped" if name in found.dropped else "failed"


def _steps(history: Sequence[Metrics]) -> int:
    return history[-1].step if history else 0


def _judged(name: str, found: Trained, history: Mapping[str, Sequence[Metrics]]) -> float | None:
    lost = found.dropped.get(name)
    loss = best_loss(history[name]) if lost is None else lost.loss
    return loss if loss is not None and math.isfinite(loss) else None


def _four(number: float | None) -> str:
    return "-" if number is None else f"{number:.4f}"
