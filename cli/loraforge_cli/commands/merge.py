"""``loraforge merge``: adapters into a base checkpoint."""

import click

from loraforge_cli.options import SOURCE, Session, common, refuse_url, weighted
from loraforge_cli.output import note
from loraforge_registry.paths import expand


@click.command("merge")
@click.argument("base", metavar="BASE")
@click.argument("terms", metavar="SOURCE[=WEIGHT]...", nargs=-1, required=True, type=SOURCE)
@click.option("--out", metavar="DIR", help="The directory to make.")
@click.option("--in-place", is_flag=True, help="Rewrite BASE itself: only the bytes that change.")
@click.option("--dry-run", is_flag=True, help="Say what would change, and what it would lose; write nothing.")
@click.option(
    "--compute",
    type=click.Choice(["exact", "float32"]),
    default="exact",
    show_default=True,
    help="exact: the true sum, rounded once. float32: PEFT's arithmetic, one adapter after the other.",
)
@click.option("--no-receipt", is_flag=True, help="Faster, without digests; cannot be unmerged or verified.")
@common
def command(
    session: Session,
    *,
    base: str,
    terms: tuple[str, ...],
    out: str | None,
    in_place: bool,
    dry_run: bool,
    compute: str,
    no_receipt: bool,
) -> None:
    """Merge adapters into the base checkpoint BASE, a directory or one .safetensors file.

    \b
    loraforge merge ./base french:v1 law:v1=0.5 --out ./merged

    The receipt in the output lets unmerge restore every bit of the base. LOST is |(W' - W) - dW| / |dW|, what
    rounding to the base's number format took from the update.
    """  # noqa: D301 - click's mark for a line to leave as it is
    refuse_url(base)
    if sum([out is not None, in_place, dry_run]) != 1 and not (dry_run and (out or in_place)):
        raise click.UsageError("say exactly one of --out DIR, --in-place and --dry-run")
    if in_place and no_receipt:
        raise click.UsageError("--in-place without a receipt could not be undone; leave --no-receipt out")
    parsed = [weighted(term) for term in terms]
    from loraforge.checkpoint.inplace import merge_in_place
    from loraforge.checkpoint.merge import merge, preview_merge
    from loraforge.checkpoint.receipt import merged_already
    from loraforge.registry import Registry
    from loraforge_cli.merging import keep_sources, print_merge, progress_bar

    registry = Registry(session.store_path)
    merged_already(expand(base))  # a receipt that is damaged is refused before anything is done
    if dry_run:
        print_merge(session, preview_merge(base, parsed, compute=compute, registry=registry), dry_run=True)
        return
    if not no_receipt:
        keep_sources(registry, [source for source, _ in parsed])
    if out is None:
        result = merge_in_place(base, parsed, compute=compute, registry=registry)
    else:
        with progress_bar(session, "merging") as progress:
            result = merge(
                base, parsed, out, compute=compute, receipt=not no_receipt, registry=registry, progress=progress
            )
    print_merge(session, result)
    if out is not None and (before := merged_already(expand(base))):  # a merge that was cut off has been finished
        note(
            f"{base} has {', '.join(before)} merged in already, which stays in and can be taken out of {base} only",
            quiet=session.quiet,
        )
