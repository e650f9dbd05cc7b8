"""``loraforge rebuild``: is an adapter what its lineage says?"""

import click

from loraforge_cli.options import SOURCE, Session, common, refuse_url, stored
from loraforge_cli.output import emit
from loraforge_registry.names import Reference


@click.command("rebuild")
@click.argument("source", type=SOURCE)
@click.option("--verify", is_flag=True, help="Exit 1 where it does not come out the same.")
@click.option("--with", "brought", multiple=True, type=SOURCE, metavar="SOURCE", help="An input that is not stored.")
@click.option("--base", metavar="DIR", help="The base that it was extracted from, and ...")
@click.option("--finetuned", metavar="DIR", help="... the fine-tune of it.")
@common
def command(
    session: Session, *, source: str, verify: bool, brought: tuple[str, ...], base: str | None, finetuned: str | None
) -> int:
    """Derive an adapter again from its inputs, as its manifest says, and compare. Nothing is stored.

    The same means the same content id: every bit that it computes with. Where the linear algebra of another machine
    gives other last bits, how far apart they are is said, |dW - dW'| / |dW|.
    """
    refuse_url(source)
    digest = stored(session.store(), source)
    if (base is None) != (finetuned is None):
        raise click.UsageError("--base and --finetuned go together")
    from loraforge.recipe import rebuild
    from loraforge.registry import Registry

    checkpoints = None if base is None or finetuned is None else (base, finetuned)
    found = rebuild(source, Registry(session.store_path), sources=brought, checkpoints=checkpoints)
    ref = Reference.parse(source).ref
    if session.as_json:
        emit(
            {
                "digest": str(digest),
                "name": ref.name if ref else None,
                "tag": ref.tag if ref else None,
                "operation": found.operation,
                "content_id": str(found.expected),
                "rebuilt": str(found.found),
                "same": found.same,
                "distance": found.distance,
            }
        )
    elif found.same:
        click.echo(f"{source}  the same: content {found.expected.short}, by {found.operation}")
    else:
        apart = (
            f"|dW - dW'| / |dW| = {found.distance:.3g}"
            if found.distance
            else "the updates are equal, what is saved whole or its settings differ"
        )
        click.echo(f"{source}  not the same: content {found.expected.short}, now {found.found.short}; {apart}")
    return 1 if verify and not found.same else 0
