"""``loraforge verify``: is a merged checkpoint what its receipt says?"""

import click

from loraforge_cli.options import Session, common, refuse_url

_SAID = {
    "receipt": "every tensor is as the merge left it (an adapter was not found, so the way back was not tried)",
    "adapters": "every tensor is as the merge left it, and gives the base when the adapters are taken out",
    "base": "base and adapters give exactly this checkpoint",
}


_SHOWN = 50  # differences


@click.command("verify")
@click.argument("merged", metavar="DIR")
@click.option("--base", metavar="BASE", help="The base: merge again, and compare.")
@click.option("--adapter", "adapters", multiple=True, metavar="PATH", help="An adapter that is not in the store.")
@click.option("--receipt", metavar="FILE", help="The receipt, if it does not lie in DIR.")
@common
def command(session: Session, *, merged: str, base: str | None, adapters: tuple[str, ...], receipt: str | None) -> None:
    """Compare a merged checkpoint with its receipt, by the digest of every tensor.

    Exits with 1 where a tensor differs.
    """
    refuse_url(merged)
    from loraforge.checkpoint.verify import verify_merge
    from loraforge.registry import Registry
    from loraforge_cli.merging import used_lines
    from loraforge_cli.output import emit, note

    report = verify_merge(merged, base=base, adapters=adapters, registry=Registry(session.store_path), receipt=receipt)
    if session.as_json:
        emit(
            {
                "holds": report.holds,
                "depth": report.depth,
                "tensors": report.tensors,
                "differences": {found.tensor: found.why for found in report.differences},
                "base": str(report.receipt.base),
                "merged": str(report.receipt.merged),
                "adapters": used_lines(report.receipt),
            }
        )
    elif report.holds:
        click.echo(f"{report.tensors} tensors: {_SAID[report.depth]}")
    else:
        for found in report.differences[:_SHOWN]:
            click.echo(f"{found.tensor} {found.why}")
        if len(report.differences) > _SHOWN:
            note(f"and {len(report.differences) - _SHOWN} more: --json has them all")
        note(f"{len(report.differences)} of {report.tensors} tensors differ", quiet=session.quiet)
    if not report.holds:
        raise click.exceptions.Exit(1)
