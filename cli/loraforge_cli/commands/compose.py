"""``loraforge compose``: several adapters into one."""

import click

from loraforge_cli.options import SOURCE, Session, common, weighted
from loraforge_registry.names import RefName


@click.command("compose")
@click.argument("terms", metavar="SOURCE[=WEIGHT]...", nargs=-1, required=True, type=SOURCE)
@click.option("--as", "name", metavar="NAME[:TAG]", help="What to call the result.")
@click.option("--method", type=click.Choice(["linear"]), default="linear", help="How to combine.", show_default=True)
@click.option("--rank", type=int, metavar="R", help="Re-rank every target to R.")
@click.option("--energy", type=float, metavar="E", help="Re-rank to the share E of every target's |dW|^2.")
@click.option("--max-params", "max_parameters", type=int, metavar="N", help="Re-rank to N parameters in all.")
@click.option("--base", metavar="BASE", help="The base's name, where the sources give different ones.")
@click.option("--drop-saved", is_flag=True, help="Leave out whole saved modules, biases and token rows.")
@click.option("--force", is_flag=True, help="Move a tag that means another adapter.")
@click.option("--dry-run", is_flag=True, help="Say what would be made; store nothing.")
@common
def command(
    session: Session,
    *,
    terms: tuple[str, ...],
    name: str | None,
    method: str,
    rank: int | None,
    energy: float | None,
    max_parameters: int | None,
    base: str | None,
    drop_saved: bool,
    force: bool,
    dry_run: bool,
) -> None:
    """Combine adapters into one: the weighted sum of their updates, exactly.

    \b
    loraforge compose french:v1=0.7 law:v1=0.3 --rank 16 --as french-law:v1

    A weight is any number; without one it is 1. Ranks add up, until --rank, --energy or --max-params brings them
    down to the best approximation, whose error is printed and recorded.
    """  # noqa: D301 - click's mark for a line to leave as it is
    parsed = [weighted(term) for term in terms]
    ref = _result_name(name, dry_run=dry_run)
    from loraforge.compose import METHODS, rerank
    from loraforge_cli.sources import open_source, print_plan, print_result, store_result

    sources = [(open_source(session, source), weight) for source, weight in parsed]
    result, report = METHODS[method].combine(sources, base=base, drop_saved=drop_saved), None
    if any(value is not None for value in (rank, energy, max_parameters)):
        reranked = rerank(result, rank, energy=energy, max_parameters=max_parameters)
        result, report = reranked.adapter, reranked.report
    if ref is None:
        print_plan(session, result, report)
        return
    described = store_result(session, result, [source for source, _ in parsed], ref, report, force=force)
    print_result(session, described, report)


def _result_name(name: str | None, *, dry_run: bool) -> RefName | None:
    if dry_run:
        return None
    if name is None:
        raise click.UsageError("say what to call the result: --as NAME[:TAG] (or --dry-run)")
    return RefName.parse(name)
