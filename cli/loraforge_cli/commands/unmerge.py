"""``loraforge unmerge``: a merged checkpoint back to its base, bit for bit."""

import click

from loraforge_cli.options import Session, common, refuse_url


@click.command("unmerge")
@click.argument("merged", metavar="DIR")
@click.option("--out", metavar="DIR", help="The directory to make; without it DIR itself is rewritten.")
@click.option("--only", multiple=True, metavar="NAME", help="Take out only this adapter (repeatable; needs --out).")
@click.option("--adapter", "adapters", multiple=True, metavar="PATH", help="An adapter that is not in the store.")
@click.option("--receipt", metavar="FILE", help="The receipt, if it does not lie in DIR (needs --out).")
@common
def command(
    session: Session,
    *,
    merged: str,
    out: str | None,
    only: tuple[str, ...],
    adapters: tuple[str, ...],
    receipt: str | None,
) -> None:
    """Take adapters out of a checkpoint that loraforge merged.

    Every tensor's digest is compared with the base's before anything appears.
    """
    refuse_url(merged)
    if out is None and (only or receipt):
        raise click.UsageError("--only and --receipt need --out DIR")
    from loraforge.checkpoint.inplace import unmerge_in_place
    from loraforge.checkpoint.merge import unmerge
    from loraforge.registry import Registry
    from loraforge_cli.merging import print_unmerge, progress_bar

    registry = Registry(session.store_path)
    if out is None:
        result = unmerge_in_place(merged, adapters=adapters, registry=registry)
    else:
        with progress_bar(session, "unmerging") as progress:
            result = unmerge(
                merged, out, only=only, adapters=adapters, registry=registry, receipt=receipt, progress=progress
            )
    print_unmerge(session, result, all_of_them=not only or not result.receipt_size)
