"""A recipe followed from the command line, and what is said about it."""

from typing import cast

import click

from loraforge.recipe import Made, Recipe
from loraforge.registry import Registry
from loraforge_cli.describe import Described, describe
from loraforge_cli.options import Session
from loraforge_cli.output import by_layer, emit, note, spread, table
from loraforge_cli.sources import print_plan
from loraforge_cli.summary import line
from loraforge_registry.names import RefName


def follow(session: Session, source: str, ref: RefName | None, *, root: str | None, update: bool, force: bool) -> None:
    """Follow a recipe; without a name for the result only say what would be made."""
    recipe, registry = Recipe.load(source, root=root), Registry(session.store_path)
    if ref is None:
        made = recipe.preview(registry, update=update)
        _say(session, made)
        print_plan(session, made.adapter, made.report)
        return
    made = recipe.run(registry, name=str(ref), update=update, force=force)
    _say(session, made)
    assert made.digest is not None, "it was run"  # noqa: S101 - not a preview
    described = describe(registry.store, made.digest, ref)
    if session.as_json:
        emit({**described.as_json(), "steps": _steps(made), "inputs": _inputs(made), "notes": list(made.notes)})
        return
    click.echo(line(described))
    if not session.quiet:
        click.echo("\n" + table(["STEP", "HOW", "DIGEST", ""], _rows(made)))
        if described.errors:
            click.echo("\n" + _errors(described))


def _say(session: Session, made: Made) -> None:
    for text in made.notes:
        note(text, quiet=session.quiet)


def _rows(made: Made) -> list[list[str]]:
    return [
        [
            step.name,
            step.operation,
            f"sha256:{step.digest.short}" if step.digest else "-",
            "found" if step.found else "made",
        ]
        for step in made.steps
    ]


def _steps(made: Made) -> list[dict[str, object]]:
    return [
        {"name": step.name, "operation": step.operation, "digest": str(step.digest), "found": step.found}
        for step in made.steps
    ]


def _inputs(made: Made) -> dict[str, dict[str, str]]:
    return {
        name: {"source": pin.source, "digest": str(pin.digest), "content_id": str(pin.content_id)}
        for name, pin in made.pins.items()
    }


def _errors(described: Described) -> str:
    """The relative error by target as the manifest has it: also of a step that was found, not made."""
    report = described.manifest.report or {}
    targets = cast("dict[str, dict[str, float]]", report["targets"])
    rows = []
    for label, names in by_layer(targets).items():
        found = [targets[name] for name in names]
        ranks = f"{spread(t['rank_before'] for t in found)} -> {spread(t['rank'] for t in found)}"
        rows.append([label, str(len(names)), ranks, spread(t["error"] for t in found)])
    overall = ["all", str(len(targets)), "", f"{cast('float', report['error']):.3g}"]
    return table(["TARGET", "N>", "RANK", "ERROR>"], [*rows, overall])
