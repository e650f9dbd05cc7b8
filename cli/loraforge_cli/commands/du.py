"""``loraforge du``: what the store holds."""

import click

from loraforge_cli.options import Session, common
from loraforge_cli.output import emit, facts, size


@click.command("du")
@common
def command(session: Session) -> None:
    """Say how many bytes the adapters have, how many lie on disk, and how many no name or lineage needs."""
    store = session.store()
    usage = store.usage()
    if session.as_json:
        emit(
            {
                "store": str(store.path),
                "artifacts": usage.artifacts,
                "logical": usage.logical,
                "physical": usage.physical,
                "reclaimable": usage.reclaimable,
            }
        )
        return
    click.echo(
        facts(
            {
                "store": str(store.path),
                "artifacts": str(usage.artifacts),
                "logical": f"{size(usage.logical)} (every adapter counted whole)",
                "physical": f"{size(usage.physical)} (equal files are stored once)",
                "reclaimable": f"{size(usage.reclaimable)} (no name or lineage needs it)",
            }
        )
    )
