"""``loraforge rerank``: a lower rank, and what it costs."""

import click

from loraforge_cli.options import SOURCE, Session, common, refuse_url
from loraforge_registry.names import RefName


@click.command("rerank")
@click.argument("source", type=SOURCE)
@click.option("--as", "name", metavar="NAME[:TAG]", help="What to call the result.")
@click.option("--rank", type=int, metavar="R", help="The rank of every target.")
@click.option("--energy", type=float, metavar="E", help="The share of every target's |dW|^2 to keep.")
@click.option("--max-params", "max_parameters", type=int, metavar="N", help="The number of parameters in all.")
@click.option("--min-rank", type=int, default=1, metavar="R", help="The least rank, with --energy or --max-params.")
@click.option("--max-rank", type=int, metavar="R", help="The greatest rank, with --energy or --max-params.")
@click.option("--force", is_flag=True, help="Move a tag that means another adapter.")
@click.option("--dry-run", is_flag=True, help="Say what would be made; store nothing.")
@common
def command(
    session: Session,
    *,
    source: str,
    name: str | None,
    force: bool,
    dry_run: bool,
    rank: int | None,
    energy: float | None,
    max_parameters: int | None,
    min_rank: int,
    max_rank: int | None,
) -> None:
    """Shrink an adapter: every update replaced by its best approximation at a lower rank.

    Say exactly one of --rank, --energy and --max-params. The error is that of the updates, |dW - dW'| / |dW|.
    """
    refuse_url(source)
    if name is None and not dry_run:
        raise click.UsageError("say what to call the result: --as NAME[:TAG] (or --dry-run)")
    ref = None if name is None else RefName.parse(name)
    from loraforge.compose import rerank
    from loraforge_cli.sources import open_source, print_plan, print_result, store_result

    reranked = rerank(
        open_source(session, source),
        rank,
        energy=energy,
        max_parameters=max_parameters,
        min_rank=min_rank,
        max_rank=max_rank,
    )
    if dry_run or ref is None:
        print_plan(session, reranked.adapter, reranked.report)
        return
    described = store_result(session, reranked.adapter, [source], ref, reranked.report, force=force)
    print_result(session, described, reranked.report)
