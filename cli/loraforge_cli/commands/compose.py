"""``loraforge compose``: several adapters into one, as the command line or a recipe says."""

from collections.abc import Mapping

import click

from loraforge_cli.options import SOURCE, Session, common, is_recipe, weighted
from loraforge_registry.names import RefName


@click.command("compose")
@click.argument("terms", metavar="SOURCE[=WEIGHT]... | RECIPE.yaml", nargs=-1, required=True, type=SOURCE)
@click.option("--as", "name", metavar="NAME[:TAG]", help="What to call the result.")
@click.option("--method", type=click.Choice(["linear"]), help="How to combine (linear).")
@click.option("--rank", type=int, metavar="R", help="Re-rank every target to R.")
@click.option("--energy", type=float, metavar="E", help="Re-rank to the share E of every target's |dW|^2.")
@click.option("--max-params", "max_parameters", type=int, metavar="N", help="Re-rank to N parameters in all.")
@click.option("--base", metavar="BASE", help="The base's name, where the sources give different ones.")
@click.option("--drop-saved", is_flag=True, help="Leave out whole saved modules, biases and token rows.")
@click.option("--update", is_flag=True, help="With a recipe: take its inputs as they are now, and pin them anew.")
@click.option("--root", metavar="DIR", help="With a recipe: its paths may lead anywhere below DIR.")
@click.option("--force", is_flag=True, help="Move a tag that means another adapter.")
@click.option("--dry-run", is_flag=True, help="Say what would be made; store nothing.")
@common
def command(
    session: Session,
    *,
    terms: tuple[str, ...],
    name: str | None,
    method: str | None,
    rank: int | None,
    energy: float | None,
    max_parameters: int | None,
    base: str | None,
    drop_saved: bool,
    update: bool,
    root: str | None,
    force: bool,
    dry_run: bool,
) -> None:
    """Combine adapters into one: the weighted sum of their updates, exactly.

    \b
    loraforge compose french:v1=0.7 law:v1=0.3 --rank 16 --as french-law:v1
    loraforge compose blend.yaml --as blend:v3

    A weight is any number; without one it is 1. Ranks add up, until --rank, --energy or --max-params brings them
    down to the best approximation, whose error is printed and recorded.

    A recipe says all that itself, step by step. Its inputs are pinned by digest in blend.lock, which
    later runs follow until --update; a step that was done before is not done again. Its paths stay below its own
    directory, or below --root.
    """  # noqa: D301 - click's mark for a line to leave as it is
    ref = _result_name(name, dry_run=dry_run)
    if len(terms) == 1 and is_recipe(terms[0]):
        from loraforge_cli.recipes import follow

        told = {"--method": method, "--rank": rank, "--energy": energy, "--max-params": max_parameters, "--base": base}
        refuse_told({**told, "--drop-saved": drop_saved or None})
        follow(session, terms[0], ref, root=root, update=update, force=force)
        return
    if root is not None:
        raise click.UsageError("--root goes with a recipe; a path on the command line may be anywhere")
    if update:
        raise click.UsageError("--update goes with a recipe; adapters on the command line are taken as they are")
    parsed = [weighted(term) for term in terms]
    criteria = {"rank": rank, "energy": energy, "max_parameters": max_parameters}
    parameters = {"base": base, "drop_saved": drop_saved or None}
    from loraforge_cli.sources import combine, open_source, print_plan, print_result, store_result

    sources = [(open_source(session, source), weight) for source, weight in parsed]
    result, report = combine(method or "linear", sources, parameters, criteria)
    if ref is None:
        print_plan(session, result, report)
        return
    described = store_result(session, result, [source for source, _ in parsed], ref, report, force=force)
    print_result(session, described, report)


def refuse_told(options: Mapping[str, object]) -> None:
    """Refuse what a recipe says itself."""
    told = next((name for name, value in options.items() if value is not None), None)
    if told is not None:
        raise click.UsageError(f"{told} goes with adapters on the command line; a recipe says that itself")


def _result_name(name: str | None, *, dry_run: bool) -> RefName | None:
    if dry_run:
        return None
    if name is None:
        raise click.UsageError("say what to call the result: --as NAME[:TAG] (or --dry-run)")
    return RefName.parse(name)
