"""``loraforge gc``: take away what nothing needs."""

import click

from loraforge_cli.options import Session, common
from loraforge_cli.output import emit, facts, many, note, size, table
from loraforge_registry.collect import Collection, Garbage
from loraforge_registry.objects import MANIFESTS

_SHOWN = 50


@click.command("gc")
@click.option("--dry-run", is_flag=True, help="Say what would go, and why; touch nothing.")
@click.option("--yes", is_flag=True, help="Do it.")
@click.option("--now", is_flag=True, help="With --yes: delete at once, instead of at the next gc.")
@common
def command(session: Session, *, dry_run: bool, yes: bool, now: bool) -> None:
    """Collect what no name and no lineage needs, while others push, pull and merge.

    It goes to the trash, which the next gc empties. Until then fsck --repair brings back what turns out to be missing.
    """
    if dry_run == yes:
        raise click.UsageError("say what to do: --dry-run shows what would go, --yes does it")
    if now and not yes:
        raise click.UsageError("--now goes with --yes")
    found = session.store().gc(dry_run=dry_run, now=now)
    if session.as_json:
        emit(_as_json(found, dry_run=dry_run))
        return
    _show(session, found, dry_run=dry_run, now=now)


def _show(session: Session, found: Collection, *, dry_run: bool, now: bool) -> None:
    if found.garbage and not session.quiet:
        click.echo(table(["DIGEST", "WHAT", "SIZE>", "WHY"], [_row(item) for item in found.garbage[:_SHOWN]]) + "\n")
        if len(found.garbage) > _SHOWN:
            note(f"and {len(found.garbage) - _SHOWN} more: --json has them all")
    artifacts = sum(item.area == MANIFESTS for item in found.garbage)
    goes = f"{many(artifacts, 'artifact')}, {many(len(found.garbage) - artifacts, 'file')}, {size(found.size)}"
    where = "deleted" if now else "to the trash, until the next gc"
    click.echo(
        facts(
            {
                "would go" if dry_run else "gone": f"{goes}{'' if dry_run else f' ({where})'}",
                "trash": f"{size(found.emptied)} {'would be ' * dry_run}deleted" if found.emptied else None,
                "left by crashes": f"{len(found.leftovers)} files" if found.leftovers else None,
            }
        )
    )


def _row(item: Garbage) -> list[str]:
    return [item.digest.short, "artifact" if item.area == MANIFESTS else "file", size(item.size), item.why]


def _as_json(found: Collection, *, dry_run: bool) -> dict[str, object]:
    return {
        "dry_run": dry_run,
        "size": found.size,
        "emptied": found.emptied,
        "leftovers": list(found.leftovers),
        "garbage": [
            {
                "digest": str(item.digest),
                "kind": "artifact" if item.area == MANIFESTS else "file",
                "size": item.size,
                "why": item.why,
            }
            for item in found.garbage
        ],
    }
